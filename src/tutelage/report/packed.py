"""The examples of the browse page as one short block of bytes: facts about tokens only, so that the page can apply any policy.

    u32 (little-endian)   length of the header
    header                JSON: names, policies, one column per field of the examples, the page's own vocabulary
    tokens                one varint per token: its place in the page's vocabulary, frequent ones first
    runs                  varints (length, kind, turn + 1) for every stretch in which neither kind nor turn changes

The whole is deflated (zlib). A vocabulary entry is a token id *with the text that it has here*: a token that ends inside a
character has the text "", and the one that completes the character has the character.
"""

from __future__ import annotations

import codecs
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tutelage.records import LEARNED_KINDS, Int64, Kind, Rendered
from tutelage.report.look import Decode, token_texts

MARK = "mark"
"""What the page calls scaffold that belongs to a turn, its ninth kind: the model writes it, so it weighs what its answers do."""


@dataclass(frozen=True, slots=True)
class Policy:
    """A loss rule as the page applies it; `line` is the line of a recipe that says it.

    `table` (9,) is the weight of each `Kind`, then that of a mark (scaffold that belongs to a turn). `is_last_only`: of what the
    model writes, only the last turn with a learned token counts.
    """

    name: str
    line: str
    table: tuple[float, ...]
    is_last_only: bool = False


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the page needs of a tokenizer: ids to text, the bytes of one id (None when not known), and which ids are special."""

    decode: Decode
    bytes_of: Callable[[int], bytes | None]
    special: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class PlannedExample:
    """One example of the plan: `place` is its line there, `part` its number among the examples of its record, from 0."""

    place: int
    row_id: str
    part: int
    task: str
    source: str
    num_visits: int
    multiplier: float
    rendered: Rendered

    @property
    def name(self) -> str:
        """The row id; the second example of a record ends in `~2`."""
        return self.row_id + (f"~{self.part + 1}" if self.part else "")


def pack(examples: Sequence[PlannedExample], policies: Sequence[Policy], vocabulary: Vocabulary, facts: dict[str, Any]) -> bytes:
    """The deflated block. `facts` are more names for the page; `unpack` reads it back."""
    texts = [texts_of(example.rendered.ids.tolist(), vocabulary) for example in examples]
    entries, places = _entries(examples, texts)
    tokens, runs = varints(places), varints(_runs(examples))
    header = {
        **facts,
        "kinds": [*(kind.name.lower() for kind in Kind), MARK],
        "learned": [int(kind) for kind in LEARNED_KINDS],
        "policies": [[p.name, p.line, list(p.table), p.is_last_only] for p in policies],
        "examples": _columns(examples),
        "vocabulary": _spelled(entries, vocabulary),
        "num_bytes": [len(tokens), len(runs)],
    }
    head = json.dumps(header, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")
    return zlib.compress(len(head).to_bytes(4, "little") + head + tokens + runs, level=9)


def _columns(examples: Sequence[PlannedExample]) -> dict[str, list[Any]]:
    """One list per field, an entry per example; `turn_weights` is [] where every turn counts 1."""
    return {
        "name": [e.name for e in examples],
        "place": [e.place for e in examples],
        "task": [e.task for e in examples],
        "source": [e.source for e in examples],
        "visits": [e.num_visits for e in examples],
        "multiplier": [float(np.float32(e.multiplier)) for e in examples],
        "num_tokens": [len(e.rendered.ids) for e in examples],
        "num_turns": [len(e.rendered.turn_weights) for e in examples],
        "turn_weights": [[] if (w := e.rendered.turn_weights.tolist()) == [1.0] * len(w) else w for e in examples],
    }


def _entries(examples: Sequence[PlannedExample], texts: Sequence[list[str]]) -> tuple[list[tuple[int, str]], Int64]:
    """The distinct (id, text) pairs, the most frequent first, and the place of every token among them (T,)."""
    places: dict[tuple[int, str], int] = {}
    tokens = (pair for e, some in zip(examples, texts, strict=True) for pair in zip(e.rendered.ids.tolist(), some, strict=True))
    flat = np.fromiter((places.setdefault(pair, len(places)) for pair in tokens), np.int64)
    order = np.argsort(-np.bincount(flat, minlength=len(places)), kind="stable")
    rank = np.empty(len(places), np.int64)
    rank[order] = np.arange(len(places))
    pairs = list(places)
    return [pairs[i] for i in order.tolist()], rank[flat]


def _spelled(entries: Sequence[tuple[int, str]], vocabulary: Vocabulary) -> dict[str, Any]:
    """Ids, texts, places of special tokens, and the bytes of the entries whose text is not exactly theirs: {place: hex}."""
    broken = {}
    for place, (token_id, text) in enumerate(entries):
        raw = vocabulary.bytes_of(token_id)
        if raw is not None and raw != text.encode() and (not text or not _is_utf8(raw)):
            broken[place] = raw.hex(" ").upper()
    return {
        "ids": [token_id for token_id, _ in entries],
        "texts": [text for _, text in entries],
        "special": [place for place, (token_id, _) in enumerate(entries) if token_id in vocabulary.special],
        "bytes": broken,
    }


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def texts_of(ids: Sequence[int], vocabulary: Vocabulary) -> list[str]:
    """The text of every token; they join to the text of the whole.

    Read off the tokens' own bytes where these join to the tokenizer's text, because bytes also tell of a token that ends one
    character and begins another; by `token_texts` otherwise.
    """
    pieces = [vocabulary.bytes_of(i) for i in ids]
    if all(piece is not None for piece in pieces):
        texts = split_bytes([piece for piece in pieces if piece is not None])
        if "".join(texts) == vocabulary.decode(ids):
            return texts
    return token_texts(ids, vocabulary.decode)


def split_bytes(pieces: Sequence[bytes]) -> list[str]:
    r"""The text that each piece of UTF-8 completes; they join to the text of the whole.

    >>> split_bytes([b" caf", b"\xc3", b"\xa9", b"!\xe2"])
    [' caf', '', 'é', '!�']
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(piece) for piece in pieces]
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    return texts


def _runs(examples: Sequence[PlannedExample]) -> Int64:
    """(length, kind, turn + 1) of every stretch of equal kind and turn, flat."""
    out: list[int] = []
    for example in examples:
        kinds, turns = example.rendered.kinds, example.rendered.turns
        if len(kinds):
            changes = np.flatnonzero((kinds[1:] != kinds[:-1]) | (turns[1:] != turns[:-1])) + 1
            for start, end in pairwise([0, *changes.tolist(), len(kinds)]):
                out += [end - start, int(kinds[start]), int(turns[start]) + 1]
    return np.array(out, np.int64)


def varints(values: Int64) -> bytes:
    """Each value in 7-bit groups, lowest first; the high bit says that more follow.

    >>> varints(np.array([1, 127, 128, 300])).hex(" ")
    '01 7f 80 01 ac 02'
    """
    if not len(values):
        return b""
    groups = np.stack([(values >> shift) & 0x7F for shift in range(0, 35, 7)], axis=1)
    num = np.maximum(1, 5 - np.argmax(groups[:, ::-1] != 0, axis=1))
    num[(groups == 0).all(axis=1)] = 1
    place = np.arange(5)
    groups[place < num[:, None] - 1] |= 0x80
    kept: NDArray[np.uint8] = groups[place < num[:, None]].astype(np.uint8)
    return kept.tobytes()
