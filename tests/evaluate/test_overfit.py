"""Training records measured like held-out ones, and what of the answers was copied from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from chats import chat
from hypothesis import given
from hypothesis import strategies as st

from toy import IM_END, tiny_llama, toy_tokenizer
from tutelage.evaluate.measure import Measure, evaluate_model
from tutelage.evaluate.overfit import RUN_LENGTH, Planned, answer_keys, begins_run, copy_scores, run_keys
from tutelage.evaluate.spec import EvaluateSpec
from tutelage.evaluate.stage import open_measure
from tutelage.records import Kind, Rendered
from tutelage.store import Artefact
from tutelage.tables import EXAMPLES, HELD_OUT, PLANNED, RenderedSet, Shards, write_table

SPEC = EvaluateSpec(samples=4, max_new_tokens=12, overfit_tokens=None)
TRAINED = {0: ("maths", "the sum of one and two is three"), 1: ("maths", "no idea"), 2: ("chat", "good morning, my dear friend")}
HELD = {
    3: ("maths", "the sum of one and two is four"),
    4: ("chat", "what a lovely evening it is"),
    5: ("unseen", "a word or two more"),
}


def is_naive_begin(kinds: np.ndarray, turns: np.ndarray, examples: np.ndarray, place: int) -> bool:
    here = slice(place, place + RUN_LENGTH)
    answers = all(kind in (Kind.ASSISTANT, Kind.REASONING, Kind.TOOL_CALL) for kind in kinds[here].tolist())
    return answers and len(set(turns[here].tolist())) == 1 and len(set(examples[here].tolist())) == 1


@given(data=st.data(), num=st.integers(0, 60))
def test_a_run_is_eight_tokens_of_one_answer(data: st.DataObject, num: int) -> None:
    """Kills runs across turns or records, over a stop, or of what the user wrote."""
    examples = np.sort(np.array(data.draw(st.lists(st.integers(0, 2), min_size=num, max_size=num)), np.int64))
    turns = np.sort(np.array(data.draw(st.lists(st.integers(0, 2), min_size=num, max_size=num)), np.int16))
    kinds = np.array(data.draw(st.lists(st.sampled_from([3] * 30 + [2, 7]), min_size=num, max_size=num)), np.uint8)
    expected = [is_naive_begin(kinds, turns, examples, place) for place in range(num - RUN_LENGTH + 1)]
    assert begins_run(kinds, turns, examples).tolist() == expected


@given(left=st.lists(st.integers(0, 3), max_size=40), right=st.lists(st.integers(0, 3), max_size=40))
def test_keys_are_equal_where_runs_are(left: list[int], right: list[int]) -> None:
    """Kills a key that forgets the order of tokens, or one of the eight."""

    def runs(ids: list[int]) -> list[tuple[int, ...]]:
        return [tuple(ids[i : i + RUN_LENGTH]) for i in range(len(ids) - RUN_LENGTH + 1)]

    mine, theirs = run_keys(np.array(left, np.int32)), run_keys(np.array(right, np.int32))
    assert np.isin(mine, theirs).tolist() == [run in runs(right) for run in runs(left)]


def artefact(stage: str, folder: Path, facts: Mapping[str, Any] | None = None) -> Artefact:
    return Artefact(stage, "0" * 32, folder, {"facts": facts or {}})


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artefact]:
    """A source of six records, three trained on and three held out, as the stages before leave it."""
    folder = tmp_path_factory.mktemp("overfit")
    examples = {row: chat(f"question {row}", answer) for row, (_, answer) in (TRAINED | HELD).items()}
    lines = [
        {
            "row": row,
            "part": 0,
            "task": task,
            "num_tokens": len(examples[row].ids),
            "num_turns": 2,
            "num_learned_tokens": 1,
            "flags": 0,
        }
        for row, (task, _) in (TRAINED | HELD).items()
    ]
    RenderedSet.write(folder, pa.Table.from_pylist(lines, schema=EXAMPLES), list(examples.values()))
    places = [line | {"source": "s", "shard": "render", "index": line["row"]} for line in lines]
    more = {"multiplier": 1.0, "weight": 1.0, "num_visits": 1, "item": "s/f:1"}
    for name, rows, schema in (("planned", places[:3], PLANNED), ("held_out", places[3:], HELD_OUT)):
        table = pa.Table.from_pylist([{k: (row | more)[k] for k in schema.names} for row in rows], schema=schema)
        write_table(folder / f"{name}.parquet", table)
    toy_tokenizer().save_pretrained(folder / "tokenizer")
    return {
        "plan": artefact("plan", folder),
        "held_out": artefact("held_out", folder),
        "tokenizer": artefact("tokenizer", folder / "tokenizer"),
        "render s": artefact("render", folder, {"stop_ids": [IM_END]}),
    }


def keys_of(text: str) -> np.ndarray:
    return run_keys(np.array([ord(c) for c in text]))


def test_what_is_copied_is_measured_against_what_was_trained_on(artefacts: dict[str, Artefact]) -> None:
    """Kills a copy rate against held-out answers, against another task's, or against what users wrote."""
    planned = open_measure(artefacts, spec=SPEC).planned
    assert planned is not None
    texts = {"maths": ["of one and two is three", "of one and two is four", "question 0"], "chat": ["the sum of one and two"]}
    found = {
        (s.task, s.metric): (s.value, s.weight)
        for s in copy_scores("copied_share", [(t, keys_of(x)) for t, each in texts.items() for x in each], planned)
    }
    three, four = len("of one and two is three") - 7, len("of one and two is four") - 7
    shared = len("of one and two is ") - 7
    num = three + four + 3
    assert found["maths", "copied_share"] == ((three + shared) / num, num)
    assert found["chat", "copied_share"][0] == 0.0
    total = num + len("the sum of one and two") - 7
    assert found["", "copied_share"] == ((three + shared) / total, total)


def test_a_measurement_has_both_losses_by_the_same_rule(artefacts: dict[str, Artefact]) -> None:
    """Kills a train loss over prompts too, in another mode, or of tasks that nothing is held out of."""
    measure = open_measure(artefacts, spec=SPEC, run="during")
    model = tiny_llama().train()
    torch.manual_seed(1)
    found = measure(model, 7)
    assert model.training
    assert measure.trained is not None and set(measure.trained.items) <= {"s#0", "s#1", "s#2"}
    expected = {s.task: s.value for s in evaluate_model(model.eval(), measure.trained) if not s.item}
    scores = {(s.metric, s.task): s for s in found.scores if not s.item}
    assert {task: score.value for (metric, task), score in scores.items() if metric == "train_nll"} == expected
    assert expected.keys() == {"maths", "chat", ""}
    assert scores["train_nll", "chat"].weight == len("good morning, my dear friend") + 1
    base = scores["reference_copied_share", "maths"]
    assert base.weight == len("the sum of one and two is four") - 7
    assert base.value == (len("the sum of one and two is ") - 7) / base.weight
    assert scores["reference_copied_share", "chat"].value == 0.0
    assert scores["copied_share", ""].weight == sum(max(sample.num_tokens - 7, 0) for sample in found.samples)
    assert {(s.run, s.step) for s in found.scores} == {("during", 7)}


def test_the_untouched_model_gets_its_training_records_too(artefacts: dict[str, Artefact]) -> None:
    """Kills a card without its starting point: the measure before knows no plan."""
    measure = open_measure(artefacts, spec=SPEC, run="during")
    model = tiny_llama()
    plain = Measure(measure.held_out, measure.tokenizer, measure.stop_ids, num_samples=0)(model, 0)
    both = measure.beside(model, plain)
    assert both.loss == plain.loss and both.scores[: len(plain.scores)] == plain.scores
    assert {s.metric for s in both.scores[len(plain.scores) :]} == {"train_nll"}


@pytest.mark.parametrize("max_tokens", [None, 60, 1])
def test_the_sample_has_the_mixture_of_what_is_held_out(artefacts: dict[str, Artefact], max_tokens: int | None) -> None:
    """Kills a gap between two losses that is a difference of mixtures, and a sample without a bound."""
    measure = open_measure(artefacts, spec=SPEC)
    rows = [
        {"source": "s", "shard": "render", "index": row % 3, "row": row, "task": ["maths", "maths", "chat"][row % 3]}
        for row in range(600)
    ]
    of = {row: len(chat(f"question {row}", text).ids) for row, (_, text) in TRAINED.items()}
    table = pa.Table.from_pylist([row | {"num_tokens": of[row["index"]]} for row in rows])
    planned = Planned(table, Shards({("s", "render"): artefacts["render s"].path}))
    sample = planned.sample(measure.held_out, max_tokens=max_tokens, seed=0)
    assert set(sample.tasks) == {"maths", "chat"}
    wanted = {
        t: sum(len(e.ids) for e, task in zip(measure.held_out.examples, measure.held_out.tasks, strict=True) if task == t)
        for t in ("maths", "chat", "unseen")
    }
    scale = 1.0 if max_tokens is None else min(1.0, max_tokens / sum(wanted.values()))
    for task in ("maths", "chat"):
        got = [len(e.ids) for e, t in zip(sample.examples, sample.tasks, strict=True) if t == task]
        assert len(got) == 1 or sum(got) <= wanted[task] * scale
    assert sample.items == planned.sample(measure.held_out, max_tokens=max_tokens, seed=0).items


def test_no_card_is_made_where_none_is_wanted(artefacts: dict[str, Artefact]) -> None:
    """Kills a cost that cannot be switched off, and a measure before that needs a plan."""
    assert open_measure(artefacts, spec=EvaluateSpec(overfit_tokens=0)).trained is None
    without = {name: a for name, a in artefacts.items() if name != "plan"}
    assert open_measure(without, spec=SPEC).planned is None


def test_answers_of_several_turns_are_told_apart() -> None:
    """Kills runs that begin in one answer and end in the next."""
    example: Rendered = chat("a", "12345678", "b", "123456789")
    assert answer_keys(example).tolist() == [*keys_of("12345678"), *keys_of("123456789")]
