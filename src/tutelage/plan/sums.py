"""Sums: what examples, their visits and their targets add up to, in as few passes over the columns as can be.

Whole numbers are added as whole numbers; floats in the order in which they stand, so results are those of `np.bincount`.
What goes over all entries of a tally is compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from tutelage.compiled import kernel
from tutelage.plan.tally import NUM_CELLS, Tally
from tutelage.records import Float32, Float64, Int32, Int64


def sum_targets(tally: Tally, *, table: Float32, factors: Float32) -> tuple[Float64, Int64]:
    """Per example (E,): the sum of its target weights (f64) and how many are above 0 (i64).

    A target of a cell weighs float32(float32(`table[cell]` * turn weight) * factor), with one factor, or one per example.

    >>> example, cell, count = np.array([[0, 1, 1], [0, 1, 2], [3, 2, 9]], np.int32)
    >>> tally = Tally(example, cell.astype(np.uint8), np.ones(3, np.float32), count, num_requests=np.ones(2, np.int32))
    >>> table, factors = np.array([1, 0.5, 0], np.float32), np.array([2], np.float32)
    >>> totals, supervised = sum_targets(tally, table=table, factors=factors)
    >>> totals.tolist(), supervised.tolist()
    ([6.0, 2.0], [3, 2])
    """
    totals, supervised = np.zeros(len(tally)), np.zeros(len(tally), np.int64)
    kernel(_sum_targets)(tally.example, tally.cell, tally.turn_weight, tally.count, table, factors, totals, supervised)
    return totals, supervised


def _sum_targets(  # noqa: PLR0913 (numba takes arrays, not records)
    example: Int32,
    cell: np.ndarray,
    turn_weight: Float32,
    count: Int32,
    table: Float32,
    factors: Float32,
    totals: Float64,
    supervised: Int64,
) -> None:
    """Plain loops, for numba."""
    is_one = len(factors) == 1
    for i in range(len(example)):
        at = example[i]
        value = np.float32(table[cell[i]] * turn_weight[i])
        product = np.float32(value * (factors[0] if is_one else factors[at]))
        totals[at] += np.float64(product) * count[i]
        if product > 0:
            supervised[at] += count[i]


def sum_cells(tally: Tally, *, num_visits: Int32, task: Int32, num_tasks: int) -> tuple[Int64, Int64, bool]:
    """Of all visits: targets by task and cell (K, cells), visits with several requests by task (K,), and whether all
    turns weigh 1.

    `num_visits` and `task` have one entry per example of the tally.

    >>> example, cell, count = np.array([[0, 0, 1], [6, 14, 6], [3, 1, 9]], np.int32)
    >>> requests, visits, task = np.array([[2, 1], [2, 0], [0, 0]], np.int32)
    >>> tally = Tally(example, cell.astype(np.uint8), np.ones(3, np.float32), count, num_requests=requests)
    >>> targets, several, is_plain = sum_cells(tally, num_visits=visits, task=task, num_tasks=1)
    >>> targets[0, [6, 14]].tolist(), several.tolist(), is_plain
    ([6, 2], [2], True)
    """
    targets, several = np.zeros((num_tasks, NUM_CELLS), np.int64), np.zeros(num_tasks, np.int64)
    columns = tally.example, tally.cell, tally.turn_weight, tally.count, tally.num_requests
    is_plain = kernel(_sum_cells)(*columns, num_visits, task, targets, several)
    return targets, several, bool(is_plain)


def _sum_cells(  # noqa: PLR0913 (numba takes arrays, not records)
    example: Int32,
    cell: np.ndarray,
    turn_weight: Float32,
    count: Int32,
    num_requests: Int32,
    num_visits: Int32,
    task: Int32,
    targets: Int64,
    several: Int64,
) -> bool:
    """Plain loops, for numba."""
    for at in range(len(num_requests)):
        if num_requests[at] > 1:
            several[task[at]] += num_visits[at]
    is_plain = True
    for i in range(len(example)):
        at = example[i]
        targets[task[at], cell[i]] += np.int64(num_visits[at]) * count[i]
        is_plain &= turn_weight[i] == np.float32(1.0)
    return is_plain


def sum_by_label(code: Int32, columns: Sequence[np.ndarray], *, num_labels: int, times: Int32 | None = None) -> Int64:
    """The sums of columns of whole numbers by label (columns, labels), every entry taken so many `times` (once without).

    >>> sum_by_label(np.array([0, 1, 0]), [np.array([5, 6, 7])], num_labels=2, times=np.array([2, 1, 0])).tolist()
    [[10, 6]]
    """
    out = np.zeros((len(columns), num_labels), np.int64)
    for column, sums in zip(columns, out, strict=True):
        np.add.at(sums, code, column.astype(np.int64, copy=False) if times is None else column * times.astype(np.int64))
    return out


def most_by_label(code: Int32, values: Int32, *, num_labels: int) -> Int64:
    """The largest value of each label, 0 for a label without entries; values are not negative.

    >>> most_by_label(np.array([0, 1, 0]), np.array([5, 6, 7]), num_labels=3).tolist()
    [7, 6, 0]
    """
    most = np.zeros(num_labels, values.dtype)
    np.maximum.at(most, code, values)
    return most.astype(np.int64)


def sum_by_part(edges: Int64, example: Int32, label: Int32, size: np.ndarray, *, num_labels: int) -> Int64:
    """Of each part of a run, the sizes of what lies in it by label (parts, labels).

    Part p holds the draws `edges[p] : edges[p + 1]`; `label` and `size` have one entry per example.

    >>> example, label = np.array([1, 0, 1, 1], np.int32), np.array([0, 1], np.int32)
    >>> sum_by_part(np.array([0, 3, 4]), example, label, np.array([5, 7]), num_labels=2).tolist()
    [[5, 14], [0, 7]]
    """
    out = np.zeros((len(edges) - 1, num_labels), np.int64)
    for sums, (begin, end) in zip(out, pairwise(edges.tolist()), strict=True):
        here = example[begin:end]
        np.add.at(sums, label[here], size[here])
    return out
