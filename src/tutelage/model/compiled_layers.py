"""The layers of a decoder compiled by torch, so that what lies between its products is one pass over memory each.

Every layer of a model is the same code, so one compilation serves all. Attention stays as it is: a call out of the
compiled code, to the kernels of `attention.py`.
"""

from __future__ import annotations

import shutil
from typing import Any

import torch
from transformers import AttentionInterface

from tutelage.errors import ModelError
from tutelage.model.attention import ATTENTION_NAME, documents_attention
from tutelage.model.loss import unwrapped

CPU_COMPILERS = ("g++", "clang++", "c++")


def can_compile(device: str) -> str | None:
    """None where layers can be compiled for a device, else what is missing.

    >>> can_compile("mps")
    'torch.compile has no code for mps that we have tried'
    """
    if device == "cpu":
        found = any(shutil.which(name) for name in CPU_COMPILERS)
        return None if found else f"torch.compile needs a C++ compiler; none of {', '.join(CPU_COMPILERS)} is on the path"
    return None if device.startswith("cuda") else f"torch.compile has no code for {device} that we have tried"


def compile_layers(model: Any) -> int:
    """How many layers were set to be compiled on their first use; adapters inside them are compiled with them.

    The numbers differ from uncompiled ones by rounding: fused code keeps what it would have rounded to bfloat16 in
    between. One machine, one version of torch and one number of threads give the same bits every time. Raises
    `ModelError` when there is no compiler, or no list of layers.
    """
    base = unwrapped(model)
    if (missing := can_compile(next(base.parameters()).device.type)) is not None:
        raise ModelError(f"{missing}; install one, or set `train.compile: false`")
    layers = decoder_layers(base)
    # Dynamo would otherwise trace into the grouping of documents and compile anew for every packing.
    AttentionInterface.register(ATTENTION_NAME, torch.compiler.disable(documents_attention))  # type: ignore[no-untyped-call]
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


def decoder_layers(base: Any) -> list[torch.nn.Module]:
    """The layers of a transformers decoder, bottom first. Raises `ModelError` when there is no list of equal modules."""
    number = getattr(base.config.get_text_config(), "num_hidden_layers", None)
    for module in base.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == number and len({type(m) for m in module}) == 1:
            return list(module)
    raise ModelError(f"{type(base).__name__} has no list of {number} equal layers; set `train.compile: false`")
