"""Rates over sources, and what is said of tasks whose records did not come this far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_reference import chat
from test_plan_stage import produced, rendering, splitting, two_sources, verdicts

from tutelage.errors import PlanError
from tutelage.plan.assemble import make_plan
from tutelage.plan.spec import BatchSpec, Counts, Equal, Explicit, MixSpec, ResponseLoss
from tutelage.plan.stage import PlanInputs, plan_stage
from tutelage.records import Dropped, Verdict
from tutelage.store import Artefact, Stage, Store
from tutelage.tables import PLANNED, read_table

BATCH = BatchSpec(slots_per_step=64, capacity=32)
LABELS = st.lists(st.tuples(st.sampled_from(["qa", "maths"]), st.sampled_from(["web", "books"])), min_size=1, max_size=40)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


@given(LABELS, st.integers(1, 80))
def test_sources_take_the_place_of_tasks_and_nothing_else_changes(labels: list[tuple[str, str]], total: int) -> None:
    """Kills rates over sources that still draw by task, and visits that differ by more than one in a source."""
    tasks, sources = zip(*labels, strict=True)
    lengths = [4 + i % 9 for i in range(len(labels))]
    mix = MixSpec(rates=Equal(), total_examples=total)
    by_source = make_plan(tasks, lengths, sources=sources, mix=mix.model_copy(update={"over": "sources"}), batch=BATCH)
    renamed = make_plan(sources, lengths, mix=mix, batch=BATCH)
    assert by_source.num_visits.tolist() == renamed.num_visits.tolist()
    assert by_source.placements.row.tolist() == renamed.placements.row.tolist()
    assert by_source.tasks == tuple(sorted(set(tasks)))
    for source, count in by_source.mixture.counts.items():
        mine = by_source.num_visits[[label == source for label in sources]]
        assert mine.sum() == count
        assert mine.max() - mine.min() <= 1


def test_sources_that_nobody_gave_are_asked_for() -> None:
    """Kills `over: sources` that quietly mixes by task."""
    with pytest.raises(PlanError, match="without sources"):
        make_plan(["a"], [5], mix=MixSpec(over="sources"))


def stage_of(inputs: PlanInputs, tasks: Mapping[str, str] | None = None, **mix: Any) -> Stage:
    spec = MixSpec(**mix)
    batch = BatchSpec(slots_per_step=64)
    return plan_stage(inputs, mix=spec, loss=ResponseLoss(), batch=batch, max_tokens=32, source_weights={}, source_tasks=tasks)


def two_sources_of_two_tasks() -> PlanInputs:
    """`web` has 6 records of `sum` and 2 of `talk`, `books` 4 of `talk`."""
    web = {row: chat(2, 3 + row, first_id=100 * row) for row in range(8)}
    books = {row: chat(3, 4, first_id=1000 + 100 * row) for row in range(4)}
    return PlanInputs(
        renders={
            "web": rendering("render", "web", web, ["sum"] * 6 + ["talk"] * 2),
            "books": rendering("render", "books", books, ["talk"] * 4),
        },
        rerenders={},
        screens={},
        copies=verdicts("copies", "", []),
        split=splitting({"web": [False] * 8, "books": [False] * 4}),
    )


def made(store: Store, **mix: Any) -> Artefact:
    return produced(stage_of(two_sources_of_two_tasks(), **mix), store)


def test_a_plan_over_sources_reports_by_task_and_by_source(store: Store) -> None:
    """Kills task names in the artefact that are sources, and a task's promise that forgets in which sources it lies."""
    facts = (artefact := made(store, over="sources", rates=Equal(), total_examples=16)).facts
    planned = read_table(artefact.file("planned.parquet"), PLANNED).to_pylist()
    assert {line["task"] for line in planned} == {"sum", "talk"} == set(facts["tasks"])
    visits = Counter[str]()
    for line in planned:
        visits[line["source"]] += line["num_visits"]
    assert visits == {"web": 8, "books": 8}
    assert facts["over"] == "sources"
    assert [(line["name"], line["promised_share"], line["planned_examples"]) for line in facts["strata"]] == [
        ("books", 0.5, 8),
        ("web", 0.5, 8),
    ]
    assert [(line["task"], line["promised_share"]) for line in facts["mixture"]] == [("sum", 0.375), ("talk", 0.625)]
    assert [line["planned_examples"] for line in facts["mixture"]] == [6, 10]


def test_facts_say_what_a_refill_did(store: Store) -> None:
    """Kills a refill that only the notes know of."""
    facts = made(store, rates=Equal(), total_examples=10, max_visits={"talk": 1, "sum": 1}).facts
    assert [line["refilled_examples"] for line in facts["mixture"]] == [0, 0]
    facts = made(store, rates=Explicit(weights={"sum": 9.0, "talk": 1.0}), total_examples=10, max_visits=1).facts
    by_task = {line["task"]: line for line in facts["mixture"]}
    assert (by_task["sum"]["promised_examples"], by_task["sum"]["planned_examples"], by_task["sum"]["is_capped"]) == (9, 6, True)
    assert (by_task["talk"]["refilled_examples"], by_task["talk"]["unfilled_examples"]) == (3, 0)
    assert any("sum 9 -> 6, talk 1 -> 4" in note for note in facts["notes"])
    left = made(store, rates=Explicit(weights={"sum": 9.0, "talk": 1.0}), total_examples=10, max_visits=1, refill="none").facts
    assert [line["unfilled_examples"] for line in left["strata"]] == [3, 0]


def nothing_rendered(reasons: list[str]) -> PlanInputs:
    """`two_sources` and a third source of task `odd` of which no record could be rendered."""
    inputs = two_sources()
    dropped = [Dropped("odd", "f.jsonl", row + 1, row, reason, "") for row, reason in enumerate(reasons)]
    renders = {**inputs.renders, "odd": rendering("render", "odd", {}, ["odd"] * len(reasons), dropped)}
    held_out = {"maths": [row == 9 for row in range(10)], "chat": [False] * 6, "odd": [False] * len(reasons)}
    return PlanInputs(renders, inputs.rerenders, inputs.screens, inputs.copies, splitting(held_out))


def test_a_task_that_could_not_be_rendered_is_known_with_its_reasons(store: Store) -> None:
    """Kills equal rates over three tasks that become rates over two, and `no such task` for one that the recipe has."""
    inputs, tasks = nothing_rendered(["too_long", "too_long", "empty"]), {"maths": "sum", "chat": "talk", "odd": "odd"}
    told = r"`odd` has a share but no training record \(3 records were left out: 2 too_long, 1 empty\)"
    for rates in (Equal(), Explicit(weights={"odd": 1.0}), Counts(counts={"odd": 4})):
        with pytest.raises(PlanError, match=told):
            produced(stage_of(inputs, tasks, rates=rates), store)
    facts = produced(stage_of(inputs, tasks), store).facts
    assert facts["tasks"] == ["odd", "sum", "talk"]
    assert any("task odd: no share" in note and "2 too_long" in note for note in facts["notes"])


def test_a_task_that_only_its_records_could_tell_is_hinted_at(store: Store) -> None:
    """Kills `no such task` without a word on the records that were dropped before their task was seen."""
    tasks = {"maths": "sum", "chat": "talk"}
    with pytest.raises(PlanError, match="of records whose task is not known, 3 records were left out: 3 too_long"):
        produced(stage_of(nothing_rendered(["too_long"] * 3), tasks, rates=Explicit(weights={"odd": 1.0})), store)


def test_a_task_that_is_held_out_says_so(store: Store) -> None:
    """Kills `no such task` for one that is kept for measuring."""
    inputs = two_sources()
    split = splitting({"maths": [False] * 10, "chat": [True] * 6})
    inputs = PlanInputs(inputs.renders, inputs.rerenders, inputs.screens, inputs.copies, split)
    with pytest.raises(PlanError, match="no such task; known: sum; of `talk`, 6 records were left out: 6 held_out"):
        produced(stage_of(inputs, {"maths": "sum", "chat": "talk"}, rates=Explicit(weights={"talk": 1.0})), store)


def test_a_source_that_is_held_out_has_no_share_to_give(store: Store) -> None:
    """Kills equal rates over sources that stop at a source which is kept for measuring, unlike those over tasks."""
    inputs = two_sources()
    split = splitting({"maths": [False] * 10, "chat": [True] * 6})
    inputs = PlanInputs(inputs.renders, inputs.rerenders, inputs.screens, inputs.copies, split)
    facts = produced(stage_of(inputs, over="sources", rates=Equal(), total_examples=9), store).facts
    assert [(line["name"], line["planned_examples"]) for line in facts["strata"]] == [("maths", 9)]
    with pytest.raises(PlanError, match="no such source; known: maths; of `chat`, 6 records were left out: 6 held_out"):
        produced(stage_of(inputs, over="sources", rates=Explicit(weights={"chat": 1.0})), store)


def test_a_screened_task_names_what_screened_it(store: Store) -> None:
    """Kills a remedy that sends the reader to search all stages."""
    inputs = two_sources()
    screens = {"chat": verdicts("screen", "chat", [_verdict(row) for row in range(6)])}
    inputs = PlanInputs(inputs.renders, inputs.rerenders, screens, inputs.copies, inputs.split)
    with pytest.raises(PlanError, match=r"`talk` has a share but no training record \(6 records were left out: 6 length\)"):
        produced(stage_of(inputs, {"maths": "sum", "chat": "talk"}, rates=Equal()), store)


def _verdict(row: int) -> Verdict:
    return Verdict("chat", row, "length", False, "2 words")


def test_the_same_record_numbers_do_not_mix_sources() -> None:
    """Kills strata that index tasks: one task, two sources, a ratio of three to one."""
    mix = MixSpec(over="sources", rates=Explicit(weights={"web": 3.0, "books": 1.0}), total_examples=8)
    plan = make_plan(["t"] * 8, [5] * 8, sources=["web"] * 4 + ["books"] * 4, mix=mix, batch=BATCH)
    assert plan.num_visits[:4].sum() == 6
    assert plan.num_visits[4:].sum() == 2
    assert np.ptp(plan.num_visits[:4]) <= 1
