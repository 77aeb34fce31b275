"""Texts to ids with exact byte positions, and positions plus cells to one kind and turn per token.

Positions come from the vocabulary itself where it can be read as bytes: token i covers as many bytes as its own text
has, so cumulative lengths are exact spans, and comparing those bytes with the text proves in one stroke that every token
decodes to what stands there. Where that cannot be (a tokenizer that rewrites text), the tokenizer's own offsets serve and
each learned span is decoded and compared instead.

Arrays of a batch are flat: N tokens, B bytes, E examples. Positions count UTF-8 bytes from the start of the batch.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np

from tutelage.compiled import kernel
from tutelage.records import Int32, Int64, Kind, UInt8
from tutelage.render.cells import Cells
from tutelage.render.engines import Chosen, Reference, Texts
from tutelage.render.kernels import PADDING, WORD, find_ids, is_worth_a_kernel, label_cells, walk
from tutelage.render.tokenizer import OpenTokenizer

BATCH_TEXTS = 4096
"""Texts that are encoded together: fewer leave cores idle, more cost memory and time."""

_PRIORITY = np.array([0, 1, 1, 4, 4, 4, 1, 3], np.uint8)
"""By kind: who gets a token that straddles a border. What the model writes, then its stop, marks, what it reads, scaffold."""
_MARK_PRIORITY = 2


@dataclass
class Encoded:
    """A batch of encoded texts: ids, starts, ends are (N,); `num_tokens` and `num_bytes` are (E,); `is_proved` (E,) bool."""

    ids: Int32
    starts: Int64
    ends: Int64
    num_tokens: Int64
    num_bytes: Int64
    is_proved: np.ndarray

    @property
    def token_offsets(self) -> Int64:
        """First token of every example, and the total."""
        return _offsets(self.num_tokens)

    @property
    def byte_offsets(self) -> Int64:
        """First byte of every example, and the total."""
        return _offsets(self.num_bytes)


@dataclass
class Labelled:
    """Kinds and turns of a batch's tokens, the cell each went to, and how many each cell got."""

    kinds: UInt8
    turns: np.ndarray
    cell: Int64
    tokens_per_cell: Int64


def _offsets(lengths: Int64) -> Int64:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


@dataclass
class ByteTable:
    """Every token of a vocabulary as bytes: token i stands for `texts[i]`, `lengths[i]` bytes long.

    `has_dummy`: the tokenizer puts a space in front of each stretch of text between special tokens. Tokens without that
    space follow the vocabulary: token i is then `texts[size + i]`.
    """

    texts: list[bytes]
    lengths: Int64
    is_special: np.ndarray
    has_dummy: bool

    @property
    def size(self) -> int:
        """The number of ids."""
        return len(self.is_special)

    @cached_property
    def flat(self) -> tuple[UInt8, Int64]:
        """The bytes of all tokens one after another, and where each begins, with the total."""
        return np.frombuffer(b"".join(self.texts), np.uint8), _offsets(self.lengths)

    @cached_property
    def short_lengths(self) -> UInt8:
        """`lengths` up to 255, a byte each."""
        return np.minimum(self.lengths, 255).astype(np.uint8)

    @cached_property
    def words(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes 0-7 and 8-15 of every token as little-endian u64, zeros behind its end: what comparing 8 bytes at once needs."""
        data, offsets = self.flat
        _, at = _words_at(data.tobytes(), len(data))
        starts, lengths = offsets[:-1], np.diff(offsets)
        near = at[starts] & _MASKS[np.minimum(lengths, WORD)]
        return near, at[starts + np.minimum(lengths, WORD)] & _MASKS[np.clip(lengths - WORD, 0, WORD)]


def byte_table(tokenizer: OpenTokenizer) -> ByteTable | None:
    """The vocabulary as bytes, or None when the tokenizer's pieces are not plain bytes of the text."""
    layout = tokenizer.layout
    if (spell := _speller(layout)) is None:
        return None
    vocabulary = _vocabulary(tokenizer)
    added = {token["content"] for token in layout["added_tokens"]}
    is_byte_level = _types(layout["decoder"]) == ["ByteLevel"]
    texts = [b""] * (max(vocabulary.values(), default=-1) + 1)
    plain = [token for token in vocabulary if token not in added]
    for token, spelled in zip(plain, _spelled_together(plain) if is_byte_level else map(spell, plain), strict=True):
        texts[vocabulary[token]] = spelled
    for token in added & vocabulary.keys():
        texts[vocabulary[token]] = token.encode() if is_byte_level else spell(token)
    is_special = special_ids(tokenizer, len(texts))
    has_dummy = "Prepend" in _types(layout["normalizer"])
    if has_dummy:
        texts += [text[1:] for text in texts]
    return ByteTable(texts, np.fromiter(map(len, texts), np.int64, len(texts)), is_special, has_dummy)


def _vocabulary(tokenizer: OpenTokenizer) -> dict[str, int]:
    """The id of every token, added ones too."""
    vocabulary = tokenizer.whole["model"].get("vocab")
    if not isinstance(vocabulary, dict):
        return tokenizer.backend.get_vocab(with_added_tokens=True)
    return vocabulary | {token["content"]: token["id"] for token in tokenizer.layout["added_tokens"]}


def special_ids(tokenizer: OpenTokenizer, size: int | None = None) -> np.ndarray:
    """A boolean per id: is this token flagged special?"""
    ids = [tokenizer.id_of(text) for text in tokenizer.special]
    flags = np.zeros(size if size is not None else tokenizer.backend.get_vocab_size(with_added_tokens=True) + 1, bool)
    flags[ids] = True
    return flags


def _types(component: Any) -> list[str]:
    """The type names in a component of a tokenizer's JSON, sequences opened."""
    if component is None:
        return []
    inner = component.get("normalizers") or component.get("pretokenizers") or component.get("decoders")
    return [component["type"]] if inner is None else [name for part in inner for name in _types(part)]


def _speller(layout: dict[str, Any]) -> Callable[[str], bytes] | None:
    """How a token's text becomes bytes in this tokenizer; None when we cannot tell."""
    decoders, before = _types(layout["decoder"]), _types(layout["pre_tokenizer"])
    if "Metaspace" in before or '"add_prefix_space": true' in json.dumps(layout["pre_tokenizer"]):
        return None
    if decoders == ["ByteLevel"]:
        return _byte_spelling
    if "ByteFallback" in decoders and "Replace" in decoders:
        return _piece_spelling
    return None


def _spelled_together(tokens: Sequence[str]) -> list[bytes]:
    """All tokens of a byte-level vocabulary as bytes: one letter is one byte, so one translation serves them all."""
    try:
        data = "".join(tokens).translate(_LETTERS).encode("latin-1")
    except UnicodeEncodeError:
        return [_byte_spelling(token) for token in tokens]
    ends = list(accumulate(map(len, tokens), initial=0))
    return [data[a:b] for a, b in pairwise(ends)]


def _byte_spelling(token: str) -> bytes:
    try:
        return token.translate(_LETTERS).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


def _piece_spelling(token: str) -> bytes:
    if token.startswith("<0x") and _BYTE.fullmatch(token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def _byte_alphabet() -> dict[int, str]:
    """The letters that byte-level vocabularies write bytes with (GPT-2's `bytes_to_unicode`), to the byte as a character.

    Characters that are no such letter go where latin-1 cannot follow.
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in set(shown)]
    unknown = dict.fromkeys(hidden, "▁")
    return unknown | {b: chr(b) for b in shown} | {256 + i: chr(b) for i, b in enumerate(hidden)}


_LETTERS = _byte_alphabet()


@lru_cache(maxsize=2)
def _table_of(tokenizer: OpenTokenizer) -> ByteTable | None:
    """One table for all sources of a tokenizer."""
    return byte_table(tokenizer)


class Encoder:
    """Encodes batches of texts with one tokenizer, through the engine chosen for it (the reference, when none is given)."""

    def __init__(self, tokenizer: OpenTokenizer, engine: Chosen | None = None) -> None:
        self.tokenizer = tokenizer
        reference = Reference(tokenizer.backend)
        self.engine = engine or Chosen(reference, reference, "none other was chosen")
        self.table = _table_of(tokenizer)
        self.is_special = self.table.is_special if self.table is not None else special_ids(tokenizer)
        known = np.flatnonzero(self.is_special)
        self._special_range = (int(known[0]), int(known[-1])) if len(known) else (0, -1)

    def find_special(self, ids: Int32) -> Int64:
        """Where special tokens stand in `ids`. Most vocabularies have them together, and a range is quicker to compare."""
        low, high = self._special_range
        if is_worth_a_kernel(len(ids)):
            found: Int64 = np.empty(len(ids) // 8 + 64, np.int64)
            if (count := kernel(find_ids)(ids, low, high, self.is_special, found)) > len(found):
                found = np.empty(count, np.int64)
                kernel(find_ids)(ids, low, high, self.is_special, found)
            return found[: int(count)]
        places = np.flatnonzero((ids >= low) & (ids <= high))
        found = places[self.is_special[ids[places]]]
        return found

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids and byte positions of whole texts; ids are those of `tokenizer(text, add_special_tokens=False)`."""
        return self.encode_batch(Texts.of(texts))

    def encode_batch(self, batch: Texts) -> Encoded:
        """The same for texts that are already bytes end to end; EngineDiffers when a fast engine turns out not to be exact."""
        num_bytes = np.diff(batch.offsets)
        if self.table is None:
            return self._by_offsets(list(batch.texts), num_bytes)
        ids, num_tokens = self.engine.encode(batch)
        encoded = _by_bytes(self.table, ids, num_tokens, batch)
        unproved = np.flatnonzero(~encoded.is_proved)
        if len(unproved):
            again = self._by_offsets([batch.texts[i] for i in unproved.tolist()], num_bytes[unproved])
            _patch(encoded, unproved, again)
        return encoded

    def encode_literal(self, text: str, cells: Cells) -> Encoded:
        """One text in which only the scaffold's special tokens count: those spelled inside messages are ordinary text."""
        stretches, ids_at = _stretches(text, cells, _special_words(self.tokenizer)), self.tokenizer.id_of
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, end, word in stretches:
            if word:
                ids.append(ids_at(word))
                offsets.append((start, end))
            elif end > start:
                encoding = self.tokenizer.literal.encode(text[start:end], add_special_tokens=False)
                ids += encoding.ids
                offsets += [(start + a, start + b) for a, b in encoding.offsets]
        num_bytes = np.array([len(text.encode())], np.int64)
        return _from_offsets([text], [ids], [offsets], num_bytes)

    def decodes(self, ids: Int32, text: str) -> bool:
        """Whether these ids read as this text, up to Unicode normalisation and a space in front that tokenizers add or eat."""
        decoded = self.tokenizer.backend.decode(ids.tolist(), skip_special_tokens=False)
        return _plain(decoded) == _plain(text)

    def _by_offsets(self, texts: Sequence[str], num_bytes: Int64) -> Encoded:
        encodings = self.tokenizer.backend.encode_batch(list(texts), add_special_tokens=False)
        return _from_offsets(texts, [e.ids for e in encodings], [e.offsets for e in encodings], num_bytes)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text.removeprefix(" "))


def _by_bytes(table: ByteTable, ids: Int32, num_tokens: Int64, batch: Texts) -> Encoded:
    """Positions from token lengths, proved by comparing the tokens' bytes with the texts'.

    >>> table = ByteTable([b"a", b"bc"], np.array([1, 2]), np.zeros(2, bool), False)
    >>> made = _by_bytes(table, np.array([0, 1, 1], np.int32), np.array([2, 1]), Texts.of(["abc", "bc"]))
    >>> made.starts, made.ends, made.is_proved
    (array([0, 1, 3]), array([1, 3, 5]), array([ True,  True]))
    """
    spelled = ids + table.size * _dummies(table, ids, num_tokens) if table.has_dummy else ids
    how = _walk_compiled if is_worth_a_kernel(len(ids)) else _walk_arrays
    starts, ends, is_proved = how(spelled, _offsets(num_tokens), table, batch)
    return Encoded(ids, starts, ends, num_tokens, np.diff(batch.offsets), is_proved)


def _walk_arrays(ids: np.ndarray, first: Int64, table: ByteTable, batch: Texts) -> tuple[Int64, Int64, np.ndarray]:
    """The walk as array operations."""
    lengths = table.lengths[ids].astype(np.int64)
    ends = np.cumsum(lengths, dtype=np.int64)
    sums = np.concatenate([[0], ends])[first]
    is_proved = np.diff(sums) == np.diff(batch.offsets)
    # An example of another length shifts all that follow: move each to where its text begins.
    ends += np.repeat(batch.offsets[:-1] - sums[:-1], np.diff(first))
    starts = ends - lengths
    wrong = _differing(table, ids, starts, lengths, batch.data)
    is_proved[np.searchsorted(first, wrong, "right") - 1] = False
    return starts, ends, is_proved


def _walk_compiled(ids: np.ndarray, first: Int64, table: ByteTable, batch: Texts) -> tuple[Int64, Int64, np.ndarray]:
    """The walk as a kernel: ten times as fast."""
    starts, ends, is_proved = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64), np.empty(len(batch), bool)
    tables = (table.short_lengths, *table.words, *table.flat)
    kernel(walk)(ids, first, *tables, *_words_at(batch.data, int(batch.offsets[-1])), batch.offsets, starts, ends, is_proved)
    return starts, ends, is_proved


def _words_at(data: bytes, end: int) -> tuple[UInt8, np.ndarray]:
    """The bytes, and the eight bytes from each place up to `end` on as one number."""
    padded = data if len(data) >= end + PADDING else data + b"\0" * PADDING
    return np.frombuffer(padded, np.uint8), np.ndarray((len(padded) - WORD + 1,), "<u8", padded, strides=(1,))


def _differing(table: ByteTable, ids: np.ndarray, starts: Int64, lengths: Int64, data: bytes) -> Int64:
    """The tokens whose bytes are not those of the data at their place, eight bytes compared at a time."""
    _, at = _words_at(data, len(data))
    top = len(data)
    near, far = table.words
    starts = np.clip(starts, 0, top)
    wrong = (at[starts] & _MASKS[np.minimum(lengths, WORD)]) != near[ids]
    long = np.flatnonzero(lengths > WORD)
    if len(long):
        rest = np.minimum(lengths[long] - WORD, WORD)
        wrong[long] |= (at[np.minimum(starts[long] + WORD, top)] & _MASKS[rest]) != far[ids[long]]
        for i in long[lengths[long] > 2 * WORD].tolist():
            wrong[i] |= data[starts[i] : starts[i] + lengths[i]] != table.texts[ids[i]]
    return np.flatnonzero(wrong)


_MASKS = np.array([(1 << (8 * n)) - 1 for n in range(WORD + 1)], np.uint64)


def _dummies(table: ByteTable, ids: Int32, num_tokens: Int64) -> Int64:
    """1 for each token that begins with a space which is not in the text, else 0."""
    out = np.zeros(len(ids), np.int64)
    if table.has_dummy and len(ids):
        follows = np.concatenate([[True], table.is_special[ids[:-1]]])
        follows[_offsets(num_tokens)[:-1][num_tokens > 0]] = True
        out[follows & ~table.is_special[ids]] = 1
    return out


def _from_offsets(
    texts: Sequence[str], ids: Sequence[list[int]], offsets: Sequence[list[tuple[int, int]]], num_bytes: Int64
) -> Encoded:
    """Positions from character offsets; nothing is proved yet."""
    num_tokens = np.fromiter(map(len, ids), np.int64, len(ids))
    bases = _offsets(num_bytes)
    spans = np.zeros((int(num_tokens.sum()), 2), np.int64)
    at = 0
    for text, pairs, base in zip(texts, offsets, bases[:-1].tolist(), strict=True):
        if pairs:
            own = np.array(pairs, np.int64)
            spans[at : at + len(pairs)] = (own if text.isascii() else _byte_positions(text)[own]) + base
            np.maximum.accumulate(spans[at : at + len(pairs), 0], out=spans[at : at + len(pairs), 0])
        at += len(pairs)
    flat = np.fromiter(chain.from_iterable(ids), np.int32, len(spans))
    return Encoded(
        flat, spans[:, 0].copy(), np.maximum(spans[:, 0], spans[:, 1]), num_tokens, num_bytes, np.zeros(len(ids), bool)
    )


def _byte_positions(text: str) -> Int64:
    """The byte position of every character, and the total."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return _offsets(1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000).astype(np.int64))


def _patch(encoded: Encoded, which: Int64, again: Encoded) -> None:
    """Overwrites positions of some examples with those that offsets gave; the ids are the same."""
    assert np.array_equal(encoded.num_tokens[which], again.num_tokens), "the tokenizer gave two different results for one text"
    there, here = encoded.token_offsets, again.token_offsets
    for k, i in enumerate(which.tolist()):
        move = encoded.byte_offsets[i] - again.byte_offsets[k]
        encoded.starts[there[i] : there[i + 1]] = again.starts[here[k] : here[k + 1]] + move
        encoded.ends[there[i] : there[i + 1]] = again.ends[here[k] : here[k + 1]] + move


def cells_in_bytes(text: str, cells: Cells) -> list[int]:
    """The ends of a text's cells in UTF-8 bytes."""
    return cells.ends if text.isascii() else _byte_positions(text)[cells.ends].tolist()


def label(encoded: Encoded, cell_ends: Int64, cell_kinds: UInt8, cell_turns: np.ndarray) -> Labelled:
    """One kind and turn per token. A token that straddles a border goes to the side that the model would have to write.

    Cells partition the batch's bytes: cell c ends before byte `cell_ends[c]`.

    >>> made = Encoded(np.arange(3), np.array([0, 2, 5]), np.array([2, 5, 6]), np.array([3]), np.array([6]), np.array([True]))
    >>> out = label(made, np.array([3, 5, 6]), np.array([0, 3, 7], np.uint8), np.array([-1, 1, 1], np.int16))
    >>> out.kinds, out.turns, out.tokens_per_cell           # bytes 0-1, 2-4, 5: the second token straddles byte 3
    (array([0, 3, 7], dtype=uint8), array([-1,  1,  1], dtype=int16), array([1, 1, 1]))
    """
    how = _label_compiled if is_worth_a_kernel(len(encoded.ids)) else label_arrays
    return how(encoded, cell_ends, cell_kinds, cell_turns)


def priorities(cell_kinds: UInt8, cell_turns: np.ndarray) -> UInt8:
    """Who gets a token that straddles a border, by cell."""
    priority: UInt8 = _PRIORITY[cell_kinds]
    priority[(cell_kinds == Kind.SCAFFOLD) & (cell_turns >= 0)] = _MARK_PRIORITY
    return priority


def _label_compiled(encoded: Encoded, cell_ends: Int64, cell_kinds: UInt8, cell_turns: np.ndarray) -> Labelled:
    num = len(encoded.ids)
    made = Labelled(np.empty(num, np.uint8), np.empty(num, np.int16), np.empty(num, np.int64), np.zeros(len(cell_ends), np.int64))
    turns = cell_turns.astype(np.int16, copy=False)
    cells = (cell_ends, cell_kinds, turns, priorities(cell_kinds, turns))
    kernel(label_cells)(encoded.starts, encoded.ends, *cells, made.kinds, made.turns, made.cell, made.tokens_per_cell)
    return made


def label_arrays(encoded: Encoded, cell_ends: Int64, cell_kinds: UInt8, cell_turns: np.ndarray) -> Labelled:
    """`label` as array operations."""
    starts_of_cells = np.concatenate([np.zeros(1, np.int64), cell_ends[:-1]])
    first = np.searchsorted(encoded.starts, starts_of_cells, "left")
    per_cell = np.diff(np.concatenate([first, [len(encoded.ids)]]))
    cell = np.repeat(np.arange(len(cell_ends)), per_cell)
    before = first - 1
    straddles = (
        np.flatnonzero((before >= 0) & (encoded.ends[np.maximum(before, 0)] > starts_of_cells)) if len(cell) else first[:0]
    )
    if len(straddles):
        priority = priorities(cell_kinds, cell_turns)
        order = straddles[np.argsort(priority[straddles], kind="stable")]
        tokens = before[order]
        wins = priority[order] > priority[cell[tokens]]
        cell[tokens[wins]] = order[wins]
    counts = np.bincount(cell, minlength=len(cell_ends))
    return Labelled(cell_kinds[cell], cell_turns[cell], cell, counts)


def _special_words(tokenizer: OpenTokenizer) -> re.Pattern[str]:
    """Matches special tokens as the tokenizer does, with the white space that they swallow; group 1 is the token."""
    words = sorted(tokenizer.special.values(), key=lambda token: -len(token.content))
    space = {True: r"\s*", False: ""}
    parts = [f"{space[w.lstrip]}(?:{re.escape(w.content)}){space[w.rstrip]}" for w in words]
    return re.compile("|".join(parts) if parts else r"(?!)")


def _stretches(text: str, cells: Cells, words: re.Pattern[str]) -> list[tuple[int, int, str]]:
    """The text as (start, end, special token) where the scaffold writes one, and (start, end, "") elsewhere.

    >>> cells = Cells([3, 7, 10], [0, 2, 7], [-1, 0, 0], [False, True, False])
    >>> _stretches("<s>a<s></s", cells, re.compile("<s>|</s"))
    [(0, 3, '<s>'), (3, 7, ''), (7, 10, '</s')]
    """
    out: list[tuple[int, int, str]] = []
    at = 0
    for start, end in _written_by_template(cells):
        for match in words.finditer(text, start, end):
            if match.start() > at:
                out.append((at, match.start(), ""))
            out.append((match.start(), match.end(), match.group().strip()))
            at = match.end()
    if len(text) > at:
        out.append((at, len(text), ""))
    return out


def _written_by_template(cells: Cells) -> list[tuple[int, int]]:
    """The longest stretches without a character of any message."""
    runs: list[tuple[int, int]] = []
    start = 0
    for end, from_data in zip(cells.ends, cells.from_data, strict=True):
        if not from_data:
            joins = bool(runs) and runs[-1][1] == start
            runs.append((runs.pop()[0] if joins else start, end))
        start = end
    return runs
