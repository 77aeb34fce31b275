"""Pictures: the numbers behind the drawings of a mixture. Pure: sizes and a rule in, shares and visits out.

    sizes --every T--> share by temperature, minority tasks over T, boost over proportional
    rates alone --supplies--> visits that each task would need, beside its cap and what was planned

The report room draws them and knows no rule; the numbers are plain values, so that they also go into `--json`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tutelage.plan.rates import compute_rates
from tutelage.plan.rates_spec import bound_of
from tutelage.plan.spec import MixSpec, Temperature

TEMPERATURES = (1.0, 2.0, 5.0, math.inf)
"""Temperatures that are always drawn: proportional, T5's, a flat one, equal."""
NUM_MINORITY = 6
_NUM_SHOWN = 24
_CURVE = tuple(1.0 + i / 4 for i in range(37))  # T from 1 to 10
_UNITS = {"examples": "examples", "tokens": "tokens", "supervised_tokens": "supervised"}


def shares_by_temperature(
    sizes: Mapping[str, float], temperatures: Iterable[float] = TEMPERATURES
) -> dict[float, dict[str, float]]:
    """The share of each task at each temperature, q_i = p_i^(1/T) / sum_j p_j^(1/T) (T5, arXiv 1910.10683, section 3.5.2).

    >>> shares_by_temperature({"qa": 1600, "maths": 100}, (2.0, math.inf))                       # 4 : 1, 1 : 1
    {2.0: {'qa': 0.8, 'maths': 0.2}, inf: {'qa': 0.5, 'maths': 0.5}}

    PlanError when no task has a size above 0.
    """
    return {T: compute_rates(sizes, Temperature(temperature=T)) for T in temperatures}


def boosts(shares: Mapping[str, float], sizes: Mapping[str, float]) -> dict[str, float]:
    """How many times its proportional share each task is given; tasks without a size are left out.

    >>> boosts({"qa": 0.5, "maths": 0.5}, {"qa": 900, "maths": 100})
    {'qa': 0.5555555555555556, 'maths': 5.0}
    """
    total = sum(sizes.values())
    return {task: shares.get(task, 0.0) / (size / total) for task, size in sizes.items() if size > 0}


def minority_tasks(sizes: Mapping[str, float], *, most: int = NUM_MINORITY) -> tuple[str, ...]:
    """The smaller half of the tasks that have a size, the smallest first, `most` at most; ties by name.

    >>> minority_tasks({"qa": 120, "maths": 8, "code": 15, "none": 0})
    ('maths',)
    >>> minority_tasks({"qa": 120, "maths": 8})
    ('maths',)
    """
    known = sorted((size, task) for task, size in sizes.items() if size > 0)
    return tuple(task for _, task in known[: min(len(known) // 2, most)])


def visits_needed(strata: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How often each record would be seen if the rates alone decided, without caps or minima.

    >>> visits_needed([{"name": "maths", "available_examples": 500, "promised_examples": 5_000}])
    {'maths': 10.0}
    """
    return {line["name"]: line["promised_examples"] / line["available_examples"] for line in strata if line["available_examples"]}


def picture_data(strata: Sequence[Mapping[str, Any]], mix: MixSpec) -> dict[str, Any]:
    """The numbers of all pictures of a plan as plain values, from the plan's facts: its lines by task (`strata`; by source
    where rates are over sources).

    Keys: `unit`; `temperature` (the recipe's own T as text, or None); `tasks` (those drawn, the largest first) and
    `num_tasks`; `shares` and `boosts` (task, T as text or `recipe`, value); `minority` (task, T, share); `visits` (task,
    needed, planned, cap); `composition` (unit, part, task, share). Of more than 24 tasks the 12 largest and 12 smallest are
    drawn.
    """
    sizes = {line["name"]: float(line[f"available_{_UNITS[mix.count]}"]) for line in strata}
    tasks = _shown(sizes)
    own = mix.rates.temperature if isinstance(mix.rates, Temperature) else None
    promised = {line["name"]: line["promised_share"] for line in strata}
    by_rule = {_name(T): shares for T, shares in shares_by_temperature(sizes).items()} | {"recipe": promised}
    boosted = {rule: boosts(shares, sizes) for rule, shares in by_rule.items() if rule != "1"}
    return {
        "unit": mix.count,
        "over": mix.over,
        "temperature": None if own is None else _name(own),
        "tasks": tasks,
        "num_tasks": sum(size > 0 for size in sizes.values()),
        "shares": [{"task": t, "rule": rule, "share": shares[t]} for rule, shares in by_rule.items() for t in tasks],
        "boosts": [{"task": t, "rule": rule, "boost": found[t]} for rule, found in boosted.items() for t in tasks],
        "minority": _minority(sizes, own),
        "visits": _visits(strata, mix, tasks),
        "composition": list(_composition(strata)),
    }


def _name(temperature: float) -> str:
    return "inf" if math.isinf(temperature) else f"{temperature:g}"


def _shown(sizes: Mapping[str, float]) -> list[str]:
    """Tasks with a size, the largest first; of many, both ends."""
    ordered = sorted((task for task in sizes if sizes[task] > 0), key=lambda task: (-sizes[task], task))
    half = _NUM_SHOWN // 2
    return ordered if len(ordered) <= _NUM_SHOWN else ordered[:half] + ordered[-half:]


def _minority(sizes: Mapping[str, float], own: float | None) -> list[dict[str, Any]]:
    """Shares of the minority tasks along T; the curve reaches the recipe's own T, infinity aside."""
    finite = own if own is not None and math.isfinite(own) else 1.0
    grid = sorted({T for T in (*_CURVE, finite) if T > 0})
    shares = shares_by_temperature(sizes, grid)
    return [{"task": task, "temperature": T, "share": shares[T][task]} for task in minority_tasks(sizes) for T in grid]


def _visits(strata: Sequence[Mapping[str, Any]], mix: MixSpec, tasks: Sequence[str]) -> list[dict[str, Any]]:
    needed, planned = visits_needed(strata), {line["name"]: line["visits_per_record"] for line in strata}
    return [
        {"task": task, "needed": needed.get(task, 0.0), "planned": planned[task], "cap": bound_of(mix.max_visits, task)}
        for task in tasks
    ]


def _composition(strata: Sequence[Mapping[str, Any]]) -> Iterable[dict[str, Any]]:
    """What there is and what is planned, in each unit, as shares."""
    for unit in _UNITS.values():
        for part in ("available", "planned"):
            total = sum(line[f"{part}_{unit}"] for line in strata)
            for line in strata:
                yield {"unit": unit, "part": part, "task": line["name"], "share": line[f"{part}_{unit}"] / max(total, 1)}
