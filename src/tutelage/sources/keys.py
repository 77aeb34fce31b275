"""The two digests of a record: of all its text, and of its normalised first request. Pure."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate, pairwise
from string import punctuation

import numpy as np
import pyarrow as pa
from xxhash import xxh3_128_digest

from tutelage.compiled import kernel
from tutelage.records import ROLES, Int64, UInt8
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
    """16 bytes of the normalised first user text: what the split looks at."""
    first = next(turn[1] for turn in turns if turn[0] == "user")
    return blake2b(normalise(first).encode(), digest_size=16).digest()


def keys_of_all(orders: Sequence[str], contents: Sequence[str]) -> tuple[list[bytes], list[bytes]]:
    """`content_key` and `prompt_key` of records whose turns have a role and a text only; `contents` is flat.

    >>> content_keys, prompt_keys = keys_of_all(["ua"], ["2+2?", "4"])
    >>> content_keys[0].hex()[:8]
    '4680b689'

    No text may hold a NUL, and all can be encoded (see `encoded`).
    """
    if set(orders) == {"ua"}:
        requests = contents[::2]
        pairs = zip(requests, contents[1::2], strict=True)
        joined = [f"\0user\0{request}\0\0\0assistant\0{answer}\0\0" for request, answer in pairs]
    else:
        starts = list(accumulate(map(len, orders), initial=0))
        requests = [contents[start + order.index("u")] for start, order in zip(starts, orders, strict=False)]
        joined = [_form(order) % tuple(contents[a:b]) for order, (a, b) in zip(orders, pairwise(starts), strict=True)]
    return list(map(xxh3_128_digest, map(str.encode, joined))), _digests(_normalise_all(requests))


def encoded(texts: Sequence[str]) -> pa.StringArray | None:
    """The texts as Arrow keeps them; None when one holds a NUL or half a surrogate pair."""
    try:
        array = pa.array(texts, pa.string())
    except UnicodeEncodeError:
        return None
    characters = np.frombuffer(array.buffers()[2], np.uint8)
    return array if characters.all() else None


def _digests(texts: Iterable[bytes]) -> list[bytes]:
    digests, start = [], blake2b(digest_size=16).copy
    for text in texts:
        digest = start()
        digest.update(text)
        digests.append(digest.digest())
    return digests


@lru_cache(maxsize=4096)
def _form(order: str) -> str:
    return "".join(f"\0{ROLE_OF_LETTER[letter]}\0%s\0\0" for letter in order)


def _normalise_all(texts: Sequence[str]) -> list[bytes]:
    """`normalise` of texts without NUL, encoded, all at once but for those in which characters may combine."""
    folded = [text if text.isascii() else _fold(text) for text in texts]
    joined = "\0".join([text or "" for text in folded]).encode()
    normal = _normalised_compiled(joined, folded) if len(joined) > _WORTH_COMPILING else _normalised(joined, folded)
    for index, text in enumerate(folded):
        if text is None:
            normal[index] = normalise(texts[index]).encode()
        elif not text.isascii():
            normal[index] = _strip(normal[index].decode()).encode()
    return normal


_WORTH_COMPILING = 1 << 14


def _normalised(joined: bytes, folded: Sequence[str | None]) -> list[bytes]:
    """Texts divided by NUL in lower case, white space collapsed; punctuation goes at the ends of those that are ASCII."""
    characters = np.frombuffer(joined.translate(_PLAIN), np.uint8)
    is_space = characters == ord(" ")
    is_first = np.append(True, ~(is_space[1:] & is_space[:-1]))
    pieces = characters[is_first[: len(characters)]].tobytes().split(b"\0")
    is_ascii = [text is None or text.isascii() for text in folded]
    return [(plain and piece.strip(_EDGE_BYTES)) or piece.strip() for piece, plain in zip(pieces, is_ascii, strict=True)]


def _normalised_compiled(joined: bytes, folded: Sequence[str | None]) -> list[bytes]:
    """The same in one loop over the bytes."""
    data = np.frombuffer(joined, np.uint8)
    out, is_ascii = np.empty(len(data), np.uint8), np.array([text is None or text.isascii() for text in folded])
    first, last = np.empty(len(folded), np.int64), np.empty(len(folded), np.int64)
    kernel(collapse)(data, _PLAIN_TABLE, _EDGE_TABLE, is_ascii, out, first, last)
    made = out.tobytes()
    return [made[a:b] for a, b in zip(first.tolist(), last.tolist(), strict=True)]


def collapse(data: UInt8, plain: UInt8, edge: np.ndarray, is_ascii: np.ndarray, out: UInt8, first: Int64, last: Int64) -> None:
    """Text i, up to the i-th NUL, with bytes as `plain` has them and spaces collapsed, at `first[i] : last[i]` of `out`.

    Spaces at its ends go, and with `is_ascii[i]` what `edge` names, unless nothing else is there. Plain loops, for numba.
    """
    at, end = 0, 0
    for i in range(len(first)):
        begin, was_space = end, False
        while at < len(data) and data[at] != 0:
            character = plain[data[at]]
            if character != 32 or not was_space:
                out[end] = character
                end += 1
            was_space = character == 32
            at += 1
        at += 1
        a, b = begin, end
        if is_ascii[i]:
            while a < b and edge[out[a]]:
                a += 1
            while b > a and edge[out[b - 1]]:
                b -= 1
        if a == b or not is_ascii[i]:
            a, b = begin, end
            while a < b and out[a] == 32:
                a += 1
            while b > a and out[b - 1] == 32:
                b -= 1
        first[i], last[i] = a, b


def _fold(text: str) -> str | None:
    """The text with all characters beyond ASCII as NFKC_Casefold has them, white space a space; None when some may combine."""
    for character in set(text.encode().translate(None, _ASCII).decode()):
        folded = _fold_character(character)
        if folded is None:
            return None
        if folded != character:
            text = text.replace(character, folded)
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
