"""The bundled model as a plain folder: quantised blocks become ordinary float32, the GGUF's metadata becomes JSON.

float32 because it is the narrowest type that holds what the file says: a Q4_1 weight is scale * q + minimum with both in
float16, which needs up to 15 bits before the sum, where bfloat16 keeps 8 and float16 11. So the folder computes what the
file computes, and loading it as bfloat16 later is a choice that the recipe makes, not one made here. No torch, and the
same bytes on every write.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.errors import MissingExtra, ModelError

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_CONTROL_TOKEN = 3
"""`tokenizer.ggml.token_type` of a token that no text may produce."""


def write_bundled(folder: Path, gguf_path: Path) -> dict[str, Any]:
    """What was written: `{"folder", "num_parameters", "size_bytes", "files"}`, after filling `folder` from a GGUF file.

    The folder holds float32 safetensors, config, generation config, tokenizer and chat template, and loads with plain
    `AutoModelForCausalLM` and `AutoTokenizer`. `config.json` is written last, so that a folder with one is complete.
    Raises `ModelError` on a GGUF that is not a Llama with SmolLM's tokenizer, `MissingExtra` without `gguf`.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingExtra("gguf", "train") from error
    reader = GGUFReader(gguf_path)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    _require_known(facts, gguf_path)
    folder.mkdir(parents=True, exist_ok=True)
    weights = _weights(reader, facts)
    _write_weights(folder, weights)
    _write_tokenizer(folder, facts)
    _write_json(folder / "generation_config.json", _generation_config(facts))
    _write_json(folder / "config.json", _config(facts, is_tied="lm_head.weight" not in weights))
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {
        "folder": str(folder),
        "num_parameters": sum(weight.size for weight in weights.values()),
        "size_bytes": sum(path.stat().st_size for path in files),
        "files": [path.name for path in files],
    }


def _require_known(facts: dict[str, Any], path: Path) -> None:
    """Nothing; raises `ModelError` unless every rule below holds for this file."""
    found = tuple(facts.get(f"{key}") for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre"))
    if found != ("llama", "gpt2", "smollm"):
        raise ModelError(
            f"{path} is {'/'.join(map(str, found))}; only llama/gpt2/smollm is known here. Pass a folder with safetensors instead"
        )


def _weights(reader: Any, facts: dict[str, Any]) -> dict[str, np.ndarray]:
    """float32 arrays under the names that transformers gives them."""
    from gguf.quants import dequantize

    num_heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        stem, _, kind = tensor.name.removesuffix(".weight").rpartition(".")
        weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if kind in num_heads:
            weight = _halves_from_pairs(weight, num_heads[kind])
        outer = _OUTER_NAMES.get(kind) or f"model.layers.{stem.removeprefix('blk.')}.{_LAYER_NAMES[kind]}"
        weights[f"{outer}.weight"] = np.ascontiguousarray(weight)
    return weights


def _halves_from_pairs(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """`weight` with each head's rows reordered: GGUF rotates neighbours (0, 1), (2, 3); transformers (0, D/2), (1, D/2 + 1).

    >>> _halves_from_pairs(np.array([[0], [1], [2], [3]]), 1).ravel().tolist()
    [0, 2, 1, 3]
    """
    rows, columns = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_weights(folder: Path, weights: dict[str, np.ndarray]) -> None:
    """Nothing; writes `model.safetensors`, names sorted."""
    from safetensors.numpy import save_file

    save_file({name: weights[name] for name in sorted(weights)}, folder / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(folder: Path, facts: dict[str, Any]) -> None:
    """Nothing; writes `tokenizer.json` (digits one by one, then byte-level BPE), its configuration and the chat template.

    The GGUF names this splitting `smollm` and stores only words and merges. The end token is not also the padding:
    a trainer that hides padding would hide the end with it, and the model would never learn to stop.
    """
    words = facts["tokenizer.ggml.tokens"]
    controls = [i for i, kind in enumerate(facts["tokenizer.ggml.token_type"]) if kind == _CONTROL_TOKEN]
    _write_json(folder / "tokenizer.json", _tokenizer(words, controls, facts["tokenizer.ggml.merges"]))
    unknown = words[facts["tokenizer.ggml.unknown_token_id"]]
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": facts["llama.context_length"],
        "bos_token": words[facts["tokenizer.ggml.bos_token_id"]],
        "eos_token": words[facts["tokenizer.ggml.eos_token_id"]],
        "unk_token": unknown,
        "pad_token": unknown,
    }
    _write_json(folder / "tokenizer_config.json", configuration)
    (folder / "chat_template.jinja").write_text(facts["tokenizer.chat_template"], encoding="utf-8")


def _tokenizer(words: list[str], controls: list[int], merges: list[str]) -> dict[str, Any]:
    """The content of `tokenizer.json`."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": words[i], **flags} for i in controls],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {word: i for i, word in enumerate(words)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def _config(facts: dict[str, Any], *, is_tied: bool) -> dict[str, Any]:
    """The content of `config.json`."""
    hidden, heads = facts["llama.embedding_length"], facts["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "dtype": "float32",
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": facts["llama.feed_forward_length"],
        "max_position_embeddings": facts["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": facts["llama.block_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "pad_token_id": facts["tokenizer.ggml.unknown_token_id"],
        # The file keeps it as a float32; nine digits give back the decimal that was meant (1e-05).
        "rms_norm_eps": float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_parameters": {"rope_theta": facts["llama.rope.freq_base"], "rope_type": "default"},
        "tie_word_embeddings": is_tied,
        "vocab_size": facts["llama.vocab_size"],
    }


def _generation_config(facts: dict[str, Any]) -> dict[str, Any]:
    """The content of `generation_config.json`."""
    return {
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.unknown_token_id"],
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Nothing; writes `content` as UTF-8 JSON, one newline at the end."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
