"""A model to a folder that plain transformers and peft load, and whose model stops where it was taught to."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from tutelage.errors import ModelError
from tutelage.model.load import dtype_named, without_progress
from tutelage.model.loss import unwrapped
from tutelage.model.quantised import is_quantised

PAD_CANDIDATES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")
"""Tokens that published tokenizers keep free of other use, best first."""


def save_model(
    model: Any, folder: Path | str, *, tokenizer: Any, stop_ids: Sequence[int], base: Path | str | None = None
) -> Path:
    """`folder`, holding the model (or, for a peft model, its adapter), tokenizer, chat template and generation config.

    `generation_config.json` ends an answer at every id of `stop_ids` and at those it ended at before. `base` is what
    `adapter_config.json` names as the model below: a folder or a hub id, by default where the base was loaded from.
    The padding token is one that is no stop token where the tokenizer has such a one. The model and tokenizer handed in
    are not changed. Note that plain peft takes generation settings from the base: the adapter's own file is read by
    `load_model` and by people.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    inner = unwrapped(model)
    if hasattr(model, "peft_config"):
        _save_adapter(model, folder, base=str(base or inner.config._name_or_path))
    else:
        with without_progress():
            inner.save_pretrained(folder)
    padded = with_pad(tokenizer, stop_ids)
    padded.save_pretrained(folder)
    generation_config(inner, stop_ids, pad_id=padded.pad_token_id).save_pretrained(folder)
    return folder


def merge_and_save(model: Any, folder: Path | str, *, tokenizer: Any, stop_ids: Sequence[int], dtype: str | None = None) -> Path:
    """`folder`, holding a peft model with its adapter added into the weights: an ordinary model of the same size.

    The sum is made in float32 and then stored in `dtype`, by default the base's own. The model handed in keeps its
    adapter; a copy in memory is merged. Raises `ModelError` when the model has no adapter.
    """
    if not hasattr(model, "peft_config"):
        raise ModelError("the model has no adapter to merge; save_model writes it as it is")
    if is_quantised(unwrapped(model)):
        raise ModelError(
            "an adapter cannot be added into weights of 4 bits without loss; save it, load its folder with load_model (which "
            "opens the base whole), and merge that"
        )
    stored = dtype_named(dtype) if dtype else unwrapped(model).dtype
    wide = torch.promote_types(torch.float32, stored)
    merged = copy.deepcopy(model).to(wide).merge_and_unload(safe_merge=True)
    return save_model(merged.to(stored), folder, tokenizer=tokenizer, stop_ids=stop_ids)


def _save_adapter(model: Any, folder: Path, *, base: str) -> None:
    """Nothing; writes adapter weights and `adapter_config.json` naming `base`. Raises `ModelError` where there is no name."""
    if not base:
        raise ModelError("the adapter's base model has no folder or hub id; pass `base`, or the adapter cannot be loaded again")
    configs = model.peft_config.values()
    kept = [config.base_model_name_or_path for config in configs]
    has_card = (folder / "README.md").exists()
    try:
        for config in configs:
            config.base_model_name_or_path = base
        # "auto" would look the base up on the hub to see whether its vocabulary grew.
        model.save_pretrained(folder, save_embedding_layers=False)
    finally:
        for config, name in zip(configs, kept, strict=True):
            config.base_model_name_or_path = name
    _sort_targets(folder / "adapter_config.json")
    if not has_card:
        # peft leaves a model card with nothing filled in.
        (folder / "README.md").unlink(missing_ok=True)


def _sort_targets(path: Path) -> None:
    """Nothing; puts `target_modules` in order: peft keeps a set, whose order differs from one process to the next."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(content.get("target_modules"), list):
        content["target_modules"].sort()
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def generation_config(model: PreTrainedModel, stop_ids: Sequence[int], *, pad_id: int | None) -> GenerationConfig:
    """A copy of the model's generation config that stops at its old end ids and at `stop_ids`, each once, old ones first."""
    config = copy.deepcopy(model.generation_config)
    old = config.eos_token_id if config.eos_token_id is not None else model.config.get_text_config().eos_token_id
    old_ids = old if isinstance(old, list | tuple) else [] if old is None else [old]
    config.eos_token_id = list(dict.fromkeys([*old_ids, *stop_ids])) or None
    config.pad_token_id = pad_id
    return config


def with_pad(tokenizer: Any, stop_ids: Sequence[int]) -> Any:
    """A copy of `tokenizer` whose padding is not in `stop_ids` if any of its tokens will do: its own, `PAD_CANDIDATES`, unknown.

    With padding = end token, a trainer that hides padding hides every end too, and the next model never stops.
    """
    tokenizer = copy.deepcopy(tokenizer)
    words = tokenizer.get_vocab()
    stops = {*stop_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
    for token in (tokenizer.pad_token, *PAD_CANDIDATES, tokenizer.unk_token):
        if token in words and words[token] not in stops:
            tokenizer.pad_token = token
            return tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
