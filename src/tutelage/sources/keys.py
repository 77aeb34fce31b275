"""The two digests of a record: of all its text, and of its normalised first request. Pure."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from hashlib import blake2b
from string import punctuation

from tutelage.sources.reasons import Malformed

TurnRow = tuple[str, str, str | None, str | None, str | None, str | None, float | None]
"""The fields of `records.Turn` in order: role, content, reasoning, tool_calls, name, call_id, weight."""

_FIELDS_PER_TURN = 4
_EDGE = punctuation + " "


def content_key(turns: Sequence[TurnRow], tools: str | None) -> bytes:
    """16 bytes: equal exactly for equal (role, content, reasoning, tool_calls) of all turns and equal tools.

    >>> question, answer = ("user", "2+2?", *[None] * 5), ("assistant", "4", *[None] * 5)
    >>> content_key([question, answer], None).hex()[:8]
    '90980b77'

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
        return blake2b(joined.encode(), digest_size=16).digest()
    except UnicodeEncodeError as error:
        raise Malformed("lone_surrogate", f"\\u{ord(error.object[error.start]):04x}") from None


def prompt_key(turns: Sequence[TurnRow]) -> bytes:
    """16 bytes of the normalised first user text: what the split looks at."""
    first = next(turn[1] for turn in turns if turn[0] == "user")
    return blake2b(normalise(first).encode(), digest_size=16).digest()


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
    text = " ".join(text.split())
    start, stop = 0, len(text)
    while start < stop and _is_edge(text[start]):
        start += 1
    while stop > start and _is_edge(text[stop - 1]):
        stop -= 1
    return text[start:stop] or text


def _is_edge(character: str) -> bool:
    return character in _EDGE or unicodedata.category(character).startswith("P")
