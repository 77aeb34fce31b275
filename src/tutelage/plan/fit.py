"""Fit: best-fit-decreasing packing of documents into rows. A document is never split.

The next longest document goes into the fullest row that still has room for it, else into a new one. Open rows are kept in
one stack per free length; a bit per non-empty stack finds the fullest fitting row in a step or two, so a million documents
take a fraction of a second and the result is that of the textbook algorithm, not an approximation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from tutelage.errors import PlanError
from tutelage.records import Int32


@dataclass(frozen=True)
class Packing:
    """Where each document lies: `rows` i32 and `starts` i32 (num_documents,), and how many rows there are."""

    rows: Int32
    starts: Int32
    num_rows: int


def pack_lengths(lengths: Sequence[int] | np.ndarray, *, capacity: int) -> Packing:
    """The row and the start in it of every document, packed best-fit-decreasing into rows of `capacity` slots.

    >>> packing = pack_lengths([3, 5, 2, 6], capacity=8)            # 6 + 2 and 5 + 3
    >>> packing.rows.tolist(), packing.starts.tolist(), packing.num_rows
    ([1, 1, 0, 0], [5, 0, 6, 0], 2)

    Equal lengths keep their order, so equal inputs give equal packings. At most 11/9 of the fewest rows possible, plus one
    (Johnson 1973); on real length distributions within half a percent. PlanError for a document longer than a row, or empty.
    """
    sizes = np.asarray(lengths, np.int32)
    if len(sizes) == 0:
        return Packing(np.zeros(0, np.int32), np.zeros(0, np.int32), 0)
    if sizes.min() < 1 or sizes.max() > capacity:
        worst = int(np.flatnonzero((sizes < 1) | (sizes > capacity))[0])
        raise PlanError(f"document {worst} has {sizes[worst]} tokens; a row takes 1 to {capacity}, and none is ever split")
    # Lengths that fit 16 bits are sorted by radix, four times as fast.
    longest_first = np.argsort((-sizes).astype(np.int16) if capacity < 1 << 15 else -sizes, kind="stable")
    rows, starts, num_rows = _compiled()(sizes[longest_first], capacity)
    packing = Packing(np.empty_like(sizes), np.empty_like(sizes), int(num_rows))
    packing.rows[longest_first], packing.starts[longest_first] = rows, starts
    return packing


@cache
def _compiled() -> Callable[[Int32, int], tuple[Int32, Int32, int]]:
    """`_best_fit` compiled on first use, and kept on disk where a folder for it can be written."""
    import numba

    try:
        kernel: Any = numba.njit(cache=True)(_best_fit)
    except RuntimeError:  # no folder that can be written: compile in every process, a second each
        kernel = numba.njit(_best_fit)
    return kernel  # type: ignore[no-any-return]


def _best_fit(lengths: Int32, capacity: int) -> tuple[Int32, Int32, int]:
    """Rows and starts of documents given longest first. Plain loops, for numba."""
    num = len(lengths)
    rows, starts = np.empty(num, np.int32), np.empty(num, np.int32)
    below = np.empty(num, np.int32)  # the row under each row in its stack
    top = np.full(capacity + 1, -1, np.int32)  # the stack of rows with so many free slots
    bits = np.zeros(capacity // 32 + 1, np.int64)  # bit f % 32 of word f // 32: stack f is not empty
    num_rows = 0
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
        if free > 0:
            below[row] = top[free]
            top[free] = row
            bits[free >> 5] |= 1 << (free & 31)
    return rows, starts, num_rows
