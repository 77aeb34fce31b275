r"""Timetable: a mixture that changes, as integers: how many examples of each task every stretch of the run holds.

    wanted amounts (tasks x stretches) --caps over the run--> fitted --largest remainder--> counts of the run
                                                                \--controlled rounding--> counts of each stretch

The fit is the nearest table, in the sense of Kullback and Leibler and in the unit of the budget, whose stretches keep their
budgets and whose tasks stay below their caps; with one stretch it is water-filling. What a cap frees is poured over the
tasks of the same stretches.

Prefix bound of a scheduled run: after any number of positions each task has been seen as often as the fitted curve says,
give or take less than 3, however many tasks and stretches there are. The rounding below keeps every task within less than 1 at
the borders of stretches, so also on the straight lines between them; inside a stretch the interleaving adds less than 2
(module `order`). The fitted curve itself is exact at the end of the run: there it is the count.

Controlled rounding: unit k of a task may come no earlier than the stretch in which its curve leaves k - 1 and no later than
the one in which it reaches k. Jobs of one unit with such release times and deadlines, the earliest deadline first, fill
stretches of any whole sizes that the curves themselves fill (Jackson 1955; the rounding exists because prefixes of a task and
prefixes of the run are two laminar families, so their matrix is totally unimodular).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tutelage.records import Float64, Int64

_MOST_ROUNDS = 10_000
_LEAST_AMOUNT = 1e-290
_SETTLED = 1e-13
_DIGITS = 6  # of an example: what floats blur beyond this is cut off, so a whole number stays one on every machine


@dataclass(frozen=True)
class Timetable:
    """When each task comes: `counts` (tasks, stretches) in examples; stretches end at `borders` (stretches + 1,) positions.

    `curve` (tasks, stretches + 1) is what the rounding follows. `wanted` and `progress` are the promise before caps and before
    rounding: amounts in the unit that rates count, and the share of the budget used at the borders of its own columns. No
    packing window reaches across `stage_ends`, positions where one stage gives way to another, and none is longer than
    `smallest_change`, the share of the budget over which rates stay as they are.
    """

    tasks: tuple[str, ...]
    counts: Int64
    borders: Int64
    curve: Float64
    wanted: Float64
    progress: Float64
    stage_ends: tuple[int, ...]
    smallest_change: float = 1.0

    @property
    def stretches(self) -> tuple[dict[str, int], ...]:
        """Task to draws, for each stretch."""
        return tuple(dict(zip(self.tasks, column, strict=True)) for column in self.counts.T.tolist())

    def promised(self, begin: float, end: float) -> dict[str, float]:
        """The share of each task that the recipe asks for between two points of progress, in the unit that rates count."""
        before = np.concatenate([np.zeros((len(self.tasks), 1)), np.cumsum(self.wanted, axis=1)], axis=1)
        amounts = [np.interp(end, self.progress, line) - np.interp(begin, self.progress, line) for line in before]
        whole = max(float(sum(amounts)), 1e-300)
        return {name: float(amount / whole) for name, amount in zip(self.tasks, amounts, strict=True)}


def fit_amounts(wanted: Float64, *, costs: Float64, caps: Float64, floors: Float64 | None = None) -> Float64:
    """The table nearest to `wanted` (tasks, stretches) that uses up each stretch's budget, no task above its cap or below its
    floor over the run.

    Amounts are in examples; `costs` (tasks,) is what one takes from the budget, so a stretch's budget is costs . wanted. Solved
    by scaling stretches and bounded tasks in turn (iterative proportional fitting; Deming and Stephan 1940).

    >>> wanted = np.array([[60.0, 20.0], [40.0, 80.0]])                         # a fades, b grows
    >>> fit_amounts(wanted, costs=np.ones(2), caps=np.array([40.0, 999.0])).round(1).tolist()
    [[32.6, 7.4], [67.4, 92.6]]
    >>> fit_amounts(np.array([[0.0, 0.0], [4.0, 8.0]]), costs=np.ones(2), caps=np.array([9.0, 99.0])).tolist()
    [[0.0, 0.0], [4.0, 8.0]]

    Caps hold to the last bit; stretches to a part in a million, less only where a cap leaves a task just one place to be.
    The caller has made sure that the caps can hold every stretch (`reach`).
    """
    floors = np.zeros(len(wanted)) if floors is None else floors
    budgets = _down(wanted * costs[:, None])
    scale = np.ones(len(wanted))
    fill = np.ones(wanted.shape[1])
    for _ in range(_MOST_ROUNDS):
        fill = budgets / _down(wanted * (scale * costs)[:, None])
        amounts = _along(wanted * fill)
        # A task that is wanted nowhere keeps its nothing.
        now = np.divide(np.clip(amounts, floors, caps), amounts, out=np.ones_like(amounts), where=amounts > _LEAST_AMOUNT)
        is_settled = bool((np.abs(now - scale) <= _SETTLED * scale).all())
        scale = now
        if is_settled:
            break
    return wanted * scale[:, None] * fill


def _down(table: Float64) -> Float64:
    """Sums over tasks, one after the other: the same bits on every machine."""
    sums: Float64 = np.cumsum(table, axis=0)[-1]
    return sums


def _along(table: Float64) -> Float64:
    sums: Float64 = np.cumsum(table, axis=1)[:, -1]
    return sums


def make_timetable(
    amounts: Float64,
    totals: Mapping[str, int],
    *,
    wanted: Float64,
    progress: Float64,
    stage_ends: Sequence[int] = (),
    smallest_change: float = 1.0,
) -> Timetable:
    """The integers nearest to fitted `amounts` (tasks, stretches) that sum to `totals` (its order names the rows).

    `stage_ends` are numbers of the stretches after which another stage begins.

    >>> table = make_timetable(np.array([[2.5, 0.5], [2.5, 4.5]]), {"a": 3, "b": 7}, wanted=np.ones((2, 2)),
    ...                        progress=np.array([0, 0.5, 1]), stage_ends=[0])
    >>> table.stretches, table.stage_ends
    (({'a': 2, 'b': 3}, {'a': 1, 'b': 4}), (5,))
    """
    ends = np.array(list(totals.values()), np.float64)
    sums = _along(amounts)
    scale = np.divide(ends, sums, out=np.zeros_like(sums), where=sums > 0)
    cumulative = np.cumsum(amounts, axis=1) * scale[:, None]
    cumulative[:, -1] = ends
    cumulative = np.concatenate([np.zeros((len(ends), 1)), cumulative], axis=1).round(_DIGITS)
    positions = _down(cumulative).round(_DIGITS)
    whole = np.floor(positions).astype(np.int64)  # what a border falls into belongs to what comes behind it
    borders = np.unique(whole)
    curve = np.stack([np.interp(borders, positions, line) for line in cumulative]).round(_DIGITS)
    counts = np.diff(round_curve(curve, deadlines=(positions, cumulative)), axis=1)
    borders = np.concatenate([[0], np.cumsum(counts.sum(axis=0))])
    ended = {int(whole[number + 1]) for number in stage_ends} - {0, int(whole[-1])}
    return Timetable(tuple(totals), counts, borders, curve, wanted, progress, tuple(sorted(ended)), smallest_change)


def round_curve(curve: Float64, *, deadlines: tuple[Float64, Float64] | None = None) -> Int64:
    """Whole numbers for cumulative amounts `curve` (tasks, borders): each within less than 1, none ever falling.

    At every border they sum to what the curves sum to there, a whole number. `deadlines` are positions (points,) and what each
    task has reached there (tasks, points), where that is known more finely: a task that ends with its stage ends in it.

    >>> round_curve(np.array([[0, 0.5, 1.0, 1.5, 2], [0, 0.25, 0.5, 0.75, 1.0], [0, 0.25, 0.5, 0.75, 1.0]])).tolist()
    [[0, 1, 1, 2, 2], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]
    """
    positions, reached = deadlines or (np.arange(curve.shape[1], dtype=np.float64), curve)
    out = np.zeros(curve.shape, np.int64)
    sums = np.floor(_down(curve) + 0.5).astype(np.int64)
    for border in range(1, curve.shape[1]):
        due = np.floor(curve[:, border]).astype(np.int64)
        now = np.maximum(due, out[:, border - 1])
        missing = int(sums[border] - now.sum())
        if missing > 0:
            open_to_more = np.flatnonzero((curve[:, border] > due) & (now == due))
            due_at = [_position_of(due[task] + 1, positions, reached[task]) for task in open_to_more]
            first = open_to_more[np.argsort(due_at, kind="stable")][:missing]
            now[first] += 1
        out[:, border] = now
    return out


def _position_of(amount: int, positions: Float64, reached: Float64) -> float:
    """Where a rising line first reaches an amount."""
    i = int(np.searchsorted(reached, amount))
    part = (amount - reached[i - 1]) / (reached[i] - reached[i - 1])
    return round(float(positions[i - 1] + part * (positions[i] - positions[i - 1])), _DIGITS)
