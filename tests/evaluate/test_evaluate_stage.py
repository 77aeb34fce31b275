"""The boxes `held_out` and `measure` on a store, with real models and hand-made inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from chats import chat

from toy import IM_END, save_tiny, toy_tokenizer
from tutelage.errors import ModelError
from tutelage.evaluate.measure import sum_nll
from tutelage.evaluate.spec import EvaluateSpec
from tutelage.evaluate.stage import HeldOutInputs, MeasureInputs, held_out_stage, measure_stage
from tutelage.model.load import add_adapter, load_model
from tutelage.model.save import save_model
from tutelage.model.spec import Lora
from tutelage.records import Conversation, Dropped, Origin, Rendered, Verdict
from tutelage.store import Artefact, Counts, Json, Outcome, Progress, Stage, Store
from tutelage.tables import (
    CONVERSATIONS,
    DROPPED,
    EXAMPLES,
    HELD_OUT,
    SPLIT,
    VERDICTS,
    ConversationColumns,
    RenderedSet,
    read_dropped,
    read_samples,
    read_scores,
    read_table,
    write_records,
    write_table,
)

NUM_ROWS = 12
Write = Callable[[Path], Mapping[str, Json]]


def box(name: str, write: Write, *, slot: str = "", **ingredients: Json) -> Stage:
    """A stage whose files `write` makes and whose facts it returns."""

    def build(folder: Path, inputs: Mapping[str, Artefact], progress: Progress) -> Outcome:
        return Outcome(Counts(0, 0), write(folder))

    return Stage(name, 1, ingredients, build, slot=slot)


def write_read(folder: Path) -> Mapping[str, Json]:
    columns = ConversationColumns()
    for row in range(NUM_ROWS):
        columns.append(Conversation(Origin("s", "f.jsonl", row + 1), (), "t", "MIT", "human", None, bytes(16), bytes(16)))
    write_table(folder / "conversations.parquet", columns.table().cast(CONVERSATIONS))
    return {}


def write_split(folder: Path) -> Mapping[str, Json]:
    """Rows 0 and 1 are for training."""
    rows = list(range(NUM_ROWS))
    table = pa.table({"source": ["s"] * NUM_ROWS, "row": rows, "is_held_out": [r > 1 for r in rows]}, schema=SPLIT)
    write_table(folder / "split.parquet", table)
    return {}


def rendering(examples: dict[int, Rendered], dropped: list[Dropped]) -> Write:
    """A rendered set; odd rows are of task b, even ones of task a, and row 0 is of a task that nobody holds out."""

    def write(folder: Path) -> Mapping[str, Json]:
        rows = [
            {
                "row": row,
                "part": 0,
                "task": "lonely" if row == 0 else "ab"[row % 2],
                "num_tokens": len(e.ids),
                "num_turns": len(e.turn_weights),
                "num_learned_tokens": 1,
                "flags": 0,
            }
            for row, e in examples.items()
        ]
        RenderedSet.write(folder, pa.Table.from_pylist(rows, schema=EXAMPLES), list(examples.values()))
        write_records(folder / "dropped.parquet", DROPPED, dropped)
        return {"stop_ids": [IM_END]}

    return write


def verdicts(*found: Verdict) -> Write:
    def write(folder: Path) -> Mapping[str, Json]:
        write_records(folder / "verdicts.parquet", VERDICTS, found)
        return {}

    return write


def gone(row: int, reason: str) -> Dropped:
    return Dropped("s", "f.jsonl", row + 1, row, reason, "why")


@pytest.fixture(scope="module")
def inputs() -> HeldOutInputs:
    """Held out are 2..11: 2 screened, 3 a copy, 4 overlong, 5 rendered anew, 6 refused anew, 7 mute; 8..11 plain."""
    base = {row: chat(f"question {row}", f"answer {row}") for row in range(NUM_ROWS) if row != 4}
    base[7] = chat("q", "a", weights=[1, 0])
    renders = box("render", rendering(base, [gone(4, "overlong")]), slot="s")
    rerenders = box("rerender", rendering({5: chat("question 5", "rewritten")}, [gone(6, "empty_answer")]), slot="s")
    screens = box("screen", verdicts(Verdict("s", 2, "length", False, "short"), Verdict("s", 8, "refusal", True, "")), slot="s")
    copies = box("copies", verdicts(Verdict("s", 3, "exact_duplicate", False, "of s/f:3"), Verdict("s", 0, "leak", False, "")))
    read, split = box("read", write_read, slot="s"), box("split", write_split)
    return HeldOutInputs({"s": read}, {"s": renders}, split, copies, {"s": screens}, {"s": rerenders})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def produce(store: Store, stage: Stage) -> Artefact:
    return store.produce(stage, {name: produce(store, upstream) for name, upstream in stage.inputs.items()})


def test_every_held_out_record_is_measured_or_listed_with_its_reason(store: Store, inputs: HeldOutInputs) -> None:
    """Kills: measuring screened records and copies; the rendering from before a rewrite; records that vanish."""
    made = produce(store, held_out_stage(inputs, spec=EvaluateSpec()))
    table = read_table(made.file("held_out.parquet"), HELD_OUT).to_pydict()
    assert list(zip(table["item"], table["shard"], table["index"], strict=True)) == [
        ("s/f.jsonl:6", "rerender", 0),
        ("s/f.jsonl:9", "render", 7),
        ("s/f.jsonl:10", "render", 8),
        ("s/f.jsonl:11", "render", 9),
        ("s/f.jsonl:12", "render", 10),
    ]
    reasons = {"length": 1, "exact_duplicate": 1, "overlong": 1, "empty_answer": 1, "nothing_learned": 1}
    assert made.manifest["counts"] == {"in": 10, "out": 5, "dropped": reasons}
    assert {d.row: d.reason for d in read_dropped(made.file("dropped.parquet"))} == {
        2: "length",
        3: "exact_duplicate",
        4: "overlong",
        6: "empty_answer",
        7: "nothing_learned",
    }
    assert made.facts["num_examples"] == 5
    assert made.facts["tasks"]["lonely"] == dict.fromkeys(made.facts["tasks"]["lonely"], 0)
    assert (made.facts["tasks"]["a"]["records"], made.facts["tasks"]["b"]["records"]) == (2, 3)


def test_a_budget_leaves_records_out_by_name_and_keeps_every_task(store: Store, inputs: HeldOutInputs) -> None:
    """Kills: records beyond the budget that are not listed; a budget that a task falls through."""
    made = produce(store, held_out_stage(inputs, spec=EvaluateSpec(max_tokens=150)))
    tokens = read_table(made.file("held_out.parquet"), HELD_OUT)["num_tokens"].to_pylist()
    assert sum(tokens) == made.facts["num_tokens"] <= 150
    assert min(made.facts["tasks"][task]["records"] for task in "ab") == 1
    assert made.manifest["counts"]["dropped"]["not_drawn"] == 5 - len(tokens)


@pytest.fixture(scope="module")
def measuring(inputs: HeldOutInputs, tmp_path_factory: pytest.TempPathFactory) -> MeasureInputs:
    folder = save_tiny(tmp_path_factory.mktemp("tiny"))

    def write_tokenizer(target: Path) -> Mapping[str, Json]:
        toy_tokenizer().save_pretrained(target)
        return {}

    held = held_out_stage(inputs, spec=EvaluateSpec())
    model = box("model", lambda _: {"folder": str(folder)})
    return MeasureInputs(model, box("tokenizer", write_tokenizer), held, inputs.renders, inputs.rerenders)


def trained_box(measuring: MeasureInputs, store: Store, *, kind: str) -> Stage:
    """A train box that really lowers the loss: a few steps on answers of this kind, as a full model or an adapter."""

    def write(folder: Path) -> Mapping[str, Json]:
        source = produce(store, measuring.model).facts["folder"]
        model: Any = load_model(source)
        if kind == "lora":
            model = add_adapter(model, Lora(rank=4, alpha=8.0))
        model.train()
        ids = torch.from_numpy(chat("question 9", "answer 9").ids.astype("int64"))[None]
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(15):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        save_model(model, folder / "model", tokenizer=toy_tokenizer(), stop_ids=[IM_END], base=source)
        return {"final_step": 15}

    return box("train", write, kind=kind)


SPEC = EvaluateSpec(samples=2, max_new_tokens=4)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_after_training_the_change_is_measured_on_the_same_targets_in_the_same_precision(
    store: Store, measuring: MeasureInputs, kind: str
) -> None:
    """Kills: the untouched model measured twice; `after` in the precision that this machine likes today; unpaired rows."""
    before = measure_stage(measuring, spec=SPEC, device="cpu", dtype="float32")
    train = trained_box(measuring, store, kind=kind)
    after = measure_stage(measuring, spec=SPEC, device="cpu", dtype="bfloat16", trained=train, before=before)
    old, new = produce(store, before), produce(store, after)
    assert (old.facts["dtype"], new.facts["dtype"], new.facts["device"]) == ("float32", "float32", "cpu")
    was, now = read_scores(old.file("scores.parquet")), read_scores(new.file("scores.parquet"))
    per_item = [[(s.task, s.item, s.weight) for s in scores if s.metric == "nll"] for scores in (was, now)]
    assert per_item[0] == per_item[1]
    total = next(s for s in now if s.metric == "nll_change" and not s.task)
    means = [next(s.value for s in scores if s.metric == "nll" and not s.item and not s.task) for scores in (was, now)]
    assert total.value == pytest.approx(means[1] - means[0])
    assert total.low <= total.value <= total.high < 0
    assert (new.facts["change"]["direction"], new.facts["loss"]) == ("fell", pytest.approx(means[1]))
    assert {(s.run, s.step) for s in was} == {("before", 0)}
    assert {(s.run, s.step) for s in now} == {("after", 15)}
    assert [s.prompt for s in read_samples(old.file("samples.parquet"))] == [
        s.prompt for s in read_samples(new.file("samples.parquet"))
    ]


def test_the_artefact_holds_what_the_model_scores(store: Store, measuring: MeasureInputs) -> None:
    """Kills: scores under the wrong record; targets counted twice; the first rendering of a rewritten record."""
    made = produce(store, measure_stage(measuring, spec=SPEC, device="cpu", dtype="float32"))
    scores = {s.item: s for s in read_scores(made.file("scores.parquet")) if s.metric == "nll" and s.item}
    expected = {f"s/f.jsonl:{row + 1}": chat(f"question {row}", f"answer {row}") for row in (8, 9, 10, 11)}
    expected["s/f.jsonl:6"] = chat("question 5", "rewritten")
    values = sum_nll(load_model(produce(store, measuring.model).facts["folder"]), list(expected.values()))
    for item, (value, count) in zip(expected, values, strict=True):
        assert (scores[item].value, scores[item].weight) == (pytest.approx(value, rel=1e-5), count)
    assert made.manifest["counts"] == {"in": 5, "out": 5, "dropped": {}}


def test_before_is_shared_by_recipes_that_differ_only_in_training(measuring: MeasureInputs) -> None:
    """Kills: measuring settings of the training loop in the key; a key that forgets what does change the result."""

    def key(spec: EvaluateSpec = SPEC, dtype: str = "auto") -> str:
        return measure_stage(measuring, spec=spec, dtype=dtype).key

    assert key() == key(SPEC.model_copy(update={"every_steps": 3, "stop_after": 2, "min_gain": 0.1, "keep_best": False}))
    changed = [key(SPEC.model_copy(update={name: 7})) for name in ("samples", "max_new_tokens", "seed")]
    assert len({key(), key(dtype="float32"), *changed}) == 5


def test_a_model_that_computes_nonsense_stops_the_run(store: Store, measuring: MeasureInputs, tmp_path: Path) -> None:
    """Kills: nan carried silently into a report."""
    model = load_model(produce(store, measuring.model).facts["folder"])
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "bad")
    broken = MeasureInputs(
        box("model", lambda _: {"folder": str(tmp_path / "bad")}, broken=True),
        measuring.tokenizer,
        measuring.held_out,
        measuring.renders,
        measuring.rerenders,
    )
    with pytest.raises(ModelError, match="held-out loss is nan"):
        produce(store, measure_stage(broken, spec=SPEC.model_copy(update={"samples": 0}), device="cpu", dtype="float32"))


def test_a_fixed_precision_is_taken_and_auto_is_settled_and_recorded(store: Store, measuring: MeasureInputs) -> None:
    """Kills: `auto` written into the facts, which `after` could not follow."""
    made = produce(store, measure_stage(measuring, spec=SPEC.model_copy(update={"samples": 0})))
    assert made.facts["device"] in ("cpu", "cuda")
    assert made.facts["dtype"] in ("float32", "bfloat16")
    assert made.facts["dtype_reason"]
