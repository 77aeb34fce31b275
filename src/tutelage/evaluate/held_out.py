"""Which held-out records are measured, and which of their tokens count.

A record is taken or left whole (all its examples), so that one record is one draw when intervals are made.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tutelage.errors import PlanError
from tutelage.records import NO_TARGET, Int64, Rendered, is_written
from tutelage.tables import HELD_OUT, Shards, read_table


@dataclass(frozen=True, slots=True)
class Candidate:
    """A held-out record that could be measured: its name, task and size in tokens."""

    item: str
    task: str
    num_tokens: int


@dataclass(frozen=True)
class HeldOut:
    """The examples that are measured, in the order of `held_out.parquet`; `items[i]` and `tasks[i]` belong to `examples[i]`.

    Two examples of one record share an item.
    """

    items: tuple[str, ...]
    tasks: tuple[str, ...]
    examples: tuple[Rendered, ...]

    @classmethod
    def read(cls, path: Path, shards: Shards) -> HeldOut:
        """The examples that a `held_out.parquet` names, taken from the rendered sets."""
        table = read_table(path, HELD_OUT).to_pydict()
        places = zip(table["source"], table["shard"], table["index"], strict=True)
        examples = tuple(shards.example(source, shard, index) for source, shard, index in places)
        return cls(tuple(table["item"]), tuple(table["task"]), examples)

    def __len__(self) -> int:
        return len(self.examples)


def is_learned(example: Rendered) -> NDArray[np.bool_]:
    """Bool [T]: tokens that the model itself must produce, marks included, in a turn that the data does not exclude.

    >>> kinds = np.array([0, 2, 3, 7, 3, 7], np.uint8)                     # scaffold user answer stop answer stop
    >>> turns = np.array([-1, 0, 1, 1, 2, 2], np.int16)
    >>> is_learned(Rendered(np.arange(6, dtype=np.int32), kinds, turns, np.array([1, 0, 2], np.float32))).astype(int)
    array([0, 0, 0, 0, 1, 1])
    """
    is_own = is_written(example.kinds, example.turns)
    has_weight = np.append(example.turn_weights > 0, True)  # turn -1 reads the appended entry: no turn, nothing excluded
    learned: NDArray[np.bool_] = is_own & has_weight[example.turns]
    return learned


def next_targets(example: Rendered) -> tuple[Int64, NDArray[np.bool_]]:
    """(targets int64 [T], counts bool [T]): what position i must predict (token i + 1), and whether that is measured.

    The first token is nobody's target, and the last position predicts nothing:

        ids      5  6  7  8        kinds   user  user  answer  stop
        targets  6  7  8  -100     counts  0     1     1       0

    >>> example = Rendered(np.array([5, 6, 7, 8], np.int32), np.array([2, 2, 3, 7], np.uint8),
    ...                    np.array([0, 0, 1, 1], np.int16), np.ones(2, np.float32))
    >>> [column.tolist() for column in next_targets(example)]
    [[6, 7, 8, -100], [False, True, True, False]]
    """
    targets = np.append(example.ids[1:].astype(np.int64), NO_TARGET)
    counts = np.append(is_learned(example)[1:], False)
    return targets, counts


def num_targets(example: Rendered) -> int:
    """How many tokens of an example are measured."""
    return int(is_learned(example)[1:].sum())


def choose_subset(records: Sequence[Candidate], *, max_tokens: int | None, seed: int) -> list[int]:
    """Positions (ascending) of the records to measure: together at most `max_tokens` tokens, at least one of each task.

    Each task's records stand in an order of their own, by digest of (seed, item), and a front part of it is taken: adding
    a record to the data moves no other. The budget is shared equally over tasks (a small budget should tell something of
    every task): the one with the fewest tokens so far goes next, so what a task without more records leaves goes to the
    others. A task stops at the first record that does not fit: jumping over it would favour short records.

    >>> records = [Candidate(f"{task}{i}", task, 10) for task, n in (("chat", 6), ("maths", 2)) for i in range(n)]
    >>> [records[i].item for i in choose_subset(records, max_tokens=45, seed=0)]
    ['chat4', 'chat5', 'maths0', 'maths1']

    Raises `PlanError`, naming the least budget that would do, when one record of each task is already too much.
    """
    total = sum(record.num_tokens for record in records)
    if max_tokens is None or total <= max_tokens:
        return list(range(len(records)))
    queues = _seeded_queues(records, seed=seed)
    chosen = _one_of_each(records, queues, max_tokens=max_tokens)
    taken = {task: records[i].num_tokens for task, i in chosen.items()}
    subset = list(chosen.values())
    waiting = {task: iter([i for i in queue if i != chosen[task]]) for task, queue in queues.items()}
    while waiting:
        task = min(waiting, key=lambda name: (taken[name], name))
        index = next(waiting[task], None)
        if index is None or sum(taken.values()) + records[index].num_tokens > max_tokens:
            del waiting[task]
            continue
        taken[task] += records[index].num_tokens
        subset.append(index)
    return sorted(subset)


def seeded_order(items: Iterable[str], *, seed: int, purpose: str) -> list[int]:
    """Positions of `items` in an order that depends on each name and the seed alone; equal names keep their order."""
    digests = [
        hashlib.blake2b(f"{purpose}\0{seed}\0{item}".encode(errors="surrogatepass"), digest_size=16).digest() for item in items
    ]
    return sorted(range(len(digests)), key=lambda i: (digests[i], i))


def _seeded_queues(records: Sequence[Candidate], *, seed: int) -> dict[str, list[int]]:
    """The positions of each task's records in their seeded order, tasks by name."""
    queues: dict[str, list[int]] = defaultdict(list)
    for index in seeded_order((record.item for record in records), seed=seed, purpose="subset"):
        queues[records[index].task].append(index)
    return dict(sorted(queues.items()))


def _one_of_each(records: Sequence[Candidate], queues: dict[str, list[int]], *, max_tokens: int) -> dict[str, int]:
    """The first record of each task; where these are too much together, the shortest of as few tasks as will do."""

    def size(index: int) -> int:
        return records[index].num_tokens

    chosen = {task: queue[0] for task, queue in queues.items()}
    shortest = {task: min(queue, key=size) for task, queue in queues.items()}
    by_saving = sorted(queues, key=lambda task: (size(shortest[task]) - size(chosen[task]), task))
    for task in by_saving:
        if sum(map(size, chosen.values())) <= max_tokens:
            break
        chosen[task] = shortest[task]
    needed = sum(map(size, chosen.values()))
    if needed > max_tokens:
        raise PlanError(
            f"evaluate.max_tokens: {max_tokens} tokens cannot hold one held-out record of each of {len(queues)} tasks; "
            f"the least that can is {needed}"
        )
    return chosen
