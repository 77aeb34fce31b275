"""The room's door: files, account, keys."""

from __future__ import annotations

import numpy as np
import pytest

from render.styles import CHATML, MISTRAL, PLAIN, reference
from tutelage.errors import TemplateError
from tutelage.records import Conversation, Kind, Origin, Rewrite, Turn
from tutelage.render.spec import RenderSpec
from tutelage.render.stage import render_stage, rerender_stage
from tutelage.store import Counts, Outcome, Stage, Store
from tutelage.tables import (
    REWRITES,
    ConversationColumns,
    RenderedSet,
    read_dropped,
    write_records,
    write_table,
)


def _records(texts):
    key = bytes(16)
    return [
        Conversation(
            Origin("s", "f.jsonl", i + 1), (Turn("user", q), Turn("assistant", a)), "maths", "MIT", "human", None, key, key
        )
        for i, (q, a) in enumerate(texts)
    ]


def _boxes(texts, template=CHATML, rewrites=()):
    def read(folder, inputs, progress):
        columns = ConversationColumns()
        for record in _records(texts):
            columns.append(record)
        write_table(folder / "conversations.parquet", columns.table())
        return Outcome(Counts(len(texts), len(texts)))

    def tokenizer(folder, inputs, progress):
        reference("bytes", template, "<|im_end|>").save_pretrained(folder)
        return Outcome(Counts(0, 0))

    def rewrite(folder, inputs, progress):
        write_records(folder / "rewrites.parquet", REWRITES, rewrites)
        return Outcome(Counts(len(texts), len(texts)))

    return (
        Stage("read", 1, {"texts": [list(t) for t in texts]}, read, slot="s"),
        Stage("tokenizer", 1, {"template": template}, tokenizer),
        Stage("rewrite", 1, {}, rewrite, slot="s"),
    )


TEXTS = [("q", "hi"), ("q", " "), ("é", "hill.\n"), ("q", "a" * 50)]


def _produce(store, stage, **inputs):
    return store.produce(stage, {name: store.produce(box, {}) for name, box in inputs.items()})


def test_every_record_is_an_example_or_listed_with_its_reason(tmp_path):
    """Kills rows that slip when one is dropped."""
    store = Store(tmp_path / "store")
    read, tokenizer, _ = _boxes(TEXTS)
    stage = render_stage(read, tokenizer=tokenizer, spec=RenderSpec(max_tokens=40), base=tmp_path, store=store)
    made = _produce(store, stage, read=read, tokenizer=tokenizer)
    rendered = RenderedSet(made.path)
    assert rendered.examples["row"].to_pylist() == [0, 2]
    assert rendered.examples["task"].to_pylist() == ["maths", "maths"]
    assert [(d.row, d.line, d.reason) for d in read_dropped(made.path / "dropped.parquet")] == [
        (1, 2, "empty_answer"),
        (3, 4, "overlong"),
    ]
    assert made.manifest["counts"] == {"in": 4, "out": 2, "dropped": {"empty_answer": 1, "overlong": 1}}
    learned = [int(np.isin(rendered[i].kinds, [Kind.ASSISTANT, Kind.STOP]).sum()) for i in range(2)]
    assert rendered.examples["num_learned_tokens"].to_pylist() == learned
    assert made.facts["num_tokens"] == len(rendered.ids) == len(rendered.kinds) == len(rendered.turns)
    assert made.facts["num_learned_tokens"] == sum(learned)
    assert made.facts["stop_ids"] == [reference("bytes", CHATML, "<|im_end|>").eos_token_id]
    assert made.facts["stop_text"] == "<|im_end|>"


def test_an_empty_source_renders_to_an_empty_set(tmp_path):
    store = Store(tmp_path / "store")
    read, tokenizer, _ = _boxes([])
    stage = render_stage(read, tokenizer=tokenizer, spec=RenderSpec(), base=tmp_path, store=store)
    made = _produce(store, stage, read=read, tokenizer=tokenizer)
    assert len(RenderedSet(made.path)) == 0 and len(RenderedSet(made.path).ids) == 0


def test_rewritten_rows_are_rendered_alone_with_their_new_text(tmp_path):
    store = Store(tmp_path / "store")
    read, tokenizer, rewrite = _boxes(
        TEXTS, rewrites=[Rewrite("s", 2, 1, "r", "hill.\n", "hill."), Rewrite("s", 0, 1, "r", "hi", "")]
    )
    stage = rerender_stage(read, rewrite=rewrite, tokenizer=tokenizer, spec=RenderSpec(), base=tmp_path, store=store)
    made = _produce(store, stage, read=read, tokenizer=tokenizer, rewrite=rewrite)
    rendered = RenderedSet(made.path)
    assert rendered.examples["row"].to_pylist() == [2]
    assert [(d.row, d.reason) for d in read_dropped(made.path / "dropped.parquet")] == [(0, "empty_answer")]
    answer = rendered[0].ids[rendered[0].kinds == Kind.ASSISTANT].tolist()
    assert reference("bytes", CHATML, "<|im_end|>").decode(answer) == "hill."


def test_a_template_that_fails_everywhere_stops_the_run(tmp_path):
    """Kills an empty training set that nobody asked about."""
    store = Store(tmp_path / "store")
    picky = "{% if messages | length == 2 and messages[1].content == 'x' %}{{ raise_exception('never') }}{% endif %}" + CHATML
    read, tokenizer, _ = _boxes([("q", "x"), ("r", "x")], picky)
    stage = render_stage(read, tokenizer=tokenizer, spec=RenderSpec(), base=tmp_path, store=store)
    with pytest.raises(TemplateError, match=r"every one of its 2 records.*never"):
        _produce(store, stage, read=read, tokenizer=tokenizer)
    read, tokenizer, _ = _boxes(TEXTS, PLAIN)
    stage = render_stage(read, tokenizer=tokenizer, spec=RenderSpec(), base=tmp_path, store=store)
    with pytest.raises(TemplateError, match="append_eos"):
        _produce(store, stage, read=read, tokenizer=tokenizer)


def test_a_template_file_counts_by_its_text(tmp_path):
    """Kills a key that keeps its value when the template file is edited, or changes when it is moved."""
    store = Store(tmp_path / "store")
    read, tokenizer, _ = _boxes(TEXTS)
    keys = []
    for name, text in (("a.jinja", CHATML), ("b.jinja", CHATML), ("a.jinja", MISTRAL)):
        (tmp_path / name).write_text(text)
        stage = render_stage(read, tokenizer=tokenizer, spec=RenderSpec(template=name), base=tmp_path, store=store)
        keys.append(stage.key)
    assert keys[0] == keys[1] != keys[2]


def test_an_engine_found_wrong_in_a_later_batch_starts_the_source_again(tmp_path, monkeypatch):
    """Kills a file that keeps what the wrong engine wrote, and a restart that appends to it."""
    from render.test_engines import _Lying
    from tutelage.render import examples, stage
    from tutelage.render.engines import Chosen, Reference

    texts = [("q", "plain")] * 4 + [("quark", "hi")]
    read, tokenizer, _ = _boxes(texts)

    def rendered(folder, engine):
        monkeypatch.setattr(examples, "choose_engine", lambda opened, **_: engine(opened))
        store = Store(folder)
        box = render_stage(read, tokenizer=tokenizer, spec=RenderSpec(), base=tmp_path, store=store)
        return _produce(store, box, read=read, tokenizer=tokenizer)

    monkeypatch.setattr(stage, "BATCH_TEXTS", 2)
    right = rendered(tmp_path / "a", lambda o: Chosen(Reference(o.backend), Reference(o.backend), ""))
    found = rendered(tmp_path / "b", lambda o: Chosen(_Lying(o.backend, "quark"), Reference(o.backend), ""))
    assert found.facts["tokenizer_engine"]["name"] == "tokenizers"
    assert "quark" in found.facts["tokenizer_engine"]["why"]
    assert RenderedSet(found.path).ids.tolist() == RenderedSet(right.path).ids.tolist()
    assert RenderedSet(found.path).examples.equals(RenderedSet(right.path).examples)
    assert found.manifest["counts"] == right.manifest["counts"]


def test_windows_and_lost_exchanges_are_in_the_account(tmp_path):
    """Kills windows counted as records, and a lost exchange that no file lists."""
    store = Store(tmp_path / "store")

    def build(folder, inputs, progress):
        turns = (Turn("user", "q"), Turn("assistant", "a" * 99), Turn("user", "p"), Turn("assistant", "b"))
        columns = ConversationColumns()
        columns.append(Conversation(Origin("s", "f.jsonl", 7), turns, "maths", "MIT", "human", None, bytes(16), bytes(16)))
        write_table(folder / "conversations.parquet", columns.table())
        return Outcome(Counts(1, 1))

    read = Stage("read", 1, {"what": "windows"}, build, slot="s")
    _, tokenizer, _ = _boxes(TEXTS)
    spec = RenderSpec(max_tokens=60, overlong="split")
    stage = render_stage(read, tokenizer=tokenizer, spec=spec, base=tmp_path, store=store)
    made = _produce(store, stage, read=read, tokenizer=tokenizer)
    assert made.manifest["counts"] == {"in": 1, "out": 1, "dropped": {}}
    assert (made.facts["windows"], made.facts["lost_examples"]) == (1, 1)
    assert [(d.line, d.reason) for d in read_dropped(made.path / "lost.parquet")] == [(7, "overlong")]
