"""Rates: from the sizes of tasks to how many examples each gives, exactly.

    sizes --rules--> weights --budget, bounds, refill (pour)--> quotas --largest remainder--> integer counts

All arithmetic is on integers and fractions, so a count never depends on the order of tasks or on rounding in floats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from tutelage.errors import PlanError, did_you_mean
from tutelage.plan import remarks
from tutelage.plan.budget import Bounds, Budget, Supply, Unit, bounds_of, budget_of, cap_text, check_budget
from tutelage.plan.pour import Number, Vessel, amount_worth, integers, join, pour, settle
from tutelage.plan.rates_spec import Counts, Proportional, Rates, bound_names, bound_of, uses_unimax
from tutelage.plan.remarks import TaskShare
from tutelage.plan.rules import Share, UnknownName, exact, share_tree
from tutelage.plan.spec import MixSpec
from tutelage.plan.timetable import Timetable

__all__ = ["Allocation", "Mixture", "Supply", "TaskShare", "allocate", "compute_rates", "plan_counts", "rate_weights"]


@dataclass(frozen=True)
class Mixture:
    """How many examples each task (or source) gives, by name, and how many the caps left unplanned."""

    tasks: tuple[TaskShare, ...]
    num_unfilled: int
    notes: tuple[str, ...]
    timetable: Timetable | None = None
    """When each comes, where a schedule says so."""

    @property
    def counts(self) -> dict[str, int]:
        """Task to planned examples."""
        return {task.task: task.num_planned for task in self.tasks}


@dataclass(frozen=True)
class Allocation:
    """Integer counts by name; `capped` names those held at their cap, `num_unfilled` what the caps left over."""

    counts: dict[str, int]
    capped: frozenset[str]
    num_unfilled: int


def compute_rates(sizes: Mapping[str, float], rates: Rates | None = None, *, budget: float | None = None) -> dict[str, float]:
    """The share of each task, summing to 1, in the unit that `sizes` is in.

    Temperature is q_i = p_i^(1/T) / sum_j p_j^(1/T) (T5, arXiv 1910.10683, section 3.5.2): T=1 is proportional, T=inf equal.
    `Capped` puts min(size, K) in place of the size. `UniMax` (arXiv 2304.09151) depends on the budget, in the same unit.

    >>> sizes = {"qa": 9000, "maths": 1000}
    >>> compute_rates(sizes)
    {'qa': 0.9, 'maths': 0.1}
    >>> from tutelage.plan.rates_spec import Capped, Explicit, Group, Groups, Temperature, UniMax
    >>> compute_rates({"qa": 1600, "maths": 100}, Temperature(temperature=2.0))          # sqrt(16) : sqrt(1)
    {'qa': 0.8, 'maths': 0.2}
    >>> compute_rates(sizes, Explicit(weights={"maths": 3.0, "qa": 1.0}))
    {'qa': 0.25, 'maths': 0.75}
    >>> compute_rates(sizes, Capped(cap=3000))
    {'qa': 0.75, 'maths': 0.25}
    >>> compute_rates(sizes, UniMax(max_epochs=2.0), budget=8000)                        # 2 x 1000, and the rest
    {'qa': 0.75, 'maths': 0.25}
    >>> groups = {"hard": Group(weight=1.5, members=("maths",)), "easy": Group(weight=1.0, members=("qa",))}
    >>> compute_rates(sizes, Groups(groups=groups))
    {'qa': 0.4, 'maths': 0.6}

    PlanError when the rates name an unknown task, when every weight is 0, and for UniMax without a budget or with one above
    `max_epochs` passes over all.
    """
    rule = rates or Proportional()
    tree = share_tree(sizes, rule)
    if uses_unimax(rule) and budget is None:
        raise PlanError("the shares of `unimax` depend on the budget; give `budget=`, in the unit of the sizes")
    own = {share.name: share.max_epochs * exact(sizes[share.name]) for share in tree.leaves() if share.max_epochs is not None}
    vessel = _vessel(tree, least={}, most=own)
    total = Fraction(1) if budget is None or not own else exact(budget)
    if total <= 0 or (vessel.high is not None and total > vessel.high):
        most = "any above 0" if vessel.high is None else f"{float(vessel.high):g} at most"
        raise PlanError(f"budget {budget:g} cannot be met with the max_epochs of `unimax`; it can be {most}")
    got = pour(vessel, total)
    return {name: float(got.get(name, 0) / total) for name in sizes}


def rate_weights(sizes: Mapping[str, float], rates: Rates, *, noun: str = "task") -> dict[str, Fraction]:
    """The rule's weight of each task, in any scale and without UniMax's cap; decimals count as written (0.1 is one tenth)."""
    tree = share_tree(sizes, rates, noun=noun)
    if any(part.parts for part in tree.parts):
        got = {name: Fraction(share) for name, share in pour(_vessel(tree, least={}, most={}), Fraction(1)).items()}
    else:
        got = {share.name: share.weight for share in tree.parts}
    return {name: got.get(name, Fraction(0)) for name in sizes}


def allocate(
    weights: Mapping[str, Fraction | float],
    total: Fraction | int,
    *,
    caps: Mapping[str, int] | None = None,
    least: Mapping[str, int] | None = None,
    costs: Mapping[str, Fraction] | None = None,
    refill: Literal["water_filling", "none"] = "water_filling",
) -> Allocation:
    """Integer counts in proportion to `weights` that use up `total`, none above its cap or below its `least`.

    Water-filling: count_i = min(level * weight_i, cap_i) with the one level that uses up the total, so no other counts
    below the caps are nearer to the weights. `costs` is what one example takes from the total (1 when left out; its
    tokens, when the total is in tokens). Fractions are settled by largest remainder, ties by name.

    >>> equal, caps = {"qa": 1, "maths": 1, "code": 1}, {"qa": 30_000, "maths": 1_500, "code": 6_000}
    >>> allocate(equal, 15_000, caps=caps).counts
    {'qa': 7500, 'maths': 1500, 'code': 6000}
    >>> left = allocate(equal, 15_000, caps=caps, refill="none")
    >>> left.counts, left.num_unfilled
    ({'qa': 5000, 'maths': 1500, 'code': 5000}, 3500)

    With costs of 1 the counts sum to `total` exactly; else to the whole number of examples nearest to it. PlanError when
    the caps hold less than the total.
    """
    caps = {name: cap for name, cap in (caps or {}).items() if weights.get(name)}
    tree = Share("", Fraction(1), tuple(Share(name, exact(weights[name])) for name in sorted(weights) if weights[name] > 0))
    names = [share.name for share in tree.parts]
    means = dict.fromkeys(names, Fraction(1))
    prices = {name: costs[name] for name in names} if costs else means
    if refill == "water_filling" and all(name in caps for name in names):
        most = sum((caps[name] * prices[name] for name in names), start=Fraction(0))
        if total > most:
            raise PlanError(f"the caps hold only {sum(caps[name] for name in names):,} examples")
    bounds = Bounds(least or {}, {}, caps if refill == "water_filling" else {})
    got = _divide(tree, Fraction(total), means, prices, bounds)
    cuts = caps if refill == "none" else {}
    counts = {name: min(count, cuts.get(name, count)) for name, count in got.counts.items()}
    capped = frozenset(name for name in names if counts[name] == caps.get(name))
    unfilled = sum(got.counts.values()) - sum(counts.values())
    return Allocation({name: counts.get(name, 0) for name in weights}, capped, unfilled)


@dataclass(frozen=True)
class _Division:
    """Whole examples by name, and the exact share of each in the unit that rates count."""

    counts: dict[str, int]
    shares: dict[str, Fraction]


def _divide(
    tree: Share, total: Fraction, means: Mapping[str, Fraction], costs: Mapping[str, Fraction], bounds: Bounds
) -> _Division:
    """Pours `total` over a tree; one example is `means` in the unit of the rates, and `costs` in that of the total."""
    sizes, unit = integers(means)
    vessel = _vessel(
        tree,
        least={name: count * sizes[name] for name, count in bounds.least.items()},
        most={name: count * sizes[name] for name, count in bounds.most.items()},
    )
    amount: Number = total / unit
    if costs != means:
        prices, price_unit = integers({name: costs[name] / sizes[name] for name in sizes})
        amount = amount_worth(vessel, total / price_unit, prices)
    amount = max(amount, vessel.low) if vessel.high is None else min(max(amount, vessel.low), vessel.high)
    got = pour(vessel, amount)
    counts = settle(vessel, {name: Fraction(got[name]) / sizes[name] for name in got})
    return _Division(counts, {name: Fraction(got[name]) / (amount or 1) for name in got})


def _vessel(share: Share, *, least: Mapping[str, Number], most: Mapping[str, Number]) -> Vessel:
    """A tree of weights with bounds on its names, all in one unit."""
    if not share.parts:
        return Vessel(share.name, share.weight, least.get(share.name, 0), most.get(share.name))
    return join(share.name, share.weight, (_vessel(part, least=least, most=most) for part in share.parts))


def plan_counts(supplies: Mapping[str, Supply], mix: MixSpec) -> Mixture:
    """The mixture that a recipe asks for: examples of each task, exact, none above `max_visits` per record.

    >>> from tutelage.plan.rates_spec import Counts, Equal
    >>> book = {name: Supply(n, n, n) for name, n in {"qa": 10_000, "maths": 500, "code": 2_000}.items()}
    >>> plan_counts(book, MixSpec(rates=Equal(), total_examples=15_000, max_visits=3)).counts
    {'code': 6000, 'maths': 1500, 'qa': 7500}
    >>> plan_counts(book, MixSpec(rates=Equal(), total_examples=15_000, max_visits={"maths": 2})).counts
    {'code': 7000, 'maths': 1000, 'qa': 7000}
    >>> plan_counts(book, MixSpec(total_examples=25, min_examples=5)).counts              # 1 of 25 would be maths
    {'code': 5, 'maths': 5, 'qa': 15}
    >>> plan_counts(book, MixSpec(rates=Counts(counts={"qa": 700, "maths": 300}))).counts
    {'code': 0, 'maths': 300, 'qa': 700}

    A share of tokens becomes a count of examples through the task's mean tokens per example. Refused with PlanError: a
    task with a share but no record, an unknown task, a budget that the caps cannot reach (the largest that they can is
    named) or that the minima exceed, a minimum above its cap, a budget of no example.
    """
    supplies = dict(sorted(supplies.items()))
    tree, drawn, bounds = _read(supplies, mix)
    if isinstance(mix.rates, Counts):
        promised = _stated(mix.rates, drawn, bounds, mix)
        counts = filled = promised.counts
    else:
        budget = budget_of(mix, drawn)
        promised, filled = _filled(tree, drawn, bounds, budget, mix)
        cuts = bounds.most if mix.refill == "none" else {}
        counts = {name: min(count, cuts.get(name, count)) for name, count in filled.items()}
    shares = tuple(
        TaskShare(
            task=name,
            supply=supply,
            promised_share=float(promised.shares.get(name, 0)),
            num_promised=promised.counts.get(name, 0),
            num_planned=counts.get(name, 0),
            num_unfilled=filled.get(name, 0) - counts.get(name, 0),
            is_capped=name in bounds.most and counts[name] == bounds.most[name],
        )
        for name, supply in supplies.items()
    )
    notes = remarks.of_mixture(shares, tree, mix, caps=cap_text(mix, None, bounds.own))
    return Mixture(shares, sum(share.num_unfilled for share in shares), tuple(notes))


def examples_range(supplies: Mapping[str, Supply], mix: MixSpec) -> tuple[int, int | None]:
    """The fewest and the most examples that the minima and the caps of a recipe allow (None: no end).

    >>> examples_range({"qa": Supply(10, 70, 30), "maths": Supply(5, 50, 20)}, MixSpec(min_examples=3, max_visits=2))
    (6, 30)
    """
    _, drawn, bounds = _read(supplies, mix)
    is_capped = bounds.most.keys() == drawn.keys()
    return max(sum(bounds.least.values()), 1), sum(bounds.most.values()) if is_capped else None


def _read(supplies: Mapping[str, Supply], mix: MixSpec) -> tuple[Share, dict[str, Supply], Bounds]:
    """The rule as a tree, who has a share, and within which bounds; all that a recipe can get wrong is refused here."""
    check_names(mix, supplies)
    tree = share_tree({name: supply.size(mix.count) for name, supply in supplies.items()}, mix.rates, noun=mix.over[:-1])
    drawn = {name: supplies[name] for name in sorted(share.name for share in tree.leaves())}
    _check_records(drawn, mix)
    return tree, drawn, bounds_of(tree, drawn, mix)


def _filled(
    tree: Share, drawn: Mapping[str, Supply], bounds: Bounds, budget: Budget, mix: MixSpec
) -> tuple[_Division, dict[str, int]]:
    """What the rates alone would give, and what the bounds make of it (without refill: before the caps cut)."""
    means = {name: supply.mean(mix.count) for name, supply in drawn.items()}
    costs = means if budget.unit == mix.count else {name: supply.mean(budget.unit) for name, supply in drawn.items()}
    check_budget(budget, bounds, costs, mix)
    promised = _divide(tree, budget.total, means, costs, Bounds({}, bounds.own, bounds.own))
    inner = bounds.own if mix.refill == "none" else bounds.most
    is_bounded = bool(bounds.least) or inner != bounds.own
    filled = _divide(tree, budget.total, means, costs, Bounds(bounds.least, bounds.own, inner)) if is_bounded else promised
    if not any(filled.counts.values()):
        half = _divide(tree, Fraction(1, 2), means, dict.fromkeys(means, Fraction(1)), Bounds({}, bounds.own, inner))
        raise _too_small(half, budget, means, costs)
    return promised, filled.counts


def _too_small(half: _Division, budget: Budget, means: Mapping[str, Fraction], costs: Mapping[str, Fraction]) -> PlanError:
    """Half an example is rounded up to one: the budget that it takes is the smallest."""
    of_rates = Fraction(1, 2) / sum(half.shares[name] / means[name] for name in half.shares)
    least = sum((of_rates * half.shares[name] / means[name] * costs[name] for name in half.shares), start=Fraction(0))
    return PlanError(f"{budget} comes to no example at all; the smallest that comes to one is {budget.smallest_above(least)}")


def _stated(rates: Counts, drawn: Mapping[str, Supply], bounds: Bounds, mix: MixSpec) -> _Division:
    """The counts of the recipe in examples, each the nearest whole number."""
    counts = {}
    for name, supply in drawn.items():
        mean = supply.mean(mix.count)
        counts[name] = math.floor(rates.counts[name] / mean + Fraction(1, 2))
        most = bounds.most.get(name, counts[name])
        if counts[name] > most:
            raise PlanError(
                f"mix.rates.counts.{name}: {rates.counts[name]:,} {mix.count.replace('_', ' ')}, but with "
                f"{cap_text(mix, name, {})} its {supply.num_examples:,} records give at most {math.floor(most * mean):,}; "
                "ask for that, or raise the cap"
            )
    if not any(counts.values()):
        largest = max(drawn, key=lambda name: (drawn[name].mean(mix.count), name))
        least = math.ceil(drawn[largest].mean(mix.count) / 2)
        raise PlanError(f"mix.rates.counts come to no example at all; {least:,} of any of them comes to one")
    total = sum(rates.counts[name] for name in drawn)
    return _Division(counts, {name: Fraction(rates.counts[name], total) for name in drawn})


def check_names(mix: MixSpec, known: Iterable[str]) -> None:
    for field in ("max_visits", "min_examples"):
        for name in bound_names(getattr(mix, field)):
            if name not in known:
                raise UnknownName(name, f"mix.{field}.{name}: no such {mix.over[:-1]}; {did_you_mean(name, known)}")


def _check_records(drawn: Mapping[str, Supply], mix: MixSpec) -> None:
    """Everyone with a share has records, in every unit that is counted."""
    totals: dict[Unit, int | None] = {"tokens": mix.total_tokens, "supervised_tokens": mix.total_supervised_tokens}
    units = [mix.count, *(unit for unit, total in totals.items() if total is not None)]
    for name, supply in drawn.items():
        for unit in units:
            if supply.num_examples == 0 or supply.size(unit) == 0:
                what = "training record" if supply.num_examples == 0 else unit.replace("_", " ").rstrip("s")
                why = f" ({supply.lost})" if supply.lost else ""
                raise PlanError(
                    f"mix.rates ({mix.rates.kind}): {mix.over[:-1]} `{name}` has a share but no {what}{why}; see what dropped "
                    f"its records, or leave the {mix.over[:-1]} out (explicit weight 0)"
                )
    for name in bound_names(mix.min_examples):
        if name not in drawn:
            least = bound_of(mix.min_examples, name)
            raise PlanError(f"mix.min_examples.{name}: {least:,} wanted, but the rates give `{name}` no share; leave one out")
