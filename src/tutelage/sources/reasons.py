"""Why a record is set aside: the one table of reason codes.

`Malformed` carries a code of this table through the room; `gather.py` turns it into a line of `dropped.parquet`.
"""

from __future__ import annotations

MALFORMED = {
    "broken_json": "the line, or the element of a JSON array, is not JSON",
    "broken_csv": "a csv record that is cut, or quoted wrongly",
    "wrong_field_count": "a csv record with more or fewer fields than the header",
    "not_an_object": "JSON, but no object",
    "duplicate_key": "an object names a key twice; readers differ in which value they keep",
    "too_deep": "objects or arrays nested more than 100 levels deep",
    "too_long": "longer than `intake.max_record_bytes`; never loaded whole",
    "invalid_utf8": "bytes that are not UTF-8",
    "lone_surrogate": "half of a surrogate pair: text that no tokenizer can encode",
    "nul_character": "a NUL character in a text",
    "missing_field": "a field that the shape needs is absent or null",
    "wrong_type": "a field of another type, such as a number where a text is needed",
    "unsupported_content": "a part of a message that is not text",
    "unknown_role": "a role other than system, user, assistant and tool",
    "empty_request": "a user turn of nothing but white space",
    "empty_answer": "an assistant turn without text and without tool calls",
    "two_system_turns": "more than one system turn",
    "system_not_first": "a system turn after another turn",
    "no_request": "no user turn",
    "no_answer": "no assistant turn",
    "ends_without_answer": "the last turn is not the assistant's",
    "stray_tool_result": "a tool's turn that follows neither an assistant's nor a tool's",
    "bad_tool_call": "tool calls or tool descriptions that are no list of objects with a name",
    "bad_label": "a task, licence or origin column without a usable value",
    "bad_weight": "the source's `weight_field` holds no number of 0 or more",
}
"""Codes that count as bad records: above `intake.max_bad_share` of a file the run stops."""

REFUSED = {
    "licence_not_allowed": "the licence is not in `intake.licences`",
    "origin_not_allowed": "the origin is not in `intake.origins`",
    "not_sampled": "left out by the source's `max_records`",
}
"""Codes of sound records that the recipe does not want."""

MAX_EXCERPT_CHARACTERS = 200


class Malformed(ValueError):
    """A record that is set aside: `reason` is a code of MALFORMED, `detail` says what was found, `excerpt` how it starts.

    >>> Malformed("unknown_role", "'narrator'").reason
    'unknown_role'
    """

    def __init__(self, reason: str, detail: str = "", excerpt: str = "") -> None:
        assert reason in MALFORMED, reason
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = printable(detail)
        self.excerpt = excerpt


def printable(text: str, limit: int = MAX_EXCERPT_CHARACTERS) -> str:
    r"""At most `limit` characters of a text, safe to encode.

    >>> printable("a\ud800b")
    'a\\ud800b'
    """
    return text[:limit].encode("utf-8", "backslashreplace").decode()[:limit]


def excerpt_of(raw: bytes) -> str:
    r"""The start of raw bytes as text; what is not UTF-8 is written out.

    >>> excerpt_of(b"caf\xe9")
    'caf\\xe9'
    """
    return raw[: 4 * MAX_EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace")[:MAX_EXCERPT_CHARACTERS]
