"""Records of one form filled together: bytes go from the texts' own buffer to their places, without a string per text.

    roles of every record --> groups of one form --> its skeleton --> where each cell's bytes come from
                                                     blank texts, forbidden words: those records go the slow way

What comes out is what filling record by record gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tutelage.compiled import kernel
from tutelage.records import Flag, Int64, UInt8
from tutelage.render.forms import EVERY, Filler, Job, Layer, particular
from tutelage.render.kernels import trim
from tutelage.render.provenance import Refusal
from tutelage.render.sheet import Cut, Sheet, cut_of
from tutelage.render.skeleton import Edit
from tutelage.tables import ArrowTexts, TurnColumns

WORTH_GROUPING = 256
"""Batches of fewer records are laid out one by one."""
SMALLEST = 16
"""Fewer records of a form are filled one by one."""
_MOST_TURNS = 20
_ROLE_BITS = 3


@dataclass(frozen=True)
class Pattern:
    """A filler as arrays over its P pieces.

    `literals` end to end, `starts` and `lengths` of each in them (P,); `turn` (P,) whose text fills the piece, -1 for a literal;
    `edits` by piece; `is_answer` (P,) whether the piece is an answer whose white space may go.
    """

    literals: bytes
    starts: Int64
    lengths: Int64
    turn: Int64
    edits: Mapping[int, tuple[Edit, ...]]
    is_answer: np.ndarray

    @classmethod
    def of(cls, filler: Filler) -> Pattern | None:
        """The pattern of a filler; None when it does more than put texts of turns somewhere and trim them."""
        edits = {place: slot.edits for place, slot, _ in filler.edited}
        if filler.has_reasoning or not all(_is_simple(edit) for each in edits.values() for edit in each):
            return None
        raw = [piece.encode() if isinstance(piece, str) else b"" for piece in filler.pieces]
        turn, is_answer = np.full(len(raw), -1, np.int64), np.zeros(len(raw), bool)
        for place, number in filler.content:
            turn[place], raw[place] = number, b""
        is_answer[[place for place, _, is_answer in filler.edited if is_answer]] = True
        lengths = np.array([len(piece) for piece in raw], np.int64)
        return cls(b"".join(raw), np.cumsum(lengths) - lengths, lengths, turn, edits, is_answer)


def _is_simple(edit: Edit) -> bool:
    return edit.characters is None or edit.characters.isascii()


@dataclass(frozen=True)
class Letters:
    """The bytes of a batch's texts: text t is `first[t] : last[t]` of `data`."""

    data: UInt8
    first: Int64
    last: Int64

    @classmethod
    def of(cls, texts: pa.StringArray) -> Letters:
        """The bytes of an Arrow array of texts without nulls."""
        _, offsets, data = texts.buffers()
        edges = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
        return cls(np.zeros(0, np.uint8) if data is None else np.frombuffer(data, np.uint8), edges[:-1], edges[1:])

    def trimmed(self, first: Int64, last: Int64, edit: Edit) -> tuple[Int64, Int64]:
        """Where stretches of the data begin and end after an edit."""
        first, last = first.copy(), last.copy()
        which = _blanks() if edit.characters is None else _table(edit.characters)
        sides = {"strip": (True, True), "lstrip": (True, False), "rstrip": (False, True)}[edit.side]
        kernel(trim)(self.data, which, edit.characters is None, *sides, first, last)
        return first, last


def _table(characters: str) -> np.ndarray:
    table = np.zeros(256, bool)
    table[list(characters.encode("ascii"))] = True
    return table


@cache
def _blanks() -> np.ndarray:
    return _table("".join(c for c in map(chr, range(128)) if c.isspace()))


def arrow_texts(content: Sequence[str]) -> pa.StringArray | None:
    """Texts as an Arrow array; None when they cannot be one (half of a surrogate pair, more than 2 GiB)."""
    if isinstance(content, ArrowTexts):
        return content.array if pa.types.is_string(content.array.type) and not content.array.null_count else None
    try:
        made = pa.array(content, pa.string())
    except (UnicodeEncodeError, pa.ArrowException):
        return None
    return made if isinstance(made, pa.StringArray) else None


def lay_together(layer: Layer, columns: TurnColumns, texts: pa.StringArray) -> Sheet:
    """What `layer.lay` gives, one example per record, with forms that occur often filled together.

    `texts` are the texts of all turns (T,). The first record of a form and one in every few hundred are rendered too, and
    must be the same.
    """
    together = Together(columns, texts)
    checks: list[tuple[int, Filler]] = []
    for roles, records in _groups(columns):
        filler = layer.filler(roles)
        pattern = None if filler is None else Pattern.of(filler)
        if filler is not None and pattern is not None:
            done = together.fill(records, filler, pattern)
            checks += [(record, filler) for record in done[-filler.num_filled % EVERY :: EVERY].tolist()]
            filler.num_filled += len(done)
    cut, refusals = together.finish(layer)
    sheet = cut.joined(refusals=refusals)
    first_turn = columns.offsets
    for record, filler in checks:
        turns = range(first_turn[record], first_turn[record + 1])
        layer.check(columns, turns, filler, sheet.pieces(int(np.searchsorted(sheet.records, record))))
    return sheet


def _groups(columns: TurnColumns) -> list[tuple[bytes, Int64]]:
    """Plain records of the same roles, of forms that occur often enough: (indices into `records.ROLES` as bytes, records)."""
    is_plain = (columns.num_turns <= _MOST_TURNS) & (columns.num_turns > 0) & ~_with_reasoning(columns)
    if (others := particular(columns)) is not None:
        is_plain &= ~others
    records, offsets = np.flatnonzero(is_plain), columns.offsets
    place = np.arange(len(columns.role)) - np.repeat(offsets[:-1], columns.num_turns)
    shift = (np.minimum(place, _MOST_TURNS) * _ROLE_BITS).astype(np.uint64)
    sums = np.cumsum((columns.role.astype(np.uint64) + np.uint64(1)) << shift)  # modulo 2^64, so differences are exact
    sums = np.concatenate([np.zeros(1, np.uint64), sums])
    codes = sums[offsets[records + 1]] - sums[offsets[records]]
    _, first, group, sizes = np.unique(codes, return_index=True, return_inverse=True, return_counts=True)
    members = np.split(records[np.argsort(group, kind="stable")], np.cumsum(sizes)[:-1])
    roles = columns.role.tobytes()
    keys = [roles[offsets[records[i]] : offsets[records[i] + 1]] for i in first.tolist()]
    return [(key, those) for key, those in zip(keys, members, strict=False) if len(those) >= SMALLEST]


def _with_reasoning(columns: TurnColumns) -> np.ndarray:
    """Which records have reasoning (R,)."""
    out = np.zeros(len(columns), bool)
    if columns.reasoning is not None:
        has = np.fromiter(map(bool, columns.reasoning), bool, len(columns.reasoning))
        out[np.repeat(np.arange(len(columns)), columns.num_turns)[has]] = True
    return out


class Together:
    """Fills the records of a batch, form by form; `left` says which records are still to be laid out (R,)."""

    def __init__(self, columns: TurnColumns, texts: pa.StringArray) -> None:
        self.columns, self.texts, self.letters = columns, texts, Letters.of(texts)
        self.left = np.ones(len(columns), bool)
        self._first_turn = columns.offsets[:-1]
        first, last = self.letters.trimmed(self.letters.first, self.letters.last, Edit("lstrip", None))
        self._is_blank = first == last
        self._words: dict[str, np.ndarray] = {}
        self._parts: list[Cut] = []
        self._sources, self._length = [self.letters.data], len(self.letters.data)

    def fill(self, records: Int64, filler: Filler, pattern: Pattern) -> Int64:
        """Fills these records; returns those that meet the skeleton's conditions, which are now done."""
        num_turns = int(self.columns.num_turns[records[0]])
        turns = self._first_turn[records][:, None] + np.arange(num_turns)
        fails = self._is_blank[turns].any(axis=1)
        for turn, _, word in filler.words:
            fails |= self._holds(word)[turns[:, turn]]
        records, turns = records[~fails], turns[~fails]
        self.left[records] = False
        if len(records):
            self._parts.append(self._cells(records, turns, filler, pattern))
        return records

    def finish(self, layer: Layer) -> tuple[Cut, list[tuple[int, Job, Refusal]]]:
        """All examples in the order of the records, the others laid out one by one; and who has none."""
        rest, laid = cut_of(layer.lay(self.columns, records=np.flatnonzero(self.left).tolist()))
        if len(rest.records):
            self._parts.append(dataclasses.replace(rest, starts=rest.starts + self._source(rest.source.tobytes())))
        return self._cut() if self._parts else rest, laid.refusals

    def _cut(self) -> Cut:
        parts = self._parts
        records = np.concatenate([part.records for part in parts])
        order = np.argsort(records, kind="stable")
        counts = np.concatenate([np.diff(part.offsets) for part in parts])
        begins = (np.cumsum(counts) - counts)[order]
        counts = counts[order]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        index = np.repeat(begins - offsets[:-1], counts) + np.arange(offsets[-1])
        cells = {name: np.concatenate([getattr(part, name) for part in parts])[index] for name in _PER_CELL}
        flags = np.concatenate([part.flags for part in parts])[order]
        return Cut(source=np.concatenate(self._sources), records=records[order], flags=flags, offsets=offsets, **cells)

    def _holds(self, word: str) -> np.ndarray:
        """Which texts hold a word."""
        if word not in self._words:
            self._words[word] = pc.match_substring(self.texts, word).to_numpy(zero_copy_only=False)
        return self._words[word]

    def _cells(self, records: Int64, turns: Int64, filler: Filler, pattern: Pattern) -> Cut:
        num, pieces, letters = len(records), len(pattern.turn), self.letters
        starts, lengths = np.empty((num, pieces), np.int64), np.empty((num, pieces), np.int64)
        starts[:], lengths[:] = pattern.starts + self._source(pattern.literals), pattern.lengths
        is_rewritten = np.zeros(num, bool)
        for place in np.flatnonzero(pattern.turn >= 0).tolist():
            text = turns[:, pattern.turn[place]]
            first, last = letters.first[text], letters.last[text]
            for edit in pattern.edits.get(place, ()):
                first, last = letters.trimmed(first, last, edit)
            starts[:, place], lengths[:, place] = first, last - first
            if pattern.is_answer[place]:
                is_rewritten |= last - first != letters.last[text] - letters.first[text]
        form = filler.form
        return Cut(
            source=letters.data,
            starts=starts.ravel(),
            lengths=lengths.ravel(),
            records=records,
            flags=(form.flags | np.where(is_rewritten, int(Flag.REWRITTEN), 0)).astype(np.int32),
            offsets=np.arange(num + 1) * pieces,
            kinds=np.tile(form.kinds, num),
            turns=np.tile(form.turns, num),
            from_data=np.tile(form.from_data, num),
        )

    def _source(self, data: bytes) -> int:
        """Where some more bytes begin in the common source."""
        self._sources.append(np.frombuffer(data, np.uint8))
        self._length += len(data)
        return self._length - len(data)


_PER_CELL = ("starts", "lengths", "kinds", "turns", "from_data")
