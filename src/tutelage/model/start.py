"""The model as it was before training, to be held close to: its adapter switched off, or a frozen copy.

Shapes: N tokens of packed documents, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tutelage.model.chunks import Head
from tutelage.model.loss import head_of, hidden_states


class Start:
    """The starting model, made before the first update. `copied_bytes` is what it costs in memory.

    Where adapters alone are trained it is the same model without them and costs nothing. Otherwise the trained weights are kept
    a second time, in the precision that the model runs in; frozen ones are shared.
    """

    # TODO(sharded-start): under FSDP every rank keeps the copy whole

    def __init__(self, model: Any) -> None:
        self.copied_bytes = 0
        self._model = model
        self._is_copy = not _trains_adapters_alone(model)
        if self._is_copy:
            self._model = _frozen_copy(model)
            self.copied_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)

    @torch.no_grad()
    def states(self, ids_N: Tensor, *, positions_N: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Head]:
        """([N, D] last hidden states, head) of packed documents, without dropout, noise or gradients."""
        if self._is_copy:
            return hidden_states(self._model, ids_N[None], positions=positions_N[None], lengths=lengths), head_of(self._model)
        with _as_before(self._model):
            return hidden_states(self._model, ids_N[None], positions=positions_N[None], lengths=lengths), head_of(self._model)


def _trains_adapters_alone(model: Any) -> bool:
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return hasattr(model, "disable_adapter") and all("lora_" in name for name in names)


def _frozen_copy(model: Any) -> Any:
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False).eval()


@contextmanager
def _as_before(model: Any) -> Iterator[None]:
    """Nothing; while it is open the model has no adapter and no dropout. What trains, and each module's mode, is put back."""
    modes = [(module, module.training) for module in model.modules()]
    trains = [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, is_trained in trains:  # peft switches every adapter weight on again, frozen ones too
            parameter.requires_grad_(is_trained)
