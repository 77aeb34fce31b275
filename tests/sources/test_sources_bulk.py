"""Many records at a time: the same table, the same records set aside, and no ordinary record looked at singly."""

from __future__ import annotations

import json
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.records import Dropped
from tutelage.sources import gather, keys
from tutelage.sources.chat import MORE_FIELDS
from tutelage.sources.gather import DroppedWriter, Gatherer, GroupWriter, Labels
from tutelage.sources.keys import ROLE_OF_LETTER, content_key, encoded, keys_of_all, normalise, prompt_key
from tutelage.sources.parse import parse, parse_all
from tutelage.sources.reasons import Malformed
from tutelage.sources.scan import Block
from tutelage.sources.spec import ColumnsSpec, IntakeSpec, SourceSpec
from tutelage.tables import CONVERSATIONS, ConversationColumns, read_dropped, read_table

PIECES = [
    "a",
    "Z",
    " ",
    "  ",
    "\n",
    "\t",
    ":",
    '":',
    '" :',
    "\\",
    '\\":',
    "%s",
    "{",
    "?",
    "tool",
    '"tool',
    "\u00a0",
    "É",
    "e\u0301",
]
ODD_PIECES = ["\0", "\ud800", "ﬁ", "…", "\u2028", "Σ", "\u0085", "½", "漢", "\u1161", "😀"]
GOOD_TEXT = st.lists(st.sampled_from(PIECES), max_size=5).map("".join).map("x{}".format)
ODD_TEXT = st.sampled_from(ODD_PIECES).map("x{} y".format)
TEXT = GOOD_TEXT | ODD_TEXT | st.lists(st.sampled_from([*PIECES, *ODD_PIECES]), max_size=5).map("".join)
VALUE = TEXT | st.sampled_from([None, "", " ", 7, True, 2.5, [], ["a"], [["q", "a"]], {}, {"a": {"b": 1}}, 10**30])


Records = st.SearchStrategy[dict[str, Any]]


def with_odd_fields(good: Records, names: Sequence[str]) -> Records:
    """Good ones of which a field or two are given, replaced or left out."""
    changes = st.dictionaries(st.sampled_from(names), VALUE, min_size=1, max_size=2)
    changed = st.builds(lambda record, more: record | more, good, changes)
    left_out = st.builds(lambda record, name: {key: record[key] for key in record if key != name}, good, st.sampled_from(names))
    return changed | changed | left_out


def fields(needed: Sequence[str], *optional: str) -> tuple[Records, Records]:
    more = {"system": GOOD_TEXT, "t": st.sampled_from("mn"), optional[0]: GOOD_TEXT}
    good = st.fixed_dictionaries(dict.fromkeys(needed, GOOD_TEXT), optional=more)
    return good, with_odd_fields(good, [*needed, *optional, "t", "system", "system_prompt", "history"])


def chats(listed: str, role_key: str, content_key: str, roles: Sequence[str]) -> tuple[Records, Records]:
    def message(role: str, text: str) -> dict[str, Any]:
        return {role_key: role, content_key: text}

    exchange = st.builds(lambda a, b: [message(roles[0], a), message(roles[1], b)], GOOD_TEXT, GOOD_TEXT)
    good_chat = st.builds(lambda one, more: [*one, *more], exchange, exchange | st.just([]))
    names = [role_key, content_key, "name", "weight", "loss", "tool_calls", "reasoning", "note"]
    role = st.sampled_from([*roles, "system", "tool", "narrator", "function_call"])
    any_message = st.builds(message, role, TEXT)
    odd_message = any_message | with_odd_fields(any_message, names) | VALUE
    odd_chat = st.builds(lambda chat, odd, at: [*chat[:at], odd, *chat[at:]], good_chat, odd_message, st.integers(0, 4))
    optional = {"system": GOOD_TEXT, "id": st.just(3), "tools": st.none(), "meta": st.just({"a": [{"b": 1}]})}
    good = st.fixed_dictionaries({listed: good_chat}, optional=optional)
    odd = st.fixed_dictionaries({listed: odd_chat}, optional=optional)
    return good, with_odd_fields(good, [listed, "system", "system_prompt", "tools", "t", "conversation"]) | odd


SHAPES: dict[str, tuple[Records, Records]] = {
    "alpaca": fields(["instruction", "output"], "input", "context", "response"),
    "prompt_completion": fields(["prompt", "completion"], "question", "answer", "response"),
    "columns": fields(["q", "a"], "b"),
    "messages": chats("messages", "role", "content", ["user", "assistant"]),
    "sharegpt": chats("conversations", "from", "value", ["human", "gpt"]),
    "natural_instructions": (st.just({"definition": "d", "inputs": "i", "targets": "t"}), st.just({"definition": "d"})),
}
BROKEN = [
    b"",
    b" \r",
    b"nope",
    b"[1]",
    b'{"a": 1',
    b'{"a": NaN}',
    b'{"a": "\xff"}',
    b'{"q": "a", "q" : "b"}',
    b'{"a": [{}',
    b'{}]}, {"b": 1}',
]


def line(record: dict[str, Any], is_ascii: bool, colon: str, end: str) -> bytes:
    text = json.dumps(record, ensure_ascii=is_ascii, separators=(",", colon)) + end
    return text.encode("utf-8", "surrogatepass")


def items_of(shape: str) -> st.SearchStrategy[list[Any]]:
    """Lines or dictionaries: good ones alone, or with one odd one in five."""
    good, odd = SHAPES[shape]
    form = st.booleans(), st.sampled_from([":", ": ", " :", "\t : "]), st.sampled_from(["", "\r"])
    good_line, odd_line = st.builds(line, good, *form), st.builds(line, odd, *form) | st.sampled_from(BROKEN)
    several = st.one_of(
        st.lists(good_line, min_size=2),
        st.lists(st.one_of(*[good_line] * 4, odd_line), min_size=2),
        st.lists(good, min_size=2),
        st.lists(st.one_of(*[good] * 4, odd, st.just(Malformed("broken_csv"))), min_size=2),
    )
    return st.builds(lambda one, more: [*one, *more], several, several)


def gathered(items: list[Any], spec: SourceSpec, intake: IntakeSpec | None = None) -> tuple[pa.Table, list[Dropped], Any]:
    with tempfile.TemporaryDirectory() as folder:
        kept, dropped = Path(folder) / "kept.parquet", Path(folder) / "dropped.parquet"
        writer = DroppedWriter("s", dropped)
        gatherer = Gatherer(Labels("s", spec, intake or IntakeSpec()), kept, writer)
        with mock.patch.object(gather, "check_columns"):
            facts = gatherer.take_file("f", iter([Block(range(1, len(items) + 1), items)]), lambda _: None)
        gatherer.close()
        writer.close()
        assert gatherer.num_kept + sum(writer.counts.values()) == gatherer.num_records
        return read_table(kept, CONVERSATIONS).combine_chunks(), read_dropped(dropped), facts


def spec_of(shape: str, **more: Any) -> SourceSpec:
    columns = ColumnsSpec(user="{q}\n{b}" if "b" in more else "q", assistant="a", system="system") if shape == "columns" else None
    more.pop("b", None)
    return SourceSpec(path="x", shape=shape, columns=columns, **more)


@pytest.mark.parametrize("shape", SHAPES)
@given(
    data=st.data(),
    labels=st.sampled_from([{}, {"task_column": "t"}, {"licence_column": "system"}]),
    sizes=st.sampled_from([(512, 32), (6, 2), (4, 1)]),
)
@settings(max_examples=120)
def test_many_at_a_time_are_read_as_one_by_one(
    shape: str, data: st.DataObject, labels: dict[str, str], sizes: tuple[int, int]
) -> None:
    """Kills a bulk reader that keeps, drops, orders, labels or words anything otherwise than the reader of single records."""
    items = data.draw(items_of(shape))
    intake = IntakeSpec(licences=("xa", "x")) if "licence_column" in labels else None
    with mock.patch.multiple(gather, MANY=sizes[0], FEW=sizes[1], ROWS_PER_GROUP=10):
        together = gathered(items, spec_of(shape, **labels), intake)
        with mock.patch.object(gather, "bulk_named", lambda *_: None):
            singly = gathered(items, spec_of(shape, **labels), intake)
    assert together[0].to_pylist() == singly[0].to_pylist()
    assert together[1:] == singly[1:]


ASK, SAY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
EDGES: list[tuple[str, dict[str, Any]]] = [
    *(("messages", {"messages": [ASK, SAY | {name: value}]}) for name in MORE_FIELDS for value in (None, "", "x", 0, 0.5, [])),
    *(("sharegpt", {"conversations": [HUMAN, GPT | {name: value}]}) for name in MORE_FIELDS for value in (None, "x", 0, True)),
    *(("messages", {"messages": [{"role": role, "content": " "}, ASK, SAY]}) for role in ("system", "user", "assistant", "tool")),
    *(
        ("messages", {"messages": [ASK, SAY, {"role": role, "content": ""}, SAY]})
        for role in ("developer", "user", "assistant", "tool")
    ),
    *(("sharegpt", {"conversations": [HUMAN, {"from": "function_call", "value": text}, GPT]}) for text in ("x", '{"name": "f"}')),
    *(
        ("messages", {"messages": [ASK, SAY], "tools": tools})
        for tools in (None, [], "", [{"name": "f"}], '[{"name": "f"}]', "x")
    ),
    *(
        ("messages", {name: value, "messages": [ASK, SAY]})
        for name in ("system", "system_prompt")
        for value in (None, "", " ", "s", 3)
    ),
    ("messages", {"system": "", "system_prompt": "s", "messages": [ASK, SAY]}),
    ("messages", {"conversation": [SAY, ASK], "conversations": [ASK, SAY]}),
    ("sharegpt", {"messages": None, "conversation": [HUMAN, GPT]}),
    *(
        ("alpaca", {"instruction": "a", "output": "b", name: value})
        for name in ("input", "context", "history")
        for value in (None, "", "c", 0, [])
    ),
    ("alpaca", {"instruction": " ", "input": "b", "output": "c"}),
    ("alpaca", {"instruction": " ", "output": "c"}),
    ("alpaca", {"instruction": "a", "input": "b", "context": "c", "output": "d", "response": "e"}),
    ("prompt_completion", {"prompt": "", "completion": "a"}),
    ("prompt_completion", {"prompt": "p", "completion": "\n"}),
    ("prompt_completion", {"prompt": "p", "completion": "a", "system": "s", "system_prompt": "z"}),
    ("alpaca", {"instruction": "a", "output": None, "response": "c"}),
    ("alpaca", {"instruction": "a", "output": "b", "response": "c", "input": None, "context": "d", "history": [["e", "f"]]}),
    ("prompt_completion", {"prompt": None, "completion": "a", "question": "b", "answer": "c"}),
    ("prompt_completion", {"prompt": "p", "completion": "a", "question": "b", "answer": "c"}),
    ("columns", {"q": "a", "a": "b", "system": None}),
    ("columns", {"q": "a", "a": "b"}),
]


@pytest.mark.parametrize(("shape", "record"), EDGES)
def test_the_edges_of_what_is_ordinary_are_read_alike(shape: str, record: dict[str, Any]) -> None:
    """Kills a bulk reader that overlooks one field, one role or one kind of blank."""
    with mock.patch.object(gather, "FEW", 1):
        together = gathered([record, json.dumps(record).encode()], spec_of(shape))
        with mock.patch.object(gather, "bulk_named", lambda *_: None):
            singly = gathered([record, json.dumps(record).encode()], spec_of(shape))
    assert together[0].to_pylist() == singly[0].to_pylist()
    assert together[1:] == singly[1:]


ORDINARY: dict[str, list[dict[str, Any]]] = {
    "alpaca": [{"instruction": "a", "input": "b", "output": "c", "history": []}, {"instruction": "É", "output": "c", "id": 3}],
    "prompt_completion": [
        {"question": "a : b", "answer": '":'},
        {"question": "a", "answer": "c", "system": "s", "m": {"n": [1]}},
    ],
    "columns": [{"q": "a", "a": "b", "system": "", "b": "c"}, {"q": "a", "a": "b", "system": "s", "b": "c"}],
    "messages": [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"system": "s", "messages": [{"content": "a", "role": "user", "name": None}, {"role": "assistant", "content": "b"}] * 2},
    ],
    "sharegpt": [
        {"conversations": [{"from": "system", "value": ""}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"id": 1, "conversations": [{"from": "human", "value": '\\":'}, {"from": "gpt", "value": "b"}]},
    ],
}


@pytest.mark.parametrize("shape", ORDINARY)
@pytest.mark.parametrize("are_lines", [True, False])
def test_ordinary_records_are_never_looked_at_singly(shape: str, are_lines: bool) -> None:
    """Kills a fast road that is never taken."""
    records = ORDINARY[shape] * 40
    items = [json.dumps(record, ensure_ascii=False).encode() for record in records] if are_lines else records
    spec = spec_of(shape, b=True, task_column="q") if shape == "columns" else spec_of(shape)
    with mock.patch.object(Gatherer, "_take_singly", side_effect=AssertionError("singly")):
        table, dropped, facts = gathered(items, spec)
    assert (table.num_rows, dropped, facts["records"]) == (80, [], 80)


def test_one_odd_record_takes_only_a_few_others_with_it() -> None:
    """Kills a reader that gives up a whole block for one blank answer."""
    items = [json.dumps({"prompt": "a", "completion": "" if i == 700 else "b"}).encode() for i in range(2_000)]
    taken: list[int] = []
    singly = Gatherer._take_singly

    def seen(self: Gatherer, file: str, block: Block, shape: str) -> None:
        taken.extend(block.lines)
        singly(self, file, block, shape)

    with mock.patch.object(Gatherer, "_take_singly", seen):
        table, dropped, _ = gathered(items, spec_of("prompt_completion"))
    assert (table.num_rows, [each.line for each in dropped]) == (1_999, [701])
    assert 701 in taken
    assert len(taken) <= 32


RAW = st.sampled_from(
    [
        *(
            b'{"a": 1}',
            b'{"a" : ":b"}',
            b'{"a"\t:"\\":"}',
            b'{"a": " \\" :"}',
            b'{"a\\\\":1}',
            b'{"a": {"b":[{"c":""}]}}',
            b'{"": "x :y"}',
        ),
        *(
            b'{"a": 1, "a": 2}',
            b'{"b": {"a\\\\": 1, "a\\\\" :2}}',
            b'{"c": "\\\\", "c"  : 1}',
            b'{"a":1}, {"b":2}',
            b'{"a": [{}',
            b"{}]}",
        ),
        *(b'{"x": ' + b"[" * 99 + b"]" * 99 + b"}", b'{"x": ' + b"[" * 100 + b"]" * 100 + b"}", b"", b"[]", b'{"a": "\\ud800"}'),
    ]
)


@given(st.lists(RAW, min_size=1, max_size=6))
def test_many_texts_are_parsed_as_each_alone_or_not_at_all(raws: list[bytes]) -> None:
    """Kills a count of colons that a key given twice in one text and a colon in another can balance, or a block parsed as one array."""
    found = parse_all(raws)
    if found is not None:
        assert found == [parse(raw) for raw in raws]


@pytest.mark.parametrize(
    "text", ["a : b", "a:b", '"a": b', '": ', " \\\\n :", "a   : b", 'said "x"\n: y', "tool", "C:\\temp", "\u00a0:", '{"a": "b"}']
)
def test_colons_and_quotes_in_texts_raise_no_doubt(text: str) -> None:
    """Kills a proof so careful that text with punctuation never takes the fast road."""
    raw = json.dumps({"q": text, "a": [{"b": text}]}).encode()
    assert parse_all([raw, raw]) == [parse(raw), parse(raw)]


KEYED = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
NEAR_ASCII = st.lists(
    st.sampled_from([*PIECES, "…", "½", "Ǆ", "ß", "İ", "\u0307", "¨", "\u20d0", "\u20d2", "“", "\u3000", "\u2028", "\x1f"])
).map("".join)


@given(
    st.lists(
        st.tuples(st.sampled_from(["ua", "sua", "uaua", "auta"]), st.lists(KEYED | NEAR_ASCII, min_size=4, max_size=4)),
        min_size=1,
    )
)
@settings(max_examples=200)
def test_keys_of_many_are_those_of_each(records: list[tuple[str, list[str]]]) -> None:
    """Kills a quick normal form that differs from the slow one, a form filled from the wrong record, and a cut at the wrong place."""
    orders = [order for order, _ in records]
    contents = [text for order, texts in records for text in texts[: len(order)]]
    for worth_compiling in (0, 1 << 20):
        with mock.patch.object(keys, "_WORTH_COMPILING", worth_compiling):
            found = keys_of_all(orders, encoded(contents))
        for index, (order, texts) in enumerate(records):
            turns = [(ROLE_OF_LETTER[role], text, None, None, None, None, None) for role, text in zip(order, texts, strict=False)]
            assert (found[0][index], found[1][index]) == (content_key(turns, None), prompt_key(turns))


def test_no_character_that_joins_the_one_before_is_folded_alone() -> None:
    """Kills a range of characters taken to stand alone that holds a combining one, in the Unicode tables at hand."""
    pairs = [unicodedata.decomposition(chr(code)).split() for code in range(0x110000)]
    texts = ["".join(chr(int(each, 16)) for each in pair) for pair in pairs if len(pair) == 2 and pair[0][0] != "<"]
    texts += [
        "\u1100\u1161",
        "\uac00\u11a8",
        *(f"{chr(a)}{chr(b)}" for a in range(0x20D0, 0x20F1) for b in range(0x20D0, 0x20F1)),
    ]
    texts += [chr(code) for code in range(0x80, 0x3000)]
    requests = [f"x{text}y{text}" for text in texts]
    _, found = keys_of_all(["ua"] * len(requests), encoded([text for request in requests for text in (request, "a")]))
    assert found == [prompt_key([("user", request, None, None, None, None, None)]) for request in requests]


def test_what_fails_while_a_group_is_written_stops_the_reading(tmp_path: Path) -> None:
    """Kills a writing thread whose errors nobody hears of: a table that lacks a group and passes for whole."""
    for fails_at in (1, 2):
        groups = GroupWriter(tmp_path / f"{fails_at}.parquet")
        with mock.patch.object(ConversationColumns, "table", side_effect=OSError("disk full")):
            groups.write(ConversationColumns())
            with pytest.raises(OSError, match="disk full"):
                groups.close() if fails_at == 1 else groups.write(ConversationColumns())


@given(st.lists(st.text(st.sampled_from([*"aB ?!.\t\n\x1c", "é", "\u2003", "ß"]), max_size=9), min_size=1, max_size=9))
def test_requests_are_folded_alike_by_the_loop_and_one_by_one(texts: list[str]) -> None:
    """Kills a loop that collapses across texts, trims letters, or leaves nothing of a text that is all punctuation."""
    data, borders = "".join(texts).encode(), np.cumsum([0, *(len(text.encode()) for text in texts)]).astype(np.int32)
    out, first, last, is_ascii = keys._collapsed(np.frombuffer(data, np.uint8), borders[:-1], borders[1:])
    assert is_ascii.tolist() == [text.isascii() for text in texts]
    for text, a, b in zip(texts, first.tolist(), last.tolist(), strict=True):
        assert not text.isascii() or out[a:b].tobytes() == normalise(text).encode()
