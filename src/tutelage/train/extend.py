"""Where an extension begins: the checkpoint whose weights the run before it handed out.

That is the best one where the recipe keeps the best, so weights, optimizer and random state belong together. With the
optimizer kept and a constant learning rate, an extension is to the bit what one run over both plans would have been; with
any other schedule it is not, since the rate has already fallen once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from tutelage.store import Artefact, Json
    from tutelage.train.optimizer import Optimizer
    from tutelage.train.state import Checkpoints

KeptOrFresh = Literal["kept", "fresh"]
"""What becomes of the optimizer's memory."""


@dataclass(frozen=True)
class Beginning:
    """The finished run that an extension begins from: its folder, the step of its checkpoint, what becomes of the optimizer."""

    folder: Path
    step: int
    optimizer: KeptOrFresh

    @property
    def text(self) -> str:
        """For people."""
        return f"beginning with the weights after step {self.step} of the run before, its optimizer {self.optimizer}"


def begin_from(beginning: Beginning, checkpoints: Checkpoints, optimizer: Optimizer, device: torch.device) -> None:
    """Nothing; weights, random state and, where kept, the optimizer's memory are those of the run before.

    `checkpoints` are the new run's own: they know how tensors are cut between ranks. Raises `TrainError` when the earlier
    checkpoint is damaged or does not fit.
    """
    from tutelage.train.state import set_random_state

    theirs = copy.copy(checkpoints)
    theirs.folder = beginning.folder / "checkpoints"
    snapshot = theirs.load(beginning.step)
    optimizer.restore(dict(snapshot.weights), dict(snapshot.optimizer) if beginning.optimizer == "kept" else None)
    if snapshot.random:
        set_random_state(snapshot.random, device)


def beginning_of(artefacts: Mapping[str, Artefact], optimizer: KeptOrFresh) -> Beginning | None:
    """Where training begins when `artefacts` have an earlier part (`earlier`), else None."""
    if (earlier := artefacts.get("earlier")) is None:
        return None
    return Beginning(earlier.path, int(earlier.facts["final_step"]), optimizer)


def lineage(artefacts: Mapping[str, Artefact], beginning: Beginning | None) -> dict[str, Json]:
    """What the facts of an extension say of the run that it extends; nothing where it is none."""
    if beginning is None:
        return {}
    earlier: dict[str, Any] = dict(artefacts["earlier"].facts)
    before: dict[str, Any] = earlier.get("extends") or {}
    return {
        "extends": {
            "run": artefacts["earlier"].key,
            "step": beginning.step,
            "optimizer": beginning.optimizer,
            "steps_before": int(before.get("steps_before", 0)) + beginning.step,
        }
    }
