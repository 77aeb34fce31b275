"""AdamW over float32 weights, whatever precision the model runs in.

A model in bfloat16 cannot take an update of a thousandth of a weight: its 8 bits round it away, and so do sums of
gradients over micro-batches. So the optimizer holds each narrow weight and its gradient in float32 ("master"), and the
model works with the rounded copy. Weights in float32 or float64 are their own master and cost nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tutelage.errors import TrainError
from tutelage.train.spec import TrainSpec

NARROW = (torch.bfloat16, torch.float16)


class Optimizer:
    """The trainable weights of a model by name, their gradients and AdamW's memory of them.

    Between `zero` and `step` any number of backward passes add to the gradients. `close` takes the hooks off the model.
    """

    def __init__(self, model: torch.nn.Module, spec: TrainSpec) -> None:
        self._working = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._working:
            raise TrainError("the model has no trainable weight; choose `model.adapter: lora` or `full`")
        self.weights: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        for name, parameter in self._working.items():
            self.weights[name] = parameter
            if parameter.dtype in NARROW:
                self.weights[name] = parameter.detach().float().requires_grad_()
                widen: Any = parameter.register_post_accumulate_grad_hook
                self._hooks.append(widen(_widen(self.weights[name])))
        self._max_grad_norm = spec.max_grad_norm
        groups = [
            {"params": [w for w in self.weights.values() if w.ndim >= 2], "weight_decay": spec.weight_decay},
            {"params": [w for w in self.weights.values() if w.ndim < 2], "weight_decay": 0.0},  # norms and biases
        ]
        groups = [group for group in groups if group["params"]]
        beta1, beta2 = spec.betas
        self._adamw = torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), eps=1e-8, fused=True)

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
        norm = torch.nn.utils.get_total_norm(gradients)
        size = float(norm)
        if self._max_grad_norm is not None and math.isfinite(size):
            torch.nn.utils.clip_grads_with_norm_(list(self.weights.values()), self._max_grad_norm, norm)
        return size

    def step(self, learning_rate: float) -> None:
        """Nothing; moves the weights along their gradients, and the model's rounded copies with them."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()
        self._refresh()

    def memory(self) -> dict[str, Tensor]:
        """AdamW's tensors by `what/weight name`; empty before the first step."""
        names = {id(weight): name for name, weight in self.weights.items()}
        return {f"{what}/{names[id(p)]}": value for p, state in self._adamw.state.items() for what, value in state.items()}

    def restore(self, weights: dict[str, Tensor], memory: dict[str, Tensor] | None = None) -> None:
        """Nothing; takes weights, and AdamW's tensors where given, from a checkpoint. Raises `TrainError` on a misfit."""
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
            self._adamw.state.clear()
            for name, value in memory.items():
                what, _, weight_name = name.partition("/")
                weight = self.weights[weight_name]
                place = torch.device("cpu") if what == "step" and weight.device.type == "cpu" else weight.device
                self._adamw.state[weight][what] = value.to(place, copy=True)

    def close(self) -> None:
        """Nothing; the model's own gradients work as before."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _refresh(self) -> None:
        for name, parameter in self._working.items():
            if self.weights[name] is not parameter:
                parameter.copy_(self.weights[name])


def _widen(master: Tensor) -> Any:
    """A hook that moves a parameter's fresh gradient into its float32 master, where gradients are added up."""

    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        fresh = parameter.grad.float()
        master.grad = fresh if master.grad is None else master.grad.add_(fresh)
        parameter.grad = None

    return move
