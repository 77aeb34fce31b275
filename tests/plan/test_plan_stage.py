"""The `plan` box: the join of renderings, verdicts and the split, through the real store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from plan_reference import chat

from tutelage.errors import PlanError
from tutelage.plan.batch import Batches
from tutelage.plan.spec import BatchSpec, Equal, LastResponse, MixSpec, ResponseLoss
from tutelage.plan.stage import PlanInputs, plan_stage
from tutelage.records import Dropped, Rendered, Verdict
from tutelage.store import Artefact, Counts, Outcome, Progress, Stage, Store
from tutelage.tables import (
    DROPPED,
    EXAMPLES,
    PLACEMENTS,
    PLAN_STEPS,
    PLANNED,
    SPLIT,
    VERDICTS,
    RenderedSet,
    Shards,
    read_dropped,
    read_table,
    write_records,
    write_table,
)

Examples = Mapping[int, Rendered]


def box(name: str, slot: str, write: object, *, version: int = 1) -> Stage:
    def build(folder: Path, _: Mapping[str, Artefact], __: Progress) -> Outcome:
        write(folder)  # type: ignore[operator]
        return Outcome(Counts(0, 0))

    return Stage(name, version, {"slot": slot}, build, slot=slot)


def rendering(name: str, slot: str, examples: Examples, tasks: Sequence[str], dropped: Sequence[Dropped] = ()) -> Stage:
    """A rendered set that holds these rows; `tasks` has one entry per record of the source."""

    def write(folder: Path) -> None:
        columns = {
            "row": list(examples),
            "part": [0] * len(examples),
            "task": [tasks[row] for row in examples],
            "num_tokens": [len(e.ids) for e in examples.values()],
            "num_turns": [len(e.turn_weights) for e in examples.values()],
            "num_learned_tokens": [1] * len(examples),
            "flags": [0] * len(examples),
        }
        RenderedSet.write(folder, pa.table(columns, schema=EXAMPLES), list(examples.values()))
        write_records(folder / "dropped.parquet", DROPPED, dropped)

    return box(name, slot, write)


def verdicts(name: str, slot: str, found: Sequence[Verdict]) -> Stage:
    return box(name, slot, lambda folder: write_records(folder / "verdicts.parquet", VERDICTS, found))


def splitting(held_out: Mapping[str, Sequence[bool]]) -> Stage:
    def write(folder: Path) -> None:
        lines = [(source, row, held) for source, rows in held_out.items() for row, held in enumerate(rows)]
        source, row, held = zip(*lines, strict=True)
        write_table(folder / "split.parquet", pa.table({"source": source, "row": row, "is_held_out": held}, schema=SPLIT))

    return box("split", "", write)


def refused(source: str, row: int) -> Dropped:
    return Dropped(source, "f.jsonl", row + 1, row, "too_long", "99 tokens")


def two_sources() -> PlanInputs:
    """Ten records of `maths` and six of `chat` that meet every fate but one."""
    maths = {row: chat(2, 3 + row, first_id=100 * row) for row in range(10) if row != 4}
    screened = [Verdict("maths", 1, "length", False, "2 words"), Verdict("maths", 2, "refusal", True, "")]
    talk = {row: chat(3, 4, first_id=1000 + 100 * row) for row in range(6)}
    return PlanInputs(
        renders={
            "maths": rendering("render", "maths", maths, ["sum"] * 10, [refused("maths", 4)]),
            "chat": rendering("render", "chat", talk, ["talk"] * 6),
        },
        rerenders={"chat": rendering("rerender", "chat", {2: chat(3, 9, first_id=5000)}, ["talk"] * 6, [refused("chat", 3)])},
        screens={"maths": verdicts("screen", "maths", screened)},
        copies=verdicts(
            "copies",
            "",
            [
                Verdict("maths", 1, "near_duplicate", False, "of maths 0"),
                Verdict("chat", 0, "exact_duplicate", False, "of chat 1"),
                Verdict("maths", 9, "leak", False, "of maths 0"),
            ],
        ),
        split=splitting({"maths": [row == 9 for row in range(10)], "chat": [False] * 6}),
    )


def stage_of(
    inputs: PlanInputs,
    *,
    mix: MixSpec | None = None,
    loss: ResponseLoss | LastResponse | None = None,
    weights: Mapping[str, float] | None = None,
    slots_per_step: int = 64,
) -> Stage:
    return plan_stage(
        inputs,
        mix=mix or MixSpec(),
        loss=loss or ResponseLoss(),
        batch=BatchSpec(slots_per_step=slots_per_step),
        max_tokens=32,
        source_weights=weights or {},
    )


def produced(stage: Stage, store: Store) -> Artefact:
    return store.produce(stage, {name: produced(upstream, store) for name, upstream in stage.inputs.items()})


def shards_of(inputs: PlanInputs, store: Store) -> Shards:
    boxes = {(name, "render"): stage for name, stage in inputs.renders.items()}
    boxes |= {(name, "rerender"): stage for name, stage in inputs.rerenders.items()}
    return Shards({name: store.folder(stage) for name, stage in boxes.items()})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_every_record_is_planned_or_has_one_reason(store: Store) -> None:
    """Kills records that disappear, verdicts read backwards, and a held-out record that trains."""
    made = produced(stage_of(two_sources()), store)
    fates = {(d.source, d.row): d.reason for d in read_dropped(made.file("dropped.parquet"))}
    assert fates == {
        ("maths", 1): "length",
        ("maths", 4): "too_long",
        ("maths", 9): "held_out",
        ("chat", 0): "exact_duplicate",
        ("chat", 3): "too_long",
    }
    planned = read_table(made.file("planned.parquet"), PLANNED)
    rows = list(zip(planned["source"].to_pylist(), planned["row"].to_pylist(), strict=True))
    assert len(rows) == 11
    assert not set(rows) & set(fates)
    assert made.manifest["counts"] == {"in": 16, "out": 11, "dropped": dict(Counter(fates.values()))}


def test_a_record_rendered_anew_is_trained_as_rewritten(store: Store) -> None:
    """Kills a stale rendering: row 2 of chat has the ids of its second rendering, and its first is never seen."""
    inputs = two_sources()
    made = produced(stage_of(inputs), store)
    batches = Batches(made.path, shards_of(inputs, store))
    ids = np.concatenate([batch.inputs[batch.segments > 0] for batch in batches])
    assert 5000 in ids
    assert 1200 not in ids
    assert 1300 not in ids
    assert 1400 in ids


def test_batches_from_disk_follow_placements_and_steps(store: Store) -> None:
    """Kills a plan whose tables disagree: sources, tasks and documents of each batch are those of the files."""
    inputs = two_sources()
    made = produced(stage_of(inputs, weights={"chat": 0.5}, mix=MixSpec(epochs=2.0)), store)
    planned = read_table(made.file("planned.parquet"), PLANNED).to_pylist()
    steps = read_table(made.file("steps.parquet"), PLAN_STEPS).to_pylist()
    batches = Batches(made.path, shards_of(inputs, store))
    assert len(batches) == made.facts["num_steps"] == len(steps)
    for batch, step in zip(batches, steps, strict=True):
        assert batch.inputs.shape == (2, 32)
        assert batch.total_weight == step["total_weight"]
        for document in batch.documents:
            line, slots = planned[document.example], slice(document.start, document.start + document.length)
            assert set(batch.sources[document.row, slots]) == {made.facts["sources"].index(line["source"])}
            assert set(batch.tasks[document.row, slots]) == {made.facts["tasks"].index(line["task"])}
            assert batch.weights[document.row, slots].sum() == pytest.approx(line["weight"])
            assert line["multiplier"] == (0.5 if line["source"] == "chat" else 1.0)
    placed = read_table(made.file("placements.parquet"), PLACEMENTS).to_pylist()
    assert placed == sorted(placed, key=lambda p: (p["row"], p["start"]))
    assert Counter(p["example"] for p in placed) == {i: line["num_visits"] for i, line in enumerate(planned)}


def test_facts_give_the_mixture_promised_and_realised(store: Store) -> None:
    """Kills a table whose shares do not add up or count other tokens than those planned."""
    made = produced(stage_of(two_sources(), mix=MixSpec(rates=Equal(), total_examples=14, max_visits=2)), store)
    facts = made.facts
    by_task = {line["task"]: line for line in facts["mixture"]}
    assert facts["tasks"] == ["sum", "talk"]
    assert {task: line["available_examples"] for task, line in by_task.items()} == {"sum": 7, "talk": 4}
    assert {task: line["planned_examples"] for task, line in by_task.items()} == {"sum": 7, "talk": 7}
    assert [line["promised_share"] for line in facts["mixture"]] == [0.5, 0.5]
    for unit in ("examples", "tokens", "supervised"):
        assert sum(line[f"share_{unit}"] for line in facts["mixture"]) == pytest.approx(1)
    planned = read_table(made.file("planned.parquet"), PLANNED).to_pylist()
    for task, line in by_task.items():
        mine = [p for p in planned if p["task"] == task]
        assert line["planned_tokens"] == sum(p["num_tokens"] * p["num_visits"] for p in mine)
        assert line["planned_supervised"] == sum(p["weight"] * p["num_visits"] for p in mine)
        assert line["most_visits"] == max(p["num_visits"] for p in mine)
    assert by_task["talk"]["visits_per_record"] == 7 / 4
    assert facts["total"]["planned_examples"] == 14
    assert facts["packing_efficiency"] == facts["total"]["planned_tokens"] / facts["slots"]


def test_what_is_not_drawn_or_has_nothing_to_learn_is_listed(store: Store) -> None:
    """Kills a silent remainder."""
    few = produced(stage_of(two_sources(), mix=MixSpec(total_examples=3)), store)
    assert few.manifest["counts"]["dropped"]["not_drawn"] == 8
    weightless = produced(stage_of(two_sources(), weights={"chat": 0.0}, mix=MixSpec()), store)
    assert weightless.manifest["counts"]["dropped"]["no_loss_weight"] == 4
    assert [line["planned_examples"] for line in weightless.facts["mixture"]] == [7, 0]


def test_a_task_whose_records_were_all_dropped_cannot_have_a_share(store: Store) -> None:
    """Kills an equal mixture of two tasks that quietly becomes one task."""
    with pytest.raises(PlanError, match="`talk` has a share but no training record"):
        produced(stage_of(two_sources(), weights={"chat": 0.0}, mix=MixSpec(rates=Equal())), store)


def test_the_order_of_sources_changes_no_byte(store: Store, tmp_path: Path) -> None:
    """Kills a plan that depends on the order of keys in a recipe."""
    inputs = two_sources()
    turned = PlanInputs(dict(reversed(inputs.renders.items())), inputs.rerenders, inputs.screens, inputs.copies, inputs.split)
    stage, other = stage_of(inputs), stage_of(turned)
    assert stage.key == other.key
    made, again = produced(stage, store), produced(other, Store(tmp_path / "other"))
    assert made.manifest["files"] == again.manifest["files"]


def test_an_impossible_batch_is_refused_before_anything_is_built() -> None:
    """Kills an error that comes after an hour of rendering."""
    with pytest.raises(PlanError, match="nearest that is"):
        stage_of(two_sources(), slots_per_step=50)


def test_only_what_changes_the_plan_changes_its_key() -> None:
    """Kills a plan that is made again for nothing, and one that is not made again when it must be."""
    inputs = two_sources()
    same = stage_of(inputs, weights={"maths": 1.0, "gone": 3.0})
    assert same.key == stage_of(inputs).key
    assert stage_of(inputs, mix=MixSpec(seed=1)).key != same.key
    assert stage_of(inputs, loss=LastResponse()).key != same.key
