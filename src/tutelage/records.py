"""The nouns: what a line of input is called on its way to a gradient.

They travel as columns (see `tables.py`); the classes here are one-row views for tests, docs and `look`, and the
NumPy bundles that cross from one room to the next.
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
UInt8 = NDArray[np.uint8]

NO_TARGET = -100
"""Target id where there is nothing to predict (torch's `ignore_index`)."""


class Kind(enum.IntEnum):
    """What a token is. Whether it is trained is a policy over kinds, decided later (`plan/weights.py`)."""

    SCAFFOLD = 0
    SYSTEM = 1
    USER = 2
    ASSISTANT = 3
    REASONING = 4
    TOOL_CALL = 5
    TOOL_RESULT = 6
    STOP = 7


LEARNED_KINDS = (Kind.ASSISTANT, Kind.REASONING, Kind.TOOL_CALL, Kind.STOP)
"""The kinds that the model itself must produce."""


def is_written(kinds: UInt8, turns: NDArray[Any]) -> NDArray[np.bool_]:
    """Bool (T,): tokens that the model itself must write, the learned kinds and marks (scaffold that belongs to a turn).

    >>> is_written(np.array([0, 2, 0, 3, 7], np.uint8), np.array([-1, 0, 1, 1, 1])).astype(int)
    array([0, 0, 1, 1, 1])
    """
    written: NDArray[np.bool_] = np.isin(kinds, LEARNED_KINDS) | ((kinds == Kind.SCAFFOLD) & (turns >= 0))
    return written


ROLES = ("system", "user", "assistant", "tool")


class Flag(enum.IntFlag):
    """What happened to an example on its way, beside the account of those that were dropped."""

    FORGED = 1  # a message spells a special token; it was encoded as ordinary text (or let through, by `allow`)
    TRUNCATED = 2  # whole oldest exchanges were cut off to make it fit
    SYSTEM_HIDDEN = 4  # the template leaves the system turn out
    TURN_HIDDEN = 8  # the template leaves out a turn that the model would read
    WINDOW = 16  # one of several windows of a record that was too long
    EXPANDED = 32  # one of several examples of a record, each with the history that inference shows
    REWRITTEN = 64  # the template shows a learned turn with other text than the record's (trimmed, say)


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. `tool_calls` is canonical JSON text (a list), `weight` the learn weight from the data or None.

    >>> Turn("user", "Hi").message()
    {'role': 'user', 'content': 'Hi'}
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: str | None = None
    name: str | None = None
    call_id: str | None = None
    weight: float | None = None

    def message(self) -> dict[str, Any]:
        """This turn as the dictionary that chat templates read (keys without a value are left out)."""
        out: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning is not None:
            out["reasoning_content"] = self.reasoning
        if self.tool_calls is not None:
            out["tool_calls"] = json.loads(self.tool_calls)
        if self.name is not None:
            out["name"] = self.name
        if self.call_id is not None:
            out["tool_call_id"] = self.call_id
        return out


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a record was read: `file` as written in the recipe's glob, `line` from 1, `part` within the line from 0.

    >>> Origin("maths", "data/gsm8k.jsonl", 17).row_id
    'maths/data/gsm8k.jsonl:17'
    """

    source: str
    file: str
    line: int
    part: int = 0

    @property
    def row_id(self) -> str:
        """The name people use for a record: `source/file:line`, with `#part` when a line holds several."""
        return f"{self.source}/{self.file}:{self.line}" + (f"#{self.part}" if self.part else "")


@dataclass(frozen=True, slots=True)
class Conversation:
    """One record of training data as it was read; text is never edited (see `Rewrite`)."""

    where: Origin
    turns: tuple[Turn, ...]
    task: str
    licence: str
    origin: str
    tools: str | None = None
    content_key: bytes = b""
    prompt_key: bytes = b""

    @property
    def row_id(self) -> str:
        """`source/file:line`."""
        return self.where.row_id

    def messages(self) -> list[dict[str, Any]]:
        """The turns as the list of dictionaries that chat templates read."""
        return [turn.message() for turn in self.turns]


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A rule's edit of one turn of one record, kept beside the text as read."""

    source: str
    row: int
    turn: int
    rule: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a rule says of a record: `keep=False` drops it in the plan, `keep=True` only flags it."""

    source: str
    row: int
    rule: str
    keep: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A record that a stage set aside, with enough to find it and to understand why. `row` is -1 before it has one."""

    source: str
    file: str
    line: int
    row: int
    reason: str
    detail: str = ""
    excerpt: str = ""


@dataclass(frozen=True, slots=True)
class Rendered:
    """One example: `ids` i32 (T,), `kinds` u8 (T,), `turns` i16 (T,) = index of the turn a token belongs to, -1 for none.

    `turn_weights` f32 (num_turns,) holds the learn weight of each turn (1 where the data says nothing).
    """

    ids: Int32
    kinds: UInt8
    turns: NDArray[np.int16]
    turn_weights: Float32

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.kinds) == len(self.turns), "ids, kinds and turns must have one entry per token"


@dataclass(frozen=True, slots=True)
class Document:
    """One example inside a packed row: tokens `start : start + length` of row `row`."""

    row: int
    start: int
    length: int
    example: int
    visit: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One optimizer step as NumPy arrays of shape (num_rows, capacity).

    inputs i32; targets i32 (`NO_TARGET` where there is none); weights f32 on the targets; positions i32, restarting per
    document; segments i32 (0 = padding, 1, 2, ... = documents of the row); tasks and sources i16 (-1 = padding); kinds u8
    of the *target*. `total_weight` is the step's denominator over all rows and ranks; `documents` names what is where.
    """

    inputs: Int32
    targets: Int32
    weights: Float32
    positions: Int32
    segments: Int32
    tasks: NDArray[np.int16]
    sources: NDArray[np.int16]
    kinds: UInt8
    documents: tuple[Document, ...]
    step: int
    total_weight: float

    @property
    def num_rows(self) -> int:
        """How many rows the step has, padding rows included."""
        return int(self.inputs.shape[0])

    @property
    def real_tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.segments > 0).sum())


@dataclass(frozen=True, slots=True)
class Tally:
    """A sum of weighted nll (nats) and of weight, so that averages divide once, at the end.

    >>> (Tally(20.0, 10.0) + Tally(90.0, 90.0)).mean
    1.1
    """

    loss_sum: float = 0.0
    weight: float = 0.0
    tokens: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.loss_sum + other.loss_sum, self.weight + other.weight, self.tokens + other.tokens)

    @property
    def mean(self) -> float:
        """Loss in nats per unit of weight; nan without weight."""
        return self.loss_sum / self.weight if self.weight else float("nan")


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did. Tallies are keyed by task, source and kind names."""

    step: int
    loss: Tally
    by_task: dict[str, Tally] = field(default_factory=dict)
    by_source: dict[str, Tally] = field(default_factory=dict)
    by_kind: dict[str, Tally] = field(default_factory=dict)
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    seconds: float = 0.0
    real_tokens: int = 0
    slots: int = 0
    memory_bytes: int = 0
    """The most in use at once so far: of the GPU where there is one, else of this process."""
    batch_key: str = ""
    """Digest of what the step was made from."""
    objective: float | None = None
    """What was minimised, per unit of weight, where that is not `loss`."""
    kl: float | None = None
    """Mean KL to the starting model in nats, where the model is held close to it."""


@dataclass(frozen=True, slots=True)
class Score:
    """One measured value: `item` names the record or question ("" = an aggregate); low/high are a 95 % interval or nan."""

    run: str
    step: int
    task: str
    item: str
    metric: str
    value: float
    weight: float = 1.0
    low: float = float("nan")
    high: float = float("nan")


@dataclass(frozen=True, slots=True)
class Sample:
    """One generation on a held-out prompt. `ended` says that the model wrote a stop token by itself."""

    run: str
    step: int
    task: str
    item: str
    prompt: str
    reference: str
    output: str
    ended: bool
    num_tokens: int
