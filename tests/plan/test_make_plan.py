"""The whole plan on plain lists: promises kept to the record."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.plan.assemble import Plan, make_plan, step_facts
from tutelage.plan.spec import BatchSpec, Equal, Explicit, MixSpec, Temperature

BATCH = BatchSpec(slots_per_step=64, capacity=32)


def plan_as_lists(plan: Plan) -> tuple[Any, ...]:
    placed = [values.tolist() for values in vars(plan.placements).values()]
    return placed, [values.tolist() for values in vars(plan.steps).values()]


@st.composite
def sets(draw: st.DrawFn) -> tuple[list[str], list[int]]:
    tasks = draw(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=60))
    return tasks, draw(st.lists(st.integers(2, 32), min_size=len(tasks), max_size=len(tasks)))


mixes = st.sampled_from(
    [
        MixSpec(),
        MixSpec(epochs=2.5),
        MixSpec(rates=Temperature(temperature=3.0), max_visits=2),
        MixSpec(rates=Equal(), count="tokens", epochs=1.5),
        MixSpec(rates=Equal(), total_examples=37, count="supervised_tokens"),
    ]
)


@given(sets(), mixes)
def test_visits_are_the_counts_and_differ_by_at_most_one_in_a_task(examples: tuple[list[str], list[int]], mix: MixSpec) -> None:
    """Kills a plan whose packing loses or repeats what the mixture promised."""
    tasks, lengths = examples
    plan = make_plan(tasks, lengths, mix=mix, batch=BATCH)
    visits = np.bincount(plan.placements.example, minlength=len(tasks))
    assert visits.tolist() == plan.num_visits.tolist()
    for name, count in plan.mixture.counts.items():
        mine = visits[[task == name for task in tasks]]
        assert mine.sum() == count
        assert mine.max() - mine.min() <= 1
        assert mix.max_visits is None or mine.max() <= mix.max_visits
    assert plan.steps.real_tokens.sum() == (visits * lengths).sum()
    assert plan.steps.num_examples.sum() == visits.sum()
    assert plan.steps.total_weight.sum() == pytest.approx((visits * (np.array(lengths) - 1)).sum())


@given(sets())
def test_a_record_is_visited_in_pass_order(examples: tuple[list[str], list[int]]) -> None:
    """Kills visit numbers that do not count up from 0."""
    plan = make_plan(*examples, mix=MixSpec(epochs=3.0), batch=BATCH)
    for example in range(len(examples[0])):
        assert sorted(plan.placements.visit[plan.placements.example == example].tolist()) == [0, 1, 2]


@given(sets(), st.randoms())
def test_reordering_tasks_changes_no_position(examples: tuple[list[str], list[int]], random) -> None:  # type: ignore[no-untyped-def]
    """Kills a plan that depends on which task was read first; order within a task is kept."""
    tasks, lengths = examples
    by_task = sorted(set(tasks))
    random.shuffle(by_task)
    moved = [i for name in by_task for i, task in enumerate(tasks) if task == name]
    first = make_plan(tasks, lengths, batch=BATCH)
    second = make_plan([tasks[i] for i in moved], [lengths[i] for i in moved], batch=BATCH)
    assert first.placements.example.tolist() == [moved[i] for i in second.placements.example]
    assert first.placements.row.tolist() == second.placements.row.tolist()


@given(sets())
def test_adding_a_zero_weight_task_changes_no_position(examples: tuple[list[str], list[int]]) -> None:
    """Kills an order, a budget or a shuffle that counts tasks which are not drawn."""
    tasks, lengths = examples
    weights = {name: 1.0 + i for i, name in enumerate(sorted(set(tasks)))}
    mix = MixSpec(rates=Explicit(weights=weights), epochs=2.0)
    more = MixSpec(rates=Explicit(weights={"0": 0.0, **weights}), epochs=2.0)
    plan = make_plan(tasks, lengths, mix=mix, batch=BATCH)
    wider = make_plan([*tasks, "0", "0"], [*lengths, 5, 6], mix=more, batch=BATCH)
    assert plan_as_lists(plan) == plan_as_lists(wider)
    assert wider.num_visits.tolist()[-2:] == [0, 0]


def test_the_seed_changes_the_order_and_nothing_else() -> None:
    """Kills an ignored seed, and a seed that changes the mixture."""
    tasks, lengths = ["a", "b"] * 20, [5 + i % 9 for i in range(40)]
    plans = [make_plan(tasks, lengths, mix=MixSpec(seed=seed), batch=BATCH) for seed in (0, 0, 1)]
    assert plan_as_lists(plans[0]) == plan_as_lists(plans[1])
    assert plan_as_lists(plans[0]) != plan_as_lists(plans[2])
    assert plans[0].num_visits.tolist() == plans[2].num_visits.tolist()


def test_every_window_keeps_the_mixture() -> None:
    """Kills packing that gathers one task's documents: in each window of 100 steps every share is within 2 % of the run's."""
    rng = np.random.default_rng(0)
    code = np.array([0] * 9000 + [1] * 3000 + [2] * 1000)
    lengths = np.clip(rng.lognormal(np.array([3.0, 4.5, 5.0])[code], 0.5), 4, 512).astype(int)
    plan = make_plan([["short", "middle", "long"][c] for c in code], lengths, batch=BatchSpec(slots_per_step=2048, capacity=512))
    step = np.repeat(np.arange(len(plan.steps)), plan.steps.num_rows)[plan.placements.row]
    window = plan.steps.window[step]
    for number in range(int(window.max())):
        share = np.bincount(code[plan.placements.example[window == number]], minlength=3) / (window == number).sum()
        assert np.abs(share - np.array([9, 3, 1]) / 13).max() < 0.02
    assert plan.packing_efficiency > 0.985


def test_the_default_batch_size_is_said() -> None:
    """Kills a default that nobody hears of."""
    assert make_plan(["a"], [10]).notes == ("no batch size given: 8 rows of 10 slots per step",)


def test_step_facts_are_the_extremes_of_the_steps() -> None:
    """Kills means in place of medians, and padding counted against the whole run."""
    plan = make_plan(
        ["a"] * 5, [30, 30, 30, 10, 8], weights=[5.0, 4.0, 3.0, 2.0, 1.0], batch=BatchSpec(slots_per_step=32, capacity=32)
    )
    found = step_facts(plan.steps)
    assert found["examples"] == {"least": 1, "median": 1, "most": 2}
    assert found["real_tokens"] == {"least": 18, "median": 30, "most": 30}
    assert found["weight"] == {"least": 3, "median": 3.5, "most": 5}
    assert found["padding_share"] == {"least": 2 / 32, "median": 2 / 32, "most": 14 / 32}


def test_a_limit_of_documents_holds_in_the_plan_and_is_refused_without_packing() -> None:
    """Kills an option that is read and not used, or used where it means nothing."""
    plan = make_plan(
        ["a"] * 40, [4] * 40, mix=MixSpec(epochs=2.0), batch=BatchSpec(slots_per_step=64, capacity=32, max_documents_per_row=3)
    )
    assert np.bincount(plan.placements.row).max() == 3
    assert len(plan.placements.row) == 80
    with pytest.raises(ValueError, match="with `pack: none` a row has one document: leave it out"):
        BatchSpec(pack="none", max_documents_per_row=3)
