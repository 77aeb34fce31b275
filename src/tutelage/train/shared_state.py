"""Checkpoints of a run of several processes: one folder, written together, read by any number of processes.

    step-000040/  as ever                                        where each rank has whole weights: the first writes
    step-000040/weights/shard-0000R-..., optimizer/...           where they are cut: each rank writes its pieces
                  random.safetensors                             the random states of every rank: `rank 1/cpu`

The manifest is written last in both, by the first, when all are done. Whatever the layout and the number of ranks that
wrote it, `load` gives each rank what it needs, cut as its weights are.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tutelage.errors import TrainError
from tutelage.store import Progress, canonical_json, digest_bytes, fault_point, write_atomic
from tutelage.train.sharded import cut_like, is_cut, load_pieces, model_of, save_pieces
from tutelage.train.state import POSITION, Checkpoints, Position, Snapshot, damage, save_tensors
from tutelage.world import World

PIECES = ("weights", "optimizer")
OF_EACH_RANK = ("events_bytes", "train_seconds", "measure_seconds")
"""Parts of a position that are no decision, and differ between ranks."""


class SharedCheckpoints(Checkpoints):
    """The folder of checkpoints of a run in `world`. All methods but `steps` and `path` are called by every rank alike.

    `weights` are those that snapshots will hold: they say how tensors are cut. `seed` is the run's.
    """

    def __init__(
        self, folder: Path, world: World, weights: Mapping[str, Tensor], *, seed: int, keep: int = 3, progress: Progress
    ) -> None:
        self._world, self._weights, self._seed = world, weights, seed
        if world.is_first:
            super().__init__(folder, keep=keep, progress=progress)
        world.barrier()
        if not world.is_first:
            self.folder, self._keep, self._progress = folder, keep, progress
        _require_shared(folder, world)

    def save(self, snapshot: Snapshot) -> Path:
        """The new checkpoint's folder, durable. Raises `TrainError` when the ranks are not at the same point of the run."""
        decided = {k: v for k, v in dataclasses.asdict(snapshot.position).items() if k not in OF_EACH_RANK}
        self._world.require_same("the position", hashlib.blake2b(canonical_json(decided).encode(), digest_size=8).hexdigest())
        snapshot = dataclasses.replace(snapshot, random=_of_all(snapshot.random, self._world))
        return self._save_pieces(snapshot) if is_cut(self._weights) else self._save_whole(snapshot)

    def latest(self) -> Snapshot | None:
        """The newest checkpoint that is whole, as the first rank finds it; None when there is none."""
        step = self._world.first(self.newest() if self._world.is_first else None)
        return None if step is None else self.load(step)

    def load(self, step: int) -> Snapshot:
        """The checkpoint of a step, cut for this rank. Raises `TrainError` when it is missing or damaged."""
        folder = self.path(step)
        if (fault := self._world.first(damage(folder) if self._world.is_first else None)) is not None:
            raise TrainError(f"{folder}: {fault}; run again to go back to an older checkpoint")
        snapshot = read_checkpoint(folder, self._weights)
        return dataclasses.replace(snapshot, random=_own(snapshot.random, self._world, seed=self._seed, step=step))

    def _save_whole(self, snapshot: Snapshot) -> Path:
        if self._world.is_first:
            super().save(snapshot)
        self._world.barrier()
        return self.path(snapshot.position.step)

    def _save_pieces(self, snapshot: Snapshot) -> Path:
        world, position = self._world, snapshot.position
        new = self.folder / world.first(f".new-{position.step:06d}-{os.getpid()}")
        if world.is_first:
            for name in PIECES:
                (new / name).mkdir(parents=True)
        world.barrier()
        save_pieces(new / "weights", snapshot.weights)
        fault_point("checkpoint:write")
        save_pieces(new / "optimizer", snapshot.optimizer)
        if world.is_first:
            save_tensors(new / "random.safetensors", snapshot.random)
            write_atomic(new / POSITION, canonical_json(dataclasses.asdict(position)).encode())
        world.barrier()
        mine = sorted(path for path in new.rglob("*") if path.is_file())[world.rank :: world.size]
        digests = world.gather({str(path.relative_to(new)): digest_bytes(path) for path in mine})
        if world.is_first:
            self._finish(new, position, {name: digest for part in digests for name, digest in part.items()})
        world.barrier()
        return self.path(position.step)


def read_checkpoint(folder: Path, like: Mapping[str, Tensor]) -> Snapshot:
    """A checkpoint in either layout, its tensors cut as the weights in `like` are; the random states of all ranks."""
    parts = {}
    for name in PIECES:
        if (folder / name).is_dir():
            parts[name] = load_pieces(folder / name, like)
        else:
            whole = load_file(folder / f"{name}.safetensors")
            parts[name] = {key: cut_like(value, model_of(key, like)) for key, value in whole.items()}
    position = Position(**json.loads((folder / POSITION).read_text()))
    return Snapshot(position, parts["weights"], parts["optimizer"], load_file(folder / "random.safetensors"))


def rank_seed(seed: int, *, rank: int, step: int = 0) -> int:
    """The seed of a rank's dropout: the run's own on the first, others that have nothing in common elsewhere.

    >>> rank_seed(7, rank=0), rank_seed(7, rank=1) == rank_seed(7, rank=2)
    (7, False)
    """
    if rank == 0 and step == 0:
        return seed
    return int(np.random.SeedSequence([seed, rank, step]).generate_state(1, np.uint64)[0] >> 1)


def _require_shared(folder: Path, world: World) -> None:
    """Nothing; raises `TrainError` on every rank when some do not see what the first writes into the folder."""
    if world.is_alone:
        return
    path = folder.parent / f".seen-{world.first(os.getpid())}"
    if world.is_first:
        for leftover in folder.parent.glob(".seen-*"):
            leftover.unlink()
        path.write_text("")
    world.barrier()
    blind = [rank for rank, is_seen in enumerate(world.gather(path.exists())) if not is_seen]
    if world.is_first:
        path.unlink()
    if blind:
        raise TrainError(
            f"{folder}: ranks {', '.join(map(str, blind))} do not see what rank 0 writes there; the store must be one folder "
            "shared by all machines (`--store`), since checkpoints are read from it by every rank"
        )


def _of_all(states: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """The random states of all ranks: `cpu` is the first's, `rank 1/cpu` the second's."""
    mine = {name: base64.b64encode(bytes(state.numpy())).decode() for name, state in states.items()}
    return {
        name if rank == 0 else f"rank {rank}/{name}": torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        for rank, theirs in enumerate(world.gather(mine))
        for name, text in theirs.items()
    }


def _own(states: Mapping[str, Tensor], world: World, *, seed: int, step: int) -> dict[str, Tensor]:
    """This rank's random states; a rank that was not there before draws from its own seed and the step."""
    prefix = "" if world.rank == 0 else f"rank {world.rank}/"
    mine = {
        name.removeprefix(prefix): s for name, s in states.items() if name.startswith(prefix) and "/" not in name[len(prefix) :]
    }
    if "cpu" not in mine:
        generator = torch.Generator().manual_seed(rank_seed(seed, rank=world.rank, step=step))
        mine["cpu"] = generator.get_state()
        if torch.cuda.is_available():
            mine["cuda"] = torch.Generator("cuda").manual_seed(generator.initial_seed()).get_state()
    return mine
