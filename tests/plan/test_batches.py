"""Batches: what training sees is what the plan says, token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_reference import chat, example

from tutelage.plan.assemble import Plan, make_plan
from tutelage.plan.batch import Batches, InMemory
from tutelage.plan.spec import BatchSpec, InstructionModelling, LossRule, MixSpec, ResponseLoss
from tutelage.plan.weights import weigh_examples, weigh_tokens
from tutelage.records import NO_TARGET, Batch, Kind, Rendered

BATCHES = [
    BatchSpec(slots_per_step=32, capacity=16),
    BatchSpec(slots_per_step=48, capacity=16, pack="none"),
    BatchSpec(examples_per_step=3, capacity=16),
    BatchSpec(examples_per_step=3, capacity=16, pack="none"),
]


def planned(
    rendered: list[Rendered], batch: BatchSpec, *, loss: LossRule | None = None, epochs: float = 1.0
) -> tuple[Plan, Batches]:
    rule = loss or ResponseLoss()
    weights, supervised = weigh_examples(InMemory(rendered), loss=rule)
    tasks = ["even" if i % 2 == 0 else "odd" for i in range(len(rendered))]
    plan = make_plan(
        tasks,
        [len(r.ids) for r in rendered],
        weights=weights,
        num_supervised=supervised,
        mix=MixSpec(epochs=epochs),
        batch=batch,
    )
    return plan, Batches.of(plan, rendered, loss=rule)


def laid_out(batch: Batch, rendered: list[Rendered], loss: LossRule) -> dict[str, np.ndarray]:
    """The arrays of a batch written one token at a time."""
    shape = batch.inputs.shape
    out = {name: np.zeros(shape) for name in ("inputs", "weights", "positions", "segments", "kinds")}
    out["targets"] = np.full(shape, NO_TARGET)
    for document in batch.documents:
        one = rendered[document.example]
        weights = weigh_tokens(one.kinds, loss=loss, turns=one.turns, turn_weights=one.turn_weights)
        before = [d for d in batch.documents if d.row == document.row and d.start < document.start]
        for i in range(document.length):
            at = document.row, document.start + i
            out["inputs"][at], out["positions"][at], out["segments"][at] = one.ids[i], i, len(before) + 1
            if i + 1 < document.length:
                out["targets"][at], out["weights"][at], out["kinds"][at] = one.ids[i + 1], weights[i + 1], one.kinds[i + 1]
    return out


chats = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 8)), min_size=2, max_size=12)


@pytest.mark.parametrize("spec", BATCHES, ids=str)
@pytest.mark.parametrize("loss", [ResponseLoss(), InstructionModelling()], ids=lambda loss: loss.kind)
def test_a_batch_equals_the_documents_laid_out_one_by_one(spec: BatchSpec, loss: LossRule) -> None:
    """Kills every vectorised slip: shifts across documents, positions that run on, segments joined, kinds of the input."""

    @given(chats)
    def check(sizes: list[tuple[int, int]]) -> None:
        rendered = [chat(u, a, first_id=100 * i + 1) for i, (u, a) in enumerate(sizes)]
        plan, batches = planned(rendered, spec, loss=loss, epochs=1.5)
        assert len(batches) == len(plan.steps)
        visits = np.zeros(len(rendered), int)
        for step, batch in enumerate(batches):
            assert batch.step == step
            for name, expected in laid_out(batch, rendered, loss).items():
                assert getattr(batch, name).tolist() == expected.tolist(), name
            assert batch.total_weight == pytest.approx(batch.weights.sum())
            assert batch.real_tokens == plan.steps.real_tokens[step]
            assert ((batch.tasks >= 0) == (batch.segments > 0)).all()
            np.add.at(visits, [document.example for document in batch.documents], 1)
        assert visits.tolist() == plan.num_visits.tolist()

    check()


def test_no_document_learns_the_first_token_of_its_neighbour() -> None:
    """Kills the shift after packing."""
    rendered = [example("aaa", first_id=10), example("aaaa", first_id=20)]
    _, batches = planned(rendered, BatchSpec(slots_per_step=8, capacity=8))
    (batch,) = batches
    assert batch.inputs.tolist() == [[20, 21, 22, 23, 10, 11, 12, 0]]
    assert batch.targets.tolist() == [[21, 22, 23, NO_TARGET, 11, 12, NO_TARGET, NO_TARGET]]
    assert batch.weights.tolist() == [[1, 1, 1, 0, 1, 1, 0, 0]]


def test_dtypes_are_those_of_the_record() -> None:
    """Kills float64 weights and int64 ids, twice the memory and another result."""
    _, batches = planned([chat(2, 3), chat(1, 4)], BATCHES[0])
    batch = batches[0]
    dtypes = {name: getattr(batch, name).dtype.name for name in ("inputs", "targets", "weights", "tasks", "sources", "kinds")}
    assert dtypes == {
        "inputs": "int32",
        "targets": "int32",
        "weights": "float32",
        "tasks": "int16",
        "sources": "int16",
        "kinds": "uint8",
    }


def test_steps_can_be_taken_in_any_order_and_from_the_end() -> None:
    """Kills batches that depend on those before: resuming is looking up a step."""
    rendered = [chat(1 + i % 4, 1 + i % 7, first_id=50 * i) for i in range(30)]
    _, batches = planned(rendered, BATCHES[0])
    forward = [batch.inputs.tolist() for batch in batches]
    assert [batches[step].inputs.tolist() for step in reversed(range(len(batches)))] == forward[::-1]
    assert batches[-1].step == len(batches) - 1
    assert [batch.step for batch in batches[1:3]] == [1, 2]
    with pytest.raises(IndexError, match="a plan of"):
        batches[len(batches)]


def test_a_plan_for_other_examples_is_noticed() -> None:
    """Kills a plan applied to renderings that it was not made for."""
    rendered = [chat(2, 3), chat(1, 4)]
    plan, _ = planned(rendered, BATCHES[0])
    with pytest.raises(AssertionError, match="differ in length"):
        Batches.of(plan, [chat(2, 4), chat(1, 4)])[0]
    with pytest.raises(AssertionError, match="the plan says"):
        Batches.of(plan, rendered, loss=InstructionModelling())[0]


def test_padding_has_no_kind_task_weight_or_target() -> None:
    """Kills padding that trains."""
    _, batches = planned([chat(1, 1), chat(1, 2)], BatchSpec(slots_per_step=32, capacity=16))
    batch = batches[0]
    padding = batch.segments == 0
    assert padding[1].all()
    assert (batch.weights[padding] == 0).all()
    assert (batch.targets[padding] == NO_TARGET).all()
    assert (batch.tasks[padding] == -1).all()
    assert (batch.kinds[padding] == Kind.SCAFFOLD).all()
