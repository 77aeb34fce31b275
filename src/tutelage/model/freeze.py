"""Weights left as they are, by pattern of their names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tutelage.errors import ModelError
from tutelage.model.patterns import matches, nearest


def freeze(model: nn.Module, patterns: Sequence[str]) -> int:
    """How many numbers are no longer trained: the weights of every pattern of `model.freeze` (see `patterns.matches`).

    A weight that two names share (tied embeddings and head) is frozen by either. Raises `ModelError` for a pattern that
    matches nothing, and when nothing is left to train.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    chosen = set()
    for i, pattern in enumerate(patterns):
        found = [name for name in named if matches(pattern, name)]
        if not found:
            raise ModelError(f"model.freeze.{i}: {pattern!r} matches no weight; {nearest(pattern, list(named))}")
        chosen |= set(found)
    frozen = {id(named[name]): named[name] for name in chosen}
    for weight in frozen.values():
        weight.requires_grad_(False)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ModelError("model.freeze: nothing is left to train; leave a pattern out")
    return sum(weight.numel() for weight in frozen.values())


def count_weights(model: nn.Module) -> tuple[int, int]:
    """(numbers that are trained, numbers in all); packed 4-bit weights count as what they stand for."""
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    total = sum(_unpacked_size(weight) for weight in model.parameters())
    return trained, total


def _unpacked_size(weight: nn.Parameter) -> int:
    shape = getattr(getattr(weight, "quant_state", None), "shape", None)
    return int(shape.numel()) if shape is not None else weight.numel()
