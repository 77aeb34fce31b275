"""Order: which example of which task stands at which position of the run, computable for any position alone.

Tasks are interleaved by a Huffman tree over their counts. At a node that holds n positions, a of them for its left child,
the k-th goes left exactly when round(k * a / n) rises: the two children are mixed as evenly as integers allow. So the
number of left positions among the first k is off by at most 1/2, and an error made higher up shrinks by the child's share.

Prefix bound: after any t positions a task with count c of N has been seen t * c / N times, give or take less than 2. (In
a Huffman tree a node is at most half of its grandparent, so the errors sum to 1/2 * (1 + 1) * (1 + 1/2 + 1/4 + ...) < 2.)
It does not depend on the number of tasks.

A scheduled run is a row of stretches, each interleaved by its own tree; a table of the counts before each stretch leads to
any position at once. Inside a stretch the bound holds from its first position; `timetable` bounds what stands before it.

Inside a task, every pass is a fresh permutation, a keyed Feistel network on (seed, task name, pass): no shuffled copy is
kept, and the numbers are ours, so they do not change with a NumPy version.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from tutelage.plan.kernels import feistel, sort_by_code, walk_tree
from tutelage.records import Int32, Int64

UInt64 = NDArray[np.uint64]
_ROUNDS, _NARROW_ROUNDS = 4, 10  # four make a strong pseudo-random permutation (Luby and Rackoff 1988) of a wide range
_NARROW_HALF_BITS = 6  # up to 4,096 records need more: there are few round functions to choose from
_MIN_HALF_BITS = 3  # narrower round functions are too few to reach all orders of a handful equally often
_MAX_TASKS = 1 << 15  # batches hold tasks as int16
_GOLDEN = 0x9E3779B97F4A7C15
_SALTS = np.array([(number + 1) * 0xD1B54A32D192ED03 & 0xFFFFFFFFFFFFFFFF for number in range(_NARROW_ROUNDS)], np.uint64)
_MAX_POSITIONS = 1 << 30  # k * a must stay inside 64 bits
_THREADS = 2
_CHUNK = 1 << 17  # positions worked on at a time: temporaries stay in cache and memory flat


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
class Behind:
    """What earlier parts of a run drew of a task: its draws 0 to `end`, without those in `missed` (ascending).

    >>> Behind(end=5, missed=np.array([1, 3])).onward(np.arange(4)).tolist()
    [1, 3, 5, 6]
    """

    end: int
    missed: Int64

    def onward(self, occurrence: Int64) -> Int64:
        """Which draw of the whole run the draws of this part are: those that were missed first, then those never reached."""
        num = len(self.missed)
        out: Int64 = self.end + occurrence - num
        is_missed = occurrence < num
        out[is_missed] = self.missed[occurrence[is_missed]]
        return out

    @property
    def num_drawn(self) -> int:
        """How many draws there were."""
        return self.end - len(self.missed)


@dataclass(frozen=True)
class Order:
    """The order of a run: `counts` draws of each task from its `sizes` examples; `window` gives any part of it.

    With `stretches`, draws of each task in each stretch of the run, which sum to `counts`, the mixture changes from one to the
    next; passes over a task go on across them.

    >>> order = Order({"a": 4, "b": 2}, sizes={"a": 2, "b": 2}, seed=0)
    >>> [order.tasks[t] for t in order.window(0, 6).task]
    ['a', 'b', 'a', 'a', 'b', 'a']
    >>> [order.tasks[t] for t in order.window(4, 6).task]                  # any stretch, without what precedes it
    ['b', 'a']
    >>> order.window(0, 6).visit.tolist()                                  # a: both once, then both again
    [0, 0, 0, 1, 0, 1]

    >>> staged = Order({"a": 4, "b": 2}, sizes={"a": 2, "b": 2}, stretches=[{"a": 3}, {"a": 1, "b": 2}])
    >>> [staged.tasks[t] for t in staged.window(0, 6).task], staged.window(0, 6).visit.tolist()
    (['a', 'a', 'a', 'b', 'a', 'b'], [0, 0, 1, 0, 1, 0])

    Tasks are known by name: their order, and tasks without a draw, change nothing. `behind` says what earlier parts of the same
    run have drawn; passes go on from there.

    >>> more = Order({"a": 2}, sizes={"a": 2, "b": 2}, behind={"a": Behind(end=3, missed=np.array([], np.int64))})
    >>> more.window(0, 2).visit.tolist()                                   # the other record a second time, then a third pass
    [1, 2]
    """

    counts: Mapping[str, int]
    sizes: Mapping[str, int]
    seed: int = 0
    stretches: Sequence[Mapping[str, int]] = ()
    behind: Mapping[str, Behind] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self._before[-1].tolist() == [self.counts[name] for name in self.tasks], "stretches sum to the counts"
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
    def _before(self) -> Int64:
        """Draws of each task before each stretch, and in all: (stretches + 1, tasks)."""
        stretches = [s for s in self.stretches if any(s.values())] or [self.counts]
        rows = [[0] * len(self.tasks), *([stretch.get(name, 0) for name in self.tasks] for stretch in stretches)]
        before: Int64 = np.cumsum(np.array(rows, np.int64), axis=0)
        return before

    @cached_property
    def _starts(self) -> Int64:
        """The first position of each stretch, and the length of the run."""
        starts: Int64 = self._before.sum(axis=1)
        return starts

    @cached_property
    def _trees(self) -> list[tuple[Tree, Int64]]:
        """The tree of each stretch, and the tasks that its leaves stand for."""
        trees = []
        for counts in np.diff(self._before, axis=0):
            drawn = np.flatnonzero(counts)
            trees.append((huffman_tree(counts[drawn].tolist()), drawn))
        return trees

    def window(self, start: int, stop: int) -> Draws:
        """The draws at positions `start : stop`, at a cost that does not depend on `start`."""
        draws = Draws(np.empty(stop - start, np.int32), np.empty(stop - start, np.int32), np.empty(stop - start, np.int64))

        def draw(a: int) -> None:
            b = min(a + _CHUNK, stop)
            part, here = self._draw(a, b), slice(a - start, b - start)
            draws.task[here], draws.visit[here], draws.index[here] = part.task, part.visit, part.index

        begins = range(start, stop, _CHUNK)
        if len(begins) < 2:
            for a in begins:
                draw(a)
        else:
            with ThreadPoolExecutor(_THREADS, "order") as pool:  # compiled loops need no lock
                list(pool.map(draw, begins))
        return draws

    def _interleave(self, start: int, stop: int) -> tuple[Int32, Int64]:
        """The task at each position, and how many times it came before."""
        task, occurrence = np.empty(stop - start, np.int32), np.empty(stop - start, np.int64)
        first = int(np.searchsorted(self._starts, start, "right")) - 1
        for number in range(first, int(np.searchsorted(self._starts, stop, "left"))):
            begin = int(self._starts[number])
            a, b = max(start, begin), min(stop, int(self._starts[number + 1]))
            tree, drawn = self._trees[number]
            leaf, local = interleave(tree, np.arange(a - begin, b - begin, dtype=np.int64))
            here = slice(a - start, b - start)
            task[here] = drawn[leaf]
            occurrence[here] = local + self._before[number, task[here]]
        return task, occurrence

    def _draw(self, start: int, stop: int) -> Draws:
        task, occurrence = self._interleave(start, stop)
        visit, index = np.empty_like(task), np.empty_like(occurrence)
        by_task, begins = sort_by_code(task, num_codes=len(self.tasks))
        edges = [*begins.tolist(), len(task)]
        for t, name in enumerate(self.tasks):
            where = by_task[edges[t] : edges[t + 1]]
            if len(where):
                nth = self.behind[name].onward(occurrence[where]) if name in self.behind else occurrence[where]
                passes, slot = np.divmod(nth, self.sizes[name])  # rising: occurrences and missed draws are in order
                visit[where] = passes
                keys = pass_keys(self.seed, name, np.arange(passes[0], passes[-1] + 1))[passes - passes[0]]
                index[where] = permute(slot, size=self.sizes[name], keys=keys)
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
    return walk_tree(_as_lines(tree), positions)


def _as_lines(tree: Tree) -> Int64:
    """The nodes as `walk_tree` reads them, the root first."""
    lines: list[tuple[int, int, int, int]] = []

    def add(node: Tree) -> int:
        if isinstance(node, int):
            return ~node
        at = len(lines)
        lines.append((0, 0, 0, 0))
        lines[at] = (add(node.left), add(node.right), node.num_left, node.num)
        return at

    add(tree)
    return np.array(lines, np.int64).reshape(-1, 4)


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
    half = max(((size - 1).bit_length() + 1) // 2, _MIN_HALF_BITS)
    num_rounds = _ROUNDS if half > _NARROW_HALF_BITS else _NARROW_ROUNDS
    return feistel(index, size=size, half=half, salts=_SALTS[:num_rounds], keys=keys)


def _mix(x: UInt64) -> UInt64:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    out = x >> np.uint64(30)
    out ^= x
    for factor, shift in ((0xBF58476D1CE4E5B9, 27), (0x94D049BB133111EB, 31)):
        out *= np.uint64(factor)
        out ^= out >> np.uint64(shift)
    return out
