"""Dropout of the architecture itself: set after loading, wherever its own configuration would have put it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tutelage.errors import ModelError

IN_ATTENTION = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")
ON_LAYERS = (
    "resid_pdrop",
    "resid_dropout",
    "residual_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "dropout",
    "dropout_rate",
)
"""What configurations call dropout of attention weights, and of what a layer adds to the residual stream."""


def set_dropout(model: Any, share: float) -> tuple[str, ...]:
    """The fields of the configuration that now are `share`; the modules that they reach drop so much in training.

    `model` is a transformers model before any adapter is put on. A twin of the architecture without memory is made from the
    changed configuration, and its dropout copied module by module: where a field acts is the architecture's to say. Fields for
    embeddings alone stay as they were. Raises `ModelError` where the architecture has none, naming what there is.
    """
    config = model.config.get_text_config()
    fields = tuple(name for name in (*IN_ATTENTION, *ON_LAYERS) if isinstance(getattr(config, name, None), int | float))
    if not fields:
        others = sorted(name for name in config.to_dict() if "drop" in name)
        raise ModelError(
            f"train.dropout: {type(model).__name__} has no dropout in attention or on layers "
            f"(its configuration has {', '.join(others) or 'none at all'}); leave it out, or take `model.adapter.dropout` of lora"
        )
    for name in fields:
        setattr(config, name, share)
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    for name, module in twin.named_modules():
        _copy_dropout(module, model.get_submodule(name))
    return fields


def _copy_dropout(twin: torch.nn.Module, module: torch.nn.Module) -> None:
    """Nothing; what the module drops is what its twin drops: modules keep it as `Dropout.p` or as a number of their own."""
    if isinstance(twin, torch.nn.Dropout):
        assert isinstance(module, torch.nn.Dropout), f"{type(module).__name__} where the architecture has dropout"
        module.p = twin.p
    for name, value in vars(twin).items():
        if "drop" in name and isinstance(value, float):
            setattr(module, name, value)
