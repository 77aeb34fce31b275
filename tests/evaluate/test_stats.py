"""Intervals that cover what they should."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.errors import DataError
from tutelage.evaluate.stats import Change, aggregates, changes, mean_interval, paired_interval, total_change
from tutelage.records import Float64, Score


def simulated(rng: np.random.Generator, n: int) -> tuple[Float64, Float64]:
    """(sums, weights) of n records with uneven lengths, whose mean nll per token is 2 plus a part of their own."""
    weights = rng.integers(5, 60, n).astype(float)
    return weights * (2.0 + rng.normal(0, 0.5, n)), weights


@pytest.mark.parametrize("n", [6, 40])
def test_the_interval_covers_the_truth_about_nineteen_times_in_twenty(n: int) -> None:
    """Kills: resampling tokens instead of records; plain percentiles, which cover 84 % on six records."""
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(400):
        found = mean_interval(*simulated(rng, n), seed=trial, num_resamples=800)
        hits += found.low <= 2.0 <= found.high
    assert 0.92 <= hits / 400 <= 0.985


def test_the_mean_weighs_tokens_and_not_records() -> None:
    """Kills: the mean of the records' means, which is 1.5 here."""
    found = mean_interval(np.array([20.0, 90.0]), np.array([10.0, 90.0]))
    assert found.mean == pytest.approx(1.1)
    assert found.low < 1.1 < found.high


def test_numerator_and_denominator_are_drawn_together() -> None:
    """Kills: resampling sums and weights apart, which gives records of one and the same mean an interval of great width."""
    weights = np.array([1.0, 10.0, 100.0, 1000.0])
    found = mean_interval(2.5 * weights, weights)
    assert (found.mean, found.low, found.high) == (2.5, 2.5, 2.5)


def test_pairing_is_what_makes_a_small_change_visible() -> None:
    """Kills: an unpaired interval of the difference; drawing other records for after than for before."""
    rng = np.random.default_rng(0)
    before, weights = simulated(rng, 40)
    after = before - weights * (0.1 + rng.normal(0, 0.02, 40))
    paired = paired_interval(before, after, weights)
    old, new = mean_interval(before, weights), mean_interval(after, weights, seed=1)
    assert paired.mean == pytest.approx(new.mean - old.mean)
    assert paired.high < 0
    assert paired.high - paired.low < 0.2 * min(old.high - old.low, new.high - new.low)
    assert old.low < new.high, "apart, the two could not be told from one another"


def test_one_record_has_a_mean_and_no_interval_and_none_has_neither() -> None:
    """Kills: an interval of width 0 around a single record, which would claim certainty."""
    one = mean_interval(np.array([6.0]), np.array([3.0]))
    assert (one.mean, one.num_records) == (2.0, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    none = mean_interval(np.zeros(0), np.zeros(0))
    assert math.isnan(none.mean)
    assert none.num_records == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-50, 50), st.integers(1, 90)), min_size=2, max_size=15), st.integers(0, 5))
def test_an_interval_repeats_and_holds_what_the_records_allow(rows: list[tuple[float, int]], seed: int) -> None:
    """Kills: an unseeded bootstrap; bounds in the wrong order; bounds outside of the records' own means."""
    weights = np.array([float(w) for _, w in rows])
    sums = np.array([m for m, _ in rows]) * weights
    found = mean_interval(sums, weights, seed=seed, num_resamples=300)
    assert found == mean_interval(sums, weights, seed=seed, num_resamples=300)
    assert found.low <= found.high
    means = sums / weights
    assert means.min() - 1e-9 <= found.low
    assert found.high <= means.max() + 1e-9


def test_many_records_are_drawn_in_pieces_with_the_same_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: drawing only the first piece; a piece whose records are drawn from part of the set."""
    sums, weights = simulated(np.random.default_rng(3), 50)
    whole = mean_interval(sums, weights, num_resamples=4000)
    monkeypatch.setattr("tutelage.evaluate.stats.MAX_DRAWS", 50 * 7)
    pieces = mean_interval(sums, weights, num_resamples=4000)
    assert (pieces.low, pieces.high) == pytest.approx((whole.low, whole.high), abs=0.02)


def score(task: str, item: str, value: float, weight: float) -> Score:
    return Score("r", 3, task, item, "nll", value, weight)


def test_tasks_and_total_are_aggregated_with_their_weights() -> None:
    """Kills: a total that averages the tasks; aggregates that are read as records; other metrics that are counted in."""
    scores = [score("a", "1", 20.0, 10.0), score("a", "2", 10.0, 10.0), score("b", "3", 80.0, 80.0)]
    noise = [score("a", "", 99.0, 9.0), Score("r", 3, "a", "1", "ended_share", 1.0)]
    found = {s.task: s for s in aggregates([*scores, *noise], seed=0)}
    assert list(found) == ["a", "b", ""]
    assert (found["a"].value, found["b"].value, found[""].value) == (1.5, 1.0, 1.1)
    assert (found["a"].weight, found[""].weight) == (20.0, 100.0)
    assert math.isnan(found["b"].low)
    assert found[""].low < 1.1 < found[""].high
    assert {s.item for s in found.values()} == {""}
    assert {(s.run, s.step) for s in found.values()} == {("r", 3)}


def test_examples_of_one_record_are_one_draw() -> None:
    """Kills: counting a record that rendered to ten examples as ten independent records."""
    whole = [score("t", "1", 20.0, 10.0), score("t", "2", 5.0, 10.0), score("t", "3", 8.0, 10.0)]
    parts = [score("t", s.item, s.value / 10, s.weight / 10) for s in whole for _ in range(10)]
    one, ten = aggregates(whole, seed=0)[-1], aggregates(parts, seed=0)[-1]
    assert (ten.low, ten.high) == pytest.approx((one.low, one.high))


def test_items_of_the_same_name_in_two_tasks_stay_two_records() -> None:
    """Kills: a total keyed by item alone."""
    assert aggregates([score("a", "1", 1.0, 1.0), score("b", "1", 3.0, 1.0)], seed=0)[-1].value == 2.0


def test_the_order_of_scores_changes_no_interval() -> None:
    """Kills: pairing before and after by position."""
    rng = np.random.default_rng(0)
    before = [score("t", str(i), float(v), 10.0) for i, v in enumerate(rng.normal(20, 5, 12))]
    after = [score("t", s.item, s.value - 1.0, 10.0) for s in before]
    assert aggregates(before, seed=0) == aggregates(before[::-1], seed=0)
    for change in changes(before, after[::-1], seed=0):
        assert (change.metric, change.value, change.low, change.high) == ("nll_change", *[pytest.approx(-0.1)] * 3)


def test_losses_over_different_tokens_are_not_compared() -> None:
    """Kills: an inner join that quietly compares what is left; comparing the same records over other targets."""
    before = [score("t", "1", 1.0, 5.0), score("t", "2", 1.0, 5.0)]
    for other in ([before[0]], [before[0], score("t", "2", 1.0, 6.0)], [*before, score("u", "3", 1.0, 1.0)]):
        with pytest.raises(DataError, match="cannot be compared"):
            changes(before, other, seed=0)


def test_a_new_task_leaves_the_intervals_of_the_others() -> None:
    """Kills: one random stream through all tasks."""
    base = [score("b", str(i), float(i * i), 10.0) for i in range(9)]
    alone, joined = aggregates(base, seed=0)[0], aggregates([score("a", "x", 1.0, 1.0), *base], seed=0)[1]
    assert alone == joined


@pytest.mark.parametrize(
    ("low", "high", "direction"),
    [(-0.3, -0.1, "fell"), (0.1, 0.3, "rose"), (-0.1, 0.3, "unclear"), (math.nan, math.nan, "unclear")],
)
def test_a_change_claims_no_more_than_its_interval(low: float, high: float, direction: str) -> None:
    """Kills: the sign of the mean as the verdict."""
    found = total_change([score("t", "1", 1.0, 1.0), Score("r", 3, "", "", "nll_change", -0.2, 1.0, low, high)])
    assert found is not None
    assert (found.direction, found.amount, found.num_records) == (direction, 0.2, 1)


def test_without_a_comparison_there_is_no_change() -> None:
    """Kills: a change of 0 where nothing was compared."""
    assert total_change(aggregates([score("t", "1", 1.0, 1.0)], seed=0)) is None
    assert Change.of(mean_interval(np.zeros(0), np.zeros(0))).direction == "unclear"
