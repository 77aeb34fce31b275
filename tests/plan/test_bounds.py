"""Caps, minima and budgets over every kind of rates: exact totals, honest refusals, and what is told."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mix_strategies import met, mixtures
from test_rates import SMALL_BOOK

from tutelage.errors import PlanError
from tutelage.plan.rates import Mixture, Supply, plan_counts
from tutelage.plan.rates_spec import bound_of
from tutelage.plan.spec import Equal, Explicit, MixSpec, Proportional, UniMax

Case = tuple[dict[str, Supply], MixSpec]


@settings(max_examples=120)
@given(mixtures())
def test_every_refusal_names_a_demand_that_is_then_met(case: Case) -> None:
    """Kills a nearest value that is itself refused, or rounded to the wrong side."""
    got, _ = met(*case)
    assert sum(got.counts.values()) > 0


@settings(max_examples=120)
@given(mixtures())
def test_no_record_is_seen_above_its_cap_over_the_whole_run(case: Case) -> None:
    """Kills a cap that each pass starts anew, and one that a refill, a group or a minimum walks through."""
    got, mix = met(*case)
    for share in got.tasks:
        cap = bound_of(mix.max_visits, share.task)
        assert cap is None or share.num_planned <= cap * share.supply.num_examples
        if isinstance(mix.rates, UniMax):
            assert share.num_planned <= mix.rates.max_epochs * share.supply.num_examples


@settings(max_examples=120)
@given(mixtures())
def test_minima_are_held(case: Case) -> None:
    """Kills minima that rounding or a small budget undercuts."""
    got, mix = met(*case)
    assert all(share.num_planned >= (bound_of(mix.min_examples, share.task) or 0) for share in got.tasks)


@settings(max_examples=120)
@given(mixtures())
def test_totals_are_exact_whatever_the_rates_and_bounds(case: Case) -> None:
    """Kills a total that caps, minima, groups or their rounding miss: exact in examples, else to half an example's cost."""
    got, mix = met(*case)
    assert got.num_unfilled == 0
    if mix.total_examples is not None:
        assert sum(got.counts.values()) == mix.total_examples
    for field, unit in (("total_tokens", "tokens"), ("total_supervised_tokens", "supervised_tokens")):
        wanted = getattr(mix, field)
        if wanted is not None:
            spent = sum(share.num_planned * share.supply.mean(unit) for share in got.tasks)
            largest = max(share.supply.mean(unit) for share in got.tasks)
            assert abs(spent - wanted) <= (Fraction(1, 2) + len(got.tasks)) * largest


@settings(max_examples=120)
@given(mixtures(), st.randoms(use_true_random=False))
def test_order_and_names_without_a_share_change_nothing(case: Case, shuffle: random.Random) -> None:
    """Kills sums, ties or groups that depend on which task was read first, and a task without records that moves others."""
    given, mix = case
    got, mix = met(given, mix)
    turned = list(given.items())
    shuffle.shuffle(turned)
    more = dict(turned)
    if isinstance(mix.rates, Proportional):
        more["0"] = Supply(0, 0, 0)
    if isinstance(mix.rates, Explicit):
        more["0"] = Supply(7, 70, 7)
        mix = mix.model_copy(update={"rates": Explicit(weights={"0": 0.0, **dict(reversed(mix.rates.weights.items()))})})
    again = plan_counts(more, mix)
    assert {name: count for name, count in again.counts.items() if name != "0"} == got.counts
    assert again.counts.get("0", 0) == 0


@settings(max_examples=120)
@given(mixtures())
def test_what_moved_is_told_task_by_task(case: Case) -> None:
    """Kills a refill that the notes do not mention."""
    got, _ = met(*case)
    moved = [share for share in got.tasks if share.num_planned != share.num_promised]
    told = [note for note in got.notes if note.startswith("refilled")]
    assert bool(told) == any(share.num_planned > share.num_promised for share in moved)
    for share in moved if told else ():
        assert f"{share.task} {share.num_promised:,} -> {share.num_planned:,}" in told[0]


@settings(max_examples=120)
@given(mixtures())
def test_without_refill_nobody_gets_what_a_cap_frees(case: Case) -> None:
    """Kills a refill in disguise: with `refill: none` each has what it would have without caps, cut at its cap."""
    given, mix = case
    if isinstance(mix.rates, UniMax) or mix.rates.kind == "groups":
        mix = mix.model_copy(update={"rates": Equal()})
    mix = mix.model_copy(update={"refill": "none", "min_examples": None})
    got, mix = met(given, mix)
    free = plan_counts(given, mix.model_copy(update={"max_visits": None}))
    for share in got.tasks:
        cap = bound_of(mix.max_visits, share.task)
        uncapped = free.counts[share.task]
        assert share.num_planned == (uncapped if cap is None else min(uncapped, cap * share.supply.num_examples))
        assert share.num_unfilled == uncapped - share.num_planned
    assert any("stay unused" in note for note in got.notes) == (got.num_unfilled > 0)


def book(**mix: object) -> Mixture:
    return plan_counts(SMALL_BOOK, MixSpec(rates=Equal(), total_examples=15_000, **mix))  # type: ignore[arg-type]


def test_the_books_example_is_told_in_full() -> None:
    """Kills a note that gives totals only. The book's own code stops at 11,500 of 15,000 and says nothing."""
    assert book(max_visits=3).notes == (
        "held at mix.max_visits 3: code at 6,000, maths at 1,500 examples",
        "refilled, examples by the rates alone -> planned: code 5,000 -> 6,000, maths 5,000 -> 1,500, qa 5,000 -> 7,500",
    )
    left = book(max_visits=3, refill="none")
    assert sum(left.counts.values()) == 11_500
    assert left.notes == (
        "held at mix.max_visits 3: maths at 1,500 examples",
        "unfilled (mix.refill: none): 3,500 examples stay unused: maths 3,500",
    )


def test_caps_by_name() -> None:
    """Kills a default that overrides a name, and a name without a default that caps the others."""
    assert book(max_visits={"maths": 2}).counts == {"maths": 1_000, "code": 7_000, "qa": 7_000}
    assert book(max_visits={"default": 3, "maths": 5}).counts == {"maths": 2_500, "code": 6_000, "qa": 6_500}


def test_minima_are_paid_by_the_others_in_proportion() -> None:
    """Kills a minimum that is added on top of the total, or taken from the largest alone."""
    given = {name: Supply(n, n, n) for name, n in {"a": 6_000, "b": 3_000, "rare": 10}.items()}
    mix = MixSpec(total_examples=901, min_examples={"rare": 100}, max_visits={"rare": 10})
    got = plan_counts(given, mix)
    assert got.counts == {"a": 534, "b": 267, "rare": 100}
    assert "raised to mix.min_examples: rare from 1 to 100" in got.notes
    assert plan_counts(given, mix.model_copy(update={"min_examples": 100})).counts == got.counts


def test_minima_that_cannot_be_are_refused() -> None:
    """Kills a minimum above its cap, minima above the budget, and a minimum for a task that has no share."""
    given = {name: Supply(n, n, n) for name, n in {"a": 60, "rare": 10}.items()}
    with pytest.raises(PlanError, match=r"`rare` can give: its 10 examples under mix.max_visits 3 make at most 30;"):
        plan_counts(given, MixSpec(min_examples={"rare": 31}, max_visits=3))
    with pytest.raises(PlanError, match=r"mix.total_examples 50 is too little .* the minima alone take 60;"):
        plan_counts(given, MixSpec(min_examples=30, total_examples=50))
    assert plan_counts(given, MixSpec(min_examples=30, total_examples=60)).counts == {"a": 30, "rare": 30}
    with pytest.raises(PlanError, match="the rates give `rare` no share"):
        plan_counts(given, MixSpec(rates=Explicit(weights={"a": 1.0}), min_examples={"rare": 1}))


def test_a_budget_in_supervised_tokens_counts_those() -> None:
    """Kills a budget of targets spent in tokens, and one on tasks that have no target."""
    given = {"short": Supply(100, 1_000, 200), "long": Supply(100, 9_000, 800)}
    got = plan_counts(given, MixSpec(rates=Equal(), count="supervised_tokens", total_supervised_tokens=1_600))
    assert got.counts == {"long": 100, "short": 400}
    with pytest.raises(PlanError, match="`none` has a share but no supervised token"):
        plan_counts(given | {"none": Supply(5, 50, 0)}, MixSpec(total_supervised_tokens=10))


def test_epochs_that_cannot_be_met_are_named_rounded_down() -> None:
    """Kills 2.33333 rounded to 2.33334, which is refused again."""
    given = {"a": Supply(2, 2, 2), "b": Supply(1, 1, 1)}
    for visits in (1, 2):
        mix = MixSpec(epochs=7.0, max_visits={"a": visits, "b": 3})
        with pytest.raises(PlanError, match=f"reach at most {math.floor((2 * visits + 3) * 1e5 / 3) / 1e5:g};"):
            plan_counts(given, mix)


def test_rates_over_sources_speak_of_sources() -> None:
    """Kills a message about a task that is a source."""
    given = {"web": Supply(0, 0, 0, "5 records were left out: 5 too_long"), "books": Supply(3, 3, 3)}
    with pytest.raises(
        PlanError, match=r"source `web` has a share but no training record \(5 records were left out: 5 too_long\)"
    ):
        plan_counts(given, MixSpec(rates=Equal(), over="sources"))
    assert any(note.startswith("source web: no share") for note in plan_counts(given, MixSpec(over="sources")).notes)
