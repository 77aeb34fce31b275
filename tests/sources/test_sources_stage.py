"""The room through its door: files of every kind, planted faults, refusals, samples, and the account of all of it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tutelage.errors import DataError
from tutelage.records import Dropped
from tutelage.sources import gather
from tutelage.sources import read as read_module
from tutelage.sources.spec import ColumnsSpec, IntakeSpec, SourceSpec, SplitSpec
from tutelage.sources.stage import check_bad_share, read_stage, split_stage
from tutelage.store import Artefact, Stage, Store
from tutelage.tables import SPLIT, Conversations, read_dropped, read_table

ROWS = [{"question": f"What is {i}+1?", "answer": f"{i + 1}", "kind": "odd" if i % 2 else "even"} for i in range(300)]


def read(folder: Path, path: str = "data.jsonl", intake: IntakeSpec | None = None, **spec: Any) -> Artefact:
    store = Store(folder / "store")
    stage = read_stage("s", SourceSpec(path=path, **spec), intake=intake or IntakeSpec(), base=folder, store=store)
    return store.produce(stage, {})


def found(artefact: Artefact) -> Conversations:
    return Conversations.read(artefact.path, "s")


def dropped(artefact: Artefact) -> list[Dropped]:
    return read_dropped(artefact.file("dropped.parquet"))


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def as_csv(rows: list[dict[str, str]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[Any]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def as_is(data: bytes) -> bytes:
    return data


FORMATS: dict[str, Callable[[list[Any]], bytes]] = {
    "jsonl": lines,
    "csv": as_csv,
    "parquet": as_parquet,
    "json": lambda rows: json.dumps(rows, indent=1).encode(),
}
PACKINGS = {"": as_is, ".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_and_packing_gives_the_same_records(tmp_path: Path, ending: str, packing: str) -> None:
    """Kills a format that edits texts, drops the last record, or counts places otherwise."""
    name = f"data.{ending}{packing}"
    (tmp_path / name).write_bytes(PACKINGS[packing](FORMATS[ending](ROWS)))
    artefact = read(tmp_path, name)
    conversations = found(artefact)
    assert [[turn.content for turn in c.turns] for c in conversations] == [[r["question"], r["answer"]] for r in ROWS]
    first = {"jsonl": 1, "csv": 2, "parquet": 1, "json": 2}[ending]
    step = {"json": 5}.get(ending, 1)
    assert [c.where.line for c in conversations] == list(range(first, first + step * len(ROWS), step))
    assert artefact.manifest["counts"] == {"in": 300, "out": 300, "dropped": {}}
    assert artefact.facts["files"][name]["shape"] == "prompt_completion"


@pytest.mark.parametrize(
    ("text", "places"),
    [
        (lines(ROWS[:3]), [1, 2, 3]),
        (b'{"meta": {"n": [{"x": 1}]},\n "data": ' + json.dumps(ROWS[:3]).encode() + b', "end": "[{"}', [2, 2, 2]),
        (json.dumps(ROWS[0], indent=1).encode(), [1]),
        (b"\xef\xbb\xbf" + json.dumps(ROWS[:2]).encode(), [1, 1]),
    ],
)
def test_json_files_hold_an_array_or_a_list_in_an_object_or_one_object_or_lines(
    tmp_path: Path, text: bytes, places: list[int]
) -> None:
    """Kills a reader of .json that knows one of its four uses."""
    (tmp_path / "data.json").write_bytes(text)
    assert [c.where.line for c in found(read(tmp_path, "data.json"))] == places


def test_a_second_list_in_a_json_object_is_not_passed_over(tmp_path: Path) -> None:
    """Kills a reader that takes `train` and loses `test` without a word."""
    (tmp_path / "data.json").write_bytes(json.dumps({"train": ROWS[:3], "test": ROWS[3:5]}).encode())
    with pytest.raises(DataError, match=r"data.json: .*several lists"):
        read(tmp_path, "data.json")


def test_a_task_file_gives_one_record_per_instance(tmp_path: Path) -> None:
    """Kills a bad instance that takes its whole task with it."""
    task = {
        "Definition": ["Add."],
        "Instances": [{"input": "1", "output": ["2"]}, {"input": "3"}, {"input": "5", "output": ["6"]}],
    }
    (tmp_path / "task.json").write_text(json.dumps(task, indent=2))
    artefact = read(tmp_path, "task.json")
    assert [c.row_id for c in found(artefact)] == ["s/task.json:1", "s/task.json:1#2"]
    assert [(d.reason, d.detail) for d in dropped(artefact)] == [("missing_field", "instance 1: the instance has no `output`")]
    assert artefact.manifest["counts"] == {"in": 3, "out": 2, "dropped": {"missing_field": 1}}


def ask(*messages: tuple[str, Any]) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in messages]}).encode()


FAULTS: list[tuple[str, bytes]] = [
    ("broken_json", b'{"messages": ['),
    ("broken_json", b"not json"),
    ("broken_json", ask(("user", "a"), ("assistant", "b"))[:-1] + b', "n": NaN}'),
    ("not_an_object", b"[1, 2]"),
    ("not_an_object", b'"text"'),
    ("not_an_object", b"3"),
    ("duplicate_key", ask(("user", "a"), ("assistant", "b"))[:-1] + b', "messages": []}'),
    ("duplicate_key", b'{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}'),
    ("too_deep", b'{"messages": ' + b"[" * 5_000 + b"]" * 5_000 + b"}"),
    ("too_deep", b'{"x": ' + b"[" * 150 + b"]" * 150 + b"}"),
    ("too_long", ask(("user", "a" * 60_000), ("assistant", "b"))),
    ("too_long", b"y" * 3_000_000),
    ("invalid_utf8", b'{"messages": [{"role": "user", "content": "caf\xe9"}]}'),
    ("invalid_utf8", b"\xff\xff"),
    ("lone_surrogate", b'{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "b"}]}'),
    ("nul_character", ask(("user", "a\0"), ("assistant", "b"))),
    ("nul_character", b'{"messages"\0: []}'),
    ("missing_field", b'{"text": "a"}'),
    ("missing_field", b"{}"),
    ("missing_field", ask(("user", "a"), ("assistant", None))),
    ("wrong_type", b'{"messages": "a"}'),
    ("wrong_type", ask(("user", 5), ("assistant", "b"))),
    ("wrong_type", ask(("user", "a"), ("assistant", {"text": "b"}))),
    ("unsupported_content", ask(("user", [{"type": "image_url", "image_url": "x"}]), ("assistant", "b"))),
    ("unknown_role", ask(("narrator", "a"), ("assistant", "b"))),
    ("unknown_role", ask(("User", "a"), ("assistant", "b"))),
    ("empty_request", ask(("user", ""), ("assistant", "b"))),
    ("empty_request", ask(("user", " \u3000\n"), ("assistant", "b"))),
    ("empty_answer", ask(("user", "a"), ("assistant", ""))),
    ("empty_answer", ask(("user", "a"), ("assistant", " \t"))),
    ("two_system_turns", ask(("system", "a"), ("system", "b"), ("user", "c"), ("assistant", "d"))),
    ("system_not_first", ask(("user", "c"), ("system", "b"), ("assistant", "d"))),
    ("no_request", ask(("assistant", "d"))),
    ("no_answer", ask(("user", "d"))),
    ("ends_without_answer", ask(("user", "a"), ("assistant", "b"), ("user", "c"))),
    ("stray_tool_result", ask(("user", "a"), ("tool", "b"), ("assistant", "c"))),
    ("bad_tool_call", b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [1]}]}'),
]


def planted(num_good: int) -> tuple[bytes, list[tuple[int, str]]]:
    """A file of good records, blank lines and all FAULTS spread among them, and where each fault is."""
    out, places = [], []
    for i in range(num_good):
        out.append(ask(("user", f"question {i}\u2028\u0085 end"), ("assistant", f"answer {i}")))
        if i % 50 == 7 and i // 50 < len(FAULTS):
            reason, raw = FAULTS[i // 50]
            out.append(raw)
            places.append((len(out), reason))
        if i % 400 == 0:
            out.append(b" \r")
    return b"\n".join(out), places


def test_thirty_seven_planted_faults_are_found_and_nothing_else(tmp_path: Path) -> None:
    """Kills a reader that one odd line stops, that miscounts lines, or that drops a good neighbour."""
    data, places = planted(4_000)
    assert len(places) == 37
    assert len({reason for _, reason in places}) >= 12
    (tmp_path / "data.jsonl").write_bytes(data)
    artefact = read(tmp_path, intake=IntakeSpec(max_record_bytes=50_000))
    assert [(d.line, d.reason) for d in dropped(artefact)] == places
    assert all(d.file == "data.jsonl" and d.row == -1 and len(d.excerpt) <= 200 for d in dropped(artefact))
    assert all(d.excerpt for d in dropped(artefact))
    assert [c.turns[0].content for c in found(artefact)] == [f"question {i}\u2028\u0085 end" for i in range(4_000)]
    assert artefact.manifest["counts"]["in"] == 4_037
    check_bad_share(artefact, IntakeSpec())
    with pytest.raises(DataError, match=r"data.jsonl: 37 of 4037 records are malformed \(0.92%; at most 0.10%") as caught:
        check_bad_share(artefact, IntakeSpec(max_bad_share=0.001))
    assert str(caught.value).count("  line ") == 3
    assert f"line {places[0][0]}: broken_json" in str(caught.value)


def test_csv_faults_are_placed_at_the_line_where_their_record_starts(tmp_path: Path) -> None:
    """Kills counting records for lines when texts hold line breaks, and a csv error that ends the reading."""
    text = b'question,answer\n"a\nb",c\n\nx,y,z\nd,"e"f\ng,\xff\nh,' + b"w" * 5_000 + b'\n"i",j\nk,\n"l,m'
    (tmp_path / "data.csv").write_bytes(text)
    artefact = read(tmp_path, "data.csv", intake=IntakeSpec(max_record_bytes=2_000))
    assert [(c.where.line, c.turns[0].content) for c in found(artefact)] == [(2, "a\nb"), (9, "i")]
    assert [(d.line, d.reason) for d in dropped(artefact)] == [
        (5, "wrong_field_count"),
        (6, "broken_csv"),
        (7, "invalid_utf8"),
        (8, "too_long"),
        (10, "empty_answer"),
        (11, "broken_csv"),
    ]


def test_parquet_messages_with_nulls_read_as_if_the_keys_were_absent(tmp_path: Path) -> None:
    """Kills a null that is taken for a text, since Parquet gives every message every key."""
    say = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "a"},
                say,
                {"role": "tool", "content": "1"},
                {"role": "assistant", "content": "b"},
            ]
        }
    ]
    (tmp_path / "data.parquet").write_bytes(as_parquet([*rows, {"messages": None}]))
    artefact = read(tmp_path, "data.parquet")
    (conversation,) = found(artefact)
    assert [turn.content for turn in conversation.turns] == ["a", "", "1", "b"]
    assert [turn.tool_calls is not None for turn in conversation.turns] == [False, True, False, False]
    assert [(d.line, d.reason) for d in dropped(artefact)] == [(2, "missing_field")]


def test_labels_come_from_columns_and_what_is_not_allowed_is_refused_and_listed(tmp_path: Path) -> None:
    """Kills a refusal that counts as a bad record, that is not listed, or that comes after the shape was looked at."""
    rows = [
        {"q": "a", "a": "b", "t": "maths", "l": "MIT", "o": "human"},
        {"q": "a", "a": "b", "t": "code", "l": "MIT", "o": "model:x"},
        {"q": "", "a": "", "t": "code", "l": "CC-BY-NC-4.0", "o": "human"},
        {"q": "a", "a": "b", "t": "code", "l": "MIT", "o": "robot"},
        {"q": "a", "a": "b", "t": None, "l": "MIT", "o": "human"},
        {"q": "a", "a": "b", "t": 3, "l": "MIT", "o": "model:y"},
    ]
    (tmp_path / "data.jsonl").write_bytes(lines(rows))
    columns = {"task_column": "t", "licence_column": "l", "origin_column": "o"}
    intake = IntakeSpec(licences=("MIT",), origins=("human", "model:y*"))
    artefact = read(tmp_path, intake=intake, shape="columns", columns=ColumnsSpec(user="q", assistant="a"), **columns)
    assert [(c.task, c.licence, c.origin) for c in found(artefact)] == [("maths", "MIT", "human"), ("3", "MIT", "model:y")]
    assert [(d.line, d.reason) for d in dropped(artefact)] == [
        (2, "origin_not_allowed"),
        (3, "licence_not_allowed"),
        (4, "bad_label"),
        (5, "bad_label"),
    ]
    assert artefact.facts["files"]["data.jsonl"]["bad"] == 2


def test_a_sample_is_exact_seeded_spread_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills `records[:n]`, and records that vanish because they were not drawn."""
    monkeypatch.setattr(gather, "ROWS_PER_GROUP", 70)
    (tmp_path / "data.jsonl").write_bytes(lines(ROWS))
    artefact = read(tmp_path, max_records=50)
    kept = [c.where.line for c in found(artefact)]
    assert len(kept) == 50
    assert kept == sorted(kept)
    assert kept != list(range(1, 51))
    assert max(kept) > 200
    assert sorted(kept + [d.line for d in dropped(artefact)]) == list(range(1, 301))
    assert artefact.manifest["counts"]["dropped"] == {"not_sampled": 250}
    larger = [c.where.line for c in found(read(tmp_path, max_records=60))]
    assert set(kept) < set(larger)


def test_globs_are_read_in_the_order_of_names_and_every_file_has_its_own_shape(tmp_path: Path) -> None:
    """Kills one shape for all files, and an order that depends on the disk."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "b.jsonl").write_bytes(lines(ROWS[:2]))
    (tmp_path / "d" / "a.csv").write_bytes(b"instruction,input,output\nx,,y\n")
    artefact = read(tmp_path, "d/*")
    assert [c.row_id for c in found(artefact)] == ["s/d/a.csv:2", "s/d/b.jsonl:1", "s/d/b.jsonl:2"]
    assert [fact["shape"] for fact in artefact.facts["files"].values()] == ["alpaca", "prompt_completion"]


def test_urls_are_read_through_fsspec(tmp_path: Path) -> None:
    """Kills `Path(url)`, and a key that does not follow the content of a URL."""
    system = fsspec.filesystem("memory")
    system.pipe("/tutelage/x.jsonl.gz", gzip.compress(lines(ROWS[:2])))
    one = read(tmp_path, "memory://tutelage/*.gz")
    assert [c.where.line for c in found(one)] == [1, 2]
    system.pipe("/tutelage/x.jsonl.gz", gzip.compress(lines(ROWS[:3])))
    assert len(found(read(tmp_path, "memory://tutelage/*.gz"))) == 3


def test_a_hub_dataset_is_streamed_with_its_rows_as_lines(tmp_path: Path) -> None:
    """Kills a hub reader that loads the whole set, or numbers rows from 0."""
    pytest.importorskip("datasets")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_bytes(lines(ROWS[:3]))
    store = Store(tmp_path / "store")
    spec = SourceSpec(dataset=str(tmp_path / "hub"))
    stage = read_stage("s", spec, intake=IntakeSpec(), base=tmp_path, store=store)
    assert [(c.where.line, c.turns[1].content) for c in found(store.produce(stage, {}))] == [(1, "1"), (2, "2"), (3, "3")]


@pytest.mark.parametrize(
    ("name", "data", "path", "told"),
    [
        ("x.jsonl", b"{}", "y.jsonl", "y.jsonl: no such file"),
        ("x.jsonl", b"{}", "*.csv", "no such file"),
        ("x.jsonl", b"{}", ".", "is a folder"),
        ("x.txt", b"{}", "x.txt", "rename it"),
        ("x.jsonl", b"{}", "nosuch://y", "cannot be opened"),
        ("x.jsonl.gz", gzip.compress(lines(ROWS))[:-40], "x.jsonl.gz", "x.jsonl.gz: cannot be read: Truncated"),
        ("x.jsonl.zst", zstandard.compress(lines(ROWS))[:-40], "x.jsonl.zst", "x.jsonl.zst: cannot be read: Truncated"),
        ("x.parquet", b"PAR1 no", "x.parquet", "x.parquet: cannot be read"),
        ("x.jsonl", "{}".encode("utf-16"), "x.jsonl", "x.jsonl: is UTF-16"),
        ("x.json", b"hello", "x.json", "neither an array nor an object"),
        ("x.csv", b"", "x.csv", "no header"),
        ("x.csv", b"a,a\n1,2\n", "x.csv", "twice"),
        ("x.jsonl", b'{"text": "a"}\n', "x.jsonl", "x.jsonl: no known shape fits"),
        ("x.jsonl", b"nope\n", "x.jsonl", "x.jsonl: none of 1 sampled records can be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_a_remedy(tmp_path: Path, name: str, data: bytes, path: str, told: str) -> None:
    """Kills a traceback, an empty source, and half a file that passes for a whole one."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read(tmp_path, path)
    assert told in str(caught.value)


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills `file.read()`, and columns that are kept until the end."""
    monkeypatch.setattr(gather, "ROWS_PER_GROUP", 1_000)
    monkeypatch.setattr(read_module, "BLOCK_BYTES", 1 << 16)
    for times in (20, 800):  # the first one for what is loaded once
        content = lines(ROWS) * times
        (tmp_path / f"x{times}.jsonl.gz").write_bytes(gzip.compress(content, 1))
        tracemalloc.start()
        read(tmp_path, f"x{times}.jsonl.gz")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < len(content) / 4


def test_the_key_follows_the_content_and_not_the_weight_or_the_bounds(tmp_path: Path) -> None:
    """Kills a key that misses a byte of the data, or re-reads for what changes nothing."""
    store = Store(tmp_path / "store")

    def key(bad_share: float = 0.01, **spec: Any) -> str:
        intake = IntakeSpec(max_bad_share=bad_share)
        return read_stage("s", SourceSpec(path="data.jsonl", **spec), intake=intake, base=tmp_path, store=store).key

    (tmp_path / "data.jsonl").write_bytes(lines(ROWS))
    before = key()
    assert key(weight=2.0) == before
    assert key(bad_share=0.5) == before
    assert key(task="x") != before
    (tmp_path / "data.jsonl").write_bytes(lines(ROWS).replace(b"299", b"298"))
    assert key() != before


def make_split(folder: Path, spec: SplitSpec) -> tuple[Artefact, dict[str, Artefact]]:
    store = Store(folder / "store")
    stages: dict[str, Stage] = {}
    for name in ("one", "two"):
        (folder / f"{name}.jsonl").write_bytes(lines(ROWS))
        stages[name] = read_stage(
            name, SourceSpec(path=f"{name}.jsonl", task_column="kind"), intake=IntakeSpec(), base=folder, store=store
        )
    reads = {name: store.produce(stage, {}) for name, stage in stages.items()}
    return store.produce(split_stage(stages, spec=spec), reads), reads


def test_the_split_has_one_line_per_record_and_its_facts_add_up(tmp_path: Path) -> None:
    """Kills a split that misses a source or a row, and facts that were counted otherwise."""
    split, _ = make_split(tmp_path, SplitSpec(held_out_share=0.2))
    table = read_table(split.file("split.parquet"), SPLIT).to_pydict()
    assert table["row"] == [*range(300), *range(300)]
    assert table["source"] == ["one"] * 300 + ["two"] * 300
    assert table["is_held_out"][:300] == table["is_held_out"][300:]
    total = sum(side["train"] + side["held_out"] for side in split.facts["tasks"].values())
    assert total == 600
    assert sum(side["held_out"] for side in split.facts["tasks"].values()) == sum(table["is_held_out"])
    assert split.facts["notes"] == []


def test_an_unseen_task_that_no_record_has_is_a_mistake(tmp_path: Path) -> None:
    """Kills a misspelt task that is trained on although it was to be unseen."""
    with pytest.raises(DataError, match="did you mean `even`"):
        make_split(tmp_path, SplitSpec(unseen_tasks=("evn",)))
