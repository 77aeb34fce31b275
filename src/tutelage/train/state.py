"""Checkpoints: whole or not there, never half.

    checkpoints/step-000040/   weights, optimizer and random states as safetensors, position.json,
                               manifest.json with a digest of each file, written last
    checkpoints/.new-...       being written; renamed when complete, removed by the next run otherwise

A folder whose files are not what its manifest says is passed over with a message and never loaded. No pickle.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tutelage.errors import TrainError
from tutelage.store import MANIFEST, Json, Progress, Silent, canonical_json, digest_bytes, fault_point, sync_path, write_atomic

POSITION = "position.json"


@dataclass(frozen=True)
class Position:
    """Where a run is. `step` optimizer steps are done, so it is the number of the next; the data need nothing else.

    `best_step` and `best_loss` are None until something was measured; `num_without_gain` counts measurements since. `mixing`
    is the state of an online mixture, None where all steps were planned ahead.
    """

    step: int = 0
    measured_step: int = -1
    best_step: int | None = None
    best_loss: float | None = None
    num_without_gain: int = 0
    is_stopped: bool = False
    real_tokens: int = 0
    train_seconds: float = 0.0
    measure_seconds: float = 0.0
    events_bytes: int = 0
    mixing: dict[str, Json] | None = None


@dataclass(frozen=True)
class Snapshot:
    """Everything that the rest of a run depends on. Tensors by name; `weights` in the optimizer's precision."""

    position: Position
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    random: Mapping[str, Tensor] = field(default_factory=dict)


class Checkpoints:
    """The folder of checkpoints: the last `keep` and the best are kept."""

    def __init__(self, folder: Path, *, keep: int = 3, progress: Progress | None = None) -> None:
        self.folder = folder
        self._keep = keep
        self._progress = progress or Silent()
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".*"):  # of a killed process
            shutil.rmtree(leftover)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, whole or not, in order."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def path(self, step: int) -> Path:
        """`step-000040`."""
        return self.folder / f"step-{step:06d}"

    def save(self, snapshot: Snapshot) -> Path:
        """The new checkpoint's folder, durable; older ones beyond the last `keep` are gone, the best excepted."""
        position = snapshot.position
        new = self.folder / f".new-{position.step:06d}-{os.getpid()}"
        new.mkdir()
        save_tensors(new / "weights.safetensors", snapshot.weights)
        fault_point("checkpoint:write")
        save_tensors(new / "optimizer.safetensors", snapshot.optimizer)
        save_tensors(new / "random.safetensors", snapshot.random)
        write_atomic(new / POSITION, canonical_json(dataclasses.asdict(position)).encode())
        return self._finish(new, position, {path.name: digest_bytes(path) for path in sorted(new.iterdir())})

    def _finish(self, new: Path, position: Position, files: Mapping[str, str]) -> Path:
        """The checkpoint's folder in its place, the manifest written last, and those that are not kept gone."""
        fault_point("checkpoint:manifest")
        write_atomic(new / MANIFEST, canonical_json({"files": files}).encode())
        fault_point("checkpoint:rename")
        final = self.path(position.step)
        if final.exists():
            self._remove(final)
        new.rename(final)
        sync_path(self.folder)
        fault_point("checkpoint:done")
        self._prune(position)
        return final

    def latest(self) -> Snapshot | None:
        """The newest checkpoint that is whole, together with the best one it refers to; None when there is none.

        What is passed over is said, and removed: the steps after it are trained again.
        """
        step = self.newest()
        return None if step is None else self.load(step)

    def newest(self) -> int | None:
        """The step of what `latest` loads."""
        for step in reversed(self.steps()):
            if (fault := self._fault(step)) is None:
                return step
            self._progress.note(f"checkpoint {self.path(step).name} is not used: {fault}; going back to the one before it")
            self._remove(self.path(step))
        return None

    def load(self, step: int) -> Snapshot:
        """The checkpoint of a step. Raises `TrainError` when it is missing or damaged."""
        folder = self.path(step)
        if (fault := damage(folder)) is not None:
            raise TrainError(f"{folder}: {fault}; run again to go back to an older checkpoint")
        return Snapshot(
            Position(**json.loads((folder / POSITION).read_text())),
            load_file(folder / "weights.safetensors"),
            load_file(folder / "optimizer.safetensors"),
            load_file(folder / "random.safetensors"),
        )

    def _fault(self, step: int) -> str | None:
        """Why a run cannot go on from here: itself damaged, or the best checkpoint so far, which it would need at the end."""
        if (fault := damage(self.path(step))) is not None:
            return fault
        best = Position(**json.loads((self.path(step) / POSITION).read_text())).best_step
        if best is None or best == step or (fault := damage(self.path(best))) is None:
            return None
        return f"the best so far, {self.path(best).name}: {fault}"

    def _prune(self, position: Position) -> None:
        last = [step for step in self.steps() if step <= position.step][-self._keep :]
        for step in self.steps():
            if step not in last and step != position.best_step:
                self._remove(self.path(step))

    def _remove(self, folder: Path) -> None:
        """Nothing; the folder is out of sight at once, so that a killed removal leaves no damaged checkpoint behind."""
        doomed = folder.with_name(f".old-{folder.name}-{os.getpid()}")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, None when they are what its manifest says."""
    try:
        files: dict[str, str] = json.loads((folder / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return "its manifest is missing"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return "its manifest is damaged"
    for name, digest in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if digest_bytes(folder / name) != digest:
            return f"{name} is not what was written"
    return None


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of the random generators that training draws from, as bytes."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Nothing; puts the random generators back where `random_state` found them."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Nothing; writes a safetensors file, durable."""
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
