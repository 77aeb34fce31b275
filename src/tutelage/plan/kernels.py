"""Kernels: the two inner loops of `order`, compiled. The same numbers as plain NumPy, without its temporaries.

Whole numbers throughout, so results are equal on every machine. Compiled on first use, and kept on disk where a folder for
it can be written.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tutelage.compiled import kernel
from tutelage.records import Float32, Float64, Int32, Int64

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


def sum_targets(example: Int32, value: Float32, count: Int32, *, factors: Float32, num: int) -> tuple[Float64, Int64]:
    """Per example: the sum of its target weights (f64) and how many are above 0 (i64), in one pass.

    `count[i]` targets of example `example[i]` weigh float32(`value[i]` * factor); `factors` has one factor, or one per example.

    >>> entries = np.array([0, 1, 1], np.int32), np.array([1, 0.5, 0], np.float32), np.array([3, 2, 9], np.int32)
    >>> totals, supervised = sum_targets(*entries, factors=np.array([2], np.float32), num=2)
    >>> totals.tolist(), supervised.tolist()
    ([6.0, 2.0], [3, 2])
    """
    totals, supervised = np.zeros(num), np.zeros(num, np.int64)
    kernel(_sum_targets)(example, value, count, factors, totals, supervised)
    return totals, supervised


def _sum_targets(example: Int32, value: Float32, count: Int32, factors: Float32, totals: Float64, supervised: Int64) -> None:
    """Plain loops, for numba."""
    is_one = len(factors) == 1
    for i in range(len(example)):
        at = example[i]
        product = np.float32(value[i] * (factors[0] if is_one else factors[at]))
        totals[at] += np.float64(product) * count[i]
        if product > 0:
            supervised[at] += count[i]
