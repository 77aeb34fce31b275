"""Weights through the `plan` box: normalising, record weights, and what the plan says the loss lies on."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from plan_reference import example
from test_plan_stage import box, produced, rendering, shards_of, splitting, two_sources, verdicts

from tutelage.plan.batch import Batches
from tutelage.plan.join import RECORD_WEIGHT_0
from tutelage.plan.spec import BatchSpec, InstructionModelling, LossRule, MixSpec, PromptWeight, ResponseLoss
from tutelage.plan.stage import PlanInputs, plan_stage
from tutelage.records import NO_TARGET, Kind
from tutelage.store import Artefact, Stage, Store
from tutelage.tables import PLANNED, RECORD_WEIGHTS, read_dropped, read_table, write_table


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def stage_of(inputs: PlanInputs, *, loss: LossRule, weights: Mapping[str, float] | None = None, epochs: float = 1.0) -> Stage:
    shape = BatchSpec(slots_per_step=64)
    mix = MixSpec(epochs=epochs)
    return plan_stage(inputs, mix=mix, loss=loss, batch=shape, max_tokens=32, source_weights=weights or {})


def reading(source: str, weights: list[float]) -> Stage:
    """A `read` box whose records state weights."""

    def write(folder: Path) -> None:
        import pyarrow as pa

        write_table(folder / "weights.parquet", pa.table({"weight": weights}, schema=RECORD_WEIGHTS))

    return box("read", source, write)


def weighted(weights: list[float]) -> PlanInputs:
    """`two_sources`, where the six records of `chat` state their weights."""
    return dataclasses.replace(two_sources(), weighted_reads={"chat": reading("chat", weights)})


def weight_by_task(made: Artefact, inputs: PlanInputs, store: Store) -> dict[str, float]:
    found = defaultdict(float)
    for batch in Batches(made.path, shards_of(inputs, store)):
        for i, task in enumerate(made.facts["tasks"]):
            found[task] += float(batch.weights[batch.tasks == i].sum(dtype=np.float64))
    return found


def test_record_weights_multiply_their_records_only(store: Store) -> None:
    """Kills weights joined by the order of examples instead of by record, and weights of one source given to another."""
    inputs = weighted([9.0, 0.5, 2.0, 9.0, 1.0, 3.0])
    made = produced(stage_of(inputs, loss=ResponseLoss(), weights={"chat": 0.5}), store)
    planned = read_table(made.file("planned.parquet"), PLANNED).to_pylist()
    multipliers = {(line["source"], line["row"]): line["multiplier"] for line in planned}
    assert {row: m for (source, row), m in multipliers.items() if source == "chat"} == {1: 0.25, 2: 1.0, 4: 0.5, 5: 1.5}
    assert {m for (source, _), m in multipliers.items() if source == "maths"} == {1.0}
    assert {(p["row"]): p["weight"] for p in planned if p["source"] == "chat"} == {1: 1.25, 2: 10.0, 4: 2.5, 5: 7.5}
    assert weight_by_task(made, inputs, store)["talk"] == pytest.approx(21.25)


def test_a_record_of_weight_zero_is_dropped_by_name(store: Store) -> None:
    """Kills a record that silently trains as if it had no weight of its own, or is blamed on the loss rule."""
    made = produced(stage_of(weighted([1.0, 0.0, 1.0, 0.0, 1.0, 1.0]), loss=ResponseLoss()), store)
    dropped = {(d.source, d.row): (d.reason, d.detail) for d in read_dropped(made.file("dropped.parquet"))}
    assert dropped["chat", 1] == ("no_loss_weight", RECORD_WEIGHT_0)
    assert dropped["chat", 3][0] == "too_long"
    without = produced(stage_of(two_sources(), loss=ResponseLoss(), weights={"chat": 0.0}), store)
    silent = {d.detail for d in read_dropped(without.file("dropped.parquet")) if d.reason == "no_loss_weight"}
    assert silent == {""}


@pytest.mark.parametrize("loss", [PromptWeight(prompt_weight=0.1, normalise="task"), ResponseLoss(normalise="task")])
def test_tasks_weigh_the_same_before_source_and_record_weights(store: Store, loss: LossRule) -> None:
    """Kills normalising after the source weights; Batches checks every step's weight against the plan to 1e-9."""
    inputs = two_sources()
    even = produced(stage_of(inputs, loss=loss, epochs=2.5), store)
    found = weight_by_task(even, inputs, store)
    assert found["sum"] == pytest.approx(found["talk"], rel=1e-6)
    assert even.facts["total_weight"] == pytest.approx(sum(found.values()))
    doubled = produced(stage_of(inputs, loss=loss, weights={"chat": 2.0}, epochs=2.5), store)
    found = weight_by_task(doubled, inputs, store)
    assert 2 * found["sum"] == pytest.approx(found["talk"], rel=1e-6)


def small(loss: LossRule, *, weights: Mapping[str, float] | None = None) -> Stage:
    """Three examples of `a`, one of them with two requests, and one of `b`, in two sources."""
    mine = {0: example("su sae"), 1: example("yu saaae su sae"), 2: example("suuu smae")}
    inputs = PlanInputs(
        renders={
            "one": rendering("render", "one", mine, ["a"] * 3),
            "two": rendering("render", "two", {0: example("suuuu sae")}, ["b"]),
        },
        rerenders={},
        screens={},
        copies=verdicts("copies", "", []),
        split=splitting({"one": [False] * 3, "two": [False]}),
    )
    return stage_of(inputs, loss=loss, weights=weights)


def test_lengths_and_kinds_by_hand(store: Store) -> None:
    """Kills the first token counted as a target, marks counted as template, and requests counted as answers."""
    facts = produced(small(ResponseLoss()), store).facts
    a, b = facts["mixture"]
    #   targets: u s a e | (y) u s a a a e s u s a e | u u u s m a e
    assert (a["instruction_tokens"], a["output_tokens"]) == (6, 11)
    assert (b["instruction_tokens"], b["output_tokens"]) == (4, 2)
    assert b["length_ratio"] == 2.0
    assert a["multi_turn_share"] == 1 / 3
    assert a["supervised_share"] == 11 / 25
    assert facts["total"]["length_ratio"] == 10 / 13
    assert facts["total"]["multi_turn_share"] == 1 / 4
    assert {kind: n for kind, n in facts["kinds"]["a"].items() if n} == {
        "scaffold": 5, "user": 6, "assistant": 6, "stop": 4, "mark": 1
    }  # fmt: skip
    assert facts["kind_weight"]["b"]["assistant"] == 1
    assert facts["kind_weight"]["b"]["user"] == 0


def test_shares_of_weight_under_each_rule_by_hand(store: Store) -> None:
    """Kills shares that forget source weights, or show the recipe's rule under another's name."""
    facts = produced(small(InstructionModelling(normalise="task"), weights={"two": 2.0}), store).facts
    shares = facts["kind_weight_by_policy"]
    assert shares["response"]["assistant"] == pytest.approx((6 + 2 * 1) / (11 + 2 * 2))
    assert shares["instruction_modelling"]["user"] == pytest.approx((6 + 2 * 4) / (17 + 2 * 6))
    assert shares["full"]["scaffold"] == pytest.approx((5 + 2 * 1) / (22 + 2 * 7))
    #   task a weighs 1 before source weights and b the same: 17 and 6 targets become 11.5 each
    assert shares["recipe"]["user"] == pytest.approx((6 * 11.5 / 17 + 2 * 4 * 11.5 / 6) / (11.5 + 2 * 11.5), rel=1e-6)
    for named in shares.values():
        assert sum(named.values()) == pytest.approx(1.0)
    assert sum(facts["kind_weight"]["b"].values()) == pytest.approx(23.0, rel=1e-6)


def test_the_plan_gives_advice_and_switches_nothing(store: Store) -> None:
    """Kills advice that changes the run."""
    made = produced(small(ResponseLoss()), store)
    assert "task b" in [line["about"] for line in made.facts["advice"]]
    assert all(line["text"] and line["evidence"] for line in made.facts["advice"])
    assert made.facts["loss"] == ResponseLoss().canonical()
    assert made.facts["total_weight"] == 13


@pytest.mark.parametrize("weights", [[1.0] * 6, [1.0, 0.5, 2.0, 0.25, 1.0, 3.0]])
@pytest.mark.parametrize("loss", [PromptWeight(prompt_weight=0.1), InstructionModelling(normalise="example")])
def test_kinds_and_their_weights_are_those_of_the_batches(store: Store, loss: LossRule, weights: list[float]) -> None:
    """Kills sums over what was rendered instead of what is visited, in the quick way for equal multipliers and in the other."""
    inputs = weighted(weights)
    made = produced(stage_of(inputs, loss=loss, weights={"chat": 0.5}, epochs=2.5), store)
    weight, targets = defaultdict(float), defaultdict(int)
    for batch in Batches(made.path, shards_of(inputs, store)):
        for task, kind, value in zip(batch.tasks.ravel(), batch.kinds.ravel(), batch.weights.ravel(), strict=True):
            weight[int(task), int(kind)] += float(value)
        is_target = batch.targets != NO_TARGET
        for task, kind in zip(batch.tasks[is_target], batch.kinds[is_target], strict=True):
            targets[int(task), int(kind)] += 1
    for i, task in enumerate(made.facts["tasks"]):
        for kind in Kind:
            assert made.facts["kind_weight"][task][kind.name.lower()] == pytest.approx(weight[i, kind], rel=1e-9)
            assert made.facts["kinds"][task][kind.name.lower()] == targets[i, kind]
