"""Faults that show in kinds, turns and weights: documents end to end in, places out. Pure NumPy, nothing per token in Python.

E examples, T tokens and U turns lie end to end; `offsets` and `turn_offsets` begin at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tutelage.records import Float32, Int64, Kind, UInt8

Bools = NDArray[np.bool_]

MARK = len(Kind)
"""Counted apart from scaffold: what the template writes inside a turn (around reasoning, say), and the model has to write."""

KIND_NAMES = (*(kind.name.lower() for kind in Kind), "mark")

_IS_TEXT = np.isin(np.arange(len(Kind)), [kind for kind in Kind if kind not in (Kind.SCAFFOLD, Kind.STOP)])
_IS_ANSWER = np.isin(np.arange(MARK + 1), [Kind.ASSISTANT, Kind.REASONING, Kind.TOOL_CALL, MARK])
PROMPT_KINDS = (Kind.SYSTEM, Kind.USER, Kind.TOOL_RESULT)


@dataclass(frozen=True)
class Stretch:
    """Examples end to end: ids i32, kinds u8, turns i16 (T,); turn_weights f32 (U,); offsets i64 (E+1,), turn_offsets (E+1,)."""

    ids: np.ndarray
    kinds: UInt8
    turns: np.ndarray
    turn_weights: Float32
    offsets: Int64
    turn_offsets: Int64

    def __len__(self) -> int:
        return len(self.offsets) - 1


Weigh = Callable[[Stretch], Float32]
"""The loss weight of each token, f32 (T,): the plan's rule, handed in by the pipeline."""


@dataclass(frozen=True)
class Vocabulary:
    """What the audit knows of ids, as booleans by id: flagged special, swallowing white space beside it, ending an answer."""

    is_special: Bools
    is_greedy: Bools
    is_end: Bools

    @classmethod
    def of(cls, special: Sequence[int], *, greedy: Sequence[int] = (), ends: Sequence[int] | None = None) -> Vocabulary:
        """From lists of ids; without `ends` any token may end an answer."""
        size = max([*special, *greedy, *(ends or ()), 0]) + 2  # the last place stands for every larger id
        ids = np.arange(size)
        return cls(np.isin(ids, special), np.isin(ids, greedy), np.isin(ids, ends) if ends is not None else ids >= 0)

    def look_up(self, table: Bools, ids: np.ndarray) -> Bools:
        """The flags of these ids."""
        flags: Bools = table[np.minimum(ids, len(table) - 1)]
        return flags


@dataclass(frozen=True)
class Hits:
    """Places (H,), by example: `example` counts from the stretch's first, `turn` within the example, `token` an id or -1."""

    example: Int64
    turn: Int64
    token: Int64

    def by_example(self, text_of: Callable[[int], str] | None = None) -> tuple[Int64, list[str]]:
        """The examples, once each, with what is wrong in words; `text_of` tells what a token stands for.

        >>> Hits(np.array([2, 2, 5]), np.array([1, 3, 1]), np.array([-1, -1, -1])).by_example()
        (array([2, 5]), ['turn 1; turn 3', 'turn 1'])
        """
        said: dict[int, dict[str, None]] = {}
        for example, turn, token in zip(*(a.tolist() for a in (self.example, self.turn, self.token)), strict=True):
            where = f"turn {turn}" if turn >= 0 else "outside of all turns"
            said.setdefault(example, {})[f"{where}: {text_of(token)}" if text_of else where] = None
        return np.fromiter(said, np.int64, len(said)), ["; ".join(words) for words in said.values()]


@dataclass(frozen=True)
class Marks:
    """What a stretch holds: `targets` (E, 9) counts those with weight by KIND_NAMES; `num_stops` (E,) i64; faults by finding."""

    targets: Int64
    num_stops: Int64
    faults: dict[str, Hits]


def mark(stretch: Stretch, weights: Float32, vocabulary: Vocabulary) -> Marks:
    """The faults of a stretch: no_stop, cut_answer, stop_untrained, wrong_stop, forged_turn. `weights` f32 (T,) are the rule's.

    A turn is learned when some token of its answer is a target with weight. Two examples, turn 1 of the second without stop:

    >>> S, U, A, E = Kind.SCAFFOLD, Kind.USER, Kind.ASSISTANT, Kind.STOP
    >>> kinds = np.array([S, U, S, A, E, S, U, S, A, A], np.uint8)
    >>> turns = np.array([-1, 0, -1, 1, 1, -1, 0, -1, 1, 1], np.int16)
    >>> ends = np.array([0, 5, 10])
    >>> pair = Stretch(np.arange(10), kinds, turns, np.ones(4, np.float32), ends, np.array([0, 2, 4]))
    >>> made = mark(pair, np.isin(kinds, [A, E]).astype(np.float32), Vocabulary.of([0], ends=[4]))
    >>> made.targets[:, [A, E]].tolist(), made.faults["cut_answer"].example.tolist(), made.faults["no_stop"].example.tolist()
    ([[1, 1], [2, 0]], [1], [])
    """
    flat = _Flat.of(stretch, weights)
    targets = np.bincount(flat.example[flat.is_on] * (MARK + 1) + flat.kinds[flat.is_on], minlength=len(stretch) * (MARK + 1))
    learned = flat.turns_with(flat.is_on & _IS_ANSWER[flat.kinds])
    stops = (flat.kinds == Kind.STOP) & flat.is_in_turn
    stopped, stop_on = flat.turns_with(stops), flat.turns_with(stops & flat.is_on)
    cut = _cut_turns(stretch, flat, learned)
    unstopped = learned & ~stopped
    unstopped[cut] = False
    ends = _last_stops(flat, stops)
    ends = ends[learned[flat.turn[ends]]]
    wrong = ends[~vocabulary.look_up(vocabulary.is_end, stretch.ids[ends])]
    faults = {
        "no_stop": _hits_at_turns(stretch, np.flatnonzero(unstopped)),
        "cut_answer": _hits_at_turns(stretch, cut),
        "stop_untrained": _hits_at_turns(stretch, np.flatnonzero(learned & stopped & ~stop_on)),
        "wrong_stop": _hits_at_tokens(stretch, flat, wrong),
        "forged_turn": _hits_at_tokens(stretch, flat, _forged(stretch, flat, vocabulary)),
    }
    num_stops = np.bincount(flat.example[ends], minlength=len(stretch))
    return Marks(targets.reshape(len(stretch), MARK + 1), num_stops, faults)


@dataclass(frozen=True)
class _Flat:
    """Per token (T,): example, turn over the whole stretch (0 for none), kind with marks told apart, target with weight."""

    example: Int64
    turn: Int64
    kinds: np.ndarray
    is_in_turn: Bools
    is_on: Bools
    num_turns: int

    @classmethod
    def of(cls, stretch: Stretch, weights: Float32) -> _Flat:
        lengths = np.diff(stretch.offsets)
        is_in_turn = stretch.turns >= 0
        turn = np.where(is_in_turn, np.repeat(stretch.turn_offsets[:-1], lengths) + stretch.turns, 0)
        kinds = np.where(is_in_turn & (stretch.kinds == Kind.SCAFFOLD), MARK, stretch.kinds)
        is_on = weights > 0
        is_on[stretch.offsets[:-1][lengths > 0]] = False  # the first token of a document is never a target
        return cls(np.repeat(np.arange(len(stretch)), lengths), turn, kinds, is_in_turn, is_on, len(stretch.turn_weights))

    def turns_with(self, where: Bools) -> Bools:
        """Which turns have such a token, (U,)."""
        out = np.zeros(self.num_turns, bool)
        out[self.turn[where & self.is_in_turn]] = True
        return out


def _cut_turns(stretch: Stretch, flat: _Flat, learned: Bools) -> Int64:
    """The learned turns in which an example ends: its last token is of the answer."""
    ends = stretch.offsets[1:][np.diff(stretch.offsets) > 0] - 1
    ends = ends[_IS_ANSWER[flat.kinds[ends]] & flat.is_in_turn[ends]]
    turns: Int64 = flat.turn[ends]
    return turns[learned[turns]]


def _last_stops(flat: _Flat, stops: Bools) -> Int64:
    """Positions of stop tokens that no stop token of the same turn follows at once."""
    goes_on = np.zeros(len(stops), bool)
    goes_on[:-1] = stops[1:] & (flat.turn[1:] == flat.turn[:-1]) & (flat.example[1:] == flat.example[:-1])
    return np.flatnonzero(stops & ~goes_on)


def _forged(stretch: Stretch, flat: _Flat, vocabulary: Vocabulary) -> Int64:
    """Special tokens inside messages.

    One that swallows white space may reach over the border of a message that begins or ends with it: at a border it is no
    fault.
    """
    found = np.flatnonzero(vocabulary.look_up(vocabulary.is_special, stretch.ids) & _IS_TEXT[stretch.kinds])
    greedy = vocabulary.look_up(vocabulary.is_greedy, stretch.ids[found])
    if not greedy.any():
        return found
    place = (flat.example * (len(stretch.turn_weights) + 1) + flat.turn) * (MARK + 1) + flat.kinds
    padded = np.concatenate([[-1], place, [-1]])
    at_border = (padded[found] != place[found]) | (padded[found + 2] != place[found])
    kept: Int64 = found[~(greedy & at_border)]
    return kept


def _hits_at_turns(stretch: Stretch, turns: Int64) -> Hits:
    example = np.searchsorted(stretch.turn_offsets, turns, "right") - 1
    return Hits(example, turns - stretch.turn_offsets[example], np.full(len(turns), -1))


def _hits_at_tokens(stretch: Stretch, flat: _Flat, tokens: Int64) -> Hits:
    return Hits(flat.example[tokens], stretch.turns[tokens].astype(np.int64), stretch.ids[tokens].astype(np.int64))
