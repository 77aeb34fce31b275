"""Which characters of a rendered conversation come from which message: found with sentinels, then checked.

A conversation is rendered twice: as it is, and with a private-use character before and after each message's text. If
removing these characters gives exactly the plain rendering, the template treated both alike, and what stands between a
pair *is* that message's text, as the template shows it. Three placements are tried, the first proved one is taken:

    whole     around the whole text, white space at its ends included
    core      just inside that white space (templates that trim); then it is won back where the template kept it
    pieces    around the stretches between words that the template itself looks for (`</think>`), which stay intact

and once more without the names of tools, which some templates look up.

No rendering is ever searched for a message's text: equal texts, markers in content and turns that the template rewrote
or left out are told apart by construction. This module is pure: `render` is a function from messages to text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from tutelage.errors import TemplateError
from tutelage.records import Kind

Message = Mapping[str, Any]
RenderMessages = Callable[[Sequence[Message]], str]
Cut = tuple[int, int]
Cuts = Callable[["Part", str], Sequence[Cut]]
Prove = Callable[[Cuts], "list[Span] | None"]

FIRST_SENTINEL = 0x100000  # plane 16: private use, met in no text on purpose
LAST_SENTINEL = 0x10FFFD
_SENTINELS = re.compile(f"([{chr(FIRST_SENTINEL)}-{chr(LAST_SENTINEL)}])")
_ESCAPED = re.compile(r"\\+U0010([0-9a-f]{4})|\\+u(db[c-f][0-9a-f])\\+u(d[c-f][0-9a-f]{2})")

_ALWAYS_UNTOUCHED = ("id", "type")
"""Fields of a call that templates compare."""

CONTENT_KINDS = {"system": Kind.SYSTEM, "user": Kind.USER, "assistant": Kind.ASSISTANT, "tool": Kind.TOOL_RESULT}


class Refusal(TemplateError):
    """A conversation that cannot be rendered with certainty: `reason` is counted, `turn` is where (-1: no turn in particular)."""

    def __init__(self, reason: str, detail: str, *, turn: int = -1) -> None:
        self.reason, self.detail, self.turn = reason, detail, turn
        super().__init__(f"{reason}: {detail}" if turn < 0 else f"{reason}: turn {turn}: {detail}")


class Part(NamedTuple):
    """One text of a message: its turn, its kind, and a number that tells several of a kind apart."""

    turn: int
    kind: Kind
    number: int = 0


class Piece(NamedTuple):
    """A stretch `start : end` of the text of a part, wrapped in one pair of sentinels."""

    part: Part
    source: str
    start: int
    end: int

    @property
    def source_start(self) -> int:
        """Where it begins; 0 when only white space stands before it, which is no text of its own."""
        return self.start if self.source[: self.start].strip() else 0


class Span(NamedTuple):
    """Characters `start : end` of the rendered text that come from one message: from `source_start : source_end` of its text."""

    start: int
    end: int
    part: Part
    source_start: int = 0
    source_end: int = 0


@dataclass(frozen=True, slots=True)
class Trace:
    """A rendered text and where its messages stand in it, in order."""

    text: str
    spans: tuple[Span, ...]


class _Marker:
    """Copies messages with sentinels in them, and remembers what each pair encloses."""

    def __init__(self, cuts: Cuts, untouched: Sequence[str]) -> None:
        self.cuts, self.untouched = cuts, untouched
        self.pieces: list[Piece] = []

    def message(self, turn: int, message: Message) -> Message:
        """The message with sentinels in everything that a template may print."""
        marked = dict(message)
        if reasoning := message.get("reasoning_content"):
            marked["reasoning_content"] = self.text(reasoning, Part(turn, Kind.REASONING))
        marked["content"] = self.text(message["content"], Part(turn, CONTENT_KINDS[message["role"]]))
        if "tool_calls" in message:
            before = len(self.pieces)
            marked["tool_calls"] = self.leaves(
                message["tool_calls"], lambda: Part(turn, Kind.TOOL_CALL, len(self.pieces) - before), ""
            )
        return marked

    def text(self, text: str, part: Part) -> str:
        """The text with sentinels around each of its cuts; blank stretches get none, so that emptiness stays visible."""
        out, at = [], 0
        for start, end in self.cuts(part, text):
            if text[start:end].strip():
                opening = chr(FIRST_SENTINEL + 2 * len(self.pieces))
                self.pieces.append(Piece(part, text, start, end))
                out += [text[at:start], opening, text[start:end], chr(ord(opening) + 1)]
                at = end
        return "".join([*out, text[at:]])

    def leaves(self, value: Any, part: Callable[[], Part], key: str) -> Any:
        """A JSON value with sentinels in its texts; ids and types are left alone, because templates compare them."""
        match value:
            case dict():
                return {k: self.leaves(v, part, k) for k, v in value.items()}
            case list():
                return [self.leaves(v, part, key) for v in value]
            case str() if key not in self.untouched:
                return self.text(value, part())
        return value


def _whole(part: Part, text: str) -> Sequence[Cut]:
    return ((0, len(text)),)


def _core(part: Part, text: str) -> Sequence[Cut]:
    left = len(text) - len(text.lstrip())
    return ((left, max(left, len(text.rstrip()))),)


def _pieces_between(literals: Sequence[str]) -> Cuts:
    words = re.compile("|".join(re.escape(word) for word in literals))

    def cuts(part: Part, text: str) -> Sequence[Cut]:
        edges = [0, *(edge for match in words.finditer(text) for edge in match.span()), len(text)]
        return [_shifted(_core(part, text[a:b])[0], a) for a, b in zip(edges[::2], edges[1::2], strict=True)]

    return cuts


def _shifted(cut: Cut, by: int) -> Cut:
    return cut[0] + by, cut[1] + by


def trace(render: RenderMessages, messages: Sequence[Message], *, literals: Sequence[str] = ()) -> Trace:
    """The rendered text and the spans of its messages, proved; Refusal when no placement can be proved.

    >>> def trimming(messages):
    ...     return "".join(f"<{m['role']}>{m['content'].strip()}" for m in messages)
    >>> made = trace(trimming, [{"role": "user", "content": " Hi "}])
    >>> made.text, made.spans[0][:2], made.spans[0].part
    ('<user>Hi', (6, 8), Part(turn=0, kind=<Kind.USER: 2>, number=0))
    """
    try:
        text = render(messages)
    except Refusal:
        raise
    except TemplateError as error:
        raise Refusal("template_refuses", str(error)) from None
    if _SENTINELS.search(text):
        raise Refusal("private_characters", f"the text has characters from U+{FIRST_SENTINEL:X} on, which mark messages here")
    calls = any(message.get("tool_calls") for message in messages)
    for untouched in (_ALWAYS_UNTOUCHED, (*_ALWAYS_UNTOUCHED, "name")) if calls else (_ALWAYS_UNTOUCHED,):
        prove = partial(_proved, render, messages, text, untouched=untouched)
        if (spans := _placed(prove, messages, text, literals)) is not None:
            return Trace(text, tuple(spans))
    raise Refusal("unproved", "the template changes its output when messages are marked; no placement of marks could be proved")


def _placed(prove: Prove, messages: Sequence[Message], text: str, literals: Sequence[str]) -> list[Span] | None:
    """The spans under the first placement that is proved."""
    if (spans := prove(_whole)) is not None:
        return spans
    texts = [source for _, source in _texts(messages)]
    if any(source != source.strip() for source in texts) and (spans := _core_and_kept_space(prove, messages, text)) is not None:
        return spans
    found = [word for word in literals if any(word in source for source in texts)]
    return prove(_pieces_between(found)) if found else None


def _texts(messages: Sequence[Message]) -> Iterator[tuple[Part, str]]:
    for turn, message in enumerate(messages):
        yield Part(turn, CONTENT_KINDS[message["role"]]), message["content"]
        if reasoning := message.get("reasoning_content"):
            yield Part(turn, Kind.REASONING), reasoning


def _proved(
    render: RenderMessages, messages: Sequence[Message], text: str, cuts: Cuts, *, untouched: Sequence[str]
) -> list[Span] | None:
    """The spans under one placement, or None when it proves nothing."""
    marker = _Marker(cuts, untouched)
    marked = [marker.message(turn, message) for turn, message in enumerate(messages)]
    if 2 * len(marker.pieces) > LAST_SENTINEL - FIRST_SENTINEL:
        raise Refusal("too_many_turns", f"{len(marker.pieces)} texts in one conversation")
    try:
        shown = render(marked)
    except TemplateError:
        return None
    # A template that prints values as Python or as ASCII JSON writes sentinels as escapes.
    for candidate in (shown, _ESCAPED.sub(_unescaped, shown)):
        parts = _SENTINELS.split(candidate)
        if "".join(parts[::2]) == text:
            return _read(parts, text, marker.pieces)
    return None


def _unescaped(match: re.Match[str]) -> str:
    r"""The character of an escape.

    >>> [_ESCAPED.sub(_unescaped, text) == "a" + chr(0x100004) for text in (r"a\U00100004", r"a\udbc0\udc04")]
    [True, True]
    """
    code, high, low = match.groups()
    return (
        chr(0x100000 + int(code, 16))
        if code
        else f"{chr(int(high, 16))}{chr(int(low, 16))}".encode("utf-16", "surrogatepass").decode("utf-16")
    )


def _read(parts: Sequence[str], text: str, pieces: Sequence[Piece]) -> list[Span] | None:
    """The spans between paired sentinels; None where a sentinel lost its partner. Stretches of one part are joined."""
    if len(parts) % 4 != 1:
        return None
    found: list[tuple[Span, int]] = []
    at = len(parts[0])
    for i in range(1, len(parts), 4):
        code, between = ord(parts[i]) - FIRST_SENTINEL, parts[i + 1]
        if code % 2 or ord(parts[i + 2]) != FIRST_SENTINEL + code + 1:
            return None
        if between:
            piece = pieces[code // 2]
            found.append((Span(at, at + len(between), piece.part, piece.source_start, piece.end), code // 2))
        at += len(between) + len(parts[i + 3])
    is_cut = any(piece.end - piece.start < len(piece.source) for piece in pieces)
    return _joined(found, text, pieces) if is_cut else [span for span, _ in found]


def _joined(found: Sequence[tuple[Span, int]], text: str, pieces: Sequence[Piece]) -> list[Span]:
    """Spans of one part joined, and widened at its ends, over words of the source that the template printed as they stood."""
    out: list[Span] = []
    last = -1
    for span, k in found:
        piece = pieces[k]
        floor = out[-1].end if out else 0
        is_first = k == 0 or pieces[k - 1].part != piece.part
        if not is_first and last == k - 1 and text[floor : span.start] == piece.source[pieces[last].end : piece.start]:
            out[-1] = out[-1]._replace(end=span.end, source_end=piece.end)
        else:
            head = piece.source[: piece.start] if is_first else ""
            widens = bool(head.strip()) and text.startswith(head, max(floor, span.start - len(head)), span.start)
            out.append(span._replace(start=span.start - len(head), source_start=0) if widens else span)
        tail = piece.source[piece.end :] if k + 1 == len(pieces) or pieces[k + 1].part != piece.part else ""
        if tail.strip() and text.startswith(tail, span.end):
            out[-1] = out[-1]._replace(end=span.end + len(tail), source_end=len(piece.source))
        last = k
    return out


def _core_and_kept_space(prove: Prove, messages: Sequence[Message], text: str) -> list[Span] | None:
    """Spans under the placement `core`, wider where moving a sentinel outwards is proved too."""
    chosen = {part: _core(part, source)[0] for part, source in _texts(messages)}

    def cuts(part: Part, source: str) -> Sequence[Cut]:
        return (chosen.get(part, (0, len(source))),)

    spans = prove(cuts)
    if spans is None:
        return None
    for part, source in _texts(messages):
        for is_left in (True, False):
            for cut in _wider(spans, text, part, source, chosen[part], is_left=is_left):
                before, chosen[part] = chosen[part], cut
                if (wider := prove(cuts)) is not None:
                    spans = wider
                    break
                chosen[part] = before
    return spans


def _wider(spans: Sequence[Span], text: str, part: Part, source: str, cut: Cut, *, is_left: bool) -> list[Cut]:
    """Cuts wider on one side that the rendered text allows: the white space stands there, though perhaps as scaffold."""
    mine = next((span for span in spans if span.part == part), None)
    if mine is None:
        return []
    start, end = cut
    if is_left:
        return [(k, end) for k in range(start) if text.endswith(source[k:start], 0, mine.start)]
    return [(start, k) for k in range(len(source), end, -1) if text.startswith(source[end:k], mine.end)]
