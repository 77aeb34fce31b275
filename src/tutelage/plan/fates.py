"""Fates: what becomes of each record of a source, one number per record, so that a million cost what a few do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

OPEN = ""
"""The fate of a record that may be drawn, or was."""


class Fates:
    """One reason per record why it may not be drawn, `""` for one that may. Numbers inside, names outside.

    >>> fates = Fates(4)
    >>> fates.put(np.array([0, 2]), "too_long")
    >>> fates.put(np.array([False, False, True, True]), "held_out")
    >>> fates.are("held_out").tolist(), dict(fates.counts())
    ([False, False, True, True], {'': 1, 'too_long': 1, 'held_out': 2})
    """

    def __init__(self, num: int) -> None:
        self._names = [OPEN]
        self._codes = np.zeros(num, np.int16)

    def __len__(self) -> int:
        return len(self._codes)

    def copy(self) -> Fates:
        """The same fates, to be changed."""
        other = Fates(0)
        other._names, other._codes = [*self._names], self._codes.copy()
        return other

    def put(self, records: np.ndarray, name: str) -> None:
        """Gives records, positions or a flag for each, this fate over the one they had."""
        self._codes[records] = self._number(name)

    def put_each(self, records: np.ndarray, names: pa.ChunkedArray | pa.Array) -> None:
        """Gives each of these records a fate of its own."""
        labels = names if pa.types.is_dictionary(names.type) else names.dictionary_encode()
        if isinstance(labels, pa.ChunkedArray):
            labels = labels.unify_dictionaries().combine_chunks()
        numbers = np.array([self._number(name) for name in labels.dictionary.to_pylist()] or [0], np.int16)
        self._codes[records] = numbers[labels.indices.to_numpy()]

    def are(self, name: str) -> np.ndarray:
        """Which records have this fate, a flag for each."""
        known = self._names.index(name) if name in self._names else -1
        flags: np.ndarray = self._codes == known
        return flags

    def counts(self, which: np.ndarray | None = None) -> Counter[str]:
        """How many records, or how many of those flagged, have each fate."""
        codes = self._codes if which is None else self._codes[which]
        return Counter({self._names[code]: num for code, num in self._numbers(codes)})

    def labels(self, records: np.ndarray) -> pa.DictionaryArray:
        """The fates of records at these positions; the names in the order of their first record."""
        codes = self._codes[records]
        used = [code for code, _ in self._numbers(codes)]
        used.sort(key=lambda code: int(np.argmax(codes == code)))
        place = np.zeros(len(self._names), np.int32)
        place[used] = np.arange(len(used))
        return pa.DictionaryArray.from_arrays(pa.array(place[codes]), pa.array([self._names[code] for code in used], pa.string()))

    def _numbers(self, codes: np.ndarray) -> Iterator[tuple[int, int]]:
        counts = np.bincount(codes, minlength=len(self._names)).tolist()
        return ((code, num) for code, num in enumerate(counts) if num)

    def _number(self, name: str) -> int:
        if name not in self._names:
            self._names.append(name)
        return self._names.index(name)
