"""Plans to show: made-up arrays and facts of the book's tasks, through the real `make_plan`; and one whose names are attacks."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tutelage.plan.assemble import Candidates, Plan, mixture_facts, plan_candidates, step_facts, strata_facts
from tutelage.plan.pictures import picture_data
from tutelage.plan.spec import BatchSpec, Equal, MixSpec, Temperature
from tutelage.report.plan_view import PlanArrays, PlanView, plan_view
from tutelage.report.spec import CoverageSpec

BOOK = {"qa": 1200, "summarization": 800, "code": 150, "math": 80, "creative": 250, "translation": 400, "classification": 600}
"""The book's tasks at a hundredth of their size."""
MIX = MixSpec(rates=Temperature(temperature=2.0), epochs=2.0, max_visits=5)
CAPPED = MixSpec(rates=Equal(), total_examples=6000, max_visits=3)
OFTEN = MixSpec(rates=Equal(), total_examples=4000)


def fake_plan(sizes: dict[str, int] = BOOK, mix: MixSpec = MIX) -> tuple[Candidates, Plan]:
    """A plan of so many examples of each task, lengths drawn with a fixed seed."""
    draws = np.random.default_rng(0)
    names = tuple(sorted(sizes))
    task = np.repeat(np.arange(len(names), dtype=np.int32), [sizes[name] for name in names])
    lengths = np.clip(draws.gamma(3.0, 40.0 + 12.0 * task), 8, 512).astype(np.int32)
    learned = np.maximum(lengths * draws.uniform(0.3, 0.8, len(lengths)), 1).astype(np.int64)
    candidates = Candidates(names, task, lengths, learned, learned.astype(float))
    return candidates, plan_candidates(candidates, mix=mix, batch=BatchSpec(slots_per_step=4096, capacity=512), max_tokens=512)


def fake_facts(candidates: Candidates, plan: Plan, mix: MixSpec) -> dict[str, Any]:
    """The facts that the plan's stage writes of it, as far as a page reads them."""
    mixture = mixture_facts(plan, candidates, strata_facts(plan, candidates), count=mix.count)
    summed = [name for name in mixture[0] if name.startswith(("available_", "planned_"))]
    for i, line in enumerate(mixture):
        line |= {"length_ratio": 0.2 * (i + 1), "multi_turn_share": 0.02 * i, "supervised_share": 0.5}
    return {
        "capacity": plan.shape.capacity,
        "slots_per_step": plan.shape.slots,
        "num_steps": len(plan.steps),
        "packing_efficiency": plan.packing_efficiency,
        "steps": step_facts(plan.steps),
        "count": mix.count,
        "mixture": mixture,
        "strata": strata_facts(plan, candidates),
        "total": {name: sum(line[name] for line in mixture) for name in summed} | {"num_unfilled": plan.mixture.num_unfilled},
        "notes": list(plan.notes),
        "advice": [{"about": f"task {plan.tasks[0]}", "text": "outputs are short", "evidence": "arXiv 2401.13586: measured"}],
        "kind_weight_by_policy": {
            "recipe": {"assistant": 0.9, "stop": 0.1, "user": 0.0},
            "response": {"assistant": 0.9, "stop": 0.1, "user": 0.0},
            "instruction_modelling": {"assistant": 0.5, "stop": 0.05, "user": 0.45},
            "full": {"assistant": 0.4, "stop": 0.04, "user": 0.36, "scaffold": 0.2},
        },
    }


def fake_view(sizes: dict[str, int] = BOOK, mix: MixSpec = MIX, estimate: dict[str, Any] | None = None) -> PlanView:
    """A plan's view of these sizes."""
    candidates, plan = fake_plan(sizes, mix)
    facts = fake_facts(candidates, plan, mix)
    arrays = PlanArrays(plan.tasks, candidates.task, candidates.num_tokens, plan.num_visits, plan.placements.example)
    return plan_view(arrays, facts, picture_data(facts["strata"], mix), CoverageSpec(), estimate=estimate)


def fake_estimate(view: PlanView) -> dict[str, Any]:
    """What a preview says of its error, every interval two per cent wide on each side."""

    def around(value: float) -> dict[str, int]:
        return {"value": int(value), "low": int(0.98 * value), "high": int(1.02 * value)}

    units = ("examples", "tokens", "supervised")
    return {
        "num_sampled": 700,
        "num_records": 3480,
        "sources": {},
        "relative_error": 0.02,
        "tasks": {line["task"]: {unit: around(line[f"available_{unit}"]) for unit in units} for line in view.facts["mixture"]},
        "planned": {unit: around(view.facts["total"][f"planned_{unit}"]) for unit in units},
        "steps": around(view.facts["num_steps"]),
        "dropped": {"overlong": around(50)},
    }


def hostile_view(name: str) -> PlanView:
    """A plan of two tasks, one of whose names is an attack, as are its notes, its advice and the reason of its drops."""
    candidates, plan = fake_plan({"victim": 40, "other": 10}, OFTEN)
    facts = _renamed(fake_facts(candidates, plan, OFTEN), name)
    facts |= {"notes": [name], "advice": [{"about": name, "text": name, "evidence": name}]}
    arrays = PlanArrays(("other", name), candidates.task, candidates.num_tokens, plan.num_visits, plan.placements.example)
    pictures = _renamed(picture_data(fake_facts(candidates, plan, OFTEN)["strata"], OFTEN), name)
    view = plan_view(arrays, facts, pictures, CoverageSpec())
    estimate = fake_estimate(view) | {"dropped": {name: {"value": 1, "low": 0, "high": 2}}}
    return dataclasses.replace(view, estimate=estimate)


def _renamed(value: Any, name: str) -> Any:
    """The value with every `victim` in it called something else."""
    if isinstance(value, dict):
        return {name if key == "victim" else key: _renamed(inner, name) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_renamed(inner, name) for inner in value]
    return name if value == "victim" else value
