"""The optimizer over float32 weights, whatever precision the model runs in.

A model in bfloat16 cannot take an update of a thousandth of a weight: its 8 bits round it away, and so do sums of
gradients over micro-batches. So the optimizer holds each narrow weight and its gradient in float32 ("master"), and the
model works with a rounded copy (`rounding.py`). Weights in float32 or float64 are their own master and cost nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tutelage.errors import TrainError
from tutelage.train.choice import choose
from tutelage.train.memory import dump, load, starting_points
from tutelage.train.rounding import round_into
from tutelage.train.spec import TrainSpec

NARROW = (torch.bfloat16, torch.float16)
CHUNK = 32_768
"""Numbers widened at a time on a CPU: the wide copy stays in the cache, and torch starts no threads for so few."""


class Optimizer:
    """The trainable weights of a model by name, their gradients and the optimizer's memory of them.

    Between `zero` and `step` any number of backward passes add to the gradients. `close` takes the hooks off the model.
    `peak` is the run's peak learning rate, needed where groups have one of their own (`train.learning_rate` by default).
    `used_in` is the narrow precision that the model's float32 weights are used in, where they are (`Parallel.used_in`).
    """

    def __init__(
        self, model: torch.nn.Module, spec: TrainSpec, *, peak: float | None = None, used_in: torch.dtype | None = None
    ) -> None:
        self._working = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._working:
            raise TrainError("the model has no trainable weight; choose `model.adapter: lora` or `full`")
        self.weights: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        for name, parameter in self._working.items():
            self.weights[name] = parameter
            if parameter.dtype in NARROW or used_in in NARROW:
                self.weights[name] = parameter.detach().to(torch.float32, copy=True).requires_grad_()
                widen: Any = parameter.register_post_accumulate_grad_hook
                self._hooks.append(widen(_widen(self.weights[name])))
        self._max_grad_norm = spec.max_grad_norm
        self._chosen = choose(self.weights, spec, peak=peak)
        self._torch = self._chosen.optimizer
        self._before = starting_points(self._torch)

    @property
    def num_weights(self) -> int:
        """How many numbers are trained."""
        return sum(weight.numel() for weight in self.weights.values())

    def zero(self) -> None:
        """Nothing; forgets all gradients."""
        for weight in self.weights.values():
            weight.grad = None

    def clip(self) -> float:
        """The norm of the whole gradient before it was scaled down to the bound; not finite when a part of it is not."""
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        norm: Any = torch.nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of gradients cut over ranks
        size = float(norm)
        if self._max_grad_norm is not None and math.isfinite(size):
            torch.nn.utils.clip_grads_with_norm_(list(self.weights.values()), self._max_grad_norm, norm)
        return size

    def step(self, learning_rate: float) -> None:
        """Nothing; moves the weights along their gradients, and the model's rounded copies with them."""
        self._chosen.set_rate(learning_rate)
        self._torch.step()
        self._refresh()

    def memory(self) -> dict[str, Tensor]:
        """What the optimizer remembers by `what/weight name` (see `memory.py`); AdamW nothing before the first step."""
        return dump(self._torch, self.weights, self._before)

    def restore(self, weights: dict[str, Tensor], memory: dict[str, Tensor] | None = None) -> None:
        """Nothing; takes weights, and the optimizer's memory where given, from a checkpoint. Raises `TrainError` on a misfit."""
        mine = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        theirs = {name: tuple(weight.shape) for name, weight in weights.items()}
        if mine != theirs:
            odd = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
            raise TrainError(
                f"the checkpoint does not fit this model: {len(odd)} weights differ, `{odd[0]}` first "
                f"(here {mine.get(odd[0])}, there {theirs.get(odd[0])}); it is of another model or adapter"
            )
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(weights[name])
        self._refresh()
        if memory is not None:
            load(self._torch, self.weights, memory)

    def close(self) -> None:
        """Nothing; the model's own gradients work as before."""
        for hook in self._hooks:
            hook.remove()

    def _refresh(self) -> None:
        for name, parameter in self._working.items():
            if self.weights[name] is not parameter:
                round_into(parameter, self.weights[name], name=name)


def _widen(master: Tensor) -> Any:
    """A hook that moves a parameter's fresh gradient into its float32 master, where gradients are added up.

    A gradient that is wide already is taken as it is. Else the wide one's memory is kept from step to step: pages that the
    system hands out anew cost as much as the sum.
    """
    kept: list[Tensor] = []

    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        fresh, parameter.grad = parameter.grad, None
        if master.grad is not None:
            _add(fresh, to=master.grad)
            return
        if fresh.dtype == master.dtype:
            master.grad = fresh
            return
        if not kept:
            kept.append(torch.empty_like(master, requires_grad=False))
        master.grad = kept[0].copy_(fresh)

    return move


def _add(narrow: Tensor, *, to: Tensor) -> None:
    """Nothing; adds `narrow` to a wide tensor. A CPU would write the wide copy to memory first, so it goes by chunks there."""
    if to.device.type != "cpu" or type(to) is not Tensor or not (narrow.is_contiguous() and to.is_contiguous()):
        to.add_(narrow)
        return
    wide, fresh = to.view(-1), narrow.view(-1)
    for start in range(0, wide.numel(), CHUNK):
        wide[start : start + CHUNK].add_(fresh[start : start + CHUNK])
