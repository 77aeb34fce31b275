"""One raw record to one object, strictly. Pure.

The fast road is orjson with a proof that no key stands twice; whatever it does not settle goes down the slow road,
Python's json with every pair looked at, which also says what is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from tutelage.sources.reasons import Malformed

MAX_DEPTH = 100
_WHITE_SPACE = {b" ", b"\t", b"\n", b"\r"}
_IS_SPACE = np.isin(np.arange(256), list(b" \t\n\r"))
_IS_BACKSLASH = np.arange(256) == ord("\\")
_MAX_STEPS = 64
Record = dict[str, Any]


def parse(raw: bytes) -> Record:
    r"""The object in `raw`; Malformed when there is none, or when readers could disagree on what it says.

    >>> parse(b'{"q": "2+2", "a": "4"}')
    {'q': '2+2', 'a': '4'}
    >>> parse(b'{"q": "2+2", "q": "4"}')
    Traceback (most recent call last):
    tutelage.sources.reasons.Malformed: duplicate_key: 'q'

    Why the proof holds: every key of valid JSON is followed by a colon, with or without white space between. With as many
    colons as decoded keys, no key was decoded twice. Nor when no colon follows white space and as many colons follow a
    quotation mark as there are decoded keys: text inside strings can only add to either count. Whole numbers beyond 64
    bits lose digits in orjson, and only tool calls and descriptions keep numbers, so what speaks of tools goes slowly.
    """
    try:
        record = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return parse_slowly(raw)
    if type(record) is not dict:
        raise Malformed("not_an_object", f"a JSON {_kind(record)}")
    num_keys = len(record)
    for value in record.values():
        if type(value) is dict or type(value) is list:
            num_keys += count_keys(value)
    if num_keys != len(record) and (b'"tool' in raw or b'"function' in raw):
        return parse_slowly(raw)
    if raw.count(b":") != num_keys:
        before = [piece[-1:] for piece in raw.split(b":")]
        before.pop()
        if before.count(b'"') != num_keys or not _WHITE_SPACE.isdisjoint(before):
            return parse_slowly(raw)
    return record


def parse_all(raws: Sequence[bytes]) -> list[Record] | None:
    r"""The objects in many texts, or None when one of them is not sound, or not plainly so.

    >>> parse_all([b'{"q": "2+2"}', b'{"q": "3+3"}'])
    [{'q': '2+2'}, {'q': '3+3'}]
    >>> parse_all([b'{"q": "2+2"}', b'{"q": "3", "q": "4"}']) is None
    True

    Equal to `parse` of each, but that whole numbers beyond 64 bits may have lost digits. The proof is the one of `parse`:
    no text has fewer colons behind a closing quotation mark than decoded keys, so equal sums are equal in every text.
    """
    try:
        records = list(map(orjson.loads, raws))
    except orjson.JSONDecodeError:
        return None
    if set(map(type, records)) != {dict}:
        return None
    num_keys = _count_all_keys(records)
    return records if num_keys is not None and num_keys == _count_key_colons(b"\n".join(raws)) else None


def _count_all_keys(records: list[Record]) -> int | None:
    """Keys of all objects, a level at a time; None when they are nested too deep."""
    num_keys = 0
    objects: list[Any] = records
    arrays: list[Any] = []
    for _ in range(MAX_DEPTH):
        num_keys += sum(map(len, objects))
        inner = [*chain.from_iterable(map(dict.values, objects)), *chain.from_iterable(arrays)]
        kinds = set(map(type, inner))
        if kinds.isdisjoint((dict, list)):
            return num_keys
        objects = inner if kinds == {dict} else [value for value in inner if type(value) is dict]
        arrays = inner if kinds == {list} else [value for value in inner if type(value) is list]
    return None


def _count_key_colons(text: bytes) -> int | None:
    """Colons in valid JSON behind a quotation mark that no backslash escapes, with or without white space; None when unsure."""
    codes = np.frombuffer(text, np.uint8)
    before = _step_back(codes, np.flatnonzero(codes == ord(":")) - 1, over=_IS_SPACE)
    if before is None:
        return None
    marks = before[codes[before] == ord('"')]
    first = _step_back(codes, marks - 1, over=_IS_BACKSLASH)
    return None if first is None else int(np.count_nonzero((marks - 1 - first) % 2 == 0))


def _step_back(codes: NDArray[np.uint8], at: NDArray[np.int64], *, over: NDArray[np.bool_]) -> NDArray[np.int64] | None:
    """For each position the last one at or before it that is none of these characters; None when it is far away."""
    for _ in range(_MAX_STEPS):
        is_over = over[codes[at]]
        if not is_over.any():
            return at
        at = at - is_over
    return None


def count_keys(value: Any, depth: int = 2) -> int:
    """Keys in a nested value; Malformed when it is nested too deep."""
    if depth > MAX_DEPTH:
        raise Malformed("too_deep", f"more than {MAX_DEPTH} levels")
    num_keys = 0
    if type(value) is dict:
        num_keys = len(value)
        value = value.values()
    for inner in value:
        if type(inner) is dict or type(inner) is list:
            num_keys += count_keys(inner, depth + 1)
    return num_keys


def parse_slowly(raw: bytes) -> Record:
    """As `parse`, without the fast road: the reference for it."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Malformed("invalid_utf8", f"byte {raw[error.start]:#04x} at position {error.start}") from None
    if "\0" in text:
        raise Malformed("nul_character", f"at position {text.index(chr(0))}")
    try:
        record = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise Malformed("too_deep", f"more than {MAX_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise Malformed("broken_json", f"{error.msg} at position {error.pos}") from None
    except Malformed:
        raise
    except ValueError as error:  # a whole number with more than 4,300 digits
        raise Malformed("broken_json", str(error)) from None
    if not isinstance(record, dict):
        raise Malformed("not_an_object", f"a JSON {_kind(record)}")
    count_keys(record, 1)
    if "\\u" in text:
        _refuse_surrogates(record)
    return record


def _unique(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        raise Malformed("duplicate_key", repr(next(name for name in names if names.count(name) > 1)))
    return record


def _no_constant(name: str) -> Any:
    raise Malformed("broken_json", f"{name} is no JSON number")


def _refuse_surrogates(record: Record) -> None:
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise Malformed("lone_surrogate", f"\\u{ord(error.object[error.start]):04x}") from None


def _kind(value: Any) -> str:
    match value:
        case list():
            return "array; a file that is one JSON array is named .json"
        case str():
            return "string"
        case bool() | None:
            return json.dumps(value)
        case _:
            return "number"
