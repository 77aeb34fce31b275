r"""Mixtures: how much of each task a run takes, and when: rates alone, or a schedule of them.

    supplies, mix --constant rates--> rates.plan_counts ------------------------> Mixture
                  \--schedule--> stretches --fit--> totals --round--> timetable --/

Under a schedule totals, caps and minima are those of the whole run; what a cap frees goes to the tasks of the same stretches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from tutelage.errors import PlanError
from tutelage.plan import remarks
from tutelage.plan.budget import Bounds, Budget, Supply, bounds_of, budget_of, cap_text, check_budget
from tutelage.plan.online import OnlineMixer, OnlineRule
from tutelage.plan.rates import Mixture, allocate, check_names, examples_range, plan_counts
from tutelage.plan.rates_spec import bound_of
from tutelage.plan.reach import largest_budget
from tutelage.plan.remarks import TaskShare
from tutelage.plan.rules import Share
from tutelage.plan.schedule import Stretch, replay_factor, stretches_of
from tutelage.plan.schedule_spec import Online, TwoStage
from tutelage.plan.spec import MixSpec
from tutelage.plan.timetable import Timetable, fit_amounts, make_timetable
from tutelage.records import Float64

_DIGITS = 6
_MOST_OFF = 0.01  # of a stretch's budget: beyond this the minima do not fit

Exact = Mapping[str, Fraction]


def plan_mixture(supplies: Mapping[str, Supply], mix: MixSpec, *, examples_per_step: int | None = None) -> Mixture:
    """The mixture that a recipe asks for; with a schedule it has a timetable.

    Of an online schedule, which needs `examples_per_step`, it is what comes of it while no loss moves the shares.

    >>> from tutelage.plan.schedule_spec import TwoStage
    >>> supplies = {"maths": Supply(1000, 1000, 1000), "chat": Supply(3000, 3000, 3000)}
    >>> two = plan_mixture(supplies, MixSpec(schedule=TwoStage(first=["maths"], replay=0.1)))
    >>> two.counts, two.timetable.stretches                              # an epoch: all once, and the replay
    ({'chat': 3000, 'maths': 1100}, ({'chat': 0, 'maths': 1000}, {'chat': 3000, 'maths': 100}))

    PlanError as `plan_counts` says, and for a stage that the caps of its tasks cannot fill.
    """
    if mix.schedule is None:
        return plan_counts(supplies, mix)
    if isinstance(mix.schedule, Online):
        return _online(supplies, mix, online_rule(supplies, mix, examples_per_step=examples_per_step))
    return _scheduled(dict(sorted(supplies.items())), mix)


def examples_between(supplies: Mapping[str, Supply], mix: MixSpec) -> tuple[int, int | None]:
    """The fewest and the most examples that minima, caps and stages allow (None: no end).

    >>> from tutelage.plan.schedule_spec import TwoStage
    >>> supplies = {"maths": Supply(10, 70, 30), "chat": Supply(30, 300, 90)}
    >>> examples_between(supplies, MixSpec(schedule=TwoStage(first=["maths"], replay=0.5), max_visits=2))
    (1, 80)
    """
    if mix.schedule is None or isinstance(mix.schedule, Online):
        return examples_range(supplies, at_start(mix))
    run = _Run(dict(sorted(supplies.items())), mix)
    held = run.largest(dict.fromkeys(run.drawn, Fraction(1)))
    return max(sum(run.bounds.least.values()), 1), math.floor(held[0]) if held else None


def online_rule(supplies: Mapping[str, Supply], mix: MixSpec, *, examples_per_step: int | None) -> OnlineRule:
    """What an online mixture goes by. PlanError where it could not keep what the recipe says."""
    assert isinstance(mix.schedule, Online)
    if examples_per_step is None:
        raise PlanError(
            "mix.schedule (online): needs batch.examples_per_step; with batch.slots_per_step the number of steps, and so the "
            "learning rate, would depend on the mixture, which is not known ahead"
        )
    drawn = [share for share in plan_counts(supplies, at_start(mix)).tasks if share.promised_share > 0]
    if len(drawn) * mix.schedule.floor >= 1:
        raise PlanError(
            f"mix.schedule.floor {mix.schedule.floor:g}: {len(drawn)} tasks with that much each leave nothing to share out; "
            f"it can be anything below {1 / len(drawn):.4g}"
        )
    visits = {share.task: bound_of(mix.max_visits, share.task) for share in drawn}
    return OnlineRule(
        shares={share.task: share.promised_share for share in drawn},
        means={share.task: float(share.supply.mean(mix.count)) for share in drawn},
        caps={share.task: limit * share.supply.num_examples for share in drawn if (limit := visits[share.task]) is not None},
        total=sum(share.num_planned for share in drawn),
        window=mix.schedule.every_steps * examples_per_step,
        step_size=mix.schedule.step_size,
        floor=mix.schedule.floor,
        reference=None if mix.schedule.reference == "start" else mix.schedule.reference,
    )


def at_start(mix: MixSpec) -> MixSpec:
    """The mixture that an online one starts with; any other as it is."""
    if not isinstance(mix.schedule, Online):
        return mix
    return mix.model_copy(update={"schedule": None, "rates": mix.schedule.rates})


def _online(supplies: Mapping[str, Supply], mix: MixSpec, rule: OnlineRule) -> Mixture:
    """The mixture of a mixer that hears of no loss."""
    mixer = OnlineMixer(rule)
    while not mixer.is_complete:
        mixer.next_window({})
    names = tuple(sorted(rule.shares))
    counts = np.array([[window.counts[name] for window in mixer.windows] for name in names])
    curve = np.concatenate([np.zeros((len(names), 1)), np.cumsum(counts, axis=1)], axis=1)
    borders = curve.sum(axis=0).astype(np.int64)
    wanted = np.array([[rule.shares[name]] for name in names])
    ends = tuple(borders[1:-1].tolist())
    timetable = Timetable(names, counts, borders, curve, wanted, np.array([0.0, 1.0]), ends)
    start = plan_counts(supplies, at_start(mix))
    shares = tuple(dataclasses.replace(share, num_planned=mixer.drawn.get(share.task, 0)) for share in start.tasks)
    note = "mix.schedule is online: this is the run at the starting shares; training decides anew within its total and caps"
    return Mixture(shares, 0, (*start.notes, note), timetable)


class _Run:
    """A schedule over what there is: who has a share, within which bounds over the run."""

    def __init__(self, supplies: dict[str, Supply], mix: MixSpec) -> None:
        assert mix.schedule is not None and not isinstance(mix.schedule, Online)
        self.supplies, self.mix, self.schedule = supplies, mix, mix.schedule
        check_names(mix, supplies)
        self.sizes = {name: supply.size(mix.count) for name, supply in supplies.items()}
        first = stretches_of(self.schedule, self.sizes, noun=mix.over[:-1])
        self.drawn = {name: supplies[name] for name in supplies if any(stretch.rates[name] for stretch in first)}
        self._check_records()
        self.tree = Share("", Fraction(1), tuple(Share(name, Fraction(1)) for name in self.drawn))
        self.bounds = bounds_of(self.tree, self.drawn, mix)
        self.means = {name: supply.mean(mix.count) for name, supply in self.drawn.items()}

    def _check_records(self) -> None:
        mix = self.mix
        for name, supply in self.drawn.items():
            if not self.sizes[name]:
                why = f" ({supply.lost})" if supply.lost else ""
                raise PlanError(
                    f"mix.schedule: {mix.over[:-1]} `{name}` has a share but no training record with "
                    f"{mix.count.replace('_', ' ')}{why}; see what dropped its records, or give it no share"
                )

    @cached_property
    def budget(self) -> Budget:
        """The recipe's budget; an epoch of two stages is every record once and the replay."""
        budget = budget_of(self.mix, self.drawn)
        if not isinstance(self.schedule, TwoStage) or budget.field != "epochs":
            return budget
        return dataclasses.replace(budget, worth=budget.worth * replay_factor(self.schedule, self.sizes))

    def stretches(self, costs: Exact) -> list[Stretch]:
        """The stretches of a budget to which one example of a task costs so much."""
        prices = {name: costs[name] / self.means[name] if name in costs else Fraction(0) for name in self.sizes}
        return stretches_of(self.schedule, self.sizes, prices=prices, noun=self.mix.over[:-1])

    def largest(self, costs: Exact) -> tuple[Fraction, list[Stretch]] | None:
        """The largest budget that fills every stage and the stretches that allow no more; None where there is no end."""
        shares: dict[frozenset[str], Fraction] = {}
        stretches = self.stretches(costs)
        for stretch in stretches:
            if stretch.names <= self.bounds.most.keys():
                shares[stretch.names] = shares.get(stretch.names, Fraction(0)) + stretch.share
        if not shares:
            return None
        holds = {name: self.bounds.most[name] * costs[name] for name in sorted(frozenset[str]().union(*shares))}
        most, tight = largest_budget(shares, holds)
        return most, [stretch for stretch in stretches if stretch.names in tight]

    def reachable(self, wanted: Float64, costs: Exact) -> Float64:
        """`wanted` without what cannot be: at the largest budget of all, some stages need their tasks to the last example."""
        held = self.largest(costs)
        if held is None or self.mix.refill == "none" or self.budget.total < held[0]:
            return wanted
        tight = {stretch.names for stretch in held[1]}
        is_tight = np.array([stretch.names in tight for stretch in self.stretches(costs)])
        is_spent = np.array([any(name in names for names in tight) for name in costs])
        return np.where(is_spent[:, None] & ~is_tight[None, :], 0.0, wanted)

    def check_stages(self, costs: Exact) -> None:
        """Refuses a budget at which the tasks of some stages, all of them capped, cannot fill these stages."""
        held = self.largest(costs)
        if held is None or self.budget.total <= held[0]:
            return
        most, tight = held
        names = sorted(frozenset[str]().union(*(stretch.names for stretch in tight)))
        where = " and ".join(dict.fromkeys(f"mix.schedule.{stretch.place}" for stretch in tight))
        needed = sum((stretch.share for stretch in tight), Fraction(0)) * self.budget.total
        holds = sum((self.bounds.most[name] * costs[name] for name in names), Fraction(0))
        raise PlanError(
            f"{where}: {float(needed):,.0f} {self.budget.unit.replace('_', ' ')} of {self.budget}, but with "
            f"{cap_text(self.mix, None, {})} its {self.mix.over} ({', '.join(names)}) hold {float(holds):,.0f}; the largest "
            f"budget that fills every stage is {self.budget.largest_within(most)}; ask for that, raise the cap, give the stage "
            "a smaller share or more tasks, or set mix.refill: none"
        )


def _scheduled(supplies: dict[str, Supply], mix: MixSpec) -> Mixture:
    run = _Run(supplies, mix)
    budget, bounds = run.budget, run.bounds
    costs = {name: supply.mean(budget.unit) for name, supply in run.drawn.items()}
    if mix.refill == "water_filling":
        run.check_stages(costs)
    check_budget(budget, bounds, costs, mix)
    stretches = run.stretches(costs)
    wanted = _amounts(stretches, budget.total, run.means, costs)
    fitted = wanted if mix.refill == "none" and not bounds.least else _fit(run.reachable(wanted, costs), costs, bounds, mix)
    more: dict[str, Any] = {"costs": costs, "refill": mix.refill}
    promised = allocate(_exact(run.drawn, wanted), budget.total, costs=costs)
    got = allocate(_exact(run.drawn, fitted), budget.total, caps=bounds.most, least=bounds.least, **more)
    if not any(got.counts.values()):
        raise PlanError(f"{budget} comes to no example at all; give a larger budget")
    timetable = make_timetable(
        fitted,
        got.counts,
        wanted=wanted * np.array([[float(mean)] for mean in run.means.values()]),
        progress=np.append(0.0, np.cumsum([float(stretch.share) for stretch in stretches])),
        stage_ends=_stage_ends(stretches),
        smallest_change=_smallest_change(stretches),
    )
    shares = tuple(_line(name, run, timetable, promised.counts, got.counts) for name in supplies)
    notes = [*remarks.of_mixture(shares, run.tree, mix, caps=cap_text(mix, None, {})), *_stage_notes(timetable, run)]
    return Mixture(shares, sum(share.num_unfilled for share in shares), tuple(notes), timetable)


def _amounts(stretches: Sequence[Stretch], total: Fraction, means: Exact, costs: Exact) -> Float64:
    """Examples of each task in each stretch (tasks, stretches) as the schedule wants them, before any bound."""
    rates = np.array([[float(stretch.rates[name]) for stretch in stretches] for name in means])
    in_examples = rates / np.array([[float(mean)] for mean in means.values()])
    taken = np.cumsum(in_examples * np.array([[float(cost)] for cost in costs.values()]), axis=0)[-1]
    budgets = np.array([float(stretch.share * total) for stretch in stretches])
    amounts: Float64 = in_examples * (budgets / taken)
    return amounts


def _fit(wanted: Float64, costs: Exact, bounds: Bounds, mix: MixSpec) -> Float64:
    """The nearest amounts within bounds. PlanError when minima do not fit into the stages."""
    prices = np.array([float(cost) for cost in costs.values()])
    caps = np.array([float(bounds.most.get(name, np.inf)) if mix.refill == "water_filling" else np.inf for name in costs])
    floors = np.array([float(bounds.least.get(name, 0)) for name in costs])
    if np.isinf(caps).all() and not bounds.least:
        return wanted
    fitted = fit_amounts(wanted, costs=prices, caps=caps, floors=floors)
    used, budgets = (prices[:, None] * fitted).sum(axis=0), (prices[:, None] * wanted).sum(axis=0)
    if bounds.least and np.abs(used - budgets).max() > _MOST_OFF * budgets.max():
        names = ", ".join(sorted(bounds.least))
        raise PlanError(f"mix.min_examples ({names}): the stages that these are in cannot hold so many; lower the minima")
    return fitted


def _exact(names: Iterable[str], amounts: Float64) -> dict[str, Fraction]:
    """Sums over the run as decimals: what floats blur is cut off, so that ties are ties on every machine."""
    sums = np.cumsum(amounts, axis=1)[:, -1].tolist()
    return {name: Fraction(str(round(amount, _DIGITS))) for name, amount in zip(names, sums, strict=True)}


def _stage_ends(stretches: Sequence[Stretch]) -> list[int]:
    return [i for i, (a, b) in enumerate(pairwise(stretches)) if a.place != b.place]


def _smallest_change(stretches: Sequence[Stretch]) -> float:
    """The share of the budget over which rates stay as they are where they change step by step; 1 where they jump only."""
    inner = [min(a.share, b.share) for a, b in pairwise(stretches) if a.place == b.place]
    return float(min(inner, default=Fraction(1)))


def _line(name: str, run: _Run, timetable: Timetable, promised: Mapping[str, int], planned: Mapping[str, int]) -> TaskShare:
    num_promised, num_planned = promised.get(name, 0), planned.get(name, 0)
    is_capped = name in run.bounds.most and num_planned == run.bounds.most[name]
    return TaskShare(
        task=name,
        supply=run.supplies[name],
        promised_share=timetable.promised(0.0, 1.0).get(name, 0.0),
        num_promised=num_promised,
        num_planned=num_planned,
        num_unfilled=max(num_promised - num_planned, 0) if is_capped and run.mix.refill == "none" else 0,
        is_capped=is_capped,
    )


def _stage_notes(timetable: Timetable, run: _Run) -> Iterator[str]:
    """What the two stages of a replay hold."""
    if isinstance(run.schedule, TwoStage) and len(timetable.stretches) == 2:
        for place, counts in zip(("first", "replay"), timetable.stretches, strict=True):
            parts = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
            yield f"mix.schedule.{place}: {sum(counts.values()):,} examples: {parts}"
