"""bfloat16: however a step is cut, its gradient stays within the rounding of one pass."""

from __future__ import annotations

import torch

from tiny_training import make_batch, make_docs
from toy import tiny_llama
from tutelage.train.optimizer import Optimizer
from tutelage.train.spec import TrainSpec
from tutelage.train.step import step_gradients

ROUNDING = 2.0**-8
"""Relative, of one number kept in bfloat16."""
BATCH = make_batch([[doc] for doc in make_docs(64, seed=11)], capacity=16)
Gradients = dict[str, torch.Tensor]


def cut(rows: int, *, has_masters: bool) -> Gradients:
    """The step's gradient in passes of so many rows, added up in float32 masters or in the weights' own bfloat16."""
    model = tiny_llama(dtype=torch.bfloat16)
    optimizer = Optimizer(model, TrainSpec()) if has_masters else None
    step_gradients(model, BATCH, micro_batch_rows=rows)
    weights = optimizer.weights if optimizer is not None else dict(model.named_parameters())
    return {name: weight.grad.float() for name, weight in weights.items() if weight.grad is not None}


def distance(one: Gradients, other: Gradients) -> float:
    """Norm of the difference over the norm."""
    apart, size = (sum(float((g - h).pow(2).sum()) for g, h in pairs) for pairs in _pairs(one, other))
    return (apart / size) ** 0.5


def _pairs(one: Gradients, other: Gradients) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], ...]:
    assert one.keys() == other.keys() and one
    return [(one[n], other[n]) for n in one], [(other[n], torch.zeros(())) for n in one]


def test_bfloat16_gradients_are_the_same_for_every_cut_up_to_one_rounding() -> None:
    """Kills accumulation in bfloat16, which the control shows: there sixty-four passes are off by several roundings."""
    whole = cut(64, has_masters=True)
    for rows in (1, 8):
        assert distance(cut(rows, has_masters=True), whole) < ROUNDING
    assert distance(cut(1, has_masters=False), cut(64, has_masters=False)) > 2 * ROUNDING
