"""Order: which example of which task stands at which position of the run, computable for any position alone.

Tasks are interleaved by a Huffman tree over their counts. At a node that holds n positions, a of them for its left child,
the k-th goes left exactly when round(k * a / n) rises: the two children are mixed as evenly as integers allow. So the
number of left positions among the first k is off by at most 1/2, and an error made higher up shrinks by the child's share.

Prefix bound: after any t positions a task with count c of N has been seen t * c / N times, give or take less than 2. (In
a Huffman tree a node is at most half of its grandparent, so the errors sum to 1/2 * (1 + 1) * (1 + 1/2 + 1/4 + ...) < 2.)
It does not depend on the number of tasks.

Inside a task, every pass is a fresh permutation, a keyed Feistel network on (seed, task name, pass): no shuffled copy is
kept, and the numbers are ours, so they do not change with a NumPy version.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tutelage.records import Int32, Int64

UInt64 = NDArray[np.uint64]
_ROUNDS, _NARROW_ROUNDS = 4, 10  # four make a strong pseudo-random permutation (Luby and Rackoff 1988) of a wide range
_NARROW_HALF_BITS = 6  # up to 4,096 records need more: there are few round functions to choose from
_MIN_HALF_BITS = 3  # narrower round functions are too few to reach all orders of a handful equally often
_MAX_TASKS = 1 << 15  # batches hold tasks as int16
_GOLDEN = 0x9E3779B97F4A7C15
_MAX_POSITIONS = 1 << 30  # k * a must stay inside 64 bits
_CHUNK = 1 << 18  # positions worked on at a time: temporaries stay in cache and memory flat


@dataclass(frozen=True, slots=True)
class Node:
    """Two subtrees that share `num` positions, `num_left` of them on the left."""

    left: int | Node
    right: int | Node
    num_left: int
    num: int


Tree: TypeAlias = int | Node


@dataclass(frozen=True, slots=True)
class Draws:
    """What stands at a run of positions: `task` (index into `Order.tasks`), `visit` (pass, from 0), `index` in the task."""

    task: Int32
    visit: Int32
    index: Int64


@dataclass(frozen=True)
class Order:
    """The order of a run: `counts` draws of each task from its `sizes` examples; `window` gives any stretch of it.

    >>> order = Order({"a": 4, "b": 2}, sizes={"a": 2, "b": 2}, seed=0)
    >>> [order.tasks[t] for t in order.window(0, 6).task]
    ['a', 'b', 'a', 'a', 'b', 'a']
    >>> [order.tasks[t] for t in order.window(4, 6).task]                  # any stretch, without what precedes it
    ['b', 'a']
    >>> order.window(0, 6).visit.tolist()                                  # a: both once, then both again
    [0, 0, 0, 1, 0, 1]

    Tasks are known by name: their order, and tasks without a draw, change nothing.
    """

    counts: Mapping[str, int]
    sizes: Mapping[str, int]
    seed: int = 0

    def __post_init__(self) -> None:
        assert all(self.sizes[name] > 0 for name in self.tasks), "a task that is drawn has examples"
        assert len(self.tasks) < _MAX_TASKS, f"{len(self.tasks):,} tasks; at most {_MAX_TASKS:,}"
        assert len(self) <= _MAX_POSITIONS, f"{len(self):,} positions; at most {_MAX_POSITIONS:,}"

    def __len__(self) -> int:
        return sum(self.counts.values())

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that are drawn, by name."""
        return tuple(sorted(name for name, count in self.counts.items() if count > 0))

    @cached_property
    def _tree(self) -> Tree:
        return huffman_tree([self.counts[name] for name in self.tasks])

    def window(self, start: int, stop: int) -> Draws:
        """The draws at positions `start : stop`, at a cost that does not depend on `start`."""
        draws = Draws(np.empty(stop - start, np.int32), np.empty(stop - start, np.int32), np.empty(stop - start, np.int64))
        for a in range(start, stop, _CHUNK):
            b = min(a + _CHUNK, stop)
            part, here = self._draw(np.arange(a, b, dtype=np.int64)), slice(a - start, b - start)
            draws.task[here], draws.visit[here], draws.index[here] = part.task, part.visit, part.index
        return draws

    def _draw(self, positions: Int64) -> Draws:
        task, occurrence = interleave(self._tree, positions)
        visit, index = np.empty_like(task), np.empty_like(occurrence)
        by_task = np.argsort(task.astype(np.int16), kind="stable")  # 16 bits: NumPy sorts them by radix
        edges = np.searchsorted(task[by_task], np.arange(len(self.tasks) + 1))
        for t, name in enumerate(self.tasks):
            where = by_task[edges[t] : edges[t + 1]]
            if len(where):
                passes, slot = np.divmod(occurrence[where], self.sizes[name])
                visit[where] = passes
                index[where] = permute(slot, size=self.sizes[name], keys=pass_keys(self.seed, name, passes))
        return Draws(task, visit, index)


def huffman_tree(counts: list[int]) -> Tree:
    """The tree that joins the two smallest again and again, ties by the first task in it: leaves are positions in `counts`."""
    heap: list[tuple[int, int, Tree]] = [(count, leaf, leaf) for leaf, count in enumerate(counts)]
    heapq.heapify(heap)
    while len(heap) > 1:
        small, first_small, left = heapq.heappop(heap)
        large, first_large, right = heapq.heappop(heap)
        heapq.heappush(heap, (small + large, min(first_small, first_large), Node(left, right, small, small + large)))
    return heap[0][2] if heap else 0


def interleave(tree: Tree, positions: Int64) -> tuple[Int32, Int64]:
    """The leaf at each position, and how many times that leaf came before.

    >>> task, occurrence = interleave(huffman_tree([2, 4]), np.arange(6))
    >>> task.tolist(), occurrence.tolist()
    ([1, 0, 1, 1, 0, 1], [0, 0, 1, 2, 1, 3])
    """
    task, occurrence = np.empty(len(positions), np.int32), np.empty(len(positions), np.int64)
    pending: list[tuple[Tree, Int64 | None, Int64]] = [(tree, None, positions)]
    while pending:
        node, where, local = pending.pop()
        if isinstance(node, int):
            _store(task, occurrence, where, leaf=node, local=local)
            continue
        # floor((2 k a + n) / 2 n) is k a / n rounded; it rises after k exactly when the remainder leaves room for 2 a.
        before, rest = np.divmod(local * (2 * node.num_left) + node.num, 2 * node.num)
        is_left = rest >= 2 * (node.num - node.num_left)
        left, right = np.flatnonzero(is_left), np.flatnonzero(~is_left)
        pending.append((node.left, left if where is None else where[left], before[left]))
        pending.append((node.right, right if where is None else where[right], (local - before)[right]))
    return task, occurrence


def _store(task: Int32, occurrence: Int64, where: Int64 | None, *, leaf: int, local: Int64) -> None:
    task[slice(None) if where is None else where] = leaf
    occurrence[slice(None) if where is None else where] = local


def name_key(seed: int, name: str) -> int:
    """64 bits that stand for (seed, name)."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest(), "little")


def pass_keys(seed: int, name: str, passes: Int64) -> UInt64:
    """64 bits for each (seed, name, pass)."""
    return _mix(np.uint64(name_key(seed, name)) + (passes.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN))


def permute(index: Int64, *, size: int, keys: UInt64) -> Int64:
    """Where each index in [0, size) goes under the permutation of its key, one by one and without a table.

    >>> permute(np.arange(5), size=5, keys=pass_keys(0, "maths", np.zeros(5, np.int64))).tolist()
    [2, 3, 1, 0, 4]

    A balanced Feistel network on the next even power of two, 64 at least; what lands outside walks on until it is
    inside (at most four steps on average from 16 records up), which keeps it a bijection.
    """
    if size == 1:
        return np.zeros_like(index)
    half = max(((size - 1).bit_length() + 1) // 2, _MIN_HALF_BITS)
    value = _feistel(index.astype(np.uint64), half=half, keys=keys)
    outside = np.flatnonzero(value >= size)
    while len(outside):
        moved = _feistel(value[outside], half=half, keys=keys[outside])
        value[outside] = moved
        outside = outside[moved >= size]
    return value.astype(np.int64)


def _feistel(value: UInt64, *, half: int, keys: UInt64) -> UInt64:
    shift, low = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = value >> shift, value & low
    for round_number in range(_ROUNDS if half > _NARROW_HALF_BITS else _NARROW_ROUNDS):
        salt = np.uint64((round_number + 1) * 0xD1B54A32D192ED03 & 0xFFFFFFFFFFFFFFFF)
        mixed = right * np.uint64(_GOLDEN)
        mixed += salt
        mixed ^= keys
        mixed = _mix(mixed)
        mixed &= low
        mixed ^= left
        left, right = right, mixed
    return (left << shift) | right


def _mix(x: UInt64) -> UInt64:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    out = x >> np.uint64(30)
    out ^= x
    for factor, shift in ((0xBF58476D1CE4E5B9, 27), (0x94D049BB133111EB, 31)):
        out *= np.uint64(factor)
        out ^= out >> np.uint64(shift)
    return out
