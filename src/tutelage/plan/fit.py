"""Fit: best-fit-decreasing packing of documents into rows. A document is never split.

The next longest document goes into the fullest row that still has room for it, else into a new one. Open rows are kept in
one stack per free length; a bit per non-empty stack finds the fullest fitting row in a step or two, so a million documents
take a fraction of a second and the result is that of the textbook algorithm, not an approximation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tutelage.compiled import kernel
from tutelage.errors import PlanError
from tutelage.records import Int32


@dataclass(frozen=True)
class Begun:
    """Rows so far, oldest first: `free` slots and number of documents `held` of each, i32 (num_rows,)."""

    free: Int32
    held: Int32

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return len(self.free)


NO_ROWS = Begun(np.zeros(0, np.int32), np.zeros(0, np.int32))


@dataclass(frozen=True)
class Packing(Begun):
    """Where each document lies, `rows` and `starts`, i32 (num_documents,); and the rows that came of it."""

    rows: Int32
    starts: Int32


def pack_lengths(lengths: Sequence[int] | np.ndarray, *, capacity: int, max_documents: int | None = None) -> Packing:
    """The row and the start in it of every document, packed best-fit-decreasing into rows of `capacity` slots.

    >>> packing = pack_lengths([3, 5, 2, 6], capacity=8)            # 6 + 2 and 5 + 3
    >>> packing.rows.tolist(), packing.starts.tolist(), packing.num_rows
    ([1, 1, 0, 0], [5, 0, 6, 0], 2)
    >>> pack_lengths([2, 2, 2, 2], capacity=8, max_documents=2).rows.tolist()
    [0, 0, 1, 1]

    Equal lengths keep their order, so equal inputs give equal packings. At most 11/9 of the fewest rows possible, plus one
    (Johnson 1973), as long as no row is closed by `max_documents`; on real length distributions within half a percent.
    PlanError for a document longer than a row, or empty.
    """
    return pack_onto(NO_ROWS, lengths, capacity=capacity, max_documents=max_documents)


def pack_onto(begun: Begun, lengths: Sequence[int] | np.ndarray, *, capacity: int, max_documents: int | None = None) -> Packing:
    """The packing of further documents, into rows that were begun before and new ones. The begun rows come first.

    >>> begun = Begun(free=np.array([1, 3], np.int32), held=np.array([2, 1], np.int32))
    >>> packing = pack_onto(begun, [3, 4, 1], capacity=8)           # 3 and 1 fill what was left, 4 begins a row
    >>> packing.rows.tolist(), packing.starts.tolist(), packing.free.tolist(), packing.held.tolist()
    ([1, 2, 0], [5, 0, 7], [0, 0, 4], [3, 2, 1])

    Two rows that are not closed hold more than `capacity` together: nothing begins a row that has room in an older one. So
    n tokens leave fewer than 2 * n / capacity + 1 of them.
    """
    sizes = np.asarray(lengths, np.int32)
    if len(sizes) and (sizes.min() < 1 or sizes.max() > capacity):
        worst = int(np.flatnonzero((sizes < 1) | (sizes > capacity))[0])
        raise PlanError(f"document {worst} has {sizes[worst]} tokens; a row takes 1 to {capacity}, and none is ever split")
    # Lengths that fit 16 bits are sorted by radix, four times as fast.
    longest_first = np.argsort((-sizes).astype(np.int16) if capacity < 1 << 15 else -sizes, kind="stable")
    most = capacity if max_documents is None else max_documents
    rows, starts, free, held = kernel(_best_fit)(sizes[longest_first], capacity, most, begun.free, begun.held)
    packing = Packing(free, held, np.empty_like(sizes), np.empty_like(sizes))
    packing.rows[longest_first], packing.starts[longest_first] = rows, starts
    return packing


def _best_fit(
    lengths: Int32, capacity: int, max_documents: int, begun_free: Int32, begun_held: Int32
) -> tuple[Int32, Int32, Int32, Int32]:
    """Row and start of documents given longest first; free slots and documents of every row. Plain loops, for numba."""
    num, num_rows = len(lengths), len(begun_free)
    rows, starts = np.empty(num, np.int32), np.empty(num, np.int32)
    left, held = np.empty(num + num_rows, np.int32), np.zeros(num + num_rows, np.int32)
    below = np.empty(num + num_rows, np.int32)  # the row under each row in its stack
    top = np.full(capacity + 1, -1, np.int32)  # the stack of rows with so many free slots
    bits = np.zeros(capacity // 32 + 1, np.int64)  # bit f % 32 of word f // 32: stack f is not empty
    for row in range(num_rows - 1, -1, -1):  # the oldest on top
        free, left[row], held[row] = int(begun_free[row]), begun_free[row], begun_held[row]
        if free > 0 and held[row] < max_documents:
            below[row], top[free] = top[free], row
            bits[free >> 5] |= 1 << (free & 31)
    for i in range(num):
        length = int(lengths[i])
        word = length >> 5
        found = int(bits[word]) & (0xFFFFFFFF << (length & 31))
        while found == 0 and word + 1 < len(bits):
            word += 1
            found = int(bits[word])
        if found == 0:
            row, free = num_rows, capacity
            num_rows += 1
        else:
            free = word * 32
            while found & 1 == 0:
                if found & 0xFF == 0:
                    found >>= 8
                    free += 8
                else:
                    found >>= 1
                    free += 1
            row = top[free]
            top[free] = below[row]
            if top[free] == -1:
                bits[free >> 5] &= ~(1 << (free & 31))
        rows[i], starts[i] = row, capacity - free
        free -= length
        left[row] = free
        held[row] += 1
        if free > 0 and held[row] < max_documents:
            below[row], top[free] = top[free], row
            bits[free >> 5] |= 1 << (free & 31)
    return rows, starts, left[:num_rows].copy(), held[:num_rows].copy()
