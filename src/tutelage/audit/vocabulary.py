"""What a tokenizer's files and the facts of renderings tell the audit: special tokens, stops, the template's markers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.audit.tokens import Vocabulary

_MARKER = re.compile(r"<\|[^|<>\s]+\|>|</?[A-Za-z_]\w*>|\[/?[A-Z_]+\]")


@dataclass(frozen=True)
class Added:
    """The tokens that a tokenizer adds to its vocabulary, text by id; which of them are special, which swallow white space."""

    texts: Mapping[int, str]
    special: tuple[int, ...]
    greedy: tuple[int, ...]

    @classmethod
    def read(cls, folder: Path) -> Added:
        """From tokenizer.json and tokenizer_config.json; what neither names is not known."""
        tokens = {
            int(i): token for i, token in (_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}).items()
        }
        tokens |= {token["id"]: token for token in _json(folder / "tokenizer.json").get("added_tokens", [])}
        return cls(
            {i: token["content"] for i, token in tokens.items()},
            tuple(i for i, token in tokens.items() if token.get("special")),
            tuple(i for i, token in tokens.items() if token.get("lstrip") or token.get("rstrip")),
        )


def vocabulary(folder: Path, added: Added, facts: Sequence[Mapping[str, Any]]) -> Vocabulary:
    """What ends an answer, by id: the stops that rendering found, or the tokens that the last of a stop's text can be."""
    ends = sorted({int(i) for fact in facts for i in fact.get("stop_ids", ())})
    if not ends:
        ends = _ids_ending(folder, {str(fact["stop_text"]) for fact in facts if fact.get("stop_text")})
    return Vocabulary.of(added.special, greedy=added.greedy, ends=ends or None)


def _ids_ending(folder: Path, stops: Iterable[str]) -> list[int]:
    """The ids that a stop can end with: its last characters, or these and the first of what follows."""
    from tokenizers import Tokenizer

    wanted = [stop.rstrip() for stop in stops]
    if not wanted or not (folder / "tokenizer.json").exists():
        return []
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = tokenizer.decode_batch([[i] for i in range(tokenizer.get_vocab_size())], skip_special_tokens=False)
    return [i for i, text in enumerate(texts) if any(_can_end(stop, text.strip()) for stop in wanted)]


def _can_end(stop: str, token: str) -> bool:
    """Whether a token that covers the last character of a stop could be this one.

    >>> [_can_end("<|end|>", token) for token in ("|>", "><|", "<|", "")]
    [True, True, False, False]
    """
    return any(stop.endswith(token[:length]) for length in range(1, len(token) + 1))


def template_facts(folder: Path, facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What renderings say of the template: keeps_prefix, appends_header, split_markers, pad_is_end, and the text of text stops.

    Renderings that say nothing of markers or padding are made up for by the generation prompt and the tokenizer's files.
    """
    described: dict[str, Any] = {}
    for fact in facts:
        described |= fact.get("template") or {}
    known = next((fact["pad_is_end"] for fact in facts if "pad_is_end" in fact), None)
    markers = described.get("split_markers")
    return {
        "keeps_prefix": described.get("keeps_prefix"),
        "appends_header": described.get("appends_header"),
        "split_markers": split_markers(folder, _printed(facts)) if markers is None else list(markers),
        "pad_is_end": _pads_with_end(folder) if known is None else bool(known),
        "text_stops": sorted({str(f["stop_text"]) for f in facts if f.get("stop_text") and not f.get("stop_ids")}),
    }


def _printed(facts: Sequence[Mapping[str, Any]]) -> str:
    return "".join(str(fact.get(name) or "") for fact in facts for name in ("generation_prompt", "stop_text"))


def split_markers(folder: Path, printed: str) -> list[str]:
    """The markers in what a template prints around turns (`<|eot_id|>`, `[INST]`, `<s>`) that the vocabulary has no token for."""
    path = folder / "tokenizer.json"
    found = dict.fromkeys(_MARKER.findall(printed))
    if not found or not path.exists():
        return []
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    return [marker for marker in found if tokenizer.token_to_id(marker) is None]


def _pads_with_end(folder: Path) -> bool:
    config = _json(folder / "tokenizer_config.json")
    pad, end = (_text(config.get(name)) for name in ("pad_token", "eos_token"))
    return pad is not None and pad == end


def _text(token: Any) -> str | None:
    text = token["content"] if isinstance(token, dict) else token
    return None if text is None else str(text)


def _json(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return loaded
