"""Texts to ids: `tokenizers` is the reference, a faster engine is used exactly where it is proved equal.

    gigatoken    the whole text at once, for the vocabularies that it can read
    by digits    gigatoken on the stretches between digits, for vocabularies that set every digit apart first

Proof is comparison: on texts made to be difficult, on a sample of every source, and on a few texts of every batch. At the
first difference the reference takes over, from the first record on. Bytes that a vocabulary cannot write go to the reference.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from itertools import chain
from typing import Any, Protocol

import numpy as np
import orjson
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from tutelage.errors import MissingExtra, TemplateError
from tutelage.records import Int32, Int64
from tutelage.render.tokenizer import OpenTokenizer

CHUNK_TEXTS = 4096
"""Texts per call of `tokenizers`: fewer leave cores idle, more cost memory and time."""
SAMPLE, SAMPLE_BYTES = 64, 8_000
"""Texts of every source's first batch that are compared with the reference, and about how many bytes of them; two at least."""
LATER, LATER_BYTES = 4, 2_000
"""The same of every later batch; one at least."""


@dataclass(frozen=True)
class Texts:
    """A batch of texts end to end: `data` their UTF-8 bytes, text i is `offsets[i] : offsets[i + 1]` of them."""

    texts: Sequence[str]
    data: bytes
    offsets: Int64

    @classmethod
    def of(cls, texts: Sequence[str]) -> Texts:
        """The bytes and offsets of some texts."""
        raw = [text.encode() for text in texts]
        return cls(texts, b"".join(raw), _offsets([len(each) for each in raw]))

    def __len__(self) -> int:
        return len(self.texts)


class Engine(Protocol):
    """Encodes batches; `name` says with what."""

    name: str

    def encode(self, batch: Texts) -> tuple[Int32, Int64]:
        """All ids end to end, and how many each text has: those of `tokenizer.encode(text, add_special_tokens=False)`."""


class EngineDiffers(Exception):
    """A fast engine gave other ids than the reference."""


@dataclass
class Reference:
    """`tokenizers` itself."""

    backend: Tokenizer
    name: str = "tokenizers"

    def encode(self, batch: Texts) -> tuple[Int32, Int64]:
        """Ids and their number per text."""
        rows: list[list[int]] = []
        for first in range(0, len(batch), CHUNK_TEXTS):
            chunk = list(batch.texts[first : first + CHUNK_TEXTS])
            rows += [encoding.ids for encoding in self.backend.encode_batch_fast(chunk, add_special_tokens=False)]
        return _flat(rows)


class Gigatoken:
    """gigatoken on a tokenizer's JSON, in which bytes that the vocabulary lacks have got ids of their own, never let out."""

    def __init__(self, layout: dict[str, Any], reference: Reference) -> None:
        import gigatoken

        self.name = f"gigatoken {metadata.version('gigatoken')}"
        self.reference = reference
        self.limit, added = _with_all_bytes(layout)
        self._fast = gigatoken.Tokenizer.from_json(orjson.dumps(_added(layout, added) if added else layout))

    def encode(self, batch: Texts) -> tuple[Int32, Int64]:
        """Ids and their number per text."""
        ids, counts = self._encode(batch.data, batch.offsets)
        return self._mended(batch, ids, counts, np.zeros(len(batch), bool))

    def _encode(self, data: bytes, offsets: Int64) -> tuple[Int32, Int64]:
        import awkward
        from awkward.contents import ListOffsetArray, NumpyArray

        content = NumpyArray(np.frombuffer(data, np.uint8), parameters={"__array__": "byte"})
        array = ListOffsetArray(awkward.index.Index64(offsets), content, parameters={"__array__": "bytestring"})
        made = self._fast.encode_batch(awkward.Array(array)).layout.to_packed()
        return np.asarray(made.content.data).view(np.int32), np.diff(np.asarray(made.offsets.data)).astype(np.int64)

    def _mended(self, batch: Texts, ids: Int32, counts: Int64, doubtful: np.ndarray) -> tuple[Int32, Int64]:
        """The result with the doubtful texts, and those with an id that the vocabulary has not, done by the reference."""
        strange = np.flatnonzero(ids >= self.limit)
        if len(strange):
            doubtful[np.searchsorted(_offsets(counts), strange, "right") - 1] = True
        which = np.flatnonzero(doubtful)
        if not len(which):
            return ids, counts
        new_ids, new_counts = self.reference.encode(Texts.of([batch.texts[i] for i in which.tolist()]))
        return _replaced(ids, counts, which, new_ids, new_counts)


class ByDigits(Gigatoken):
    """For a pre-tokenizer that first sets every digit apart: so do we, and each stretch is a text of its own."""

    def __init__(self, layout: dict[str, Any], reference: Reference) -> None:
        super().__init__({**layout, "pre_tokenizer": layout["pre_tokenizer"]["pretokenizers"][1]}, reference)
        self.name += ", digits set apart"

    def encode(self, batch: Texts) -> tuple[Int32, Int64]:
        """Ids and their number per text."""
        data = np.frombuffer(batch.data, np.uint8)
        is_digit = (data - np.uint8(48)) < 10
        begins = np.zeros(len(data) + 1, bool)
        begins[:-1] = is_digit
        begins[1:] |= is_digit
        numbers, doubtful = _beyond_ascii(batch)
        for number in numbers:
            for start in _places(batch.data, number):
                begins[[start, start + len(number)]] = True
        begins[batch.offsets] = True
        edges = np.flatnonzero(begins)
        ids, counts = self._encode(batch.data, edges)
        sums = _offsets(counts)[np.searchsorted(edges, batch.offsets)]
        return self._mended(batch, ids, np.diff(sums), doubtful)


def _beyond_ascii(batch: Texts) -> tuple[list[bytes], np.ndarray]:
    """The digits and numbers beyond ASCII that occur, and which texts hold a character that this Python does not know."""
    doubtful = np.zeros(len(batch), bool)
    if batch.data.isascii():
        return [], doubtful
    data = np.frombuffer(batch.data, np.uint8)
    letters = set(data[data > 127].tobytes().decode())  # without the ASCII bytes between them, characters stay whole
    kinds = {letter: unicodedata.category(letter) for letter in letters}
    unknown = {letter for letter, kind in kinds.items() if kind == "Cn"}
    for i, text in enumerate(batch.texts) if unknown else ():
        doubtful[i] = not text.isascii() and not unknown.isdisjoint(text)
    return [letter.encode() for letter, kind in kinds.items() if kind in ("Nd", "Nl", "No")], doubtful


def _places(data: bytes, word: bytes) -> Iterator[int]:
    at = data.find(word)
    while at >= 0:
        yield at
        at = data.find(word, at + len(word))


def _with_all_bytes(layout: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """The number of ids, and new ids for bytes that a byte-level vocabulary lacks."""
    vocabulary: dict[str, int] = layout["model"]["vocab"]
    limit = 1 + max(chain(vocabulary.values(), (token["id"] for token in layout["added_tokens"])))
    if "ByteLevel" not in str(layout["decoder"]):
        return limit, {}
    lacking = [letter for letter in sorted(ByteLevel.alphabet()) if letter not in vocabulary]
    return limit, {letter: limit + k for k, letter in enumerate(lacking)}


def _added(layout: dict[str, Any], tokens: dict[str, int]) -> dict[str, Any]:
    return {**layout, "model": {**layout["model"], "vocab": {**layout["model"]["vocab"], **tokens}}}


def _sets_digits_apart(layout: dict[str, Any]) -> bool:
    """Whether the pre-tokenizer is: each digit apart, then byte level; and nothing else looks across digits."""
    first = (layout["pre_tokenizer"] or {}).get("pretokenizers") or [{}]
    is_such = [part.get("type") for part in first] == ["Digits", "ByteLevel"] and bool(first[0].get("individual_digits"))
    free = not any(c.isnumeric() for token in layout["added_tokens"] for c in token["content"])
    return is_such and free and layout["normalizer"] is None and not first[1].get("add_prefix_space")


@dataclass
class Chosen:
    """The engine in use, why it is the one, and how many texts were compared with the reference."""

    engine: Engine
    reference: Reference
    why: str
    num_compared: int = 0

    @property
    def is_fast(self) -> bool:
        """Whether it is another than the reference."""
        return self.engine is not self.reference

    def facts(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {"name": self.engine.name, "why": self.why, "texts_compared": self.num_compared}

    def encode(self, batch: Texts) -> tuple[Int32, Int64]:
        """Ids and their number per text; EngineDiffers when one of the texts compared has others."""
        ids, counts = self.engine.encode(batch)
        if self.is_fast and len(batch):
            least, most, num_bytes = (1, LATER, LATER_BYTES) if self.num_compared else (2, SAMPLE, SAMPLE_BYTES)
            num = max(least, min(most, num_bytes * len(batch) // max(len(batch.data), 1)))
            self._compare(batch, ids, counts, np.unique(np.linspace(0, len(batch) - 1, num).astype(int)))
        return ids, counts

    def _compare(self, batch: Texts, ids: Int32, counts: Int64, which: Int64) -> None:
        starts = _offsets(counts)
        for i, expected in zip(which.tolist(), _rows(self.reference, [batch.texts[i] for i in which.tolist()]), strict=True):
            if ids[starts[i] : starts[i + 1]].tolist() != expected:
                raise EngineDiffers(f"other ids for {batch.texts[i][:80]!r}")
        self.num_compared += len(which)


def choose_engine(tokenizer: OpenTokenizer, *, wanted: str = "auto") -> Chosen:
    """The fastest engine that gives the ids of `tokenizers` on difficult texts. `wanted`: auto, tokenizers or gigatoken.

    MissingExtra when gigatoken is wanted and not installed; TemplateError when it is wanted and not exact.
    """
    reference = Reference(tokenizer.backend, f"tokenizers {metadata.version('tokenizers')}")
    if wanted == "tokenizers":
        return Chosen(reference, reference, "as the recipe says")
    try:
        engine = _proved(tokenizer)
    except ImportError:
        if wanted == "gigatoken":
            raise MissingExtra("gigatoken", "fast") from None
        return Chosen(reference, reference, "no faster engine is installed; the extra `fast` brings one")
    if isinstance(engine, str):
        return _fallen_back(reference, wanted, engine)
    return Chosen(engine, reference, "equal ids on difficult texts and on samples of the data")


@lru_cache(maxsize=2)
def _proved(tokenizer: OpenTokenizer) -> Engine | str:
    """The fast engine of this tokenizer, or why there is none; ImportError where it is not installed."""
    reference = Reference(tokenizer.backend)
    try:
        engine = _fast(tokenizer.whole, reference)
    except EngineDiffers as error:
        return str(error)
    texts = Texts.of(difficult_texts(sorted(tokenizer.special)))
    try:
        ids, counts = engine.encode(texts)
        Chosen(engine, reference, "")._compare(texts, ids, counts, np.arange(len(texts)))
    except EngineDiffers as error:
        return f"{engine.name}: {error}"
    return engine


def _fallen_back(reference: Reference, wanted: str, why: str) -> Chosen:
    if wanted == "gigatoken":
        raise TemplateError(f"render.tokenizer_engine: gigatoken is not exact for this tokenizer ({why}); choose `auto`")
    return Chosen(reference, reference, why)


def _fast(layout: dict[str, Any], reference: Reference) -> Engine:
    """Gigatoken for this tokenizer; EngineDiffers with its reason when it refuses."""
    try:
        return ByDigits(layout, reference) if _sets_digits_apart(layout) else Gigatoken(layout, reference)
    except ImportError:
        raise
    except BaseException as error:  # a refusal in Rust is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        first = str(error).strip().partition("\n")[0]
        raise EngineDiffers(f"gigatoken refuses this tokenizer: {first}") from None


def difficult_texts(special: Sequence[str] = ()) -> list[str]:
    """Texts at which tokenizers part: white space, digits, contractions, scripts, control characters, special tokens.

    >>> len(difficult_texts(["<s>"])) > 200
    True
    """
    spaces = [
        *(" " * n for n in (1, 2, 3, 7, 16, 40)),
        "\n",
        "\n\n",
        "\n \n",
        "\t",
        "\r\n",
        " \n",
        "\n ",
        "\u00a0",
        "\u3000",
        "\u200b",
    ]
    words = ["a", "The", "don't", "I'LL", "we've", "x'", "naïve", "ÀÉ", "straße", "e\u0301", "你好世界", "こんにちは", "한국어"]
    words += ["שלום", "مرحبا", "हिन्दी", "ไทย", "😀", "👩‍👩‍👧", "🇫🇷", "\u202eabc\u202c", "ﬁ", "Ⅷ", "½", "²", "٣", "１２", "一二三"]
    words += ["123", "1234567", "3.14", "1,000", "v2.0", "0x1F", "a1b2", "_x_", "foo_bar", "fooBar", "<b>", "{}", "[[", "```"]
    words += ["//", "...", "!!!", *map(chr, range(33)), *"\x7f\x80\x85\u2028\ufeff\ufffd\U0010ffff\ue000"]
    texts = [*spaces, *words, ""]
    texts += [f"{a}{space}{b}" for a, b in zip(words, words[7:], strict=False) for space in (" ", "\n", "  ", "")]
    texts += [f"{space}{word}{space}" for word, space in zip(words, spaces * 9, strict=False)]
    texts += ["a" * 500, "1" * 300, " " * 300, "\n" * 200, "ab " * 200, "é" * 200, "的" * 300, "=" * 257, "".join(words)]
    for token in list(special)[:64]:
        texts += [token, f"a{token}b", f" {token} ", f"\n{token}\n\n x", f"{token}{token}", token[:-1], f"1{token}2"]
    return texts


def _rows(reference: Reference, texts: Sequence[str]) -> list[list[int]]:
    ids, counts = reference.encode(Texts.of(texts))
    return [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])]


def _flat(rows: Sequence[list[int]]) -> tuple[Int32, Int64]:
    counts = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(chain.from_iterable(rows), np.int32, int(counts.sum())), counts


def _offsets(lengths: Any) -> Int64:
    out = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=out[1:])
    return out


def _replaced(ids: Int32, counts: Int64, which: Int64, new_ids: Int32, new_counts: Int64) -> tuple[Int32, Int64]:
    """The ids with those of some texts exchanged.

    >>> _replaced(np.array([1, 2, 3, 4], np.int32), np.array([2, 1, 1]), np.array([1]), np.array([8, 9], np.int32), np.array([2]))
    (array([1, 2, 8, 9, 4], dtype=int32), array([2, 2, 1]))
    """
    old, new = _offsets(counts), _offsets(new_counts)
    parts, at = [], 0
    for k, i in enumerate(which.tolist()):
        parts += [ids[at : old[i]], new_ids[new[k] : new[k + 1]]]
        at = old[i + 1]
    counts = counts.copy()
    counts[which] = new_counts
    return np.concatenate([*parts, ids[at:]]), counts
