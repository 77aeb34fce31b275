"""The two digests of a record: of all its text, and of its normalised first request. Pure."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from string import punctuation

import numpy as np
import pyarrow as pa
from xxhash import xxh3_128_digest

from tutelage.compiled import kernel
from tutelage.records import ROLES, Int32, Int64, UInt8
from tutelage.sources.reasons import Malformed

TurnRow = tuple[str, str, str | None, str | None, str | None, str | None, float | None]
"""The fields of `records.Turn` in order: role, content, reasoning, tool_calls, name, call_id, weight."""

ROLE_OF_LETTER = {role[0]: role for role in ROLES}
"""The order of a record's turns can be written as a word: `sua` = system, user, assistant."""

_FIELDS_PER_TURN = 4
_EDGE = punctuation + " "
_EDGE_BYTES = _EDGE.encode()
# ASCII letters lower, all that `str.split` takes for white space a space
_PLAIN = bytes(ord(" " if chr(code).isspace() else chr(code).lower()) if code < 128 else code for code in range(256))

# Western, Greek and Cyrillic letters, punctuation and symbols, Chinese characters: no accents that join a letter before them
_ALONE = (range(0x80, 0x300), range(0x370, 0x483), range(0x2000, 0x2C00), range(0x3400, 0xA000))
_ASCII = bytes(range(128))
_PLAIN_TABLE = np.frombuffer(_PLAIN, np.uint8)
_EDGE_TABLE = np.isin(np.arange(256), list(_EDGE_BYTES))


def content_key(turns: Sequence[TurnRow], tools: str | None) -> bytes:
    """16 bytes: equal exactly for equal (role, content, reasoning, tool_calls) of all turns and equal tools.

    >>> question, answer = ("user", "2+2?", *[None] * 5), ("assistant", "4", *[None] * 5)
    >>> content_key([question, answer], None).hex()[:8]
    '4680b689'

    A fixed number of fields per turn, joined by a NUL that no field may hold, cannot be read in two ways. Malformed when
    a text holds a NUL or cannot be encoded.
    """
    fields = [tools or ""]
    for turn in turns:
        fields += (turn[0], turn[1], turn[2] or "", turn[3] or "")
    joined = "\0".join(fields)
    if joined.count("\0") != _FIELDS_PER_TURN * len(turns):
        raise Malformed("nul_character", "in the text of a turn")
    try:
        return xxh3_128_digest(joined.encode())
    except UnicodeEncodeError as error:
        raise Malformed("lone_surrogate", f"\\u{ord(error.object[error.start]):04x}") from None


def prompt_key(turns: Sequence[TurnRow]) -> bytes:
    """16 bytes of the normalised first user text: what the split draws by, so to change it is to hold out other records."""
    first = next(turn[1] for turn in turns if turn[0] == "user")
    return xxh3_128_digest(normalise(first).encode())


def keys_of_all(orders: Sequence[str], contents: pa.StringArray) -> tuple[list[bytes], list[bytes]]:
    """`content_key` and `prompt_key` of records whose turns have a role and a text only; `contents` is flat (see `encoded`).

    >>> content_keys, prompt_keys = keys_of_all(["ua"], encoded(["2+2?", "4"]))
    >>> content_keys[0].hex()[:8]
    '4680b689'
    """
    _, offsets, data = contents.buffers()
    borders = np.frombuffer(offsets, np.int32)[contents.offset : contents.offset + len(contents) + 1]
    if borders[-1] - borders[0] < _WORTH_COMPILING:
        texts = iter(contents.to_pylist())
        records = [[(ROLE_OF_LETTER[letter], next(texts), None, None, None, None, None) for letter in order] for order in orders]
        return [content_key(turns, None) for turns in records], [prompt_key(turns) for turns in records]
    characters, letters = np.frombuffer(data, np.uint8), np.frombuffer("".join(orders).encode(), np.uint8)
    ends = np.cumsum(np.fromiter(map(len, orders), np.int64, len(orders)))
    requests = np.flatnonzero(letters == ord("u"))
    first = requests[np.searchsorted(requests, np.concatenate([[0], ends[:-1]]))]
    return _content_keys(characters, borders, letters, ends), _prompt_keys(characters, borders[first], borders[first + 1])


def encoded(texts: Sequence[str]) -> pa.StringArray | None:
    """The texts as Arrow keeps them; None when one holds a NUL or half a surrogate pair."""
    try:
        array = pa.array(texts, pa.string())
    except UnicodeEncodeError:
        return None
    characters = np.frombuffer(array.buffers()[2], np.uint8)
    return array if characters.all() else None


_WORTH_COMPILING = 1 << 14
"""Bytes from which the loops are worth being read from disk."""
_PREFIXES = [f"\0{role}\0".encode() for role in ROLES]
_PREFIX_BYTES = np.frombuffer(b"".join(_PREFIXES), np.uint8)
_PREFIX_BORDERS = np.array([0, *accumulate(map(len, _PREFIXES))], np.int64)
_ROLE_CODES = np.zeros(256, np.int64)
_ROLE_CODES[[ord(role[0]) for role in ROLES]] = range(len(ROLES))


def _content_keys(characters: UInt8, borders: Int32, letters: UInt8, ends: Int64) -> list[bytes]:
    """`content_key` of records that end before the turns `ends`; text i is `borders[i] : borders[i + 1]` of `characters`."""
    roles = _ROLE_CODES[letters]
    lengths = int(borders[-1] - borders[0]) + int((np.diff(_PREFIX_BORDERS)[roles] + 2).sum())
    out, places = np.zeros(lengths, np.uint8), np.empty(len(ends), np.int64)
    kernel(spell)(characters, borders, roles, _PREFIX_BYTES, _PREFIX_BORDERS, ends, out, places)
    return _digests(out, np.concatenate([[0], places[:-1]]), places)


def _prompt_keys(characters: UInt8, starts: Int32, ends: Int32) -> list[bytes]:
    """The digests of texts as `normalise` has them; text i is `starts[i] : ends[i]` of `characters`, in UTF-8."""
    out, first, last, is_ascii = _collapsed(characters, starts, ends)
    keys = _digests(out, first, last)
    beyond = np.flatnonzero(~is_ascii)
    if not len(beyond):
        return keys
    view = out.data
    for index, a, b in zip(beyond.tolist(), first[beyond].tolist(), last[beyond].tolist(), strict=True):
        folded = _fold(str(view[a:b], "utf-8"))
        whole = characters[starts[index] : ends[index]]
        normal = normalise(whole.tobytes().decode()) if folded is None else _strip(folded)
        keys[index] = xxh3_128_digest(normal.encode())
    return keys


def _digests(data: UInt8, first: Int64, last: Int64) -> list[bytes]:
    view = data.data
    return [xxh3_128_digest(view[a:b]) for a, b in zip(first.tolist(), last.tolist(), strict=True)]


def _collapsed(data: UInt8, starts: Int32, ends: Int32) -> tuple[UInt8, Int64, Int64, np.ndarray]:
    """What `collapse` fills: the bytes, each text's place among them, and whether it is ASCII."""
    out, is_ascii = np.empty(int((ends - starts).sum()), np.uint8), np.empty(len(starts), bool)
    first, last = np.empty(len(starts), np.int64), np.empty(len(starts), np.int64)
    kernel(collapse)(data, starts, ends, _PLAIN_TABLE, _EDGE_TABLE, out, first, last, is_ascii)
    return out, first, last, is_ascii


def load_kernels() -> None:
    """Compiles the loops of this module, or reads them from disk."""
    text = encoded(["a" * _WORTH_COMPILING, "b"])
    assert text is not None
    keys_of_all(["ua"], text)


def spell(  # noqa: PLR0913 - a kernel takes arrays, not objects
    data: UInt8, borders: Int32, roles: Int64, prefixes: UInt8, prefix_borders: Int64, ends: Int64, out: UInt8, places: Int64
) -> None:
    """Records as `content_key` joins them, end to end in `out` (zeros), record i up to `places[i]`. Plain loops, for numba."""
    at, turn = 0, 0
    for i in range(len(ends)):
        while turn < ends[i]:
            prefix = prefixes[prefix_borders[roles[turn]] : prefix_borders[roles[turn] + 1]]
            text = data[borders[turn] : borders[turn + 1]]
            out[at : at + len(prefix)] = prefix
            at += len(prefix)
            out[at : at + len(text)] = text
            at += len(text) + 2
            turn += 1
        places[i] = at


def collapse(  # noqa: PLR0913 - a kernel takes arrays, not objects
    data: UInt8,
    starts: Int32,
    ends: Int32,
    plain: UInt8,
    edge: np.ndarray,
    out: UInt8,
    first: Int64,
    last: Int64,
    is_ascii: np.ndarray,
) -> None:
    """Text i, `starts[i] : ends[i]` of `data`, with bytes as `plain` has them and spaces collapsed: `first[i] : last[i]` of `out`

    Spaces at its ends go, and from a text of ASCII alone what `edge` names, unless nothing else is there. Plain loops, for numba.
    """
    end = 0
    for i in range(len(starts)):
        text = data[starts[i] : ends[i]]
        begin, was_space, above = end, False, np.uint8(0)
        for k in range(len(text)):
            character = plain[text[k]]
            is_space = character == 32
            above |= character
            out[end] = character
            end += not (is_space and was_space)
            was_space = is_space
        is_ascii[i] = above < 128
        a, b = begin, end
        if above < 128:
            while a < b and edge[out[a]]:
                a += 1
            while b > a and edge[out[b - 1]]:
                b -= 1
        if a == b or above >= 128:
            a, b = begin, end
            while a < b and out[a] == 32:
                a += 1
            while b > a and out[b - 1] == 32:
                b -= 1
        first[i], last[i] = a, b


def _fold(text: str) -> str | None:
    """A text that `collapse` gave, with all characters beyond ASCII as NFKC_Casefold has them; None when some may combine."""
    brings_space = False
    for character in set(text.encode().translate(None, _ASCII).decode()):
        folded = _fold_character(character)
        if folded is None:
            return None
        if folded != character:
            text = text.replace(character, folded)
            brings_space |= " " in folded
    if brings_space:  # what is ASCII is as it should be, and so are spaces unless there are more of them now
        while "  " in text:
            text = text.replace("  ", " ")
        text = text.strip(" ")
    return text


@lru_cache(maxsize=65_536)
def _fold_character(character: str) -> str | None:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", character).casefold())
    if not all(each.isascii() or _stands_alone(each) for each in [character, *folded]):
        return None
    return "".join([" " if each.isspace() else each for each in folded])


def _stands_alone(character: str) -> bool:
    """Whether no neighbour can change what normalisation makes of a character; many more do than this knows."""
    return any(ord(character) in codes for codes in _ALONE) and not unicodedata.combining(character)


def normalise(text: str) -> str:
    r"""The text as the split compares it: NFKC, case folded, white space collapsed, punctuation at both ends cut off.

    >>> normalise("  What IS\n2+2 ?? ")
    'what is 2+2'
    >>> normalise("???")
    '???'
    """
    if text.isascii():
        text = " ".join(text.lower().split())
        return text.strip(_EDGE) or text
    # Folding can undo the normal form and the other way round; NFKC_Casefold (Unicode 3.13, D146) ends where both agree.
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _strip(" ".join(text.split()))


def _strip(text: str) -> str:
    start, stop = 0, len(text)
    while start < stop and _is_edge(text[start]):
        start += 1
    while stop > start and _is_edge(text[stop - 1]):
        stop -= 1
    return text[start:stop] or text


def _is_edge(character: str) -> bool:
    return character in _EDGE or unicodedata.category(character).startswith("P")
