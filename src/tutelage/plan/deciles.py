"""Deciles: the mixture of each tenth of training, as promised and as it came out of rounding, caps and packing."""

from __future__ import annotations

from typing import Any

import numpy as np

from tutelage.plan.assemble import Candidates, Plan
from tutelage.plan.budget import Unit
from tutelage.plan.spec import MixSpec
from tutelage.plan.sums import sum_by_part
from tutelage.records import Float64, Int64

_NUM_PARTS = 10


def decile_facts(plan: Plan, candidates: Candidates, *, mix: MixSpec) -> list[dict[str, Any]]:
    """One line per tenth of the steps (fewer when there are fewer steps): by task, shares in the unit that rates count.

    `promised` is what the recipe asks for in that part, before caps and rounding; `realised` what lies in its rows, and
    `realised_examples` the same in examples. Where rates are over sources, a task is promised what its part of each comes to.

    >>> from tutelage.plan.assemble import make_plan
    >>> from tutelage.plan.spec import BatchSpec
    >>> stages = [{"share": 0.5, "rates": "equal"}, {"share": 0.5, "rates": {"explicit": {"weights": {"qa": 1}}}}]
    >>> mix = MixSpec.model_validate({"schedule": {"stages": stages}, "total_examples": 8})
    >>> tasks = ["qa"] * 9 + ["code"] * 9
    >>> plan = make_plan(tasks, [8] * 18, mix=mix, batch=BatchSpec(slots_per_step=32))
    >>> candidates = Candidates(("code", "qa"), np.array([1] * 9 + [0] * 9), np.full(18, 8), np.full(18, 7), np.full(18, 7.0))
    >>> [(line["from"], line["promised"], line["realised"]) for line in decile_facts(plan, candidates, mix=mix)]
    [(0.0, {'code': 0.5, 'qa': 0.5}, {'code': 0.5, 'qa': 0.5}), (0.5, {'code': 0.0, 'qa': 1.0}, {'code': 0.0, 'qa': 1.0})]
    """
    num_steps = len(plan.steps)
    num_parts = min(_NUM_PARTS, num_steps)
    edges = np.arange(num_parts + 1) * num_steps // num_parts
    draws = np.append(0, np.cumsum(plan.steps.num_examples))[edges]
    units: set[Unit] = {"examples", mix.count, _budget_unit(mix)}
    amounts = {unit: _amounts(plan, candidates, draws, unit) for unit in units}
    examples, counted = amounts["examples"], amounts[mix.count]
    used = np.append(0.0, np.cumsum(amounts[_budget_unit(mix)].sum(axis=1)))
    names, of_task = plan.tasks, _task_parts(candidates, mix.count)
    return [
        {
            "from": float(edges[i] / num_steps),
            "to": float(edges[i + 1] / num_steps),
            "promised": _promised(plan, of_task, used[i] / used[-1], used[i + 1] / used[-1]),
            "realised": _shares(names, counted[i]),
            "realised_examples": _shares(names, examples[i]),
        }
        for i in range(num_parts)
    ]


def _amounts(plan: Plan, candidates: Candidates, draws: Int64, unit: Unit) -> Float64:
    """How much of each task lies in each part (parts, tasks); part p has the placements `draws[p] : draws[p + 1]`."""
    sums = sum_by_part(draws, plan.placements.example, candidates.task, candidates.size(unit), num_labels=len(plan.tasks))
    return sums.astype(np.float64)


def _budget_unit(mix: MixSpec) -> Unit:
    """What progress is measured in. A budget in steps is one in examples once they are counted."""
    units: tuple[Unit, ...] = ("examples", "tokens", "supervised_tokens")
    if mix.total_steps is not None:
        return "examples"
    return next((unit for unit in units if getattr(mix, f"total_{unit}") is not None), mix.count)


def _task_parts(candidates: Candidates, count: Unit) -> Float64:
    """How much of each name that rates give a share is of each task (tasks, names); the unit matrix where names are tasks."""
    strata, num = candidates.strata, len(candidates.strata.names)
    if candidates.mixed_by is None:
        return np.eye(num)
    cell = candidates.task * num + strata.code
    sums = np.bincount(cell, weights=candidates.size(count), minlength=len(candidates.tasks) * num)
    table = sums.reshape(len(candidates.tasks), num)
    parts: Float64 = table / np.maximum(table.sum(axis=0), 1)
    return parts


def _promised(plan: Plan, of_task: Float64, begin: float, end: float) -> dict[str, float]:
    shares = {share.task: share.promised_share for share in plan.mixture.tasks}
    if plan.mixture.timetable is not None:
        shares = dict.fromkeys(shares, 0.0) | plan.mixture.timetable.promised(begin, end)
    amounts = (of_task * np.array(list(shares.values()))).sum(axis=1)
    return dict(zip(plan.tasks, amounts.tolist(), strict=True))


def _shares(names: tuple[str, ...], amounts: Float64) -> dict[str, float]:
    whole = max(float(amounts.sum()), 1.0)
    return {name: amount / whole for name, amount in zip(names, amounts.tolist(), strict=True)}
