"""Normalising: one example, one task or one token the same, as a rewriting of the weights."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_reference import chat, example

from tutelage.errors import PlanError
from tutelage.plan.assemble import Plan, make_plan
from tutelage.plan.batch import Batches, InMemory
from tutelage.plan.normalise import ExampleWeights, Normalise, example_weights, normalising_factors
from tutelage.plan.schedule_spec import Online
from tutelage.plan.spec import (
    BatchSpec,
    FullLoss,
    InstructionModelling,
    KindWeights,
    LastResponse,
    LossRule,
    MixSpec,
    PromptWeight,
    ResponseLoss,
)
from tutelage.records import Rendered

TWELVE = example("y su sae su smae")
FIVE = example("su sae")
BATCH = BatchSpec(slots_per_step=32, capacity=16)
KINDS = KindWeights(weights={"assistant": 1.0, "stop": 2.0, "user": 0.5})


def planned(
    rendered: list[Rendered],
    tasks: list[str],
    loss: LossRule,
    *,
    multiplier: list[float] | None = None,
    epochs: float = 1.0,
    batch: BatchSpec = BATCH,
) -> tuple[Plan, Batches]:
    weights = example_weights(InMemory(rendered), loss=loss, multiplier=np.array(multiplier or [1.0] * len(rendered)))
    plan = make_plan(tasks, [len(r.ids) for r in rendered], weights=weights, mix=MixSpec(epochs=epochs), batch=batch)
    return plan, Batches.of(plan, rendered, loss=loss)


def by_visit(batches: Batches) -> dict[tuple[int, int], np.ndarray]:
    """The target weights of each (example, visit), as training sees them."""
    found = {}
    for batch in batches:
        for d in batch.documents:
            found[d.example, d.visit] = batch.weights[d.row, d.start : d.start + d.length]
    return found


def sums(batches: Batches) -> list[float]:
    """The total weight of each document of a run of one visit each."""
    found = by_visit(batches)
    return [float(found[i, 0].sum(dtype=np.float64)) for i in range(len(found))]


#            y s u s a e s u s m a e     s u s a e
@pytest.mark.parametrize(
    ("rule", "twelve", "five"),
    [
        (ResponseLoss, 5.0, 2.0),
        (InstructionModelling, 7.0, 3.0),
        (FullLoss, 11.0, 4.0),
        (LastResponse, 3.0, 2.0),
        (lambda normalise: PromptWeight(prompt_weight=0.25, normalise=normalise), 5.5, 2.25),
        (lambda normalise: KINDS.model_copy(update={"normalise": normalise}), 8.0, 3.5),
        (lambda normalise: ResponseLoss(turns="last", normalise=normalise), 3.0, 2.0),
    ],
)
def test_each_rule_normalised_by_hand(rule, twelve: float, five: float) -> None:  # type: ignore[no-untyped-def]
    """Kills a rule that ignores `normalise`, and a whole that changes with it: one example of `long`, two of `short`."""
    rendered, tasks, whole = [TWELVE, FIVE, FIVE], ["long", "short", "short"], twelve + 2 * five
    expected: dict[Normalise, list[float]] = {
        "token": [twelve, five, five],
        "example": [whole / 3, whole / 3, whole / 3],
        "task": [whole / 2, whole / 4, whole / 4],
    }
    for normalise, totals in expected.items():
        _, batches = planned(rendered, tasks, rule(normalise=normalise))
        assert sums(batches) == pytest.approx(totals, rel=1e-6)


def test_tokens_of_one_example_keep_their_proportions() -> None:
    """Kills normalising that levels prompt and answer too: 5.5 becomes (5.5 + 2.25) / 2, each token times 3.875 / 5.5."""
    _, batches = planned([TWELVE, FIVE], ["a", "a"], PromptWeight(prompt_weight=0.25, normalise="example"))
    #               y  s  u     s  a  e  s  u     s  m  a  e  as targets, the last position has none
    plain = np.array([0, 0.25, 0, 1, 1, 0, 0.25, 0, 1, 1, 1, 0])
    assert by_visit(batches)[0, 0].tolist() == pytest.approx((plain * 3.875 / 5.5).tolist(), rel=1e-6)


@pytest.mark.parametrize(
    ("normalise", "expected"), [("token", [10.0, 2.0, 1.0]), ("example", [6.0, 3.0, 1.5]), ("task", [9.0, 2.25, 1.125])]
)
def test_source_and_record_weights_come_after_normalising(normalise: Normalise, expected: list[float]) -> None:
    """Kills normalising after the source weights, which takes them away again."""
    tasks = ["long", "short", "short"]
    _, batches = planned([TWELVE, FIVE, FIVE], tasks, ResponseLoss(normalise=normalise), multiplier=[2.0, 1.0, 0.5])
    assert sums(batches) == pytest.approx(expected, rel=1e-6)


sets = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.sampled_from("abc"), st.sampled_from([0.1, 0.5, 1.0, 3.0])),
    min_size=2,
    max_size=12,
)


@given(sets, st.sampled_from([1.0, 1.5, 2.0]), st.sampled_from(["token", "example", "task"]), st.sampled_from([8, 24]))
def test_what_is_the_same_is_the_same_over_the_whole_run(
    made: list[tuple[int, int, str, float]], epochs: float, normalise: Normalise, rows_of: int
) -> None:
    """Kills normalising per packed row or per step, over records instead of visits, and a whole that changes."""
    rendered = [chat(user, answer) for user, answer, _, _ in made]
    tasks, multiplier = [task for _, _, task, _ in made], [weight for _, _, _, weight in made]
    loss = PromptWeight(prompt_weight=0.1, normalise=normalise)
    batch = BatchSpec(slots_per_step=rows_of * 2, capacity=max(rows_of, 16) if rows_of > 8 else 16)
    _, plain = planned(rendered, tasks, PromptWeight(prompt_weight=0.1), epochs=epochs, batch=batch)
    plan, batches = planned(rendered, tasks, loss, multiplier=multiplier, epochs=epochs, batch=batch)
    totals = {visit: weights.sum(dtype=np.float64) for visit, weights in by_visit(plain).items()}
    whole, own = sum(totals.values()), dict[tuple[int, int], float]()
    for (one, visit), weights in by_visit(batches).items():
        assert weights.sum(dtype=np.float64) == pytest.approx(plan.weight[one], rel=1e-9)
        own[one, visit] = weights.sum(dtype=np.float64) / multiplier[one]
    assert sum(own.values()) == pytest.approx(whole, rel=1e-6)
    by_task = defaultdict(float)
    for (one, _), weight in own.items():
        by_task[tasks[one]] += weight
    match normalise:
        case "token":
            assert own == pytest.approx(totals, rel=1e-6)
        case "example":
            assert list(own.values()) == pytest.approx([whole / len(own)] * len(own), rel=1e-6)
        case "task":
            assert list(by_task.values()) == pytest.approx([whole / len(by_task)] * len(by_task), rel=1e-6)
    assert plan.steps.total_weight.sum() == pytest.approx((plan.weight * plan.num_visits).sum(), rel=1e-9)


def test_a_task_weighs_the_same_in_every_step() -> None:
    """Kills normalising per step: the multiplier of a task is one number for the whole run."""
    rendered, tasks = [TWELVE, *[FIVE] * 6], ["long", *["short"] * 6]
    plan, batches = planned(rendered, tasks, ResponseLoss(normalise="task"))
    assert len(batches) == 2
    assert len(set(plan.multiplier[1:].tolist())) == 1
    for (one, _), weights in by_visit(batches).items():
        assert set(weights.tolist()) == {0.0, np.float32(plan.multiplier[one])}


def test_examples_that_are_not_visited_count_for_nothing() -> None:
    """Kills means over all records where only some are drawn."""
    totals, visits, task = np.array([4.0, 2.0, 100.0, 8.0]), np.array([1, 2, 0, 0], np.int32), np.array([0, 0, 0, 1], np.int32)
    assert normalising_factors(totals, visits, task, normalise="example")[:2].tolist() == [8 / 3 / 4, 8 / 3 / 2]
    assert normalising_factors(totals, visits, task, normalise="task").tolist() == [1.0, 1.0, 1.0, 1.0]


def test_tasks_cannot_be_normalised_over_visits_that_are_not_known_yet() -> None:
    """Kills "every task weighs the same" in a run whose mixture is decided while it goes on."""
    weights = example_weights(InMemory([FIVE, FIVE]), loss=ResponseLoss(normalise="task"))
    mix = MixSpec(schedule=Online(), total_examples=4)
    with pytest.raises(PlanError, match=r"loss\.normalise: task needs"):
        make_plan(["a", "b"], [5, 5], weights=weights, mix=mix, batch=BatchSpec(examples_per_step=2))


def test_a_multiplier_that_does_not_fit_is_refused() -> None:
    """Kills an example that silently weighs nothing, or infinitely much."""
    weights = ExampleWeights(lambda m: np.array([1e-30, 1.0]) * m, np.ones(2, np.int64), np.array([1e20, 1.0]), "example")
    with pytest.raises(PlanError, match="32-bit"):
        make_plan(["a", "a"], [4, 4], weights=weights)
