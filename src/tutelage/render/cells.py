"""A traced text cut into cells of one kind: what the model reads, what it writes, the stop that ends it, and scaffold.

How a template ends an answer is learnt once, from two plain conversations (`probe`); every example is then held to it.
Pure, like `provenance`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tutelage.errors import TemplateError
from tutelage.records import Kind
from tutelage.render.provenance import Message, Part, Refusal, Span, Trace, trace


@dataclass(frozen=True, slots=True)
class Stop:
    """How a template ends an answer: `text` right after it, of which `text[:length]` is the stop and the rest scaffold.

    `token` is the single special token that the stop ends with, "" when it is ordinary text.
    """

    text: str
    length: int
    token: str


@dataclass(frozen=True, slots=True)
class Closing:
    """The stops of a template: after an answer that more turns follow, and after the last one. None = it writes none.

    `header` is the generation prompt, what a template prints when the model is to answer. `openings`, longest first, are the
    texts met between a message and the model's own text, the template's empty reasoning block included where it supplies
    one. `end_tokens` are the model's; `call_end` is what stands behind the last text of a tool call that ends a conversation.
    """

    between: Stop | None
    last: Stop | None
    header: str = ""
    openings: tuple[str, ...] = ()
    end_tokens: tuple[str, ...] = ()
    call_end: str = ""


def find_stop(closing: str, *, end_tokens: Sequence[str], special_tokens: Sequence[str]) -> Stop | None:
    r"""The stop in what a template prints after an answer; None when that is blank.

    It ends with the first of the model's end tokens, else with a special token that comes first, else it is the whole
    text without the white space behind it. White space in front belongs to it: the model has to write that too. What is
    longer than `LONGEST_STOP` characters is no stop but a text (templates of judges ask their question there).

    >>> find_stop("<|im_end|>\n", end_tokens=["<|im_end|>"], special_tokens=["<|im_start|>", "<|im_end|>"])
    Stop(text='<|im_end|>\n', length=10, token='<|im_end|>')
    >>> find_stop("\n### End\n\n", end_tokens=["</s>"], special_tokens=["</s>"])
    Stop(text='\n### End\n\n', length=8, token='')
    >>> find_stop("\n", end_tokens=["</s>"], special_tokens=["</s>"])
    """
    ends = [(closing.index(token), token) for token in end_tokens if token in closing]
    body = closing.lstrip()
    first = max((token for token in special_tokens if body.startswith(token)), key=len, default="")
    if ends:
        at, token = min(ends, key=lambda end: (end[0], -len(end[1])))
        found = Stop(closing, at + len(token), token)
    elif first:
        found = Stop(closing, len(closing) - len(body) + len(first), first)
    else:
        found = Stop(closing, len(closing.rstrip()), "")
    return found if body and found.length <= LONGEST_STOP else None


LONGEST_STOP = 80


def common_prefix(a: str, b: str) -> str:
    """The longest text that both begin with.

    >>> common_prefix("<end><user>", "<end><model>")
    '<end><'
    """
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]


@dataclass(slots=True)
class Cells:
    """A partition of a text: cell i ends before `ends[i]`, has `kinds[i]` and belongs to `turns[i]` (-1 for none).

    Scaffold with a turn is a *mark*: what the template writes around an answer's reasoning, pieces or tool calls, and the
    model has to write. `from_data[i]` says that the cell's text is a message's own, not the template's.
    """

    ends: list[int]
    kinds: list[int]
    turns: list[int]
    from_data: list[bool]

    def add(self, end: int, kind: int, turn: int, *, from_data: bool) -> None:
        """Continues the partition up to `end`; nothing happens when it is already there."""
        if end > (self.ends[-1] if self.ends else 0):
            self.ends.append(end)
            self.kinds.append(kind)
            self.turns.append(turn)
            self.from_data.append(from_data)


@dataclass(frozen=True, slots=True)
class Layout:
    """A rendered text partitioned by kind. `num_shown` turns of it are the model's own and end with a stop."""

    text: str
    cells: Cells
    hidden: tuple[int, ...]
    num_stops: int


@dataclass(frozen=True, slots=True)
class _Block:
    """Neighbouring spans of one turn, and where the scaffold after it ends."""

    turn: int
    spans: list[Span]
    until: int
    is_last: bool

    @property
    def end(self) -> int:
        return self.spans[-1].end

    @property
    def may_be_marked(self) -> bool:
        """Whether marks may stand behind its last text: a call, reasoning, or a later piece of an answer that was split."""
        last = self.spans[-1]
        return last.part.kind != Kind.ASSISTANT or last.source_start > 0


def layout(
    traced: Trace, messages: Sequence[Message], closing: Closing, *, learned: Sequence[bool], eos: str | None = None
) -> Layout:
    """The text cut into cells of one kind each; Refusal when a learned turn is not shown, shown twice, or has no stop.

    With `eos` (a token's text), an answer without a stop gets it, inserted right behind the answer.

    >>> chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    >>> traced = trace(lambda ms: "".join(f"<{m['role'][0]}>{m['content']}</>" for m in ms), chat)
    >>> stop = Stop("</>", 3, "</>")
    >>> made = layout(traced, chat, Closing(stop, stop), learned=[False, True])
    >>> made.text, made.cells.ends, [int(kind) for kind in made.cells.kinds]
    ('<u>Hi</><a>Yo</>', [3, 5, 11, 13, 16], [0, 2, 0, 3, 7])
    """
    blocks = _blocks(traced)
    _require_shown(blocks, messages, learned)
    builder = _Builder(traced.text, closing, eos)
    for block in blocks:
        if messages[block.turn]["role"] == "assistant":
            builder.answer(block, is_learned=learned[block.turn])
        else:
            builder.prompt(block)
    shown = {block.turn for block in blocks}
    hidden = tuple(turn for turn, message in enumerate(messages) if turn not in shown and message["content"].strip())
    return builder.finish(hidden)


def _blocks(traced: Trace) -> list[_Block]:
    groups: list[list[Span]] = []
    for span in _once(traced.spans):
        if groups and groups[-1][-1].part.turn == span.part.turn:
            groups[-1].append(span)
        else:
            groups.append([span])
    starts = [group[0].start for group in groups] + [len(traced.text)]
    return [
        _Block(group[0].part.turn, group, until, i == len(groups) - 1)
        for i, (group, (_, until)) in enumerate(zip(groups, pairwise(starts), strict=True))
    ]


def _once(spans: Sequence[Span]) -> Iterator[Span]:
    """The spans without texts of tool calls that were shown before: templates repeat a tool's name beside its result."""
    seen: set[tuple[Part, int]] = set()
    for span in spans:
        if span.part.kind == Kind.TOOL_CALL:
            if (span.part, span.source_start) in seen:
                continue
            seen.add((span.part, span.source_start))
        yield span


def _require_shown(blocks: Sequence[_Block], messages: Sequence[Message], learned: Sequence[bool]) -> None:
    """Refuses a conversation of which the template hides, repeats or splits something that would be learned."""
    kinds: dict[int, list[Kind]] = {}
    for block in blocks:
        if block.turn in kinds and messages[block.turn]["role"] == "assistant":
            raise Refusal("shown_twice", "the template prints this answer in two places", turn=block.turn)
        kinds[block.turn] = [span.part.kind for span in block.spans]
        if learned[block.turn] and not _in_order(block.spans):
            raise Refusal("shown_twice", "the template prints pieces of this answer twice or out of order", turn=block.turn)
    last = max((turn for turn, is_learned in enumerate(learned) if is_learned), default=-1)
    for turn, message in enumerate(messages):
        if not learned[turn]:
            continue
        shown = kinds.get(turn, [])
        wanted = Kind.ASSISTANT if message["content"].strip() else None
        if message.get("tool_calls") and Kind.TOOL_CALL not in shown:
            raise Refusal("tool_call_hidden", "the template does not show this turn's tool calls", turn=turn)
        if message.get("reasoning_content") and turn == last and Kind.REASONING not in shown:
            raise Refusal("reasoning_hidden", "the template does not show this turn's reasoning", turn=turn)
        if wanted is not None and wanted not in shown:
            raise Refusal("turn_hidden", "the template does not show this answer", turn=turn)
        if not shown:
            raise Refusal("empty_answer", "this answer is blank, so there is nothing to learn", turn=turn)


def _end_of_known(gap: str, openings: Sequence[str]) -> int:
    """Where in the gap the end of a known opening stands (the rest of it may hold a call's id, say); all of it without one.

    >>> _end_of_known(', "id": 7}[/RESULTS][CALLS]', ["[/INST]", ', "id": 1}[/RESULTS]'])
    20
    """
    endings = sorted((text[k:] for text in openings for k in range(len(text))), key=lambda ending: -len(ending))
    return next((gap.index(e) + len(e) for e in endings if len(e.strip()) > _SHORTEST_ENDING and e in gap), len(gap))


_SHORTEST_ENDING = 3


def _in_order(spans: Sequence[Span]) -> bool:
    """Whether the pieces of each text (calls aside, whose names may be repeated) stand in the order of their source."""
    ends: dict[Kind, int] = {}
    for span in spans:
        kind = span.part.kind
        if kind != Kind.TOOL_CALL and span.source_start < ends.get(kind, 0):
            return False
        ends[kind] = max(span.source_end, 1)  # a span that does not say where it is from stands for the whole text
    return True


class _Builder:
    """Lays cells from left to right, copying the text, into which stops may be inserted."""

    def __init__(self, text: str, closing: Closing, eos: str | None) -> None:
        self.text, self.closing, self.eos = text, closing, eos
        self.cells = Cells([], [], [], [])
        self.at = 0
        self.inserted: list[tuple[int, str]] = []
        self.shift = 0
        self.num_stops = 0

    def lay(self, end: int, kind: Kind, turn: int = -1, *, from_data: bool = False) -> None:
        """One cell up to character `end` of the rendered text."""
        self.cells.add(end + self.shift, kind, turn, from_data=from_data)
        self.at = max(self.at, end)

    def prompt(self, block: _Block) -> None:
        """What the model reads: its text, and scaffold around it."""
        for span in block.spans:
            self.lay(span.start, Kind.SCAFFOLD)
            self.lay(span.end, span.part.kind, block.turn, from_data=True)

    def answer(self, block: _Block, *, is_learned: bool) -> None:
        """What the model writes: its texts, the marks around them, and the stop."""
        gap = self.text[block.end : block.until]
        found = self._ending(block, gap)
        self.lay(self._begin(block.spans[0]), Kind.SCAFFOLD)
        self._body(block, block.end + (0 if found is None else found[0]))
        if found is not None:
            self.lay(block.end + sum(found), Kind.STOP, block.turn)
            self.num_stops += 1
        elif self.eos is not None and (at := self._end_of_calls(block, gap)) >= 0:
            self.lay(block.end + at, Kind.SCAFFOLD, block.turn)
            self._insert(block.turn)
        elif is_learned:
            stop = self._usual(block)
            expected = "nothing that ends an answer" if stop is None else repr(stop.text)
            raise Refusal(
                "no_stop", f"after the answer stands {gap[:40]!r}; the template usually writes {expected} there", turn=block.turn
            )

    def _usual(self, block: _Block) -> Stop | None:
        return self.closing.last if block.is_last else self.closing.between

    def _ending(self, block: _Block, gap: str) -> tuple[int, int] | None:
        """Where in the gap behind an answer the stop begins, and its length.

        Right behind an answer's text stands the usual stop or another end token, after more white space or less; behind
        a call, reasoning or a split answer whichever of them comes first, and marks before it.
        """
        usual = self._usual(block)
        text = "" if usual is None else usual.text[: usual.length]
        if text and gap.startswith(text):
            return 0, len(text)
        words = [word for word in (text.strip(), *self.closing.end_tokens) if word and word in gap]
        found = min(((gap.index(word), len(word)) for word in words), key=lambda at: (at[0], -at[1]), default=None)
        if found is None or block.may_be_marked:
            return found
        return None if gap[: found[0]].strip() else (0, sum(found))

    def _end_of_calls(self, block: _Block, gap: str) -> int:
        """Where in the gap the model's text ends when no stop stands there; -1 when that cannot be told."""
        if block.spans[-1].part.kind != Kind.TOOL_CALL:
            return 0
        tail = self.closing.call_end  # its beginning depends on what the call ends with: a text, a number, a brace
        endings = (tail[k:] for k in range(len(tail.rstrip())))
        return next((gap.index(ending) + len(ending) for ending in endings if ending in gap), -1)

    def _begin(self, first: Span) -> int:
        """Where the model's own text begins: behind the generation prompt, when more than plain text is written."""
        if first.part.kind == Kind.ASSISTANT and first.source_start == 0:
            return first.start
        gap = self.text[self.at : first.start]
        opening = next((text for text in self.closing.openings if gap.startswith(text)), None)
        if opening is not None:
            return self.at + len(opening)
        header = self.closing.header
        if header and (found := gap.rfind(header)) >= 0:
            return self.at + found + len(header)
        return self.at + _end_of_known(gap, self.closing.openings)

    def _body(self, block: _Block, end: int) -> None:
        """The turn's texts, and as marks what the template writes between them and up to `end`."""
        for span in block.spans:
            self.lay(span.start, Kind.SCAFFOLD, block.turn)
            self.lay(span.end, span.part.kind, block.turn, from_data=True)
        self.lay(end, Kind.SCAFFOLD, block.turn)

    def _insert(self, turn: int) -> None:
        assert self.eos is not None
        self.inserted.append((self.at, self.eos))
        self.shift += len(self.eos)
        self.num_stops += 1
        self.cells.add(self.at + self.shift, Kind.STOP, turn, from_data=False)

    def finish(self, hidden: tuple[int, ...]) -> Layout:
        """The partition of the whole text, inserted stops included."""
        self.lay(len(self.text), Kind.SCAFFOLD)
        edges = [0, *(at for at, _ in self.inserted), len(self.text)]
        stops = [*(stop for _, stop in self.inserted), ""]
        text = "".join(self.text[a:b] + stop for (a, b), stop in zip(pairwise(edges), stops, strict=True))
        return Layout(text, self.cells, hidden, self.num_stops)


_SYSTEM: Message = {"role": "system", "content": "Be exact."}
QUESTIONS: list[Message] = [
    {"role": "user", "content": "Why one?"},
    {"role": "assistant", "content": "Because two."},
    {"role": "user", "content": "Why three?"},
    {"role": "assistant", "content": "Because four."},
]
"""A plain conversation."""
_LOOK_UP = {"name": "look_up", "description": "Looks a word up.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": _LOOK_UP}]
_CALL = {"type": "function", "id": "a1b2c3d4e", "function": {"name": "look_up", "arguments": {"word": "five"}}}
CALLS: list[Message] = [
    QUESTIONS[0],
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": "It is six.", "name": "look_up", "tool_call_id": "a1b2c3d4e"},
    {"role": "assistant", "content": "Because seven."},
]
"""A conversation in which a tool is called."""


def probe(render: Callable[..., str], *, end_tokens: Sequence[str], special_tokens: Sequence[str]) -> Closing:
    """How a template ends answers, learnt from plain one- and two-exchange conversations; TemplateError when it refuses them."""
    error: Refusal | None = None
    for way, lead in ((render, []), (render, [_SYSTEM]), (_with_tools(render), [])):
        try:
            one = _answers(way, [*lead, *QUESTIONS[:2]])
        except Refusal as refusal:
            error = error or refusal
            continue
        try:
            two = _answers(way, [*lead, *QUESTIONS])
        except Refusal:
            two = one
        return _closing(way, lead, one[-1], two[0], end_tokens=end_tokens, special_tokens=special_tokens)
    assert error is not None
    raise TemplateError(f"the chat template refuses a plain exchange of a question and an answer: {error.detail}")


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a template prints before a plain answer (from the message before it on) and after it."""

    before: str
    after: str


def _closing(
    render: Callable[..., str],
    lead: Sequence[Message],
    last: _Answer,
    earlier: _Answer,
    *,
    end_tokens: Sequence[str],
    special_tokens: Sequence[str],
) -> Closing:
    shared = common_prefix(last.after, earlier.after)
    known = {"end_tokens": end_tokens, "special_tokens": special_tokens}
    # A header that always follows is no part of the ending; an end token in front of it is.
    has_always_header = render([*lead, *QUESTIONS[:2]], add_generation_prompt=True) == render([*lead, *QUESTIONS[:2]])
    is_ended = any(token in last.after for token in end_tokens)
    stop = find_stop(last.after if is_ended or not has_always_header else shared, **known)
    openings = {last.before, earlier.before, *_tool_openings(render, lead), *_prompted(render, [*lead, QUESTIONS[0]])}
    return Closing(
        find_stop(shared, **known),
        stop,
        header=_header(render, [*lead, *QUESTIONS[:2]]),
        openings=tuple(sorted(openings - {""}, key=lambda text: (-len(text), text))),
        end_tokens=tuple(end_tokens),
        call_end=_call_end(render, lead),
    )


def _answers(render: Callable[..., str], messages: Sequence[Message]) -> list[_Answer]:
    """The surroundings of each answer of a conversation; Refusal when one is not shown."""
    traced = trace(render, messages)
    blocks = _blocks(traced)
    shown = {block.turn for block in blocks}
    for turn, message in enumerate(messages):
        if message["role"] == "assistant" and turn not in shown:
            raise Refusal("turn_hidden", "the template does not show a plain answer", turn=turn)
    starts = [0, *(block.end for block in blocks)]
    return [
        _Answer(traced.text[start : block.spans[0].start], traced.text[block.end : block.until])
        for start, block in zip(starts, blocks, strict=False)
        if messages[block.turn]["role"] == "assistant"
    ]


def _with_tools(render: Callable[..., str]) -> Callable[..., str]:
    def rendered(messages: Sequence[Message], **more: Any) -> str:
        return render(messages, **{"tools": TOOLS, **more})

    return rendered


def _tool_openings(render: Callable[..., str], lead: Sequence[Message]) -> list[str]:
    """What stands between a tool's result and the answer, where the template knows tools."""
    with_tools = _with_tools(render)
    try:
        return [_answers(with_tools, [*lead, *CALLS])[-1].before, *_prompted(with_tools, [*lead, *CALLS[:-1]])]
    except TemplateError:
        return []


def _call_end(render: Callable[..., str], lead: Sequence[Message]) -> str:
    """What stands behind a tool call that ends a conversation, white space at its end aside."""
    messages = [*lead, *CALLS[:2]]
    try:
        traced = trace(_with_tools(render), messages)
    except TemplateError:
        return ""
    return traced.text[traced.spans[-1].end :].rstrip() if traced.spans else ""


def _prompted(render: Callable[..., str], messages: Sequence[Message]) -> list[str]:
    """What stands behind the last message when the model is to answer it; none when the template does not show that one."""
    try:
        traced = trace(lambda these: render(these, add_generation_prompt=True), messages)
    except TemplateError:
        return []
    spans = traced.spans
    return [traced.text[spans[-1].end :]] if spans and spans[-1].part.turn == len(messages) - 1 else []


def _header(render: Callable[..., str], messages: Sequence[Message]) -> str:
    """The generation prompt after a question."""
    before = list(messages[:-1])
    try:
        plain, prompted = render(before), render(before, add_generation_prompt=True)
    except TemplateError:
        return ""
    return prompted[len(plain) :] if prompted.startswith(plain) else ""
