"""New tokens: rows of embeddings and head for them, which start at the mean of the old rows.

The mean puts a new token where the model's output for it is about average, so the first steps neither avoid nor prefer it
(Hewitt 2021, "Initializing new word embeddings for pretrained language models").
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from tutelage.errors import ModelError


def write_with_tokens(source: Path, folder: Path, new_tokens: Sequence[str]) -> list[int]:
    """The ids of `new_tokens`, special tokens of the model that `folder` now holds: the one in `source`, in its own precision.

    Raises `ModelError` for a token that the tokenizer has already.
    """
    from tutelage.model.load import load_tokenizer, without_progress  # it needs this module's `token_rows`

    tokenizer = load_tokenizer(source)
    num_old = len(tokenizer)
    ids = add_tokens(tokenizer, new_tokens)
    with without_progress():
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype="auto", use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
        make_room(model, ids, num_old=num_old)
        if (source / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(source)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ids


def add_tokens(tokenizer: Any, new_tokens: Sequence[str]) -> list[int]:
    """The ids of `new_tokens` in `tokenizer`, which has them as special tokens from here on."""
    words = tokenizer.get_vocab()
    for i, token in enumerate(new_tokens):
        if token in words:
            raise ModelError(f"model.new_tokens.{i}: the tokenizer has {token!r} already (id {words[token]}); leave it out")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new_tokens], special_tokens=True)
    return [int(i) for i in tokenizer.convert_tokens_to_ids(list(new_tokens))]


def make_room(model: PreTrainedModel, ids: Sequence[int], *, num_old: int) -> None:
    """Nothing; embeddings and head have a row for each of `ids`, all of them the mean of the first `num_old` rows.

    Rows are added up to the largest id and not beyond, none where the model has spare ones; spare rows that stay unused are
    no part of the mean. Tied or untied; a head's bias goes the same way. Means are taken in float32.
    """
    needed = max(ids) + 1
    embeddings: Tensor = model.get_input_embeddings().weight
    if needed > embeddings.shape[0]:
        model.resize_token_embeddings(needed, mean_resizing=False)
    head = model.get_output_embeddings()
    weights = [model.get_input_embeddings().weight, *([head.weight, getattr(head, "bias", None)] if head is not None else [])]
    with torch.no_grad():
        for weight in {id(weight): weight for weight in weights if weight is not None}.values():
            num_known = min(num_old, min(ids))
            weight[list(ids)] = weight[:num_known].float().mean(0).to(weight.dtype)


def token_rows(model: PreTrainedModel, ids: Sequence[int]) -> dict[str, list[int]]:
    """What peft calls `trainable_token_indices`: the rows `ids` of the embeddings, and of the head where it is not the same."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = {"embeddings": embeddings}
    if head is not None and head.weight is not embeddings.weight:
        modules["head"] = head
    names = {module: name for name, module in model.named_modules()}
    return {names[module]: list(ids) for module in modules.values()}
