"""Six chat template families in small, and three small tokenizers: characters, byte-level BPE, SentencePiece-like BPE."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tutelage.records import Conversation, Origin, Turn
from tutelage.render.tokenizer import OpenTokenizer, open_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set lead = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set lead = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% set text = lead + m.content if loop.first else m.content %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + text | trim + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + text | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (  # always appends a header for the next answer, also for training
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '<|head|>\n\n' + m.content | trim + '<|eot|>' }}"
    "{% endfor %}"
    "{{ '<|start|>assistant<|head|>\n\n' }}"
)
GEMMA = (  # refuses two users in a row, trims, merges the system turn into the user's
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set lead = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set lead = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (lead if loop.first else '') }}"
    "{{ m.content | trim }}{{ '<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
MISTRAL = (  # drops the system turn silently
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}\n{% if m.role == 'user' %}\n{{ '<|user|>\n' + m.content + eos_token }}\n"
    "{% elif m.role == 'system' %}\n{{ '<|system|>\n' + m.content + eos_token }}\n"
    "{% elif m.role == 'assistant' %}\n{{ '<|assistant|>\n'  + m.content + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
THINKING = (  # drops earlier reasoning, splits it off answers that spell it, supplies an empty block to the last answer
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% set text = m.content %}{% set why = m.reasoning_content or '' %}"
    "{% if '</think>' in text %}{% set why = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}{{ '<think>\n' + why.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ text }}"
    "{% for call in m.tool_calls or [] %}{{ '\n<call>' }}"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson + '</call>' }}"
    "{% endfor %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"  # no stop at all

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|head|>", "<|eot|>", "<turn>", "<end>"]
MARKED = {  # template, end token, and whether it shows a system turn of its own
    "chatml": (CHATML, "<|im_end|>"),
    "llama2": (LLAMA2, "</s>"),
    "llama3": (LLAMA3, "</s>"),
    "gemma": (GEMMA, "<end>"),
    "mistral": (MISTRAL, "</s>"),
    "zephyr": (ZEPHYR, "</s>"),
}


def _characters() -> Tokenizer:
    """Ids 0..127 are ASCII characters; anything else becomes `?`."""
    backend = Tokenizer(models.WordLevel({chr(code): code for code in range(128)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return backend


def _bytes() -> Tokenizer:
    """Byte-level BPE whose merges cross borders: two line ends, a space and a letter, a full stop and a line end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "h"), (".", "Ċ"), ("h", "i"), ("Ġ", "Ġ"), ("Ã", "©"), ("l", "l"), ("e", "ll")]
    words = [*alphabet, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pieces(*, prepends: bool = True) -> Tokenizer:
    """SentencePiece-like BPE: a space in front, `▁` for spaces, unknown characters as bytes."""
    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *(chr(c) for c in range(33, 127))]
    merges = [("▁", "h"), ("h", "i"), ("▁", "▁"), ("l", "l"), ("▁h", "i")]
    words += [a + b for a, b in merges]
    backend = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if prepends:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _patterned() -> Tokenizer:
    """As tiktoken's vocabularies are: a pattern cuts the text, then byte-level BPE; it keeps line ends and a full stop together."""
    backend = _bytes()
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return backend


def _gpt2() -> Tokenizer:
    """As GPT-2's: its own pattern, which cuts between two line ends that words follow."""
    backend = _bytes()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return backend


def _whole() -> Tokenizer:
    """As Gemma's: `▁` for spaces, none in front."""
    backend = _pieces()
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


_BACKENDS: dict[str, Callable[[], Tokenizer]] = {
    "characters": _characters,
    "bytes": _bytes,
    "pieces": _pieces,
    "metaspace": lambda: _pieces(prepends=False),
    "tiktoken": _patterned,
    "gpt2": _gpt2,
    "whole": _whole,
}


@cache
def reference(kind: str, template: str, eos: str) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers has it."""
    backend = _BACKENDS[kind]()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token=eos,
        pad_token=eos,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


@cache
def opened(kind: str, template: str, eos: str) -> OpenTokenizer:
    """The same tokenizer as we open it, from files."""
    with TemporaryDirectory(prefix="tutelage-tokenizer-") as folder:
        reference(kind, template, eos).save_pretrained(folder)
        return open_tokenizer(Path(folder))


def talk(*turns: Turn | tuple[str, str], tools: str | None = None) -> Conversation:
    """A conversation of these turns."""
    made = tuple(turn if isinstance(turn, Turn) else Turn(*turn) for turn in turns)
    return Conversation(Origin("s", "f.jsonl", 1), made, "t", "MIT", "human", tools=tools)
