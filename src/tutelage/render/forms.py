"""Conversations of a batch laid out: flat pieces of text, and for each example the kinds and turns of its pieces.

A record whose form the template only joins is filled into a skeleton; any other is rendered, traced and cut by itself. Both
give the same, which the first record of every form and one in every few hundred must show.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from tutelage.errors import TemplateError
from tutelage.records import ROLES, Conversation, Flag, Float32, Int64, Kind, Turn, UInt8
from tutelage.render.cells import Closing, Layout, layout
from tutelage.render.provenance import Message, Refusal, trace
from tutelage.render.skeleton import Skeleton, make_skeleton, symbolic
from tutelage.render.template import ChatTemplate
from tutelage.tables import TurnColumns

EVERY = 2048
"""One in so many filled skeletons is rendered and traced too."""
EMPTY_SYSTEM = -1
"""In place of a turn's number: an empty system turn of ours."""
_SYSTEM, _ASSISTANT = ROLES.index("system"), ROLES.index("assistant")
_EMPTY: Message = {"role": "system", "content": ""}
_MAX_FORMS = 4096


@dataclass(frozen=True)
class Form:
    """The cells of an example, one per piece: `kinds` u8, `turns` i16, `from_data` bool, all (pieces,)."""

    kinds: UInt8
    turns: np.ndarray
    from_data: np.ndarray
    flags: int = 0

    @classmethod
    def of(cls, kinds: Sequence[int], turns: Sequence[int], from_data: Sequence[bool], kept: Sequence[int], flags: int) -> Form:
        """The form whose turns are numbered as in the whole record, of which `kept` were rendered."""
        numbers = np.array([*kept, -1], np.int16)  # turn -1 is no turn, and stays it
        return cls(np.array(kinds, np.uint8), numbers[np.array(turns, np.int64)], np.array(from_data, bool), flags)


class Filler:
    """A skeleton ready to be filled with a record's texts."""

    def __init__(self, skeleton: Skeleton, kept: Sequence[int], flags: int) -> None:
        self.form = Form.of(skeleton.kinds, skeleton.turns, skeleton.from_data, kept, flags)
        self.turns = list(skeleton.turns)  # as the template saw them, before they get the record's numbers
        self.pieces = list(skeleton.literals)
        slots = list(zip(skeleton.places, skeleton.slots, strict=True))
        self.content = [(place, slot.part.turn) for place, slot in slots if slot.part.kind != Kind.REASONING]
        self.reasoning = [(place, slot.part.turn) for place, slot in slots if slot.part.kind == Kind.REASONING]
        self.edited = [(place, slot, slot.part.kind == Kind.ASSISTANT) for place, slot in slots if slot.edits]
        self.words = [(part.turn, part.kind == Kind.REASONING, word) for part, word in skeleton.words]
        self.num_filled = 0

    @property
    def has_reasoning(self) -> bool:
        """Whether a turn's reasoning plays a part."""
        return bool(self.reasoning) or any(is_reasoning for _, is_reasoning, _ in self.words)

    def fill(self, content: Sequence[str], reasoning: Sequence[str | None]) -> tuple[list[str], int] | None:
        """The pieces of the example and its flags; None when the texts do not meet the skeleton's conditions."""
        for text in content:
            if not text or text.isspace():
                return None
        for turn, is_reasoning, word in self.words:
            if word in ((reasoning[turn] or "") if is_reasoning else content[turn]):
                return None
        pieces: list[Any] = self.pieces.copy()
        for place, turn in self.content:
            pieces[place] = content[turn]
        for place, turn in self.reasoning:
            pieces[place] = reasoning[turn]
        flags = self.form.flags
        for place, slot, is_answer in self.edited:
            before = pieces[place]
            pieces[place] = slot.fill(before)
            if is_answer and len(before) != len(pieces[place]):
                flags |= Flag.REWRITTEN
        self.num_filled += 1
        return pieces, flags


@dataclass(frozen=True)
class Style:
    """A template and what was learnt of it; `eos` is the text of the stop that is added, None where the template writes one."""

    template: ChatTemplate
    closing: Closing
    eos: str | None


@dataclass(frozen=True)
class Job:
    """One example to be made of a record: the turns shown (None: all), the only answer learned (-1: all), and its place."""

    kept: tuple[int, ...] | None = None
    only: int = -1
    part: int = 0
    flags: int = 0


WHOLE = Job()


@dataclass
class Laid:
    """Examples of a batch, laid out: flat `pieces`, and per example its record, job, form and flags."""

    pieces: list[str] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    forms: list[Form] = field(default_factory=list)
    flags: list[int] = field(default_factory=list)
    refusals: list[tuple[int, Job, Refusal]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def offsets(self) -> Int64:
        """First piece of every example, and the total."""
        return np.concatenate([[0], np.cumsum([len(form.kinds) for form in self.forms], dtype=np.int64)])

    def add(self, record: int, job: Job, pieces: list[str], form: Form, flags: int) -> None:
        """One more example."""
        self.pieces += pieces
        self.records.append(record)
        self.jobs.append(job)
        self.forms.append(form)
        self.flags.append(flags)

    def encodable(self) -> Laid:
        """This, with examples that UTF-8 cannot write refused: they hold half of a surrogate pair."""
        out = Laid(refusals=self.refusals)
        offsets = self.offsets.tolist()
        for i, (a, b) in enumerate(pairwise(offsets)):
            try:
                "".join(self.pieces[a:b]).encode()
            except UnicodeEncodeError:
                out.refusals.append((self.records[i], self.jobs[i], _HALF_PAIR))
            else:
                out.add(self.records[i], self.jobs[i], self.pieces[a:b], self.forms[i], self.flags[i])
        return out


_HALF_PAIR = Refusal("invalid_unicode", "the text holds half of a surrogate pair")


class Layer:
    """Lays out records with a way of finding their style."""

    def __init__(self, style: Callable[..., Style]) -> None:
        self.style = style
        self._fillers: dict[tuple[bytes, bytes, tuple[int, ...] | None], Filler | None] = {}
        self._symbolic: Any = None

    def lay(
        self,
        columns: TurnColumns,
        jobs: Callable[[int], Sequence[Job]] | None = None,
        *,
        records: Sequence[int] | None = None,
    ) -> Laid:
        """The examples of some records of a batch (of all), one after another; `jobs(record)` says which a record gives, by
        default one with all its turns.
        """
        laid = Laid()
        offsets, roles = columns.offsets.tolist(), columns.role.tobytes()
        rest = particular(columns)
        for record in range(len(columns)) if records is None else records:
            a, b = offsets[record], offsets[record + 1]
            for job in (WHOLE,) if jobs is None else jobs(record):
                if rest is None or not rest[record]:
                    made = self._filled(columns, roles, a, b, job)
                    if made is not None:
                        laid.add(record, job, *made)
                        continue
                self._lay_slowly(laid, columns, record, job)
        return laid

    def lay_one(self, columns: TurnColumns, record: int, job: Job) -> Laid:
        """One example of one record."""
        laid = Laid()
        self._lay_slowly(laid, columns, record, job)
        return laid

    def _filled(self, columns: TurnColumns, roles: bytes, a: int, b: int, job: Job) -> tuple[list[str], Form, int] | None:
        """The pieces from a skeleton; None when there is none for this record."""
        content: Sequence[str] = columns.content[a:b]
        reasoning: Sequence[str | None] = () if columns.reasoning is None else columns.reasoning[a:b]
        of_turns = roles[a:b]
        if job.kept is not None:
            if EMPTY_SYSTEM in job.kept:
                return None
            content = [content[turn] for turn in job.kept]
            reasoning = [reasoning[turn] for turn in job.kept] if reasoning else ()
            of_turns = bytes(of_turns[turn] for turn in job.kept)
        thinks = b"" if not any(reasoning) else bytes(bool(text) for text in reasoning)
        filler = self.filler(of_turns, thinks, job.kept)
        if filler is None or (made := filler.fill(content, reasoning)) is None:
            return None
        if filler.num_filled % EVERY == 1:
            self.check(columns, [a + turn for turn in job.kept or range(b - a)], filler, made[0])
        return made[0], filler.form, made[1]

    def filler(self, roles: bytes, thinks: bytes = b"", kept: tuple[int, ...] | None = None) -> Filler | None:
        """The skeleton of records of these roles (`thinks`: which turns have reasoning), or None."""
        key = (roles, thinks, kept)
        if key not in self._fillers:
            self._fillers[key] = self._make_filler(*key)
        return self._fillers[key]

    def _make_filler(self, roles: bytes, thinks: bytes, kept: tuple[int, ...] | None) -> Filler | None:
        if len(self._fillers) > _MAX_FORMS:
            self._fillers.clear()
        style = self.style(has_tools=False)
        if self._symbolic is None:
            self._symbolic = (symbolic(style.template),)
        if self._symbolic[0] is None:
            return None
        names = [ROLES[role] for role in roles]
        made = make_skeleton(
            self._symbolic[0],
            style.template,
            style.closing,
            roles=names,
            reasoning=[bool(each) for each in thinks] or [False] * len(names),
            eos=style.eos,
        )
        return None if made is None else Filler(made, kept or range(len(names)), _hidden_flags(made.hidden, names))

    def check(self, columns: TurnColumns, turns: Sequence[int], filler: Filler, pieces: list[str]) -> None:
        """The filled skeleton against the record rendered and traced; TemplateError when they differ."""
        messages = [_message(columns, turn) for turn in turns]
        try:
            made = self._layout(messages, None, [message["role"] == "assistant" for message in messages])
        except Refusal as refusal:
            raise TemplateError(
                f"a skeleton was filled where rendering refuses ({refusal}); please report this template"
            ) from None
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
        same = made.text == "".join(pieces) and made.cells.ends == ends and filler.form.kinds.tolist() == made.cells.kinds
        if not (same and filler.form.from_data.tolist() == made.cells.from_data and filler.turns == made.cells.turns):
            raise TemplateError("a filled skeleton differs from the template's rendering; please report this template")

    def _lay_slowly(self, laid: Laid, columns: TurnColumns, record: int, job: Job) -> None:
        try:
            laid.add(record, job, *self._rendered(columns, record, job))
        except Refusal as refusal:
            laid.refusals.append((record, job, refusal))
        except UnicodeEncodeError:
            laid.refusals.append((record, job, _HALF_PAIR))

    def _rendered(self, columns: TurnColumns, record: int, job: Job) -> tuple[list[str], Form, int]:
        """The pieces of a record that is rendered and traced by itself."""
        a, b = columns.offsets[record : record + 2].tolist()
        kept = range(b - a) if job.kept is None else job.kept
        messages = [_EMPTY if turn == EMPTY_SYSTEM else _message(columns, a + turn) for turn in kept]
        weights = learn_weights(columns, record, job)
        is_learned = [m["role"] == "assistant" and bool(weights[turn] > 0) for turn, m in zip(kept, messages, strict=True)]
        tools = columns.tools[record] if columns.tools is not None else None
        made = self._layout(messages, json.loads(tools) if tools else None, is_learned)
        made.text.encode()
        edges = [0, *made.cells.ends]
        pieces = [made.text[x:y] for x, y in pairwise(edges)]
        roles = [m["role"] for m in messages]
        hidden = tuple(turn for turn in made.hidden if kept[turn] != EMPTY_SYSTEM)
        flags = _hidden_flags(hidden, roles)
        if _is_rewritten(made, pieces, messages, is_learned):
            flags |= Flag.REWRITTEN
        return pieces, Form.of(made.cells.kinds, made.cells.turns, made.cells.from_data, kept, flags), flags

    def _layout(self, messages: Sequence[Message], tools: Any, is_learned: Sequence[bool]) -> Layout:
        style = self.style(has_tools=bool(tools))

        def render(these: Sequence[Message]) -> str:
            return style.template.render(these, tools=tools)

        traced = trace(render, messages, literals=style.template.literals)
        return layout(traced, messages, style.closing, learned=is_learned, eos=style.eos)


def _is_rewritten(made: Layout, pieces: Sequence[str], messages: Sequence[Message], is_learned: Sequence[bool]) -> bool:
    """Whether a learned turn is shown with another text than the record's."""
    shown = dict.fromkeys((turn for turn, learned in enumerate(is_learned) if learned), "")
    for piece, kind, turn in zip(pieces, made.cells.kinds, made.cells.turns, strict=True):
        if kind == Kind.ASSISTANT and turn in shown:
            shown[turn] += piece
    return any(text != messages[turn]["content"] for turn, text in shown.items())


def _hidden_flags(hidden: Sequence[int], roles: Sequence[str]) -> int:
    flags = Flag(0)
    for turn in hidden:
        flags |= Flag.SYSTEM_HIDDEN if roles[turn] == "system" else Flag.TURN_HIDDEN
    return int(flags)


def particular(columns: TurnColumns) -> np.ndarray | None:
    """Which records have more than plain texts and reasoning (R,); None when none has."""
    flat = [each for each in (columns.tool_calls, columns.name, columns.call_id) if each is not None]
    if not flat and columns.tools is None:
        return None
    turns = np.zeros(len(columns.role), bool)
    for each in flat:
        turns |= np.fromiter((value is not None for value in each), bool, len(each))
    found = np.zeros(len(columns), bool)
    found[np.repeat(np.arange(len(columns)), columns.num_turns)[turns]] = True
    if columns.tools is not None:
        found |= np.fromiter((value is not None for value in columns.tools), bool, len(found))
    return found


def learn_weights(columns: TurnColumns, record: int, job: Job) -> Float32:
    """The learn weight of each turn of a record under a job: 1 where the data says nothing, 0 for answers not learned here."""
    a, b = columns.offsets[record : record + 2].tolist()
    weights = (
        np.ones(b - a, np.float32) if columns.weight is None else np.nan_to_num(columns.weight[a:b], nan=1.0).astype(np.float32)
    )
    if job.only >= 0:
        others = columns.role[a:b] == _ASSISTANT
        others[job.only] = False
        weights[others] = 0.0
    return weights


def _message(columns: TurnColumns, turn: int) -> Message:
    """One turn (counted over the batch) as the dictionary that templates read."""

    def at(column: list[str | None] | None) -> str | None:
        return None if column is None else column[turn]

    role = ROLES[int(columns.role[turn])]
    reasoning, tool_calls = at(columns.reasoning), at(columns.tool_calls)
    return Turn(role, columns.content[turn], reasoning, tool_calls, at(columns.name), at(columns.call_id)).message()


def columns_of(conversations: Sequence[Conversation]) -> TurnColumns:
    """Conversations as columns."""
    turns = [turn for conversation in conversations for turn in conversation.turns]
    names = sorted({conversation.task for conversation in conversations})

    def column(values: list[str | None]) -> list[str | None] | None:
        return values if any(value is not None for value in values) else None

    weights = [np.nan if turn.weight is None else turn.weight for turn in turns]
    return TurnColumns(
        first_row=0,
        num_turns=np.array([len(conversation.turns) for conversation in conversations], np.int32),
        role=np.array([ROLES.index(turn.role) for turn in turns], np.uint8),
        content=[turn.content for turn in turns],
        reasoning=column([turn.reasoning for turn in turns]),
        tool_calls=column([turn.tool_calls for turn in turns]),
        name=column([turn.name for turn in turns]),
        call_id=column([turn.call_id for turn in turns]),
        weight=None if all(turn.weight is None for turn in turns) else np.array(weights, np.float32),
        tools=column([conversation.tools for conversation in conversations]),
        task_codes=np.array([names.index(conversation.task) for conversation in conversations], np.int32),
        task_names=names,
    )
