"""Rates: from the sizes of tasks to how many examples each gives, exactly.

    sizes --rate rule--> weights --budget, caps, refill--> quotas --largest remainder--> integer counts

All arithmetic is on integers and fractions, so a count never depends on the order of tasks or on rounding in floats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from tutelage.errors import PlanError, did_you_mean
from tutelage.plan.spec import Equal, Explicit, MixSpec, Proportional, Rates, Temperature

Unit = Literal["examples", "tokens", "supervised_tokens"]
_FEW_VISITS = 4  # beyond about four visits repeated records stop paying (arXiv 2305.16264)
_EXACT_BITS = 4096


@dataclass(frozen=True)
class Supply:
    """What a task has to give: its training examples, their tokens, and the tokens among them that carry loss weight."""

    num_examples: int
    num_tokens: int
    num_supervised: int

    def size(self, count: Unit) -> int:
        """The supply in the unit that rates count."""
        sizes = {"examples": self.num_examples, "tokens": self.num_tokens, "supervised_tokens": self.num_supervised}
        return sizes[count]


@dataclass(frozen=True)
class TaskShare:
    """One task's line of a mixture: `promised_share` is of the unit that rates count, `num_planned` is in examples."""

    task: str
    supply: Supply
    promised_share: float
    num_planned: int
    is_capped: bool


@dataclass(frozen=True)
class Mixture:
    """How many examples each task gives (by name), and how many the caps left unplanned."""

    tasks: tuple[TaskShare, ...]
    num_unfilled: int
    notes: tuple[str, ...]

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


def compute_rates(sizes: Mapping[str, float], rates: Rates | None = None) -> dict[str, float]:
    """The share of each task, summing to 1, in the unit that `sizes` is in.

    Temperature is q_i = p_i^(1/T) / sum_j p_j^(1/T) (T5, arXiv 1910.10683, section 3.5.2): T=1 is proportional, T=inf equal.

    >>> sizes = {"qa": 9000, "maths": 1000}
    >>> compute_rates(sizes)
    {'qa': 0.9, 'maths': 0.1}
    >>> compute_rates({"qa": 1600, "maths": 100}, Temperature(temperature=2.0))          # sqrt(16) : sqrt(1)
    {'qa': 0.8, 'maths': 0.2}
    >>> compute_rates(sizes, Explicit(weights={"maths": 3.0, "qa": 1.0}))
    {'qa': 0.25, 'maths': 0.75}

    PlanError when explicit weights name an unknown task or are all 0.
    """
    weights = rate_weights(sizes, rates or Proportional())
    total = sum(weights.values())
    return {name: float(weight / total) for name, weight in weights.items()}


def rate_weights(sizes: Mapping[str, float], rates: Rates) -> dict[str, Fraction]:
    """The rule's weight of each task, not normalised; decimals count as written (0.1 is one tenth)."""
    if not any(size > 0 for size in sizes.values()):
        raise PlanError("no task has a training record; look at what the stages before dropped, and why")
    match rates:
        case Proportional():
            return {name: _exact(size) for name, size in sizes.items()}
        case Equal():
            return {name: Fraction(1) for name in sizes}
        case Temperature(temperature=1.0):
            return {name: _exact(size) for name, size in sizes.items()}
        case Temperature():
            largest = max(sizes.values())  # ratios up to 1: nothing overflows, however cold
            return {name: _exact(_tempered(size / largest, rates.temperature)) for name, size in sizes.items()}
        case Explicit():
            return _explicit_weights(sizes, rates.weights)


def _tempered(ratio: float, temperature: float) -> float:
    return float(ratio ** (1.0 / temperature)) if ratio > 0 else 0.0


def _explicit_weights(sizes: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, Fraction]:
    for name in weights:
        if name not in sizes:
            raise PlanError(f"mix.rates.weights.{name}: no such task; {did_you_mean(name, sizes)}")
    if not any(weights.values()):
        raise PlanError("mix.rates.weights: every weight is 0; give at least one task a positive one")
    return {name: _exact(weights.get(name, 0.0)) for name in sizes}


def _exact(value: Fraction | float) -> Fraction:
    return Fraction(str(float(value))) if isinstance(value, float) else Fraction(value)


def allocate(
    weights: Mapping[str, Fraction | float],
    total: Fraction | int,
    *,
    caps: Mapping[str, int] | None = None,
    costs: Mapping[str, Fraction] | None = None,
    refill: Literal["water_filling", "none"] = "water_filling",
) -> Allocation:
    """Integer counts in proportion to `weights` that use up `total`, none above its cap.

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
    caps = caps or {}
    names = [name for name in weights if weights[name] > 0]
    shares, _ = _integers({name: _exact(weights[name]) for name in names})
    prices, scale = _integers({name: costs[name] if costs else Fraction(1) for name in names})
    if refill == "none":
        free = _settle(_fill(shares, Fraction(total) / scale, {}, prices), shares, {})
        counts = {name: min(count, caps.get(name, count)) for name, count in free.items()}
    else:
        level = _fill(shares, Fraction(total) / scale, caps, prices)
        counts = free = _settle(level, shares, caps)
    capped = frozenset(name for name in names if counts[name] == caps.get(name))
    unfilled = sum(free.values()) - sum(counts.values())
    return Allocation({name: counts.get(name, 0) for name in weights}, capped, unfilled)


def _integers(values: Mapping[str, Fraction]) -> tuple[dict[str, int], Fraction]:
    """Whole numbers in the same proportion, and the factor back; exact unless the common denominator is enormous."""
    common = math.lcm(*(value.denominator for value in values.values()))
    if common.bit_length() > _EXACT_BITS:  # hundreds of tasks: a part in 2^256 keeps this linear in their number
        common = 1 << 256
    return {name: max(round(value * common), 1) for name, value in values.items()}, Fraction(1, common)


def _fill(shares: Mapping[str, int], total: Fraction, caps: Mapping[str, int], prices: Mapping[str, int]) -> Fraction:
    """The water level: examples per unit of share for everyone below a cap."""
    rest, demand = total, sum(shares[name] * prices[name] for name in shares)
    for name in sorted(caps.keys() & shares.keys(), key=lambda name: (Fraction(caps[name], shares[name]), name)):
        if caps[name] * demand > rest * shares[name]:
            break
        rest -= caps[name] * prices[name]
        demand -= shares[name] * prices[name]
    if demand == 0:
        if rest > 0:
            raise PlanError(f"the caps hold only {sum(caps[name] for name in shares):,} examples")
        return max((Fraction(caps[name], shares[name]) for name in shares), default=Fraction(0))
    return Fraction(rest, demand)


def _settle(level: Fraction, shares: Mapping[str, int], caps: Mapping[str, int]) -> dict[str, int]:
    """Whole counts at a water level: each quota's floor, and one more for the largest remainders (ties by name)."""
    quotas = {name: min(level * share, Fraction(caps.get(name, level * share))) for name, share in shares.items()}
    counts = {name: math.floor(quota) for name, quota in quotas.items()}
    missing = math.floor(sum(quotas.values()) + Fraction(1, 2)) - sum(counts.values())
    by_remainder = sorted(quotas, key=lambda name: (counts[name] - quotas[name], name))
    for name in by_remainder[:missing]:
        counts[name] += 1
    return counts


def plan_counts(supplies: Mapping[str, Supply], mix: MixSpec) -> Mixture:
    """The mixture that a recipe asks for: examples of each task, exact, none above `max_visits` per record.

    >>> book = {name: Supply(n, n, n) for name, n in {"qa": 10_000, "maths": 500, "code": 2_000}.items()}
    >>> plan_counts(book, MixSpec(rates=Equal(), total_examples=15_000, max_visits=3)).counts
    {'code': 6000, 'maths': 1500, 'qa': 7500}

    A share of tokens becomes a count of examples through the task's mean tokens per example. Refused with PlanError: a
    task with a share but no record, an unknown task, a budget that the caps cannot reach (the largest that they can is
    named), a budget of no example.
    """
    supplies = dict(sorted(supplies.items()))
    sizes = {name: supply.size(mix.count) for name, supply in supplies.items()}
    weights = rate_weights(sizes, mix.rates)
    drawn = _with_share(supplies, weights, mix)
    means = {name: Fraction(sizes[name], drawn[name].num_examples) for name in drawn}
    in_examples = {name: weights[name] / means[name] if name in drawn else Fraction(0) for name in supplies}
    total, costs = _budget(drawn, means, mix)
    caps = {name: mix.max_visits * supply.num_examples for name, supply in drawn.items()} if mix.max_visits else {}
    if caps and mix.refill == "water_filling":
        _check_reachable(total, caps, costs, mix)
    got = allocate(in_examples, total, caps=caps, costs=costs, refill=mix.refill)
    if not any(got.counts.values()):
        raise PlanError(f"{_budget_text(mix)} comes to no example at all; give a larger budget")
    rate_sum = sum(weights.values())
    tasks = tuple(
        TaskShare(name, supply, float(weights[name] / rate_sum), got.counts[name], name in got.capped)
        for name, supply in supplies.items()
    )
    return Mixture(tasks, got.num_unfilled, tuple(_notes(tasks, got, mix)))


def _with_share(supplies: Mapping[str, Supply], weights: Mapping[str, Fraction], mix: MixSpec) -> dict[str, Supply]:
    drawn = {name: supply for name, supply in supplies.items() if weights[name] > 0}
    for name, supply in drawn.items():
        if supply.num_examples == 0 or supply.size(mix.count) == 0:
            what = "training record" if supply.num_examples == 0 else mix.count.replace("_", " ").rstrip("s")
            raise PlanError(
                f"mix.rates ({mix.rates.kind}): task `{name}` has a share but no {what}; see what dropped its records, "
                "or leave the task out (explicit weight 0)"
            )
    return drawn


def _budget(drawn: Mapping[str, Supply], means: Mapping[str, Fraction], mix: MixSpec) -> tuple[Fraction, dict[str, Fraction]]:
    """The budget, and what one example of each task takes from it. Epochs are of the tasks that have a share."""
    if mix.total_examples is not None:
        return Fraction(mix.total_examples), dict.fromkeys(drawn, Fraction(1))
    if mix.total_tokens is not None:
        return Fraction(mix.total_tokens), {n: Fraction(s.num_tokens, s.num_examples) for n, s in drawn.items()}
    whole = sum(supply.size(mix.count) for supply in drawn.values())
    return _exact(1 if mix.epochs is None else mix.epochs) * whole, dict(means)


def _check_reachable(total: Fraction, caps: Mapping[str, int], costs: Mapping[str, Fraction], mix: MixSpec) -> None:
    most = sum(caps[name] * costs[name] for name in caps)
    if total <= most:
        return
    if mix.total_examples is None and mix.total_tokens is None:
        epochs = _exact(1 if mix.epochs is None else mix.epochs)
        largest = f"{float(most * epochs / total):.6g}"
    else:
        largest = f"{math.floor(most):,}"
    raise PlanError(
        f"{_budget_text(mix)} cannot be met: with mix.max_visits {mix.max_visits} the tasks that have a share reach at "
        f"most {largest}; ask for that, raise mix.max_visits, or set mix.refill: none"
    )


def _budget_text(mix: MixSpec) -> str:
    if mix.total_examples is not None:
        return f"mix.total_examples {mix.total_examples:,}"
    if mix.total_tokens is not None:
        return f"mix.total_tokens {mix.total_tokens:,}"
    return f"mix.epochs {1 if mix.epochs is None else mix.epochs:g}"


def _notes(tasks: tuple[TaskShare, ...], got: Allocation, mix: MixSpec) -> list[str]:
    """What a reader of the plan should not have to work out."""
    notes = []
    for task in tasks:
        if task.promised_share > 0 and task.num_planned == 0:
            notes.append(f"task {task.task}: its share of {task.promised_share:.2%} rounds to no example")
        if task.promised_share == 0:
            notes.append(f"task {task.task}: no share, so none of its {task.supply.num_examples:,} examples is planned")
        most = -(-task.num_planned // task.supply.num_examples) if task.num_planned else 0
        if most > _FEW_VISITS:
            notes.append(f"task {task.task}: records are seen up to {most} times; mix.max_visits sets a bound")
    if got.capped:
        names = ", ".join(sorted(got.capped))
        fate = (
            f"{got.num_unfilled:,} examples of the budget stay unused" if mix.refill == "none" else "the rest went to the others"
        )
        notes.append(f"held at mix.max_visits {mix.max_visits}: {names}; {fate}")
    return notes
