"""Kernels: the inner loops of `order` and `assemble`, compiled. The same numbers as plain NumPy, without its temporaries.

Whole numbers throughout, so results are equal on every machine. Compiled on first use, and kept on disk where a folder for
it can be written.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tutelage.compiled import kernel
from tutelage.records import Int32, Int64

UInt64 = NDArray[np.uint64]


def walk_tree(nodes: Int64, positions: Int64) -> tuple[Int32, Int64]:
    """The leaf at each position (P,) of a tree, and how many times that leaf came before.

    A node is a line (left child, right child, places of the left child, places): children are lines, or ~leaf. The first
    line is the root; a tree without lines is leaf 0 alone.

    >>> leaf, occurrence = walk_tree(np.array([[~0, ~1, 2, 6]]), np.arange(6))          # 2 of the first, 4 of the second
    >>> leaf.tolist(), occurrence.tolist()
    ([1, 0, 1, 1, 0, 1], [0, 0, 1, 2, 1, 3])
    """
    leaf, occurrence = kernel(_walk)(np.asarray(nodes, np.int64).reshape(-1, 4), np.asarray(positions, np.int64))
    return leaf, occurrence


def feistel(index: Int64, *, size: int, half: int, salts: UInt64, keys: UInt64) -> Int64:
    """Where each index (P,) in [0, size) goes under the Feistel network of its key: one round per salt, `half` bits a side.

    What lands outside walks on until it is inside. One step of the round function is splitmix64's finaliser.

    >>> feistel(np.arange(5), size=5, half=3, salts=np.arange(1, 5, dtype=np.uint64), keys=np.zeros(5, np.uint64)).tolist()
    [2, 3, 0, 1, 4]
    """
    out: Int64 = kernel(_feistel)(np.asarray(index, np.int64), np.uint64(size), np.uint64(half), salts, keys)
    return out


def _walk(nodes: Int64, positions: Int64) -> tuple[Int32, Int64]:
    """Plain loops, for numba."""
    leaves, occurrences = np.empty(len(positions), np.int32), np.empty(len(positions), np.int64)
    root = 0 if len(nodes) else ~0
    for i in range(len(positions)):
        local, node = positions[i], root
        while node >= 0:
            left, right, num_left, num = nodes[node]
            # floor((2 k a + n) / 2 n) is k a / n rounded; it rises after k exactly when the remainder leaves room for 2 a.
            scaled = local * (2 * num_left) + num
            before = scaled // (2 * num)
            if scaled - before * (2 * num) >= 2 * (num - num_left):
                local, node = before, left
            else:
                local, node = local - before, right
        leaves[i], occurrences[i] = ~node, local
    return leaves, occurrences


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _31, _ONE = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(1)


def _feistel(index: Int64, size: np.uint64, half: np.uint64, salts: UInt64, keys: UInt64) -> Int64:
    """Plain loops, for numba, all in unsigned 64 bits that wrap."""
    out = np.empty(len(index), np.int64)
    low = (_ONE << half) - _ONE
    for i in range(len(index)):
        value, key = np.uint64(index[i]), keys[i]
        while True:
            left, right = value >> half, value & low
            for salt in salts:
                mixed = (right * _GOLDEN + salt) ^ key
                mixed ^= mixed >> _30
                mixed *= _FIRST
                mixed ^= mixed >> _27
                mixed *= _SECOND
                mixed ^= mixed >> _31
                left, right = right, (mixed & low) ^ left
            value = (left << half) | right
            if value < size:
                break
        out[i] = np.int64(value)
    return out


def sort_by_place(row: Int64, start: Int32, *, num_rows: int) -> Int32:
    """The positions of documents (D,) by row and, in a row, by start. No two of a row start at the same place.

    >>> sort_by_place(np.array([1, 0, 1]), np.array([4, 0, 0], np.int32), num_rows=2).tolist()
    [1, 2, 0]
    """
    out: Int32 = kernel(_sort_by_place)(row, start, num_rows)
    return out


def _sort_by_place(row: Int64, start: Int32, num_rows: int) -> Int32:
    """Plain loops, for numba: a counting sort by row, then Shell's sort of each row, which is mostly a handful."""
    end = np.zeros(num_rows + 1, np.int64)
    for i in range(len(row)):
        end[row[i] + 1] += 1
    for r in range(num_rows):
        end[r + 1] += end[r]
    out = np.empty(len(row), np.int32)
    for i in range(len(row)):  # turns the begin of each row into its end
        r = row[i]
        out[end[r]] = i
        end[r] += 1
    first = 0
    for r in range(num_rows):
        gap = 1
        while 3 * gap + 1 < end[r] - first:
            gap = 3 * gap + 1
        while gap > 0:
            for at in range(first + gap, end[r]):
                item, to = out[at], at
                while to - gap >= first and start[out[to - gap]] > start[item]:
                    out[to] = out[to - gap]
                    to -= gap
                out[to] = item
            gap //= 3
        first = end[r]
    return out


def sort_by_code(code: Int32, *, num_codes: int) -> tuple[Int32, Int64]:
    """The positions sorted by code, equal codes in their order, and where those of each code begin.

    >>> positions, begins = sort_by_code(np.array([1, 0, 1, 3], np.int32), num_codes=4)
    >>> positions.tolist(), begins.tolist()
    ([1, 0, 2, 3], [0, 1, 3, 3])
    """
    positions, begins = kernel(_sort_by_code)(code, num_codes)
    return positions, begins


def _sort_by_code(code: Int32, num_codes: int) -> tuple[Int32, Int64]:
    """Plain loops, for numba."""
    begins, place = np.zeros(num_codes, np.int64), np.zeros(num_codes, np.int64)
    for i in range(len(code)):
        begins[code[i]] += 1
    total = 0
    for c in range(num_codes):
        num = begins[c]
        begins[c] = place[c] = total
        total += num
    positions = np.empty(len(code), np.int32)
    for i in range(len(code)):
        positions[place[code[i]]] = i
        place[code[i]] += 1
    return positions, begins
