"""Floating-point operations that a step executes: what ran, not what a padded or fully trained model would have taken.

Shapes: N tokens, S targets with weight above 0, L tokens of a document. A product of [a, b] and [b, c] takes 2abc. Not
counted, and small: norms, rotations, softmax, activation functions, the optimizer. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tutelage.train.micro import FlatStep


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear layer [inputs] -> [outputs], and which of its two backward products are made.

    A frozen layer makes no gradient of its weight; below the first trained weight none of its input either.

    >>> Matrix(3, 5, needs_input_gradient=True, needs_weight_gradient=False).flops(10)  # 2 * 3 * 5 * 10, twice
    600
    """

    inputs: int
    outputs: int
    needs_input_gradient: bool = True
    needs_weight_gradient: bool = True

    def flops(self, rows: int) -> int:
        """What so many rows take, forward and backward."""
        return 2 * self.inputs * self.outputs * rows * (1 + self.needs_input_gradient + self.needs_weight_gradient)


@dataclass(frozen=True, slots=True)
class Attention:
    """The attention of a layer: `width` is query heads x head size, `window` how many keys are seen back (None = all).

    Backward is counted as twice the forward, as usual, though a flash kernel makes the scores once more.

    >>> Attention(8).flops([3, 1])  # 6 + 1 pairs, two products of 2 * 8 each, three times
    672
    """

    width: int
    window: int | None = None
    needs_gradient: bool = True

    def flops(self, lengths: Sequence[int]) -> int:
        """What documents of these lengths take, each seeing itself alone and only backwards."""
        return 4 * self.width * num_pairs(lengths, self.window) * (3 if self.needs_gradient else 1)


@dataclass(frozen=True, slots=True)
class ModelWork:
    """What each token, each target and each document makes a model do. `head` runs for the targets alone."""

    linear: tuple[Matrix, ...]
    attention: tuple[Attention, ...]
    head: Matrix


@dataclass(frozen=True, slots=True)
class StepFlops:
    """The operations of a step by place."""

    linear: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.attention + self.head

    def __add__(self, other: StepFlops) -> StepFlops:
        return StepFlops(self.linear + other.linear, self.attention + other.attention, self.head + other.head)


def step_flops(work: ModelWork, lengths: Sequence[int], *, num_targets: int) -> StepFlops:
    """What documents of `lengths` tokens with so many targets of weight above 0 take, forward and backward.

    One layer 4 -> 4, one attention of width 4, a head 4 -> 10; documents of 3 and 2 tokens, two targets:

    >>> work = ModelWork((Matrix(4, 4),), (Attention(4),), Matrix(4, 10))
    >>> step_flops(work, [3, 2], num_targets=2)  # 2*16*5*3, 4*4*(6+3)*3, 2*40*2*3
    StepFlops(linear=480, attention=432, head=480)
    """
    num_tokens = sum(lengths)
    return StepFlops(
        linear=sum(matrix.flops(num_tokens) for matrix in work.linear),
        attention=sum(attention.flops(lengths) for attention in work.attention),
        head=work.head.flops(num_targets),
    )


def num_pairs(lengths: Sequence[int], window: int | None = None) -> int:
    """Pairs of a query and a key that it may see: L (L + 1) / 2 for a document of L tokens, fewer under a window.

    >>> num_pairs([4, 1]), num_pairs([4], window=2)  # 1+2+3+4 and 1, 1+2+2+2
    (11, 7)
    """
    lengths_D = np.asarray(lengths, np.int64)
    full_D = lengths_D * (lengths_D + 1) // 2
    if window is None:
        return int(full_D.sum())
    seen_D = np.where(lengths_D > window, window * (window + 1) // 2 + (lengths_D - window) * window, full_D)
    return int(seen_D.sum())


def executed(flat: FlatStep, rows_per_pass: int) -> tuple[list[int], int]:
    """(lengths of the documents that meet the model, number of targets with weight above 0).

    A pass in which nothing has weight is not run, so it is not counted.
    """
    lengths: list[int] = []
    for part in flat.passes(rows_per_pass):
        if flat.weights[part.start : part.stop].any():
            lengths += part.lengths
    return lengths, int((flat.weights > 0).sum())
