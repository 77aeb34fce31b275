"""A traced text cut into cells of one kind: what the model reads, what it writes, the stop that ends it, and scaffold.

How a template ends an answer is learnt once, from two plain conversations (`probe`); every example is then held to it.
Pure, like `provenance`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tutelage.errors import TemplateError
from tutelage.records import Kind
from tutelage.render.provenance import Message, Refusal, Span, Trace, trace


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

    `header` is the generation prompt, what a template prints when the model is to answer.
    """

    between: Stop | None
    last: Stop | None
    header: str = ""


def find_stop(closing: str, *, end_tokens: Sequence[str], special_tokens: Sequence[str]) -> Stop | None:
    r"""The stop in what a template prints after an answer; None when that is blank.

    It ends with the first of the model's end tokens, else with a special token that comes first, else it is the whole
    text without the white space behind it. White space in front belongs to it: the model has to write that too.

    >>> find_stop("<|im_end|>\n", end_tokens=["<|im_end|>"], special_tokens=["<|im_start|>", "<|im_end|>"])
    Stop(text='<|im_end|>\n', length=10, token='<|im_end|>')
    >>> find_stop("\n### End\n\n", end_tokens=["</s>"], special_tokens=["</s>"])
    Stop(text='\n### End\n\n', length=8, token='')
    >>> find_stop("\n", end_tokens=["</s>"], special_tokens=["</s>"])
    """
    ends = [(closing.index(token), token) for token in end_tokens if token in closing]
    if ends:
        at, token = min(ends, key=lambda end: (end[0], -len(end[1])))
        return Stop(closing, at + len(token), token)
    body = closing.lstrip()
    first = max((token for token in special_tokens if body.startswith(token)), key=len, default="")
    if first:
        return Stop(closing, len(closing) - len(body) + len(first), first)
    return Stop(closing, len(closing.rstrip()), "") if body else None


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

    `from_data[i]` says that the cell's text is a message's own, not the template's (which also writes the marks around
    reasoning and tool calls).
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
    for span in traced.spans:
        if groups and groups[-1][-1].part.turn == span.part.turn:
            groups[-1].append(span)
        else:
            groups.append([span])
    starts = [group[0].start for group in groups] + [len(traced.text)]
    return [
        _Block(group[0].part.turn, group, until, i == len(groups) - 1)
        for i, (group, (_, until)) in enumerate(zip(groups, pairwise(starts), strict=True))
    ]


def _require_shown(blocks: Sequence[_Block], messages: Sequence[Message], learned: Sequence[bool]) -> None:
    """Refuses a conversation of which the template hides, repeats or splits something that would be learned."""
    kinds: dict[int, list[Kind]] = {}
    for block in blocks:
        if block.turn in kinds and messages[block.turn]["role"] == "assistant":
            raise Refusal("shown_twice", "the template prints this answer in two places", turn=block.turn)
        kinds[block.turn] = [span.part.kind for span in block.spans]
    last = max((turn for turn, is_learned in enumerate(learned) if is_learned), default=-1)
    for turn, message in enumerate(messages):
        if not learned[turn]:
            continue
        shown = kinds.get(turn, [])
        wanted = Kind.ASSISTANT if message["content"].strip() else None
        if shown.count(Kind.ASSISTANT) > 1:
            raise Refusal("shown_twice", "the template prints this answer in several pieces", turn=turn)
        if message.get("tool_calls") and Kind.TOOL_CALL not in shown:
            raise Refusal("tool_call_hidden", "the template does not show this turn's tool calls", turn=turn)
        if message.get("reasoning_content") and turn == last and Kind.REASONING not in shown:
            raise Refusal("reasoning_hidden", "the template does not show this turn's reasoning", turn=turn)
        if wanted is not None and wanted not in shown:
            raise Refusal("turn_hidden", "the template does not show this answer", turn=turn)
        if not shown:
            raise Refusal("empty_answer", "this answer is blank, so there is nothing to learn", turn=turn)


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
        """What the model writes: reasoning with the marks around it, text, tool calls with theirs, and the stop."""
        first, end = block.spans[0], block.spans[-1].end
        gap = self.text[end : block.until]
        calls = any(span.part.kind == Kind.TOOL_CALL for span in block.spans)
        stop = self.closing.last if block.is_last else self.closing.between
        at = _where(stop, gap, anywhere=calls)
        self.lay(self._begin(first), Kind.SCAFFOLD)
        self._body(block, end if at < 0 else end + at)
        if stop is not None and at >= 0:
            self.lay(end + at + stop.length, Kind.STOP, block.turn)
            self.num_stops += 1
        elif self.eos is not None:
            self._insert(block.turn)
        elif is_learned:
            expected = "nothing that ends an answer" if stop is None else repr(stop.text)
            raise Refusal(
                "no_stop", f"after the answer stands {gap[:40]!r}; the template usually writes {expected} there", turn=block.turn
            )

    def _begin(self, first: Span) -> int:
        """Where the model's own text begins: behind the generation prompt, when more than plain text is written."""
        if first.part.kind == Kind.ASSISTANT:
            return first.start
        header = self.closing.header
        found = self.text.rfind(header, self.at, first.start) if header else -1
        return first.start if found < 0 else found + len(header)

    def _body(self, block: _Block, end: int) -> None:
        """The turn's texts; what the template writes around reasoning and calls is theirs, for the model writes it too."""
        for span, following in pairwise([*block.spans, None]):
            assert span is not None
            kind = span.part.kind
            self.lay(span.start, kind, block.turn)
            self.lay(span.end, kind, block.turn, from_data=True)
            if following is None:
                self.lay(end, kind, block.turn)
            elif kind != Kind.ASSISTANT:
                self.lay(following.start, kind, block.turn)

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


def _where(stop: Stop | None, gap: str, *, anywhere: bool) -> int:
    """Where in the gap behind an answer the stop begins; -1 when it is not there. Behind tool calls it may come later."""
    if stop is None:
        return -1
    if gap.startswith(stop.text[: stop.length]):
        return 0
    return gap.find(stop.text[: stop.length]) if anywhere else -1


def probe(render: Callable[..., str], *, end_tokens: Sequence[str], special_tokens: Sequence[str]) -> Closing:
    """How a template ends answers, learnt from plain one- and two-exchange conversations; TemplateError when it refuses them."""
    system = {"role": "system", "content": "Be exact."}
    one = [{"role": "user", "content": "Why one?"}, {"role": "assistant", "content": "Because two."}]
    two = [*one, {"role": "user", "content": "Why three?"}, {"role": "assistant", "content": "Because four."}]
    error: Refusal | None = None
    for lead in ([], [system]):
        try:
            tail, always = _tail(render, [*lead, *one])
        except Refusal as refusal:
            error = error or refusal
            continue
        try:
            gap = _tail(render, [*lead, *two], answer=len(lead) + 1)[0]
        except Refusal:
            gap = tail
        shared = common_prefix(tail, gap)
        known = {"end_tokens": end_tokens, "special_tokens": special_tokens}
        # A header that always follows is no part of the ending; an end token in front of it is.
        is_ended = any(token in tail for token in end_tokens)
        last = find_stop(tail if is_ended or not always else shared, **known)
        return Closing(find_stop(shared, **known), last, _header(render, [*lead, *one]))
    assert error is not None
    raise TemplateError(f"the chat template refuses a plain exchange of a question and an answer: {error.detail}")


def _tail(render: Callable[..., str], messages: Sequence[Message], *, answer: int | None = None) -> tuple[str, bool]:
    """What is printed behind an answer (the last one, by default), and whether a header for another always follows it."""
    answer = len(messages) - 1 if answer is None else answer
    traced = trace(render, messages)
    blocks = {block.turn: block for block in _blocks(traced)}
    if answer not in blocks:
        raise Refusal("turn_hidden", "the template does not show a plain answer", turn=answer)
    block = blocks[answer]
    always = render(messages, add_generation_prompt=True) == traced.text
    return traced.text[block.spans[-1].end : block.until], always


def _header(render: Callable[..., str], messages: Sequence[Message]) -> str:
    """The generation prompt after a question."""
    before = list(messages[:-1])
    try:
        plain, prompted = render(before), render(before, add_generation_prompt=True)
    except TemplateError:
        return ""
    return prompted[len(plain) :] if prompted.startswith(plain) else ""
