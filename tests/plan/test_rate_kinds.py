"""Each kind of rates against tables worked out apart from our code."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mix_strategies import flat_rates, supplies
from test_rates import BOOK_SIZES

from tutelage.errors import PlanError
from tutelage.plan.rates import Supply, compute_rates, plan_counts, rate_weights
from tutelage.plan.spec import Capped, Counts, Equal, Explicit, MixSpec, Temperature, UniMax

# Shares in per cent of the book's sizes (qa 120,000 ... classification 60,000), from the formulas with 40-digit decimals:
# p^(1/T) / sum p^(1/T), and min(e, 30,000)^(1/T) / sum min(e, 30,000)^(1/T).
TEMPERED = {
    1.0: (34.4828, 22.9885, 4.3103, 2.2989, 7.1839, 11.4943, 17.2414),
    2.0: (23.9858, 19.5843, 8.4802, 6.1931, 10.9479, 13.8482, 16.9605),
    5.0: (17.9608, 16.5618, 11.8497, 10.4498, 13.1243, 14.4179, 15.6358),
    float("inf"): (14.2857,) * 7,
}
CAPPED = {
    1.0: (17.8571, 17.8571, 8.9286, 4.7619, 14.8810, 17.8571, 17.8571),
    2.0: (16.2963, 16.2963, 11.5232, 8.4154, 14.8764, 16.2963, 16.2963),
}


def per_cent(shares: Mapping[str, float]) -> tuple[float, ...]:
    return tuple(round(100 * shares[name], 4) for name in BOOK_SIZES)


@pytest.mark.parametrize("temperature", TEMPERED)
def test_temperature_gives_the_table(temperature: float) -> None:
    """Kills p^T for p^(1/T): T5 (arXiv 1910.10683, section 3.5.2) on the sizes of a book chapter on data mixing."""
    assert per_cent(compute_rates(BOOK_SIZES, Temperature(temperature=temperature))) == TEMPERED[temperature]


def test_a_temperature_below_one_sharpens() -> None:
    """Kills a temperature clipped at 1: at T = 1/2 shares go with the square of the size."""
    assert compute_rates({"a": 20, "b": 10}, Temperature(temperature=0.5)) == {"a": 0.8, "b": 0.2}


@pytest.mark.parametrize("temperature", CAPPED)
def test_the_cap_k_comes_before_the_temperature(temperature: float) -> None:
    """Kills a cap put on p^(1/T), where it never binds: T5, section 3.5.2, with K = 30,000."""
    assert per_cent(compute_rates(BOOK_SIZES, Capped(cap=30_000, temperature=temperature))) == CAPPED[temperature]


def test_flan_is_proportional_to_at_most_three_thousand() -> None:
    """Kills another K than FLAN's (arXiv 2109.01652): 30,000, 2,500 and 1,000 examples count as 3,000, 2,500 and 1,000."""
    sizes = {"nli": 30_000, "qa": 2_500, "maths": 1_000}
    assert compute_rates(sizes, Capped()) == {"nli": 3000 / 6500, "qa": 2500 / 6500, "maths": 1000 / 6500}
    counts = plan_counts({name: Supply(n, n, n) for name, n in sizes.items()}, MixSpec(rates=Capped(), total_examples=650)).counts
    assert counts == {"maths": 100, "nli": 300, "qa": 250}


def test_k_counts_in_the_unit_of_count() -> None:
    """Kills a K in examples against sizes in tokens."""
    given = {"short": Supply(1000, 4_000, 2_000), "long": Supply(100, 40_000, 30_000)}
    mix = MixSpec(rates=Capped(cap=4_000), count="tokens", total_tokens=8_000)
    assert plan_counts(given, mix).counts == {"long": 10, "short": 1000}


def unimax(sizes: Mapping[str, int], budget: int, max_epochs: int) -> dict[str, Fraction]:
    """The pseudo-code of UniMax (arXiv 2304.09151, algorithm 1), written out on its own."""
    left, out = Fraction(budget), {}
    ascending = sorted(sizes, key=lambda name: sizes[name])
    for done, name in enumerate(ascending):
        even = left / (len(ascending) - done)
        out[name] = min(even, Fraction(max_epochs * sizes[name]))
        left -= out[name]
    return out


def test_unimax_by_hand() -> None:
    """Kills one pass over the sources: of 280,000, five are taken whole (148,000) and the two largest share 132,000."""
    mix = MixSpec(rates=UniMax(max_epochs=1.0), total_examples=280_000)
    got = plan_counts({name: Supply(n, n, n) for name, n in BOOK_SIZES.items()}, mix)
    assert got.counts == {**{n: s for n, s in BOOK_SIZES.items() if s <= 60_000}, "qa": 66_000, "summarization": 66_000}
    assert compute_rates(BOOK_SIZES, UniMax(max_epochs=1.0), budget=280_000)["qa"] == pytest.approx(66 / 280)


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 60), min_size=1), st.integers(1, 4), st.data())
def test_unimax_is_its_pseudo_code(sizes: dict[str, int], max_epochs: int, data: st.DataObject) -> None:
    """Kills a UniMax that visits sources from the largest, or lets N_max bind on shares instead of amounts."""
    budget = data.draw(st.integers(1, max_epochs * sum(sizes.values())))
    expected = unimax(sizes, budget, max_epochs)
    got = compute_rates(sizes, UniMax(max_epochs=float(max_epochs)), budget=budget)
    assert got == {name: float(expected[name] / budget) for name in sizes}
    mix = MixSpec(rates=UniMax(max_epochs=float(max_epochs)), total_examples=budget)
    counts = plan_counts({name: Supply(n, n, n) for name, n in sizes.items()}, mix).counts
    assert sum(counts.values()) == budget
    assert all(abs(counts[name] - expected[name]) < 1 for name in sizes)


def test_a_budget_beyond_all_of_unimax_names_the_largest() -> None:
    """Kills a budget that N_max cuts without a word, in the plan and in the plain function."""
    given = {"a": Supply(10, 10, 10), "b": Supply(30, 30, 30)}
    with pytest.raises(PlanError, match="the max_epochs of `unimax` all tasks that have a share reach at most 80;"):
        plan_counts(given, MixSpec(rates=UniMax(max_epochs=2.0), total_examples=81))
    assert plan_counts(given, MixSpec(rates=UniMax(max_epochs=2.0), total_examples=80)).counts == {"a": 20, "b": 60}
    with pytest.raises(PlanError, match="80 at most"):
        compute_rates({"a": 10, "b": 30}, UniMax(max_epochs=2.0), budget=81)
    with pytest.raises(PlanError, match="give `budget=`"):
        compute_rates({"a": 10}, UniMax())


def test_counts_are_taken_as_they_stand() -> None:
    """Kills counts that are scaled to a budget, and a task that gets something though it was not named."""
    given = {"qa": Supply(1000, 7_000, 3_000), "maths": Supply(400, 8_000, 2_000), "rest": Supply(5, 5, 5)}
    rates = Counts(counts={"qa": 600, "maths": 1500})
    got = plan_counts(given, MixSpec(rates=rates))
    assert got.counts == {"maths": 1500, "qa": 600, "rest": 0}
    assert got.num_unfilled == 0
    assert any("task rest: no share" in note for note in got.notes)
    assert compute_rates({"qa": 1, "maths": 1}, rates) == {"qa": 600 / 2100, "maths": 1500 / 2100}
    in_tokens = plan_counts(given, MixSpec(rates=rates, count="tokens"))
    assert in_tokens.counts == {"maths": 75, "qa": 86, "rest": 0}  # 1,500 / 20 and 600 / 7 = 85.7


def test_counts_above_a_cap_name_the_task_and_the_largest_that_is_accepted() -> None:
    """Kills counts that a cap cuts in silence."""
    given = {"qa": Supply(10, 77, 30), "maths": Supply(10, 30, 30)}
    mix = MixSpec(rates=Counts(counts={"qa": 31, "maths": 1}), max_visits=3)
    with pytest.raises(PlanError, match=r"mix.rates.counts.qa: 31 examples, but with mix.max_visits 3 .* at most 30;"):
        plan_counts(given, mix)
    in_tokens = MixSpec(rates=Counts(counts={"qa": 240, "maths": 1}), max_visits={"qa": 3}, count="tokens")
    with pytest.raises(PlanError, match="at most 231;"):
        plan_counts(given, in_tokens)
    assert plan_counts(given, MixSpec(rates=Counts(counts={"qa": 231}), max_visits=3, count="tokens")).counts["qa"] == 30


def test_two_budgets_are_refused_by_name() -> None:
    """Kills a budget that silently loses against another."""
    rates = Counts(counts={"qa": 1})
    for budget in ({"epochs": 1.0}, {"total_tokens": 5}, {"total_steps": 2}):
        (field,) = budget
        with pytest.raises(ValueError, match=f"one budget only, found `rates` of kind `counts` and `{field}`"):
            MixSpec(rates=rates, **budget)
    with pytest.raises(ValueError, match="`total_examples` and `total_supervised_tokens`"):
        MixSpec(total_examples=5, total_supervised_tokens=5)
    with pytest.raises(ValueError, match="nothing to raise"):
        MixSpec(rates=rates, min_examples=3)


def test_what_cannot_hold_together_is_refused_when_the_recipe_is_read() -> None:
    """Kills a `refill: none` that UniMax or whole steps would quietly ignore."""
    with pytest.raises(ValueError, match="`unimax` refills by definition"):
        MixSpec(rates=UniMax(), refill="none")
    with pytest.raises(ValueError, match="`total_steps` fills whole steps"):
        MixSpec(total_steps=3, refill="none")
    with pytest.raises(ValueError, match="at least 1 is wanted"):
        MixSpec(max_visits={"maths": 0})


@given(st.data())
def test_shares_sum_to_one_whatever_the_rule(data: st.DataObject) -> None:
    """Kills a rule that forgets to normalise, or whose order of names matters."""
    given = data.draw(supplies())
    sizes = {name: supply.num_tokens for name, supply in given.items()}
    rates = data.draw(flat_rates(sorted(sizes)))
    shares = compute_rates(sizes, rates, budget=sum(sizes.values()))
    assert sum(shares.values()) == pytest.approx(1)
    backwards = dict(reversed(sizes.items()))
    assert compute_rates(backwards, rates, budget=sum(sizes.values())) == shares
    weights = rate_weights(sizes, rates)
    assert list(weights) == list(sizes)
    assert all(weight > 0 for weight in weights.values())


def test_a_misspelled_name_is_told_in_every_place() -> None:
    """Kills a bound or a count for a task that nobody has."""
    given = {"maths": Supply(5, 5, 5)}
    for mix in (
        MixSpec(rates=Counts(counts={"math": 5})),
        MixSpec(rates=Explicit(weights={"math": 5.0})),
        MixSpec(max_visits={"math": 5}),
        MixSpec(rates=Equal(), min_examples={"math": 5}),
    ):
        with pytest.raises(PlanError, match=r"\.math: no such task; did you mean `maths`"):
            plan_counts(given, mix)
    with pytest.raises(PlanError, match="no such source"):
        plan_counts(given, MixSpec(over="sources", max_visits={"math": 5}))
