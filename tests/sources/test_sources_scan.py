"""Blocks of bytes to raw records: what may never be lost, moved or split wrongly."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.errors import DataError
from tutelage.sources.parse import parse, parse_slowly
from tutelage.sources.reasons import MAX_EXCERPT_CHARACTERS, Malformed
from tutelage.sources.scan import split_array, split_lines

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
OBJECT = st.dictionaries(st.text(max_size=6), JSON, max_size=4)
COMMON = settings(max_examples=80, deadline=None)


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = sorted({min(i, len(data)) for i in at})
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


@COMMON
@given(
    st.lists(st.sampled_from([b"\n", b"\r\n", "\u2028".encode(), "\u0085".encode(), b"a", b"bc"])), st.lists(st.integers(0, 60))
)
def test_lines_end_at_line_feeds_alone_wherever_blocks_are_cut(pieces: list[bytes], at: list[int]) -> None:
    """Kills `splitlines()`, and a carry that is lost or doubled at a block's edge."""
    data = b"".join(pieces)
    blocks = list(split_lines(cut(data, at), max_bytes=1_000))
    expected = data.split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert [item for block in blocks for item in block.items] == expected
    assert [line for block in blocks for line in block.lines] == list(range(1, len(expected) + 1))


@COMMON
@given(st.lists(st.integers(0, 40), min_size=1), st.lists(st.integers(0, 200)), st.integers(1, 30))
def test_only_lines_over_the_bound_are_set_aside(lengths: list[int], at: list[int], bound: int) -> None:
    """Kills a bound that is only looked at inside one block, or that also drops what follows."""
    lines = [b"x" * n for n in lengths]
    items = [i for block in split_lines(cut(b"\n".join(lines) + b"\n", at), max_bytes=bound) for i in block.items]
    for line, item in zip(lines, items, strict=True):
        if len(line) > bound:
            assert isinstance(item, Malformed)
            assert item.reason == "too_long"
            assert item.detail.startswith(f"{len(line)} bytes")
        else:
            assert item == line


@COMMON
@given(st.lists(JSON, max_size=5), st.sampled_from([None, 1]), st.lists(st.integers(0, 300)))
def test_array_elements_are_those_of_json_wherever_a_block_ends(values: list[object], indent: int | None, at: list[int]) -> None:
    """Kills a scanner that takes brackets, commas or quotes inside texts for structure, or trips over a cut escape."""
    data = json.dumps(values, indent=indent).encode()
    blocks = list(split_array(cut(data, at), max_bytes=10_000))
    items = [item for block in blocks for item in block.items]
    assert [json.loads(item) for item in items] == values
    for line, item in ((line, item) for block in blocks for line, item in zip(block.lines, block.items, strict=True)):
        assert data.split(b"\n")[line - 1].strip().startswith(item.split(b"\n")[0].strip()) or indent is None


def test_a_broken_element_does_not_stop_the_others() -> None:
    """Kills `json.load` on the whole array."""
    data = b'[{"a": 1},\n {"a": nope},\n, {"a": "' + b"x" * 99 + b'"},\n {"a": 2}, {"a"'
    blocks = list(split_array([data], max_bytes=60))
    items = [item if isinstance(item, bytes) else item.reason for block in blocks for item in block.items]
    assert items == [b'{"a": 1}', b'{"a": nope}', "broken_json", "too_long", b'{"a": 2}', "broken_json"]
    assert [line for block in blocks for line in block.lines] == [1, 2, 3, 3, 4, 4]


def test_text_after_an_array_is_no_record_but_an_error() -> None:
    """Kills a reader that stops at the first closing bracket and loses whatever number of records follows."""
    with pytest.raises(DataError, match="after the end of the array"):
        list(split_array([b'[{"a": 1}] {"a": 2}'], max_bytes=99))


@COMMON
@given(OBJECT, st.sampled_from([(",", ":"), (", ", ": "), (" ,", " :"), (",", "\t:")]), st.sampled_from([None, 1]))
def test_the_fast_road_reads_what_the_slow_road_reads(
    record: dict[str, object], separators: tuple[str, str], indent: int | None
) -> None:
    """Kills a fast road that differs in any value, or that calls a sound record doubtful."""
    raw = json.dumps(record, ensure_ascii=False, separators=separators, indent=indent).encode()
    assert parse(raw) == parse_slowly(raw) == record


@COMMON
@given(OBJECT, st.text(max_size=5), JSON, JSON, st.sampled_from([":", " :", "\t:", " \n:"]), st.booleans())
def test_a_key_given_twice_is_always_seen(
    record: dict[str, object], key: str, one: object, two: object, colon: str, is_nested: bool
) -> None:
    """Kills the proof by counting colons when texts hold quotes and colons of their own, or white space parts them."""
    head = json.dumps({"t": '":', "u": 'a": b', **record})[:-1]
    twice = f"{json.dumps(key)}{colon}{json.dumps(one)}, {json.dumps(key)}:{json.dumps(two)}"
    inner = f'"inner": [{{{twice}}}]' if is_nested else twice
    with pytest.raises(Malformed) as caught:
        parse(f"{head}, {inner}}}".encode())
    assert caught.value.reason == "duplicate_key"


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"a": 1', "broken_json"),
        (b'{"a": NaN}', "broken_json"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "broken_json"),
        (b"[1]", "not_an_object"),
        (b'"text"', "not_an_object"),
        (b"null", "not_an_object"),
        (b"17", "not_an_object"),
        (b'{"a": "caf\xe9"}', "invalid_utf8"),
        (b'{"a": "\\ud83d"}', "lone_surrogate"),
        (b'{"a": "x\0y"}', "nul_character"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "too_deep"),
        (b'{"a": ' + b"[" * 100_000, "too_deep"),
        (b'{"a": ' * 3_000 + b"1" + b"}" * 3_000, "too_deep"),
    ],
)
def test_what_is_wrong_with_a_line_is_named(raw: bytes, reason: str) -> None:
    """Kills one code for everything, and a crash on deep nesting."""
    with pytest.raises(Malformed) as caught:
        parse(raw)
    assert caught.value.reason == reason
    assert len(caught.value.detail) <= MAX_EXCERPT_CHARACTERS


def test_long_whole_numbers_in_tool_calls_keep_their_digits() -> None:
    """Kills orjson on lines that hold tools: it rounds whole numbers beyond 64 bits."""
    raw = b'{"messages": [{"tool_calls": [{"id": 123456789012345678901234567890}]}]}'
    assert parse(raw)["messages"][0]["tool_calls"][0]["id"] == 123456789012345678901234567890
