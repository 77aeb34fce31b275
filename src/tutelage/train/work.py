"""Work: what a token, a target and a document make a model do, read off its layers and which of its weights are trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from tutelage.model.loss import unwrapped
from tutelage.train.flops import Attention, Matrix, ModelWork


def work_of(model: Any) -> ModelWork:
    """What a token, a target and a document make this model do, read off its layers and which weights are trained.

    In the lowest block with a trained weight gradients of inputs are left out, though some are made there under adapters: the
    count never flatters. Experts that are not linear layers of their own are not seen.
    """
    base = unwrapped(model)
    head = base.get_output_embeddings()
    units = list(dict.fromkeys(_unit(name) for name, _ in base.named_parameters()))
    # A tied head is listed under the name of the embeddings, where it also belongs in time.
    trained = [_unit(name) for name, parameter in base.named_parameters() if parameter.requires_grad]
    first = min((units.index(unit) for unit in trained), default=len(units))

    def is_above(unit: str) -> bool:
        return unit in units and units.index(unit) > first

    linear = tuple(
        Matrix(*_shape(module), is_above(_unit(name)), _is_trained(module))
        for name, module in base.named_modules()
        if _is_linear(module) and module is not head
    )
    blocks = [unit for unit in units if re.search(r"\.\d+$", unit)]
    return ModelWork(linear, _attentions(base.config.get_text_config(), [is_above(unit) for unit in blocks]), _head(base, head))


def _unit(name: str) -> str:
    """What a name belongs to: its numbered block, or else its module.

    >>> _unit("model.layers.3.mlp.up_proj.weight"), _unit("model.norm.weight")
    ('model.layers.3', 'model.norm')
    """
    block = re.match(r".*?\.\d+(?=\.|$)", name)
    return block.group() if block else name.rpartition(".")[0]


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _shape(module: Any) -> tuple[int, int]:
    """(inputs, outputs); a quantised weight is stored in another shape than it has."""
    if isinstance(module, torch.nn.Linear):
        return module.in_features, module.out_features
    return int(module.weight.shape[0]), int(module.weight.shape[1])


def _is_trained(module: Any) -> bool:
    return bool(module.weight.requires_grad)


def _attentions(config: Any, needs_gradient: Sequence[bool]) -> tuple[Attention, ...]:
    """One per layer. `needs_gradient` is by block; models with blocks of other kinds too get no fewer than their layers."""
    num_layers, heads = int(config.num_hidden_layers), int(config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * num_layers
    needs = list(needs_gradient) if len(needs_gradient) == num_layers else [True] * num_layers
    return tuple(
        Attention(heads * size, window if kind == "sliding_attention" else None, need)
        for kind, need in zip(kinds, needs, strict=True)
        if kind.endswith("attention") and "linear" not in kind
    )


def _head(base: Any, head: Any) -> Matrix:
    is_any_below = any(p.requires_grad for p in base.parameters() if p is not head.weight)
    return Matrix(*_shape(head), is_any_below, _is_trained(head))
