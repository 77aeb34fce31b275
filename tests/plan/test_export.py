"""Export: what another trainer learns from the rows is what the plan says, or nothing is written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_reference import chat, example

from tutelage import export_plan
from tutelage.errors import PlanError, TutelageError
from tutelage.plan.assemble import make_plan
from tutelage.plan.batch import Batches, InMemory
from tutelage.plan.export import About
from tutelage.plan.row_folder import RowFolder
from tutelage.plan.spec import BatchSpec, InstructionModelling, LossRule, PromptWeight, ResponseLoss
from tutelage.plan.trainers import SCHEMAS, TRAINERS, Trainer
from tutelage.plan.weights import weigh_examples
from tutelage.records import Rendered
from tutelage.store import Silent

PACKED = BatchSpec(slots_per_step=32, capacity=16)
EQUAL_ROWS = [PACKED, BatchSpec(examples_per_step=3, capacity=16, pack="none")]
THREE = [example("u aae", first_id=10), example("u ae", first_id=20), example("uu aae", first_id=30)]
"""Four, three and five tokens; a response each."""


def batches_of(rendered: Sequence[Rendered], batch: BatchSpec, *, loss: LossRule | None = None) -> Batches:
    rule = loss or ResponseLoss()
    weights, supervised = weigh_examples(InMemory(rendered), loss=rule)
    lengths = [len(one.ids) for one in rendered]
    plan = make_plan(["a"] * len(rendered), lengths, weights=weights, num_supervised=supervised, batch=batch)
    return Batches.of(plan, rendered, loss=rule)


def rows_in(folder: Path) -> list[dict[str, Any]]:
    tables = [pa.ipc.open_stream(path).read_all() for path in sorted(folder.glob("data-*.arrow"))]
    return pa.concat_tables(tables).to_pylist()


def chats(num: int) -> list[Rendered]:
    return [chat(1 + i % 3, 1 + i % 5, first_id=100 * i + 1) for i in range(num)]


def test_rows_for_trl_written_by_hand(tmp_path: Path) -> None:
    """Kills targets in place of labels (shifted twice), padding in a row, and a neighbour that learns a first token."""
    made = export_plan(batches_of(THREE, BatchSpec(slots_per_step=16, capacity=8)), tmp_path / "rows")
    rows = sorted(rows_in(tmp_path / "rows"), key=lambda row: row["input_ids"][0])
    assert rows == [
        {
            "input_ids": [10, 11, 12, 13],
            "labels": [-100, 11, 12, 13],
            "seq_lengths": [4],
        },
        {
            "input_ids": [30, 31, 32, 33, 34, 20, 21, 22],
            "labels": [-100, -100, 32, 33, 34, -100, 21, 22],
            "seq_lengths": [5, 3],
        },
    ]
    assert (made.num_steps, made.num_rows, made.rows_per_step, made.num_tokens, made.num_trained) == (1, 2, 2, 12, 8)


def test_rows_for_the_others_written_by_hand(tmp_path: Path) -> None:
    """Kills positions that run on over documents, an attention mask of segment numbers, and weights on inputs."""
    batches = batches_of(THREE[1:], BatchSpec(slots_per_step=8, capacity=8), loss=PromptWeight(prompt_weight=0.5))
    for to in TRAINERS[1:]:
        plain = batches if to == "weights" else batches_of(THREE[1:], BatchSpec(slots_per_step=8, capacity=8))
        export_plan(plain, tmp_path / to, to=to)
    labels = {"input_ids": [30, 31, 32, 33, 34, 20, 21, 22], "labels": [-100, -100, 32, 33, 34, -100, 21, 22]}
    positions = {"position_ids": [0, 1, 2, 3, 4, 0, 1, 2]}
    assert rows_in(tmp_path / "transformers") == [labels | positions]
    assert rows_in(tmp_path / "axolotl") == [labels | positions | {"attention_mask": [1] * 8}]
    (weighed,) = rows_in(tmp_path / "weights")
    assert weighed["targets"] == [31, 32, 33, 34, -100, 21, 22, -100]
    assert weighed["loss_weights"] == [0.5, 1, 1, 1, 0, 1, 1, 0]
    assert weighed["segments"] == [1] * 5 + [2] * 3
    assert (weighed["step"], weighed["total_weight"], weighed["position_ids"]) == (0, 5.5, positions["position_ids"])


@pytest.mark.parametrize("spec", EQUAL_ROWS, ids=str)
def test_what_is_learned_is_what_the_plan_says_token_by_token_and_in_order(
    spec: BatchSpec, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Kills rows in another order, tokens lost with the padding, lengths of another row, and labels off by one anywhere."""

    @given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 8)), min_size=1, max_size=14))
    def check(sizes: list[tuple[int, int]]) -> None:
        place = tmp_path_factory.mktemp("rows")
        batches = batches_of([chat(u, a, first_id=100 * i + 1) for i, (u, a) in enumerate(sizes)], spec)
        found: list[tuple[list[int], list[int]]] = []
        made = export_plan(batches, place / "rows")
        for row in rows_in(place / "rows"):
            bounds = np.cumsum([0, *row["seq_lengths"]])
            assert bounds[-1] == len(row["input_ids"]) == len(row["labels"])
            parts = [slice(a, b) for a, b in pairwise(bounds.tolist())]
            found += [(row["input_ids"][part], row["labels"][part]) for part in parts]
        assert found == [document for batch in batches for document in learned(batch)]
        assert made.num_rows == made.rows_per_step * (made.num_steps - 1) + made.last_rows
        assert made.num_trained == sum(int((batch.weights > 0).sum()) for batch in batches)

    check()


def learned(batch: Any) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each document of a step, read off its targets one position at a time."""
    out = []
    for document in batch.documents:
        here = range(document.start, document.start + document.length)
        ids = [int(batch.inputs[document.row, i]) for i in here]
        taught = [int(batch.targets[document.row, i]) if batch.weights[document.row, i] > 0 else -100 for i in here]
        out.append((ids, [-100, *taught[:-1]]))
    return out


def test_each_document_alone_in_plain_transformers_gives_the_loss_of_our_step(tmp_path: Path) -> None:
    """Kills an export that trains on anything else: the models of transformers shift labels by themselves and average."""
    import torch

    from toy import tiny_llama
    from tutelage.train.step import step_gradients

    batches = batches_of([chat(1 + i % 4, 2 + i % 6, first_id=5 * i + 1) for i in range(9)], PACKED, loss=InstructionModelling())
    made = export_plan(batches, tmp_path / "rows")
    model, rows = tiny_llama(), rows_in(tmp_path / "rows")
    for step, batch in enumerate(batches):
        _, nll = step_gradients(model, batch)
        total, count = 0.0, 0
        for row in rows[step * made.rows_per_step : (step + 1) * made.rows_per_step]:
            parts = zip(*(torch.tensor(row[name]).split(row["seq_lengths"]) for name in ("input_ids", "labels")), strict=True)
            for ids, labels in parts:
                loss = model(input_ids=ids[None], labels=labels[None], use_cache=False).loss
                num = int((labels[1:] != -100).sum())
                total, count = total + float(loss.detach()) * num, count + num
        ours = float((batch.weights[batch.segments > 0] * nll).sum() / batch.total_weight)
        assert total / count == pytest.approx(ours, rel=1e-6)  # their softmax is float32, whatever the model is


def test_fractional_weights_are_refused_with_record_rule_and_remedy_and_leave_nothing(tmp_path: Path) -> None:
    """Kills weights rounded to labels, a refusal that says nothing, and a folder half written."""
    about = About(name_of=lambda document: f"maths/a.jsonl:{document.example + 1}")
    batches = batches_of(THREE, PACKED, loss=PromptWeight(prompt_weight=0.25))
    for to in TRAINERS[:3]:
        with pytest.raises(PlanError, match=r"step 0: a token of maths/a.jsonl:3 has loss weight 0\.25 .*--to weights.*response"):
            export_plan(batches, tmp_path / "rows", to=to, about=about)
    assert list(tmp_path.iterdir()) == []
    export_plan(batches, tmp_path / "rows", to="weights")
    assert sorted({w for row in rows_in(tmp_path / "rows") for w in row["loss_weights"]}) == [0, 0.25, 1]


def test_a_fraction_in_the_last_step_is_found_too(tmp_path: Path) -> None:
    """Kills a look at the first step only."""
    rendered = [*chats(12), example("u aae", first_id=7, turn_weights=[1, 0.5])]
    with pytest.raises(PlanError, match=r"has loss weight 0\.5 and one of"):
        export_plan(batches_of(rendered, BatchSpec(slots_per_step=16, capacity=16)), tmp_path / "rows")
    assert list(tmp_path.iterdir()) == []


def test_one_factor_on_all_weights_is_the_same_loss_and_is_said(tmp_path: Path) -> None:
    """Kills a refusal of what changes no mean, and a factor that is dropped in silence."""
    rendered = [example("u aae", first_id=10 * i, turn_weights=[1, 0.5]) for i in range(4)]
    made = export_plan(batches_of(rendered, PACKED), tmp_path / "rows")
    assert made.factor == 0.5
    assert "each of weight 0.5 in the plan" in (tmp_path / "rows" / "README.md").read_text()


def test_a_step_divided_by_something_else_is_refused(tmp_path: Path) -> None:
    """Kills an export of weights whose sum is not what the plan divides by."""
    import dataclasses

    (batch,) = batches_of(THREE, PACKED)
    with pytest.raises(PlanError, match=r"divided by 9, but its weights sum to 8"):
        export_plan([dataclasses.replace(batch, total_weight=9.0)], tmp_path / "rows")


def test_steps_of_unequal_rows_are_refused_but_not_for_weights(tmp_path: Path) -> None:
    """Kills steps that a trainer would silently cut at other rows."""
    batches = batches_of(chats(14), BatchSpec(examples_per_step=4, capacity=16))
    rows = [int((batch.segments > 0).any(axis=1).sum()) for batch in batches]
    assert len({*rows[:-1]}) > 1, "the premise: steps of a number of examples have unequal rows"
    for to in TRAINERS[:3]:
        with pytest.raises(PlanError, match=r"step \d has \d rows and step 0 has \d.*slots_per_step.*pack: none.*--to weights"):
            export_plan(batches, tmp_path / "rows", to=to)
    made = export_plan(batches, tmp_path / "rows", to="weights")
    assert (made.rows_per_step, [row["step"] for row in rows_in(tmp_path / "rows")]) == (0, np.repeat(range(4), rows).tolist())


def test_a_short_last_step_is_exported_and_noted(tmp_path: Path) -> None:
    """Kills rows of padding alone, and a last step that nobody mentions."""
    made = export_plan(batches_of(chats(7), BatchSpec(slots_per_step=48, capacity=16)), tmp_path / "rows")
    assert 0 < made.last_rows < made.rows_per_step == 3
    assert all(row["input_ids"] for row in rows_in(tmp_path / "rows"))
    assert f"3, and {made.last_rows} in the last step" in (tmp_path / "rows" / "README.md").read_text()


@pytest.mark.parametrize("to", TRAINERS)
def test_datasets_opens_the_folder(to: Trainer, tmp_path: Path) -> None:
    """Kills a folder that only our own reader understands."""
    import datasets

    export_plan(batches_of(chats(9), PACKED), tmp_path / "rows", to=to)
    opened = datasets.load_from_disk(str(tmp_path / "rows"))
    assert opened.column_names == SCHEMAS[to].names
    assert opened.to_list() == rows_in(tmp_path / "rows")


def test_parquet_holds_the_same_rows(tmp_path: Path) -> None:
    """Kills a second format with other content."""
    batches = batches_of(chats(9), PACKED)
    export_plan(batches, tmp_path / "arrow")
    made = export_plan(batches, tmp_path / "parquet", file_format="parquet")
    (shard,) = (tmp_path / "parquet").glob("*.parquet")
    assert shard.name == "train-00000-of-00001.parquet"
    assert pq.read_table(shard).to_pylist() == rows_in(tmp_path / "arrow")
    assert f'load_dataset("parquet", data_files="{tmp_path}/parquet/*.parquet", split="train")' in made.how_to_train


def test_many_shards_are_one_data_set_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills shards named or listed in another order than they were written in."""
    import datasets

    monkeypatch.setattr("tutelage.plan.row_folder._WRITE_BYTES", 1)
    monkeypatch.setattr("tutelage.plan.row_folder._SHARD_BYTES", 1)
    batches = batches_of(chats(40), BatchSpec(slots_per_step=16, capacity=16))
    export_plan(batches, tmp_path / "rows", to="weights")
    opened = datasets.load_from_disk(str(tmp_path / "rows"))
    assert len(list((tmp_path / "rows").glob(f"data-*-of-{len(batches):05d}.arrow"))) == len(batches) > 10
    assert opened["step"][:] == list(range(len(batches)))


def test_the_same_plan_gives_the_same_bytes_and_another_another_fingerprint(tmp_path: Path) -> None:
    """Kills a fingerprint by time or chance, by which caches of `datasets` would take one export for another."""
    for name, num in (("a", 9), ("b", 9), ("c", 8)):
        export_plan(batches_of(chats(num), PACKED), tmp_path / name)
    states = [json.loads((tmp_path / name / "state.json").read_text()) for name in "abc"]
    assert states[0] == states[1]
    assert states[0]["_fingerprint"] != states[2]["_fingerprint"]
    shard = states[0]["_data_files"][0]["filename"]
    assert (tmp_path / "a" / shard).read_bytes() == (tmp_path / "b" / shard).read_bytes()


def test_an_existing_folder_is_left_alone_until_asked_and_foreign_ones_always(tmp_path: Path) -> None:
    """Kills an export that wipes a folder of somebody's data."""
    batches, mine = batches_of(THREE, PACKED), tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(TutelageError, match="is no export of ours"):
            export_plan(batches, mine, overwrite=overwrite)
    assert (mine / "thesis.txt").read_text() == "years of work"
    export_plan(batches, tmp_path / "rows")
    with pytest.raises(TutelageError, match="exists already; name another folder, or replace it with --overwrite"):
        export_plan(batches, tmp_path / "rows", to="axolotl")
    assert "seq_lengths" in rows_in(tmp_path / "rows")[0]
    export_plan(batches, tmp_path / "rows", to="axolotl", overwrite=True)
    assert "attention_mask" in rows_in(tmp_path / "rows")[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "rows"]
    with pytest.raises(TutelageError, match="does not exist; make it"):
        export_plan(batches, tmp_path / "no" / "rows")


def test_a_failed_replacement_leaves_the_earlier_export(tmp_path: Path) -> None:
    """Kills an overwrite that removes the old before the new is whole."""
    export_plan(batches_of(THREE, PACKED), tmp_path / "rows")
    before = rows_in(tmp_path / "rows")
    with pytest.raises(PlanError):
        export_plan(batches_of(THREE, PACKED, loss=PromptWeight(prompt_weight=0.1)), tmp_path / "rows", overwrite=True)
    assert rows_in(tmp_path / "rows") == before


def test_two_exports_into_one_folder_do_not_mix(tmp_path: Path) -> None:
    """Kills two writers whose shards end up in one folder."""
    other = RowFolder(tmp_path / "rows", SCHEMAS["trl"])
    with pytest.raises(TutelageError, match="is being written by another export"), other:
        export_plan(batches_of(THREE, PACKED), tmp_path / "rows")


def test_a_killed_export_leaves_no_folder_and_the_next_one_is_whole(tmp_path: Path) -> None:
    """Kills a folder that is there before its rows are."""
    code = (
        "from plan.test_export import *; from pathlib import Path; import sys;"
        "export_plan(batches_of(chats(9), PACKED), Path(sys.argv[1]) / 'rows')"
    )
    here = Path(__file__).parents[1]
    env = os.environ | {"TUTELAGE_KILL_AT": "export-rows-written", "PYTHONPATH": f"{here}:{here / 'plan'}"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "rows").exists()
    export_plan(batches_of(chats(9), PACKED), tmp_path / "rows")
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


def test_progress_moves_once_per_step(tmp_path: Path) -> None:
    """Kills a bar that stands still, or jumps at the end."""

    class Told(Silent):
        total, moved = 0, 0

        def start(self, label: str, total: int | None = None, unit: str = "") -> None:
            self.total = total or 0

        def advance(self, amount: int = 1, text: str = "") -> None:
            self.moved += amount

    told, batches = Told(), batches_of(chats(30), PACKED)
    export_plan(batches, tmp_path / "rows", progress=told)
    assert told.total == told.moved == len(batches) > 3


@pytest.mark.parametrize(("option", "word", "near"), [("to", "trll", "trl"), ("file_format", "parkett", "parquet")])
def test_a_word_that_is_not_known_names_the_nearest(option: str, word: str, near: str, tmp_path: Path) -> None:
    """Kills a KeyError for a slip of the pen."""
    with pytest.raises(PlanError, match=f"{word}: did you mean `{near}`"):
        export_plan(batches_of(THREE, PACKED), tmp_path / "rows", **{option: word})  # type: ignore[arg-type]


def test_the_readme_says_recipe_steps_and_how_to_train(tmp_path: Path) -> None:
    """Kills instructions for other numbers than those of the rows."""
    about = About({"recipe": "first (first.yaml)", "loss": "response"}, model="models/small")
    for to in TRAINERS:
        made = export_plan(batches_of(chats(9), PACKED), tmp_path / to, to=to, about=about)
        text = (tmp_path / to / "README.md").read_text()
        assert "* recipe: first (first.yaml)" in text and "* loss: response" in text
        assert made.how_to_train.strip() in text and str(tmp_path / to) in text
    trl = (tmp_path / "trl" / "README.md").read_text()
    assert "per_device_train_batch_size=2," in trl and 'SFTTrainer(model="models/small"' in trl
    axolotl = (tmp_path / "axolotl" / "README.md").read_text()
    assert "gradient_accumulation_steps: 2 " in axolotl and "sequence_len: 16" in axolotl


def test_the_instructions_are_code_that_parses(tmp_path: Path) -> None:
    """Kills a brace or an indentation that breaks what people copy."""
    import ast

    import yaml

    for file_format in ("datasets", "parquet"):
        for to in TRAINERS:
            place = tmp_path / file_format / to
            place.parent.mkdir(exist_ok=True)
            made = export_plan(batches_of(chats(9), PACKED), place, to=to, file_format=file_format)
            yaml.safe_load(made.how_to_train) if to == "axolotl" else ast.parse(made.how_to_train)
