"""A tokenizer that can be read by eye (`ord(c)`) and models small enough to run anywhere.

toy_tokenizer()        ids 0..127 are the ASCII characters; then <|im_start|> 128, <|im_end|> 129, <|pad|> 130
tiny_llama(), tiny_model(kind)   random, two layers, hidden size 32
save_tiny(folder)      both on disk, as `model: {name: PATH}` wants them
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

NUM_CHARACTERS = 128
IM_START, IM_END, PAD = 128, 129, 130
VOCAB_SIZE = 131

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def toy_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """A tokenizer with one id per character, `ord(c)`; anything beyond ASCII becomes `?`.

    >>> toy_tokenizer()("AB<|im_end|>").input_ids
    [65, 66, 129]
    """
    words = {chr(code): code for code in range(NUM_CHARACTERS)}
    backend = Tokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    special = [AddedToken(text, special=True, normalized=False) for text in ("<|im_start|>", "<|im_end|>", "<|pad|>")]
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def tiny_llama(
    vocab: int = VOCAB_SIZE, *, dtype: torch.dtype = torch.float64, tied: bool = True, seed: int = 0
) -> PreTrainedModel:
    """A random two-layer Llama of hidden size 32 in eval mode, with our attention; four heads share two keys."""
    return tiny_model("llama", vocab=vocab, dtype=dtype, tied=tied, seed=seed)


def tiny_model(
    kind: str, *, vocab: int = VOCAB_SIZE, dtype: torch.dtype = torch.float64, tied: bool = True, seed: int = 0
) -> PreTrainedModel:
    """A random two-layer model shaped like `kind` (llama, qwen2, qwen3, gemma2, mistral, gpt_neox, gpt2, mamba), in eval mode."""
    from tutelage.model.attention import ATTENTION_NAME, install_attention

    install_attention()
    config = _config(kind, vocab=vocab, tied=tied)
    attention = {} if kind == "mamba" else {"attn_implementation": ATTENTION_NAME}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **attention)
        _enlarge(model)
    return model.eval()


def _enlarge(model: PreTrainedModel) -> None:
    """Weights five times the usual start: at the usual size attention hardly matters and a leak would not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(5.0)


def _config(kind: str, *, vocab: int, tied: bool) -> PretrainedConfig:
    """The configuration of a tiny model; windows and caps are small enough to matter on ten tokens."""
    shape = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": IM_END,
        "pad_token_id": PAD if vocab > PAD else None,
    }
    shared = {**shape, "num_key_value_heads": 2}
    match kind:
        case "llama":
            return LlamaConfig(**shared)
        case "qwen2":
            return Qwen2Config(**shared)
        case "qwen3":
            return Qwen3Config(**shared, head_dim=8)
        case "mistral":
            return MistralConfig(**shared, sliding_window=4)
        case "gemma2":
            return Gemma2Config(
                **shared,
                head_dim=8,
                query_pre_attn_scalar=8,
                sliding_window=4,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
            )
        case "gpt_neox":
            return GPTNeoXConfig(**shape)
        case "gpt2":
            return GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        case "mamba":
            return MambaConfig(vocab_size=vocab, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
        case _:
            raise AssertionError(f"no tiny model of kind {kind!r}")


def save_tiny(folder: Path | str, *, kind: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """`folder`, now holding a tiny model and the toy tokenizer as any local model folder does."""
    folder = Path(folder)
    model = tiny_model(kind, dtype=dtype, seed=seed)
    model.generation_config = GenerationConfig(eos_token_id=IM_END, pad_token_id=PAD)
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder
