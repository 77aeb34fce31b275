"""Deciles: what each tenth of training was promised, and what lies in it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tutelage.plan.assemble import Candidates, Plan, Strata, plan_candidates
from tutelage.plan.deciles import decile_facts
from tutelage.plan.spec import BatchSpec, MixSpec

LENGTHS = np.array([4 + i * 7 % 13 for i in range(600)], np.int32)
TASK = np.array([0] * 300 + [1] * 300, np.int32)


def made(mix: dict[str, Any], *, sources: bool = False, **batch: Any) -> tuple[list[dict[str, Any]], Plan]:
    spec = MixSpec.model_validate(mix)
    by_source = Strata(("left", "right"), np.arange(600, dtype=np.int32) % 3 // 2) if sources else None
    supervised = LENGTHS.astype(np.int64) - 1
    candidates = Candidates(("code", "qa"), TASK, LENGTHS, supervised, supervised.astype(float), mixed_by=by_source)
    plan = plan_candidates(
        candidates, mix=spec, batch=BatchSpec(**({"slots_per_step": 96, "capacity": 48} | batch)), max_tokens=16
    )
    return decile_facts(plan, candidates, mix=spec), plan


@pytest.mark.parametrize("count", ["examples", "tokens", "supervised_tokens"])
def test_a_run_of_constant_rates_promises_the_same_throughout_and_keeps_it(count: str) -> None:
    """Kills deciles that exist for schedules only, shares of another unit, and parts that do not add up."""
    lines, plan = made({"rates": {"explicit": {"weights": {"code": 3, "qa": 1}}}, "count": count, "total_examples": 600})
    assert len(lines) == 10 and lines[0]["from"] == 0.0 and lines[-1]["to"] == 1.0
    assert all(a["to"] == b["from"] for a, b in pairwise(lines))
    for line in lines:
        assert line["promised"] == pytest.approx({"code": 0.75, "qa": 0.25})
        assert sum(line["realised"].values()) == pytest.approx(1)
        assert abs(line["realised"]["code"] - 0.75) < 0.12
    units: dict[str, np.ndarray] = {"examples": np.ones(600), "tokens": LENGTHS, "supervised_tokens": LENGTHS - 1}
    sizes = units[count]
    example = plan.placements.example
    whole = sizes[example][TASK[example] == 0].sum() / sizes[example].sum()
    assert np.mean([line["realised"]["code"] for line in lines]) == pytest.approx(whole, abs=0.02)


def test_the_deciles_of_a_fade_follow_it() -> None:
    """Kills a promise read at the start of a decile, and one that stands still: from 100 % to 0 it is 95, 85, ... %."""
    fade = {"interpolate": {"from": {"explicit": {"weights": {"code": 1}}}, "to": {"explicit": {"weights": {"qa": 1}}}}}
    lines, _ = made({"schedule": fade, "total_tokens": 6000, "count": "tokens"})
    promised = np.array([line["promised"]["code"] for line in lines])
    middles = np.array([(line["from"] + line["to"]) / 2 for line in lines])
    assert np.abs(promised - (1 - middles)).max() < 0.02
    realised = np.array([line["realised"]["code"] for line in lines])
    assert np.abs(realised - promised).max() < 0.08
    assert abs((realised - promised).mean()) < 0.01


def test_what_caps_take_shows_between_promised_and_realised() -> None:
    """Kills a promise that is quietly made what came out: qa is promised the second half and holds a quarter."""
    stages = [
        {"share": 0.5, "rates": {"explicit": {"weights": {"code": 1}}}},
        {"share": 0.5, "rates": {"explicit": {"weights": {"code": 1, "qa": 3}}}},
    ]
    lines, _ = made({"schedule": {"stages": stages}, "total_examples": 1200, "max_visits": {"qa": 1}})
    assert lines[-1]["promised"]["qa"] == pytest.approx(0.75)
    assert lines[-1]["realised_examples"]["qa"] == pytest.approx(0.5, abs=0.1)
    assert lines[0]["promised"]["qa"] == lines[0]["realised"]["qa"] == 0.0


def test_rates_over_sources_are_told_by_task() -> None:
    """Kills deciles by source beside a mixture by task: each source is half code and half qa, whatever its rate."""
    lines, _ = made(
        {"rates": {"explicit": {"weights": {"left": 9, "right": 1}}}, "over": "sources", "total_examples": 400}, sources=True
    )
    assert all(line["promised"] == pytest.approx({"code": 0.5, "qa": 0.5}) for line in lines)


def test_a_run_of_three_steps_has_three_parts() -> None:
    """Kills empty deciles."""
    lines, plan = made({"total_examples": 24}, examples_per_step=8, slots_per_step=None)
    assert len(plan.steps) == len(lines) == 3
    assert [line["to"] for line in lines] == pytest.approx([1 / 3, 2 / 3, 1])
