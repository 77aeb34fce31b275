"""Budgets in steps: exactly so many, all of them full."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.errors import PlanError
from tutelage.plan.assemble import Plan, make_plan
from tutelage.plan.rates import allocate
from tutelage.plan.spec import BatchSpec, Equal, MixSpec
from tutelage.plan.steps import examples_filling


@st.composite
def sets(draw: st.DrawFn) -> tuple[list[str], list[int]]:
    tasks = draw(st.lists(st.sampled_from(["a", "b", "c"]), min_size=4, max_size=50))
    return tasks, draw(st.lists(st.integers(2, 16), min_size=len(tasks), max_size=len(tasks)))


def is_full(plan: Plan) -> bool:
    """Whether every row of the packed steps holds something."""
    return bool((np.bincount(plan.placements.row, minlength=plan.steps.num_rows.sum()) > 0).all())


@settings(deadline=None)
@given(sets(), st.integers(1, 12))
def test_packed_steps_are_just_so_many_and_full(examples: tuple[list[str], list[int]], num_steps: int) -> None:
    """Kills a number of examples estimated from token counts, which ends in a step too many or half a step."""
    batch = BatchSpec(slots_per_step=64, capacity=32)
    plan = make_plan(*examples, mix=MixSpec(rates=Equal(), total_steps=num_steps), batch=batch)
    assert len(plan.steps) == num_steps
    assert is_full(plan)
    counts, tasks = plan.mixture.counts, sorted(set(examples[0]))
    assert counts == allocate(dict.fromkeys(tasks, 1), sum(counts.values())).counts
    assert any(note.startswith(f"mix.total_steps {num_steps}: {sum(counts.values()):,} examples") for note in plan.notes)


@settings(deadline=None)
@given(sets(), st.integers(1, 8))
def test_unpacked_steps_are_just_so_many(examples: tuple[list[str], list[int]], num_steps: int) -> None:
    """Kills a search that trusts rows where steps hold one document a row."""
    batch = BatchSpec(slots_per_step=64, capacity=32, pack="none")
    plan = make_plan(*examples, mix=MixSpec(total_steps=num_steps), batch=batch)
    assert len(plan.steps) == num_steps


def test_examples_per_step_need_no_search() -> None:
    """Kills a remainder where arithmetic is exact."""
    batch = BatchSpec(examples_per_step=7, capacity=32)
    plan = make_plan(["a", "b"] * 20, [5] * 40, mix=MixSpec(total_steps=9), batch=batch)
    assert len(plan.steps) == 9
    assert plan.steps.num_examples.tolist() == [7] * 9


def test_steps_beyond_the_caps_name_the_most_and_it_is_accepted() -> None:
    """Kills a run shorter than asked for, and a nearest number that is refused in turn."""
    tasks, lengths = ["a"] * 30 + ["b"] * 10, [7 + i % 9 for i in range(40)]
    for batch in (BatchSpec(slots_per_step=64, capacity=32), BatchSpec(examples_per_step=6, capacity=32)):
        with pytest.raises(PlanError, match="all that the caps allow fills") as refused:
            make_plan(tasks, lengths, mix=MixSpec(total_steps=500, max_visits=2), batch=batch)
        most = int(str(refused.value).split("ask for ")[1].split(",")[0])
        assert len(make_plan(tasks, lengths, mix=MixSpec(total_steps=most, max_visits=2), batch=batch).steps) == most
    with pytest.raises(PlanError, match="too little: 30 examples at least take 5 steps; ask for that"):
        make_plan(tasks, lengths, mix=MixSpec(total_steps=1, min_examples=15), batch=BatchSpec(examples_per_step=6, capacity=32))


@given(st.integers(1, 40), st.integers(1, 9), st.integers(2, 30), st.integers(1, 2000))
def test_the_search_ends_at_the_brim_or_the_last_before_it(num_steps: int, top: int, below: int, guess: int) -> None:
    """Kills a search that walks one example at a time, or stops a step short."""
    asked = []

    def filled(num: int) -> float:
        asked.append(num)
        return num * top / (top * below + 1)

    found = examples_filling(num_steps, filled, guess=guess)
    assert num_steps - 1 < filled(found) <= num_steps < filled(found + 1)
    assert len(set(asked)) < 60
