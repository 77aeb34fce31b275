"""Tally: how many targets of each kind an example has, told apart as far as any loss rule can tell them apart.

    tokens --runs of equal kind and turn--> cells --counted per example--> a handful of entries

Two targets of an example in one *cell* and under one turn weight weigh the same in every rule, so a rule is a sum over a few
entries instead of a pass over the tokens: another rule on a prepared set costs microseconds per example. Facts only: what a
cell is worth is said in `weights.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np

from tutelage.records import LEARNED_KINDS, Float32, Int32, Int64, Kind, UInt8

MARK = len(Kind)
"""The number, beside those of `Kind`, of scaffold that belongs to a turn: the model has to write it."""
KIND_NAMES = (*(kind.name.lower() for kind in Kind), "mark")
NUM_CELLS = 2 * len(KIND_NAMES)
WRITTEN = (*(int(kind) for kind in LEARNED_KINDS), MARK)
"""The numbers of what the model itself must write."""
CHUNK_TOKENS = 1 << 20
_NO_TURN = -1
_IS_LEARNED = np.isin(np.arange(len(Kind)), LEARNED_KINDS)
_IS_WRITTEN = np.isin(np.arange(len(KIND_NAMES)), WRITTEN)


class Tokens(Protocol):
    """Documents end to end: `tables.RenderedSet` on disk, or `batch.InMemory`."""

    @property
    def ids(self) -> np.ndarray:
        """Token ids (T,)."""

    @property
    def kinds(self) -> UInt8:
        """A `Kind` per token (T,)."""

    @property
    def turns(self) -> np.ndarray:
        """The turn of each token, -1 for none (T,)."""

    @property
    def turn_weights(self) -> Float32:
        """The learn weight of every turn."""

    @property
    def offsets(self) -> Int64:
        """First token of every document, and the total."""

    @property
    def turn_offsets(self) -> Int64:
        """First turn of every document, and the total."""


@dataclass(frozen=True)
class Tally:
    """The targets of E examples, in M entries sorted by example: `count` targets of `example` lie in `cell`.

    `cell` u8 (M,) is twice the number in KIND_NAMES, plus 1 for what the model writes in its last answered turn.
    `turn_weight` f32 (M,) is the learn weight of their turns, 1 for tokens of no turn. `num_requests` i32 (E,) counts the
    user turns. The first token of an example is never a target, so it is in no entry.
    """

    example: Int32
    cell: UInt8
    turn_weight: Float32
    count: Int32
    num_requests: Int32

    def __len__(self) -> int:
        return len(self.num_requests)


def cell_of(kind: int, *, is_last: bool = False) -> int:
    """The cell of a number in KIND_NAMES.

    >>> KIND_NAMES[cell_of(MARK, is_last=True) // 2]
    'mark'
    """
    return 2 * kind + is_last


def tally_examples(tokens: Tokens) -> Tally:
    """The `Tally` of every document of a set, exact; about two nanoseconds per token.

    >>> from tutelage.plan.batch import InMemory
    >>> from tutelage.records import Rendered
    >>> kinds, turns = [0, 2, 2, 0, 3, 3, 7], [-1, 0, 0, 1, 1, 1, 1]           # scaffold, a request, mark, answer and stop
    >>> one = Rendered(np.arange(7, dtype=np.int32), np.array(kinds, np.uint8), np.array(turns, np.int16), np.ones(2, np.float32))
    >>> tally = tally_examples(InMemory([one]))
    >>> [(KIND_NAMES[cell // 2], cell % 2, count) for cell, count in zip(tally.cell.tolist(), tally.count.tolist())]
    [('user', 0, 2), ('assistant', 1, 2), ('stop', 1, 1), ('mark', 1, 1)]
    >>> tally.num_requests.tolist()
    [1]
    """
    return join_tallies(list(tally_parts(tokens)))


def tally_parts(tokens: Tokens) -> Iterator[Tally]:
    """`tally_examples` a million tokens at a time, so that memory does not grow with the set; `join_tallies` puts it together."""
    offsets, first = tokens.offsets, 0
    while first < len(offsets) - 1:
        last = max(int(np.searchsorted(offsets, offsets[first] + CHUNK_TOKENS, "right")) - 1, first + 1)
        yield _tally(tokens, first, last)
        first = last


def join_tallies(parts: Sequence[Tally]) -> Tally:
    """Tallies of sets that follow one another, as one."""
    dtypes = {"example": np.int32, "cell": np.uint8, "turn_weight": np.float32, "count": np.int32, "num_requests": np.int32}
    first, moved = 0, []
    for part in parts:
        moved.append(part.example + np.int32(first))
        first += len(part)
    columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Tally)} | {"example": moved}
    return Tally(**{name: np.concatenate([np.zeros(0, dtypes[name]), *some]) for name, some in columns.items()})


@dataclass(frozen=True)
class _Runs:
    """Neighbouring tokens of one document, kind and turn, (R,) each; a document's first token is a run by itself."""

    document: Int64
    kind: UInt8
    turn: np.ndarray
    length: Int64
    is_target: np.ndarray
    last_answered: Int64


def _tally(tokens: Tokens, first: int, last: int) -> Tally:
    offsets, turn_offsets = tokens.offsets[first : last + 1], tokens.turn_offsets[first : last + 1]
    tokens_here, turns_here = slice(offsets[0], offsets[-1]), slice(turn_offsets[0], turn_offsets[-1])
    runs = _runs(np.asarray(tokens.kinds[tokens_here]), np.asarray(tokens.turns[tokens_here]), offsets - offsets[0])
    weights, code = _turn_weights(runs, np.asarray(tokens.turn_weights[turns_here]), turn_offsets)
    kind = np.where((runs.kind == Kind.SCAFFOLD) & (runs.turn != _NO_TURN), MARK, runs.kind)
    is_last = _IS_WRITTEN[kind] & (runs.turn == runs.last_answered)
    key = (runs.document * len(weights) + code) * NUM_CELLS + 2 * kind + is_last
    num_keys = (last - first) * len(weights) * NUM_CELLS
    found, count = _sum_by_key(key[runs.is_target], runs.length[runs.is_target], num_keys=num_keys)
    place, cell = np.divmod(found, NUM_CELLS)
    return Tally(
        example=(place // len(weights)).astype(np.int32),
        cell=cell.astype(np.uint8),
        turn_weight=weights[place % len(weights)],
        count=count,
        num_requests=_requests(runs, last - first),
    )


def _runs(kinds: UInt8, turns: np.ndarray, offsets: Int64) -> _Runs:
    lengths = np.diff(offsets)
    filled = np.flatnonzero(lengths > 0)
    starts_run = np.ones(len(kinds) + 1, bool)
    starts_run[1:-1] = (kinds[1:] != kinds[:-1]) | (turns[1:] != turns[:-1])
    starts_run[offsets[filled]] = True
    starts_run[offsets[filled] + 1] = True
    begin = np.flatnonzero(starts_run)
    length, begin = np.diff(begin), begin[:-1]
    kind, turn = kinds[begin], turns[begin]
    first_run = np.searchsorted(begin, offsets[filled])
    per_document = np.diff(np.append(first_run, len(begin)))
    is_target = np.ones(len(begin), bool)
    is_target[first_run] = False
    answered = np.maximum.reduceat(np.where(_IS_LEARNED[kind], turn, -2), first_run) if len(filled) else np.zeros(0, np.int64)
    return _Runs(np.repeat(filled, per_document), kind, turn, length, is_target, np.repeat(answered, per_document))


def _turn_weights(runs: _Runs, turn_weights: Float32, turn_offsets: Int64) -> tuple[Float32, Int64 | int]:
    """The different learn weights, and which of them each run has."""
    if (turn_weights == 1.0).all():
        return np.ones(1, np.float32), 0
    weights, codes = np.unique(np.append(turn_weights, np.float32(1.0)), return_inverse=True)
    in_turn = runs.turn != _NO_TURN
    flat = (turn_offsets[:-1] - turn_offsets[0])[runs.document] + runs.turn
    return weights, np.where(in_turn, codes[np.where(in_turn, flat, -1)], codes[-1])


def _sum_by_key(keys: Int64, values: Int64, *, num_keys: int) -> tuple[Int64, Int32]:
    """The keys that occur, in order, and the sum of their values."""
    if num_keys <= 8 * len(keys) + NUM_CELLS:
        sums = np.bincount(keys, weights=values, minlength=num_keys)
        found = np.flatnonzero(sums)
        return found, sums[found].astype(np.int32)
    found, inverse = np.unique(keys, return_inverse=True)
    return found, np.bincount(inverse, weights=values, minlength=len(found)).astype(np.int32)


def _requests(runs: _Runs, num: int) -> Int32:
    """User turns of each document."""
    is_user = runs.kind == Kind.USER
    document, turn = runs.document[is_user], runs.turn[is_user]
    is_new = np.ones(len(turn), bool)
    is_new[1:] = (document[1:] != document[:-1]) | (turn[1:] != turn[:-1])
    return np.bincount(document[is_new], minlength=num).astype(np.int32)
