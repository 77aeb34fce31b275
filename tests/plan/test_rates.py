"""Rates: golden numbers from the literature, exactness and caps."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_reference import water_filling

from tutelage.errors import PlanError
from tutelage.plan.rates import Supply, allocate, compute_rates, plan_counts, rate_weights
from tutelage.plan.spec import Equal, Explicit, MixSpec, Proportional, Temperature

# Worked example of a book chapter on data mixing for instruction tuning; shares in per cent as printed there.
BOOK_SIZES = {
    "qa": 120_000,
    "summarization": 80_000,
    "code": 15_000,
    "maths": 8_000,
    "creative": 25_000,
    "translation": 40_000,
    "classification": 60_000,
}
BOOK_SHARES = {
    "qa": 34.5,
    "summarization": 23.0,
    "code": 4.3,
    "maths": 2.3,
    "creative": 7.2,
    "translation": 11.5,
    "classification": 17.2,
}
SMALL_BOOK = {name: Supply(n, n * 100, n * 50) for name, n in {"qa": 10_000, "maths": 500, "code": 2_000}.items()}

names = st.text("abcdefg", min_size=1, max_size=2)
weights = st.dictionaries(names, st.integers(1, 1000), min_size=1, max_size=7)


def supplies_of(sizes: dict[str, int]) -> dict[str, Supply]:
    return {name: Supply(n, n * 7, n * 3) for name, n in sizes.items()}


def test_proportional_shares_are_those_of_the_book() -> None:
    """Kills shares of anything but the sizes."""
    assert {name: round(100 * share, 1) for name, share in compute_rates(BOOK_SIZES).items()} == BOOK_SHARES


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0, math.inf])
def test_temperature_is_the_formula(temperature: float) -> None:
    """Kills p^T for p^(1/T), and a forgotten normalisation."""
    total = sum(BOOK_SIZES.values())
    powers = {name: (size / total) ** (1 / temperature) for name, size in BOOK_SIZES.items()}
    expected = {name: power / sum(powers.values()) for name, power in powers.items()}
    assert compute_rates(BOOK_SIZES, Temperature(temperature=temperature)) == pytest.approx(expected, rel=1e-12)


def test_temperature_one_is_proportional_and_infinity_equal_to_the_bit() -> None:
    """Kills rounding at the two ends of the scale."""
    assert rate_weights(BOOK_SIZES, Temperature(temperature=1.0)) == rate_weights(BOOK_SIZES, Proportional())
    assert rate_weights(BOOK_SIZES, Temperature(temperature=math.inf)) == rate_weights(BOOK_SIZES, Equal())


def test_the_books_example_stops_at_11500_and_reaches_15000_with_refill() -> None:
    """Kills a cap that is never refilled, and a refill that overfills."""
    mix = MixSpec(rates=Equal(), total_examples=15_000, max_visits=3)
    left = plan_counts(SMALL_BOOK, mix.model_copy(update={"refill": "none"}))
    assert sum(left.counts.values()) == 11_500
    assert (left.counts, left.num_unfilled) == ({"qa": 5_000, "maths": 1_500, "code": 5_000}, 3_500)
    filled = plan_counts(SMALL_BOOK, mix)
    assert (filled.counts, filled.num_unfilled) == ({"qa": 7_500, "maths": 1_500, "code": 6_000}, 0)
    assert [task.task for task in filled.tasks if task.is_capped] == ["code", "maths"]
    assert "maths" in " ".join(filled.notes)


@given(weights, st.integers(0, 100_000))
def test_counts_sum_to_the_total_exactly(weights: dict[str, int], total: int) -> None:
    """Kills int(total * w)."""
    assert sum(allocate(weights, total).counts.values()) == total


@given(weights, st.integers(0, 1000))
def test_counts_are_the_largest_remainder_method(weights: dict[str, int], total: int) -> None:
    """Kills the remainder given to the largest, and ties settled by position."""
    quotas = {name: Fraction(total * weight, sum(weights.values())) for name, weight in weights.items()}
    expected = {name: math.floor(quota) for name, quota in quotas.items()}
    order = sorted(quotas, key=lambda name: (-(quotas[name] % 1), name))
    for name in order[: total - sum(expected.values())]:
        expected[name] += 1
    assert allocate(weights, total).counts == expected


@st.composite
def capped(draw: st.DrawFn) -> tuple[dict[str, int], int, dict[str, int]]:
    shares = draw(weights)
    caps = {name: draw(st.integers(1, 60)) for name in shares}
    return shares, draw(st.integers(0, sum(caps.values()))), caps


@given(capped())
def test_no_count_is_above_its_cap(case: tuple[dict[str, int], int, dict[str, int]]) -> None:
    """Kills a refill that ignores caps; the total is still exact."""
    shares, total, caps = case
    counts = allocate(shares, total, caps=caps).counts
    assert all(counts[name] <= caps[name] for name in counts)
    assert sum(counts.values()) == total


@given(capped())
def test_water_filling_is_within_one_of_the_quotas(case: tuple[dict[str, int], int, dict[str, int]]) -> None:
    """Kills a refill that favours anybody: no other counts below the caps are nearer to the weights."""
    shares, total, caps = case
    counts = allocate(shares, total, caps=caps).counts
    for name, quota in water_filling(shares, total, caps).items():
        assert abs(counts[name] - quota) < 1


@given(capped())
def test_without_refill_nobody_gets_more_than_the_rate(case: tuple[dict[str, int], int, dict[str, int]]) -> None:
    """Kills a refill in disguise; what the caps leave is counted."""
    shares, total, caps = case
    got, free = allocate(shares, total, caps=caps, refill="none"), allocate(shares, total)
    assert got.counts == {name: min(count, caps[name]) for name, count in free.counts.items()}
    assert got.num_unfilled == total - sum(got.counts.values())


@given(weights, st.integers(1, 5000), st.randoms())
def test_the_order_of_tasks_and_a_zero_weight_change_nothing(weights: dict[str, int], total: int, random) -> None:  # type: ignore[no-untyped-def]
    """Kills ties broken by position."""
    shuffled = list(weights.items())
    random.shuffle(shuffled)
    expected = allocate(weights, total).counts
    assert allocate({**dict(shuffled), "zero": 0}, total).counts == {**expected, "zero": 0}


def test_one_epoch_is_every_record_once_in_every_unit() -> None:
    """Kills budgets that mix up units."""
    sizes = {"a": 13, "b": 7, "c": 1}
    for count in ("examples", "tokens", "supervised_tokens"):
        assert plan_counts(supplies_of(sizes), MixSpec(count=count)).counts == sizes
    assert plan_counts(supplies_of(sizes), MixSpec(epochs=2.5)).counts == {"a": 33, "b": 18, "c": 2}


def test_equal_shares_of_tokens_give_more_examples_to_the_task_of_short_ones() -> None:
    """Kills a token share spent as a share of examples."""
    supplies = {"short": Supply(100, 1_000, 500), "long": Supply(100, 9_000, 500)}
    mixture = plan_counts(supplies, MixSpec(rates=Equal(), count="tokens", total_tokens=18_000))
    assert mixture.counts == {"short": 900, "long": 100}
    by_supervised = plan_counts(supplies, MixSpec(rates=Equal(), count="supervised_tokens", total_examples=200))
    assert by_supervised.counts == {"short": 100, "long": 100}


def test_a_budget_that_the_caps_cannot_reach_names_the_largest_that_they_can() -> None:
    """Kills a silent shortfall."""
    for budget, largest in (
        ({"total_examples": 40_000}, "37,500"),
        ({"epochs": 5.0}, "most 3;"),
        ({"total_tokens": 9_000_000}, "3,750,000"),
    ):
        with pytest.raises(PlanError, match=largest):
            plan_counts(SMALL_BOOK, MixSpec(rates=Equal(), max_visits=3, **budget))
    most = MixSpec(rates=Equal(), max_visits=3, total_examples=37_500)
    assert plan_counts(SMALL_BOOK, most).counts == {"qa": 30_000, "maths": 1_500, "code": 6_000}


def test_explicit_weights_may_leave_a_task_out_and_must_name_known_ones() -> None:
    """Kills a misspelled task that quietly gets nothing."""
    mixture = plan_counts(SMALL_BOOK, MixSpec(rates=Explicit(weights={"qa": 3.0, "code": 1.0}), total_examples=400))
    assert mixture.counts == {"qa": 300, "code": 100, "maths": 0}
    assert any(note.startswith("task maths: no share") for note in mixture.notes)
    with pytest.raises(PlanError, match="did you mean `maths`"):
        compute_rates({"maths": 1}, Explicit(weights={"math": 1.0}))
    with pytest.raises(PlanError, match="every weight is 0"):
        compute_rates({"maths": 1}, Explicit(weights={"maths": 0.0}))


def test_a_task_with_a_share_but_no_record_is_refused() -> None:
    """Kills a promised share that is quietly poured over the others."""
    with pytest.raises(PlanError, match="`maths` has a share but no training record"):
        plan_counts(SMALL_BOOK | {"maths": Supply(0, 0, 0)}, MixSpec(rates=Equal()))
    with pytest.raises(PlanError, match="no task has a training record"):
        plan_counts({}, MixSpec())


def test_a_share_that_rounds_to_nothing_is_noted() -> None:
    """Kills a task that vanishes without a word."""
    mixture = plan_counts(supplies_of({"a": 100_000, "b": 1}), MixSpec(total_examples=10))
    assert mixture.counts == {"a": 10, "b": 0}
    assert any("task b: its share of 0.00% rounds to no example" in note for note in mixture.notes)


def test_hundreds_of_tasks_with_awkward_sizes_stay_exact_and_quick() -> None:
    """Kills arithmetic that grows with the product of all sizes."""
    supplies = {f"t{i}": Supply(1_000 + i, 99_991 + 7 * i, 51_001 + 3 * i) for i in range(800)}
    mixture = plan_counts(supplies, MixSpec(rates=Equal(), count="tokens", total_examples=12_345, max_visits=2))
    assert sum(mixture.counts.values()) == 12_345
