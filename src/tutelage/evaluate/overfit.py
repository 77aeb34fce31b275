"""Overfitting: training records measured like held-out ones, and how much of what a model writes it has read.

    gap          held-out loss minus the loss on training records, the same rule for targets on both sides
    copy rate    share of the runs of eight tokens in the model's answers that some training answer of the task holds;
                 beside it the same share for what the held-out data answers, which no model has copied

Sums over tokens are made like those of held-out loss: in eval mode, each record alone. Pure: arrays in, arrays out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tutelage.evaluate.held_out import HeldOut
from tutelage.records import Int64, Kind, Rendered, Score, is_written
from tutelage.tables import RenderedSet, Shards

UInt64 = NDArray[np.uint64]
Bool = NDArray[np.bool_]

RUN_LENGTH = 8
"""Tokens of a run: long enough that two answers rarely share one by chance."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_CHUNK_TOKENS = 1 << 21


def run_keys(ids: NDArray[np.integer]) -> UInt64:
    """64 bits for each run of eight ids, one per place where one begins: equal for equal runs wherever they stand.

    >>> keys = run_keys(np.array([5, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8]))
    >>> len(keys), bool(keys[1] == keys[9]), len(set(keys.tolist()))
    (10, True, 9)
    """
    num = max(len(ids) - RUN_LENGTH + 1, 0)
    spread = (ids.astype(np.uint64) + np.uint64(1)) * _FACTOR
    spread ^= spread >> np.uint64(32)
    keys = np.zeros(num, np.uint64)
    for place in range(RUN_LENGTH):
        keys = (keys ^ spread[place : place + num]) * _FACTOR
        keys ^= keys >> np.uint64(29)
    return keys


def begins_run(kinds: NDArray[np.uint8], turns: NDArray[np.int16], examples: NDArray[np.integer]) -> Bool:
    """Whether eight tokens of one answer begin at each place of flat arrays: written by the model, no stop, in one turn.

    >>> kinds = np.full(11, Kind.ASSISTANT, np.uint8)
    >>> begins_run(kinds, np.repeat(np.int16([1, 3]), [9, 2]), np.zeros(11, int)).astype(int).tolist()
    [1, 1, 0, 0]
    """
    num = max(len(kinds) - RUN_LENGTH + 1, 0)
    is_answer = is_written(kinds, turns) & (kinds != Kind.STOP)
    before = np.concatenate([[0], np.cumsum(is_answer)])
    is_new = np.concatenate([[False], (np.diff(turns) != 0) | (np.diff(examples) != 0)])
    answer = np.cumsum(is_new)
    whole: Bool = before[RUN_LENGTH:] - before[:num] == RUN_LENGTH if num else np.zeros(0, bool)
    return whole & (answer[RUN_LENGTH - 1 :] == answer[:num]) if num else whole


def answer_keys(example: Rendered) -> UInt64:
    """The runs of all answers in one example."""
    keys = run_keys(example.ids)
    return keys[begins_run(example.kinds, example.turns, np.zeros(len(example.ids), np.int8))]


@dataclass(frozen=True)
class Planned:
    """The examples that training draws: `index` in the rendered set (`source`, `shard`), of a task, with so many tokens."""

    table: pa.Table
    shards: Shards

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, by name."""
        return tuple(sorted(self.table["task"].unique().to_pylist()))

    @cached_property
    def _labels(self) -> dict[str, NDArray[np.object_]]:
        """Source, shard and task of each example."""
        return {name: np.array(self.table[name].to_pylist(), object) for name in ("source", "shard", "task")}

    @property
    def num_tokens(self) -> int:
        """Tokens of all of them, each example once."""
        return int(self.table["num_tokens"].to_numpy().sum())

    def sample(self, like: HeldOut, *, max_tokens: int | None, seed: int) -> HeldOut:
        """Training examples of each task that `like` has too, at random: as many tokens as there, together `max_tokens` at most.

        So the two losses of all tasks together hold the same mixture; each task has one example at least.
        """
        wanted: dict[str, int] = {}
        for task, example in zip(like.tasks, like.examples, strict=True):
            wanted[task] = wanted.get(task, 0) + len(example.ids)
        scale = 1.0 if max_tokens is None else min(1.0, max_tokens / max(sum(wanted.values()), 1))
        tasks = self._labels["task"]
        lengths = self.table["num_tokens"].to_numpy()
        chosen: list[int] = []
        for task in sorted(wanted.keys() & set(self.tasks)):
            places = np.random.default_rng(_seed(seed, task)).permutation(np.flatnonzero(tasks == task))
            fits = int(np.searchsorted(np.cumsum(lengths[places]), wanted[task] * scale, "right"))
            chosen += places[: max(fits, 1)].tolist()
        lines = self.table.take(pa.array(chosen, pa.int64())).to_pylist()
        examples = tuple(self.shards.example(line["source"], line["shard"], line["index"]) for line in lines)
        return HeldOut(
            tuple(f"{line['source']}#{line['row']}" for line in lines), tuple(line["task"] for line in lines), examples
        )

    def holds(self, wanted: Mapping[str, UInt64]) -> dict[str, Bool]:
        """Which of the wanted runs of each task some training answer of the same task holds."""
        keys = {task: np.unique(values) for task, values in wanted.items()}
        found = {task: np.zeros(len(values), bool) for task, values in keys.items()}
        for task, seen in self._runs(frozenset(task for task, values in keys.items() if len(values))):
            at = np.minimum(np.searchsorted(keys[task], seen), len(keys[task]) - 1)
            found[task][at[keys[task][at] == seen]] = True
        return {task: found[task][np.searchsorted(keys[task], values)] for task, values in wanted.items()}

    def _runs(self, tasks: frozenset[str]) -> Iterator[tuple[str, UInt64]]:
        """(task, runs) of all training answers of these tasks, some at a time."""
        sources, shards, names = self._labels.values()
        index = self.table["index"].to_numpy()
        for source, shard, task in sorted(set(zip(sources.tolist(), shards.tolist(), names.tolist(), strict=True))):
            if task in tasks:
                mine = (sources == source) & (shards == shard) & (names == task)
                for keys in _runs_of(self.shards.set(source, shard), np.unique(index[mine])):
                    yield task, keys


def _runs_of(rendered: RenderedSet, wanted: Int64) -> Iterator[UInt64]:
    """The runs of the answers in these examples, some at a time."""
    lengths = np.diff(rendered.offsets)[wanted]
    pieces = np.split(wanted, np.flatnonzero(np.diff(np.cumsum(lengths) // _CHUNK_TOKENS)) + 1)
    for piece in pieces:
        of_piece = np.diff(rendered.offsets)[piece]
        starts = np.cumsum(of_piece) - of_piece
        tokens = np.arange(of_piece.sum()) + np.repeat(rendered.offsets[piece] - starts, of_piece)
        keys = run_keys(rendered.ids[tokens])
        yield keys[begins_run(rendered.kinds[tokens], rendered.turns[tokens], np.repeat(np.arange(len(piece)), of_piece))]


def copy_scores(metric: str, runs: Iterable[tuple[str, UInt64]], planned: Planned) -> list[Score]:
    """One score per task and one over all (task ""), item "": the share of runs that training answers hold; weight = how many.

    `runs` are (task, runs of one answer). A task without a run has no score.
    """
    wanted: dict[str, list[UInt64]] = {}
    for task, keys in runs:
        wanted.setdefault(task, []).append(keys)
    held = planned.holds({task: np.concatenate(keys) for task, keys in sorted(wanted.items())})
    counts = {task: (int(copied.sum()), len(copied)) for task, copied in held.items() if len(copied)}
    if counts:
        counts[""] = (sum(copied for copied, _ in counts.values()), sum(num for _, num in counts.values()))
    return [Score("", 0, task, "", metric, copied / num, float(num)) for task, (copied, num) in counts.items()]


def reference_runs(held_out: HeldOut) -> list[tuple[str, UInt64]]:
    """(task, runs) of what the held-out data answers."""
    return [(task, answer_keys(example)) for task, example in zip(held_out.tasks, held_out.examples, strict=True)]


def answer_runs(tasks: Sequence[str], answers: Sequence[Sequence[int]]) -> list[tuple[str, UInt64]]:
    """(task, runs) of what a model answered, as ids without the stop."""
    return [(task, run_keys(np.asarray(ids, np.int64))) for task, ids in zip(tasks, answers, strict=True)]


def _seed(seed: int, task: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"overfit\0{seed}\0{task}".encode(), digest_size=8).digest(), "big")
