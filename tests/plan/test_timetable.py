"""Timetables: tables of counts that keep totals, caps and the curve of a schedule at once."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.plan.order import Order
from tutelage.plan.reach import largest_budget
from tutelage.plan.timetable import Timetable, fit_amounts, make_timetable, round_curve


@st.composite
def tables(draw: st.DrawFn, max_tasks: int = 12, max_stretches: int = 12) -> np.ndarray:
    """Amounts (tasks, stretches) with holes, every task and stretch drawn on somewhere."""
    shape = (draw(st.integers(1, max_tasks)), draw(st.integers(1, max_stretches)))
    cells = st.one_of(st.just(0), st.integers(1, 400))
    table = np.array(draw(st.lists(st.lists(cells, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0])))
    table = table / draw(st.sampled_from([1, 3, 7, 40]))
    table[0] += 1
    table[:, 0] += 0.1
    return table


def timetable(amounts: np.ndarray) -> Timetable:
    """The timetable of amounts whose totals are rounded by largest remainder."""
    sums = amounts.sum(axis=1)
    totals = np.floor(sums).astype(int)
    totals[np.argsort(totals - sums, kind="stable")[: round(sums.sum()) - totals.sum()]] += 1
    counts = {f"t{i:02}": int(n) for i, n in enumerate(totals)}
    return make_timetable(amounts, counts, wanted=amounts, progress=np.linspace(0, 1, amounts.shape[1] + 1))


@given(tables())
def test_whole_tables_keep_both_margins_and_stay_within_one_of_every_curve(amounts: np.ndarray) -> None:
    """Kills rounding each cell alone (margins lost), and rounding whose error adds up along the run or over tasks."""
    made = timetable(amounts)
    assert made.counts.min(initial=0) >= 0
    seen = np.cumsum(made.counts, axis=1)
    assert np.abs(seen - made.curve[:, 1:]).max() < 1
    assert (made.counts.sum(axis=0) == np.diff(made.borders)).all()
    assert made.borders[-1] == seen[:, -1].sum() and (np.diff(made.borders) > 0).all()
    assert seen[:, -1].tolist() == made.curve[:, -1].tolist()


@given(tables())
def test_borders_lie_where_the_curves_put_them(amounts: np.ndarray) -> None:
    """Kills stretches that swell or shrink because every task rounds up there: each border is the whole position before it."""
    made = timetable(amounts)
    totals = np.array(list(made.curve[:, -1]))
    scaled = np.cumsum(amounts / amounts.sum(axis=1, keepdims=True) * totals[:, None], axis=1).sum(axis=0)
    wanted = np.unique(np.floor(np.append(0, scaled).round(6)))
    assert made.borders.tolist() == wanted.tolist()


@given(tables(max_tasks=30))
def test_every_prefix_of_a_scheduled_order_is_within_three_of_the_curve(amounts: np.ndarray) -> None:
    """Kills orders that keep a schedule only at the borders of its stretches, and errors that grow with the number of tasks."""
    made = timetable(amounts)
    counts = dict(zip(made.tasks, made.counts.sum(axis=1).tolist(), strict=True))
    order = Order(counts, sizes=dict.fromkeys(counts, 3), stretches=made.stretches)
    task = order.window(0, len(order)).task
    position = np.arange(1, len(order) + 1)
    for i, name in enumerate(order.tasks):
        due = np.interp(position, made.borders, made.curve[made.tasks.index(name)])
        assert np.abs(np.cumsum(task == i) - due).max() < 3


@given(tables(), st.data())
def test_stages_are_kept_apart_to_the_example(amounts: np.ndarray, data: st.DataObject) -> None:
    """Kills rounding that lets a task slip into the stage before its first or, of two stages, behind the one it ends in."""
    amounts = np.where(amounts > 0, amounts + 2, 0)
    begins = np.array([data.draw(st.integers(0, amounts.shape[1] - 1)) for _ in amounts])
    begins[0] = 0
    amounts[np.arange(amounts.shape[1]) < begins[:, None]] = 0
    amounts[:, -1] += 2
    made = timetable(amounts)
    assert made.counts.shape == amounts.shape
    assert all((counts[:begin] == 0).all() for counts, begin in zip(made.counts, begins, strict=True))
    two = np.stack([amounts.sum(axis=1), np.where(begins > 0, amounts[:, -1], 0)], axis=1)
    two[-1, 1] = 3.7
    assert (timetable(two).counts[two == 0] == 0).all()


def test_units_go_to_the_earliest_deadline_and_not_to_the_largest_remainder() -> None:
    """Kills the largest remainder at each border: a, b, c would take all three units, and d and e come too late for theirs."""
    curve = np.array([[0, 2 / 3, 2 / 3, 1]] * 3 + [[0, 0.5, 1, 1]] * 2).round(6)
    whole = round_curve(curve)
    assert whole.sum(axis=0).tolist() == [0, 3, 4, 5]
    assert whole[:, 1].tolist() == [1, 0, 0, 1, 1]
    assert np.abs(whole - curve).max() < 1


def test_equal_curves_take_turns_by_name() -> None:
    """Kills ties that depend on the order of a sort: three equal tasks over three stretches, one example each."""
    curve = np.array([[0.0, 1 / 3, 2 / 3, 1.0]] * 3).round(6)
    assert round_curve(curve).tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]


@given(tables(max_tasks=5, max_stretches=5), st.data())
def test_the_fit_keeps_caps_and_budgets_and_moves_by_factors_only(amounts: np.ndarray, data: st.DataObject) -> None:
    """Kills caps checked per stretch, budgets of stretches that leak into others, and a refill that favours somebody.

    The nearest table in the sense of Kullback and Leibler is the wanted one times a factor per task and a factor per stretch,
    and the factor of a task below its cap is 1 (that of one at its cap at most 1).
    """
    caps = np.array([data.draw(st.integers(20, 120)) for _ in amounts]) / 100 * amounts.sum(axis=1)
    costs = np.array([data.draw(st.sampled_from([1.0, 2.5, 40.0])) for _ in amounts])
    caps[-1] = 1e9
    amounts[-1] += 0.5  # one task without a cap in every stretch: any demand can be met
    fitted = fit_amounts(amounts, costs=costs, caps=caps)
    assert (fitted.sum(axis=1) <= caps * (1 + 1e-9)).all()
    assert costs @ fitted == pytest.approx(costs @ amounts, rel=1e-6)
    stretch = fitted[-1] / amounts[-1]
    factors = np.divide(fitted, amounts * stretch, out=np.ones_like(amounts), where=amounts > 0)
    task = factors.min(axis=1)
    assert (
        np.abs(factors - task[:, None])[amounts > 0] < 1e-6 * np.broadcast_to(task[:, None], amounts.shape)[amounts > 0]
    ).all()
    at_cap = fitted.sum(axis=1) >= caps * (1 - 1e-9)
    assert np.allclose(task[~at_cap], 1) and (task <= 1 + 1e-9).all()


def test_a_fit_worked_by_hand() -> None:
    """Kills a cap that cuts the end of the run instead of thinning the task everywhere.

    Stage 1 wants 50 a and 50 b, stage 2 the same, a holds 40: each stage gets 20 a and 80 b.
    """
    fitted = fit_amounts(np.full((2, 2), 50.0), costs=np.ones(2), caps=np.array([40.0, 1e9]))
    assert fitted.round(9).tolist() == [[20.0, 20.0], [80.0, 80.0]]


@settings(max_examples=60)
@given(st.data())
def test_the_largest_budget_is_that_of_the_tightest_stages_together(data: st.DataObject) -> None:
    """Kills a check of each stage alone: two stages can each be filled, and not both. Held against every set of stages."""
    names = "abcd"
    stages = data.draw(st.sets(st.frozensets(st.sampled_from(names), min_size=1), min_size=1, max_size=5))
    shares = {stage: Fraction(data.draw(st.integers(1, 9))) for stage in sorted(stages, key=sorted)}
    shares = {stage: share / sum(shares.values()) for stage, share in shares.items()}
    holds = {name: Fraction(data.draw(st.integers(1, 30))) for name in names}
    sets = [group for size in range(1, len(shares) + 1) for group in combinations(shares, size)]
    limits = [sum(holds[name] for name in frozenset().union(*group)) / sum(shares[stage] for stage in group) for group in sets]
    reached = {name: holds[name] for name in frozenset().union(*shares)}
    most, tight = largest_budget(shares, reached)
    assert most == min(limits)
    assert sum(reached[name] for name in frozenset().union(*tight)) / sum(shares[stage] for stage in tight) == most


def test_promised_shares_between_two_points_of_progress() -> None:
    """Kills promises looked up at the start of a stretch instead of over the part that is asked for."""
    wanted = np.array([[60.0, 10.0], [40.0, 90.0]])
    counts = {"a": 70, "b": 130}
    made = make_timetable(wanted, counts, wanted=wanted, progress=np.array([0.0, 0.5, 1.0]))
    assert made.promised(0.0, 0.5) == pytest.approx({"a": 0.6, "b": 0.4})
    assert made.promised(0.25, 0.75) == pytest.approx({"a": 0.35, "b": 0.65})
    assert made.promised(0.0, 1.0) == pytest.approx({"a": 0.35, "b": 0.65})
