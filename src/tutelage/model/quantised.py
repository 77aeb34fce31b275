"""A frozen model in 4 bits, for adapters beside it (QLoRA, arXiv 2305.14314): bitsandbytes does the arithmetic."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from tutelage.errors import MissingExtra, ModelError
from tutelage.model.attention import ATTENTION_NAME, install_attention
from tutelage.model.load import dtype_named, without_progress


def require_quantisation(device: str) -> None:
    """Nothing; raises `ModelError` off CUDA and `MissingExtra` without bitsandbytes, before any file is opened."""
    if not device.startswith("cuda"):
        raise ModelError(
            f"model.adapter: qlora needs a CUDA device and this run is on {device}; take `lora` here (in bfloat16 "
            "it needs four times qlora's memory for the frozen weights)"
        )
    for package in ("bitsandbytes", "accelerate"):
        if find_spec(package) is None:
            raise MissingExtra(package, "qlora")


def quantisation(dtype: str) -> BitsAndBytesConfig:
    """nf4 with the scales quantised too (0.37 bits per weight less), products in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype_named(dtype),
        bnb_4bit_quant_storage=torch.uint8,
    )


def load_quantised(folder: Path | str, *, device: str, dtype: str = "bfloat16") -> PreTrainedModel:
    """The model in `folder` with every linear layer but the head in 4 bits on `device`, frozen, in eval mode.

    Embeddings, norms and head are in `dtype`, in which products are made too. Layers are quantised as they are read, so no
    wide copy of the model is ever held. Raises `ModelError` when the folder cannot be loaded so.
    """
    install_attention()
    try:
        with without_progress():
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype_named(dtype),
                quantization_config=quantisation(dtype),
                device_map={"": device},
                attn_implementation=ATTENTION_NAME,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
            )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ModelError(f"{folder} could not be loaded in 4 bits: {error}; try `model.adapter: lora`") from error
    return model.requires_grad_(False).eval()


def is_quantised(model: Any) -> bool:
    """Whether weights of `model` are packed in 4 bits, so that adapters cannot be added into them without loss."""
    return bool(getattr(model, "is_loaded_in_4bit", False))
