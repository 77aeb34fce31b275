"""A batch laid out flat: the bytes of all its examples, cut into cells that say what each stretch is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from tutelage.compiled import kernel
from tutelage.records import Int32, Int64, UInt8
from tutelage.render.engines import Texts
from tutelage.render.forms import WHOLE, Form, Job, Laid
from tutelage.render.kernels import PADDING, copy_stretches, is_worth_a_kernel
from tutelage.render.provenance import Refusal


@dataclass
class Sheet:
    """E examples of C cells, in the order of records and their parts.

    `records` i64 (E,) positions in the batch; `jobs` (E), None when every example is its whole record; `flags` i32 (E,);
    `texts` their bytes end to end; `offsets` i64 (E + 1,) the first cell of each. Cells: `ends` i64 (C,) bytes of the batch,
    `kinds` u8, `turns` i16, `from_data` bool, all (C,). `refusals` names records without an example.
    """

    records: Int64
    jobs: list[Job] | None
    flags: Int32
    texts: Texts
    offsets: Int64
    ends: Int64
    kinds: UInt8
    turns: np.ndarray
    from_data: np.ndarray
    refusals: list[tuple[int, Job, Refusal]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def example(self) -> Int64:
        """Whose each cell is: i64 (C,)."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def job(self, i: int) -> Job:
        """What example i is made of."""
        return WHOLE if self.jobs is None else self.jobs[i]

    def form(self, i: int) -> Form:
        """The cells of example i."""
        cells = slice(self.offsets[i], self.offsets[i + 1])
        return Form(self.kinds[cells], self.turns[cells], self.from_data[cells], int(self.flags[i]))

    def pieces(self, i: int) -> list[str]:
        """The texts of the cells of example i."""
        a, b = self.offsets[i], self.offsets[i + 1]
        edges = [int(self.texts.offsets[i]), *self.ends[a:b].tolist()]
        return [self.texts.data[x:y].decode() for x, y in pairwise(edges)]


@dataclass(frozen=True)
class Cut:
    """Examples before their bytes are joined: cell c is `lengths[c]` bytes from `starts[c]` on of `source`.

    The other fields are those of `Sheet`.
    """

    source: UInt8
    starts: Int64
    lengths: Int64
    records: Int64
    flags: Int32
    offsets: Int64
    kinds: UInt8
    turns: np.ndarray
    from_data: np.ndarray

    def joined(self, *, jobs: list[Job] | None = None, refusals: Sequence[tuple[int, Job, Refusal]] = ()) -> Sheet:
        """The sheet of these cells."""
        ends = np.cumsum(self.lengths, dtype=np.int64)
        out = np.zeros(PADDING + (int(ends[-1]) if len(ends) else 0), np.uint8)
        (kernel(copy_stretches) if is_worth_a_kernel(len(out)) else _copy)(self.source, self.starts, self.lengths, out)
        data, borders = out.tobytes(), np.concatenate([[0], ends])[self.offsets]
        texts = Texts(Decoded(data, borders), data, borders)
        return Sheet(
            self.records, jobs, self.flags, texts, self.offsets, ends, self.kinds, self.turns, self.from_data, list(refusals)
        )


class Decoded(Sequence[str]):
    """Texts that are decoded when asked for: text i is `offsets[i] : offsets[i + 1]` of UTF-8 `data`."""

    def __init__(self, data: bytes, offsets: Int64) -> None:
        self._data, self._offsets = data, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        at = range(len(self))[i]
        return self._data[self._offsets[at] : self._offsets[at + 1]].decode()


def cut_of(laid: Laid) -> tuple[Cut, Laid]:
    """The cells of examples that are lists of strings, and the examples: without those that hold half of a surrogate pair."""
    try:
        raw = [piece.encode() for piece in laid.pieces]
    except UnicodeEncodeError:
        return cut_of(laid.encodable())
    lengths = np.fromiter(map(len, raw), np.int64, len(raw))
    flags = [flags | job.flags for flags, job in zip(laid.flags, laid.jobs, strict=True)]
    made = Cut(
        source=np.frombuffer(b"".join(raw), np.uint8),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        records=np.array(laid.records, np.int64),
        flags=np.array(flags, np.int32),
        offsets=laid.offsets,
        kinds=_concatenated([form.kinds for form in laid.forms], np.uint8),
        turns=_concatenated([form.turns for form in laid.forms], np.int16),
        from_data=_concatenated([form.from_data for form in laid.forms], bool),
    )
    return made, laid


def sheet_of(laid: Laid) -> Sheet:
    """The sheet of examples that are lists of strings; one with half of a surrogate pair is refused."""
    cut, laid = cut_of(laid)
    jobs = None if all(job is WHOLE for job in laid.jobs) else laid.jobs
    return cut.joined(jobs=jobs, refusals=laid.refusals)


def _concatenated(arrays: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)


def _copy(source: UInt8, starts: Int64, lengths: Int64, out: UInt8) -> None:
    """Stretches of `source` end to end in `out`."""
    at = 0
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        out[at : at + length] = source[start : start + length]
        at += length
