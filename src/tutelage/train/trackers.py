"""TensorBoard and W&B behind one small protocol. Both work without a network; steps.parquet stays the truth."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from tutelage.errors import MissingExtra

TrackerName = Literal["tensorboard", "wandb"]


class Tracker(Protocol):
    """Somewhere that curves are drawn."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing; one point per curve."""

    def close(self) -> None:
        """Nothing; everything is written."""


class TensorBoard:
    """Event files under `folder`; `tensorboard --logdir FOLDER` shows them. Points from `next_step` on are replaced."""

    def __init__(self, folder: Path, next_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtra("tensorboard", "trackers") from error
        # `purge_step` hides points of a lost try; on a first run it would only add an empty record.
        self._writer: Any = SummaryWriter(str(folder), purge_step=next_step or None)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing; one point per curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Nothing; everything is written."""
        self._writer.close()


class WeightsAndBiases:
    """A W&B run of this name; offline (and to be sent with `wandb sync`) unless an API key or WANDB_MODE is set."""

    def __init__(self, folder: Path, *, run: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtra("wandb", "trackers") from error
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self._run: Any = wandb.init(project="tutelage", dir=str(folder), id=run, resume="allow", mode=mode)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing; one point per curve."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Nothing; everything is written."""
        self._run.finish()


def open_trackers(names: tuple[TrackerName, ...], folder: Path, *, run: str, next_step: int = 0) -> list[Tracker]:
    """The named trackers, writing under `folder`. Raises `MissingExtra` for one whose package is not installed."""
    made: list[Tracker] = []
    for name in names:
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        match name:
            case "tensorboard":
                made.append(TensorBoard(place, next_step))
            case "wandb":
                made.append(WeightsAndBiases(place, run=run))
    return made
