"""Weights: from what each token *is* to how much it counts, and the one shift to next-token targets.

Scaffold that belongs to a turn is a mark: `<think>`, `<tool_call>`, what the template writes inside an answer. The model has
to write it, so in every rule it weighs what ASSISTANT weighs.

The weight of a token sits on that token as a target. The first token of a document is never a target, so its weight never
counts. Several documents may lie end to end: `offsets` says where each begins, and the total.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tutelage.plan.spec import (
    FullLoss,
    InstructionModelling,
    KindWeights,
    LastResponse,
    LossRule,
    PromptWeight,
    ResponseLoss,
)
from tutelage.plan.tally import MARK, WRITTEN, Tally, Tokens, cell_of, tally_examples
from tutelage.records import LEARNED_KINDS, NO_TARGET, Float32, Float64, Int32, Int64, Kind, UInt8, is_written

_NO_TURN = -1


def kind_table(loss: LossRule) -> Float32:
    """The weight of each `Kind` under a rule, f32 (8,).

    Instruction Modelling trains user text, answers and stops, and no template token (arXiv 2405.14394, equation 4); system
    prompts and tool results are neither instruction nor answer there. The entry of SCAFFOLD is for scaffold of no turn: marks
    weigh what ASSISTANT does (`weigh_tokens`).

    >>> kind_table(InstructionModelling()).tolist()             # scaffold system user assistant reasoning call result stop
    [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0]
    """
    table = np.zeros(len(Kind), np.float32)
    learned = [int(kind) for kind in LEARNED_KINDS]
    match loss:
        case ResponseLoss() | LastResponse():
            table[learned] = 1.0
        case InstructionModelling():
            table[[*learned, Kind.USER]] = 1.0
        case FullLoss():
            table[:] = 1.0
        case PromptWeight():
            table[[Kind.SYSTEM, Kind.USER]] = loss.prompt_weight
            table[learned] = 1.0
        case KindWeights():
            for name, weight in loss.weights.items():
                table[Kind[name.upper()]] = weight
    return table


def weigh_tokens(
    kinds: UInt8,
    *,
    loss: LossRule | None = None,
    turns: np.ndarray | None = None,
    turn_weights: Float32 | None = None,
    offsets: Int64 | None = None,
    turn_offsets: Int64 | None = None,
) -> Float32:
    """The loss weight of each token, f32 (T,): the rule's weight of its kind times the learn weight of its turn.

    `turns` i16 (T,) is the turn of each token within its document (-1 for none) and `turn_weights` one weight per turn;
    with several documents end to end, `offsets` and `turn_offsets` say where each begins. Marks, `turns: last` and turn
    weights need turns; without them all scaffold weighs the same.

    >>> S, U, A, E = Kind.SCAFFOLD, Kind.USER, Kind.ASSISTANT, Kind.STOP
    >>> kinds = np.array([S, U, U, S, A, E, S, U, S, S, A, E], np.uint8)      # the tenth token is a mark: scaffold of turn 3
    >>> turns = np.array([-1, 0, 0, -1, 1, 1, -1, 2, -1, 3, 3, 3], np.int16)
    >>> weigh_tokens(kinds, turns=turns).astype(int).tolist()
    [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
    >>> weigh_tokens(kinds, loss=InstructionModelling(turns="last"), turns=turns).astype(int).tolist()
    [0, 1, 1, 0, 0, 0, 0, 1, 0, 1, 1, 1]
    >>> weigh_tokens(kinds, turns=turns, turn_weights=np.array([1, 0, 1, 0.5], np.float32)).tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.5]
    """
    loss = loss or ResponseLoss()
    table = kind_table(loss)
    weights: Float32 = table[kinds]
    starts = np.array([0, len(kinds)]) if offsets is None else offsets
    if turns is not None:
        weights[(kinds == Kind.SCAFFOLD) & (turns != _NO_TURN)] = table[Kind.ASSISTANT]
    if _counts_last_only(loss):
        assert turns is not None, "`turns: last` needs to know the turns"
        last = np.repeat(_last_learned_turn(kinds, turns, starts), np.diff(starts))
        weights[is_written(kinds, turns) & (turns != last)] = 0.0
    if turn_weights is not None and not (turn_weights == 1.0).all():
        assert turns is not None, "turn weights need to know the turns"
        first_turn = np.zeros(1, np.int64) if turn_offsets is None else turn_offsets[:-1]
        flat = np.repeat(first_turn, np.diff(starts)) + turns
        weights *= np.where(turns == _NO_TURN, np.float32(1.0), turn_weights[np.where(turns == _NO_TURN, 0, flat)])
    return weights


def _counts_last_only(loss: LossRule) -> bool:
    match loss:
        case LastResponse():
            return True
        case FullLoss():
            return False
    return loss.turns == "last"


def _last_learned_turn(kinds: UInt8, turns: np.ndarray, offsets: Int64) -> Int64:
    """The last turn with a learned token, of each document; -2 (no turn at all) where there is none."""
    learned = np.isin(kinds, [int(kind) for kind in LEARNED_KINDS])
    last = np.full(len(offsets) - 1, -2, np.int64)
    filled = np.flatnonzero(np.diff(offsets) > 0)
    if len(filled):
        last[filled] = np.maximum.reduceat(np.where(learned, turns, -2), offsets[filled])
    return last


def shift_targets(ids: Int32, weights: Float32, *, offsets: Int64 | None = None) -> tuple[Int32, Int32, Float32]:
    r"""`(inputs, targets, target_weights)` of one document, each (T,): position i learns token i + 1 with that token's weight.

    This is the only place where targets are shifted, and it happens per document, before packing: no document ever
    learns the first token of its neighbour. `offsets` marks documents that lie end to end.

    >>> ids = np.array([7, 8, 9, 5, 6], np.int32)                              # two documents: 7 8 9 and 5 6
    >>> weights = np.array([1, 0, 1, 1, 1], np.float32)
    >>> inputs, targets, target_weights = shift_targets(ids, weights, offsets=np.array([0, 3, 5]))
    >>> print(inputs, targets, target_weights, sep="\n")
    [7 8 9 5 6]
    [   8    9 -100    6 -100]
    [0. 1. 0. 1. 0.]

    The last position of a document has no target and weight 0; the weight of its first token is never used.
    """
    targets, target_weights = np.full_like(ids, NO_TARGET), np.zeros_like(weights)
    targets[:-1], target_weights[:-1] = ids[1:], weights[1:]
    if offsets is not None:
        ends = offsets[1:][np.diff(offsets) > 0] - 1
        targets[ends], target_weights[ends] = NO_TARGET, 0.0
    return ids, targets, target_weights


@dataclass(frozen=True)
class Weighed:
    """Target weights of `num` examples under one rule: `count` targets of `example` weigh `value` (M entries, any order)."""

    example: Int32
    value: Float32
    count: Int32
    num: int

    def totals(self, multiplier: np.ndarray | float = 1.0) -> Float64:
        """The sum of each example's target weights, f64 (E,), every one times float32 of the example's `multiplier`.

        Products are rounded to float32 as in a batch and then added up in float64, so a plan and its batches agree.
        """
        weights = self._products(multiplier).astype(np.float64) * self.count
        return np.bincount(self.example, weights=weights, minlength=self.num).astype(np.float64, copy=False)

    def supervised(self, multiplier: np.ndarray | float = 1.0) -> Int64:
        """How many targets of each example have a weight above 0, i64 (E,)."""
        counted = np.where(self._products(multiplier) > 0, self.count, 0)
        return np.bincount(self.example, weights=counted, minlength=self.num).astype(np.int64)

    def _products(self, multiplier: np.ndarray | float) -> Float32:
        factors = np.asarray(multiplier, np.float32)
        products: Float32 = self.value * (factors[self.example] if factors.ndim else factors)
        return products


def cell_table(loss: LossRule) -> Float32:
    """The weight of each cell of a tally under a rule, f32: `weigh_tokens` for all targets of a kind at once.

    >>> cell_table(ResponseLoss(turns="last"))[[cell_of(Kind.STOP), cell_of(Kind.STOP, is_last=True)]].tolist()
    [0.0, 1.0]
    """
    kinds = kind_table(loss)
    table: Float32 = np.repeat(np.append(kinds, kinds[Kind.ASSISTANT]), 2)
    assert len(table) == cell_of(MARK, is_last=True) + 1, "a weight for each cell"
    if _counts_last_only(loss):
        table[[cell_of(kind) for kind in WRITTEN]] = 0.0
    return table


def weigh_tally(tally: Tally, *, loss: LossRule) -> Weighed:
    """The target weights of the examples of a tally under a rule, exactly those that `weigh_tokens` gives token by token."""
    return Weighed(tally.example, cell_table(loss)[tally.cell] * tally.turn_weight, tally.count, len(tally))


def weigh_examples(tokens: Tokens, *, loss: LossRule, multiplier: np.ndarray | float = 1.0) -> tuple[Float64, Int64]:
    """Per document: the sum of its target weights (f64), and how many targets have weight above 0."""
    weighed = weigh_tally(tally_examples(tokens), loss=loss)
    return weighed.totals(multiplier), weighed.supervised(multiplier)
