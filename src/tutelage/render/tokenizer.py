"""A tokenizer folder opened: the Rust tokenizer, which tokens are special, which end an answer, which templates it brings.

`tokenizers.Tokenizer.from_file` opens a folder in a tenth of a second. `AutoTokenizer` takes seconds and may rebuild the
tokenizer for its class; it is used exactly where it could make a difference, and `engine` says which and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson
from tokenizers import AddedToken, Tokenizer

from tutelage.errors import TemplateError
from tutelage.render.template import template_in

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
AS_IS_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


@dataclass(frozen=True, eq=False)
class OpenTokenizer:
    """A tokenizer ready for batches.

    `special_tokens` are the named ones that templates print (`bos_token`, ...); `end_tokens` the texts of the model's end
    tokens, the tokenizer's own `eos_token` first; `templates` by name; `engine` says how it was opened and why; `file` is
    the JSON that it was read from, until `forget`.
    """

    backend: Tokenizer
    special_tokens: dict[str, str]
    end_tokens: tuple[str, ...]
    templates: dict[str, str]
    engine: str
    file: bytes | None = None

    @property
    def pads_with_end(self) -> bool:
        """Whether the padding token is an end token, or there is none (so that others pad with the end token)."""
        pad = self.special_tokens.get("pad_token")
        return pad is None or pad in self.end_tokens

    @cached_property
    def special(self) -> dict[str, AddedToken]:
        """The tokens flagged special, by text: they are what text can forge."""
        return {token.content: token for token in self.backend.get_added_tokens_decoder().values() if token.special}

    @cached_property
    def literal(self) -> Tokenizer:
        """The same tokenizer, to which special tokens are ordinary text; other added tokens still match."""
        copy = Tokenizer.from_str(self.backend.to_str())
        copy.no_truncation()
        copy.no_padding()
        copy.encode_special_tokens = True
        return copy

    @cached_property
    def layout(self) -> dict[str, Any]:
        """The tokenizer's JSON without its vocabulary."""
        return {name: self.whole.get(name) for name in ("normalizer", "pre_tokenizer", "decoder", "added_tokens")}

    @property
    def raw(self) -> bytes:
        """The tokenizer's JSON."""
        return self.backend.to_str().encode() if self.file is None else self.file

    @cached_property
    def whole(self) -> dict[str, Any]:
        """The tokenizer's JSON read, without truncation and padding."""
        found: dict[str, Any] = orjson.loads(self.raw)
        return found | {"truncation": None, "padding": None}

    def forget(self) -> None:
        """Keeps no more than what rendering needs: a vocabulary as Python objects takes a hundred megabytes."""
        _ = self.layout
        self.__dict__.pop("whole", None)
        object.__setattr__(self, "file", None)

    def id_of(self, token: str) -> int:
        """The id of a token's text; TemplateError when the vocabulary lacks it."""
        found = self.backend.token_to_id(token)
        if found is None:
            raise TemplateError(f"the tokenizer has no token {token!r}")
        return int(found)


READY, READY_BACKEND = "opened_tokenizer.json", "opened_backend.json"
"""A tokenizer that only `AutoTokenizer` opens rightly, as it came out: its names and templates, and its own JSON."""


def open_tokenizer(folder: Path) -> OpenTokenizer:
    """The tokenizer of a folder that `AutoTokenizer.from_pretrained` can load; ids are the same as its ids."""
    config = _json(folder / "tokenizer_config.json")
    file: bytes | None
    if (folder / READY).exists():
        ready, file = _json(folder / READY), (folder / READY_BACKEND).read_bytes()
        backend, special, templates = Tokenizer.from_buffer(file), ready["special_tokens"], ready["templates"]
        engine = "transformers.AutoTokenizer, as kept from the first time"
    elif (why := _why_not_as_is(folder, config)) is None:
        file = (folder / "tokenizer.json").read_bytes()
        backend = Tokenizer.from_buffer(file)
        special, templates = named_tokens(config), template_in(folder, config)
        engine = "tokenizers: tokenizer.json is used as it is"
    else:
        file = None
        backend, special, templates = _through_transformers(folder)
        engine = f"transformers.AutoTokenizer: {why}"
    backend.no_truncation()
    backend.no_padding()
    return OpenTokenizer(backend, special, _end_tokens(folder, backend, special), templates, engine, file)


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens of a tokenizer_config.json as texts.

    >>> named_tokens({"eos_token": {"content": "</s>", "lstrip": False}, "bos_token": None, "model_max_length": 5})
    {'eos_token': '</s>'}
    """
    found = {name: config[name] for name in NAMED if config.get(name) is not None}
    return {name: str(value["content"] if isinstance(value, dict) else value) for name, value in found.items()}


def _why_not_as_is(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Why tokenizer.json alone might give other ids than AutoTokenizer; None when it cannot."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return "the folder has no tokenizer.json"
    kind = config.get("tokenizer_class")
    if kind not in AS_IS_CLASSES:
        return f"class {kind} may rebuild the tokenizer"
    if config.get("split_special_tokens") or (folder / "added_tokens.json").exists():
        return "it splits special tokens or adds tokens from another file"
    added = {token["content"]: token for token in _json(path).get("added_tokens", [])}
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    for text in [*named_tokens(config).values(), *(e["content"] if isinstance(e, dict) else e for e in extra)]:
        if not added.get(text, {}).get("special"):
            return f"{text!r} becomes special only through the configuration"
    for token in (config.get("added_tokens_decoder") or {}).values():
        known = added.get(token["content"])
        if known is None or any(known.get(flag) != token.get(flag, False) for flag in ("special", "lstrip", "rstrip")):
            return f"{token['content']!r} is changed by the configuration"
    return None


def _through_transformers(folder: Path) -> tuple[Tokenizer, dict[str, str], dict[str, str]]:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (ImportError, ValueError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise TemplateError(
            f"{folder}: transformers cannot open this tokenizer: {first} (SentencePiece models need `pip install sentencepiece`)"
        ) from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise TemplateError(f"{folder}: {type(loaded).__name__} runs in Python only; a tokenizer with a tokenizer.json is needed")
    template = loaded.chat_template
    templates = {"default": template} if isinstance(template, str) else dict(template or {})
    return backend, dict(loaded.special_tokens_map), templates


def _end_tokens(folder: Path, backend: Tokenizer, special: Mapping[str, str]) -> tuple[str, ...]:
    """Texts of the end tokens: `eos_token`, then what generation_config.json and config.json add."""
    texts = [special["eos_token"]] if "eos_token" in special else []
    for name in ("generation_config.json", "config.json"):
        ids = _json(folder / name).get("eos_token_id")
        for token_id in ids if isinstance(ids, list) else [ids]:
            text = backend.id_to_token(token_id) if isinstance(token_id, int) else None
            if text is not None:
                texts.append(text)
    return tuple(dict.fromkeys(texts))


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    loaded: dict[str, Any] = orjson.loads(path.read_bytes())
    return loaded
