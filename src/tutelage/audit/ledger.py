"""Findings being collected: counts by finding and source, and one line per example; the first ids are taken at the end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from tutelage.audit.findings import MAX_LISTED
from tutelage.audit.texts import RecordNames
from tutelage.records import Int64
from tutelage.tables import FINDINGS

_Lines = tuple[Int64, np.ndarray, Sequence[str]]


@dataclass
class Ledger:
    """`found[finding][source]` holds `num`, `of` and whatever else was told; "" stands for all sources."""

    names: Mapping[str, RecordNames]
    found: dict[str, dict[str, dict[str, Any]]] = field(default_factory=lambda: defaultdict(dict))
    _lines: dict[tuple[str, str], list[_Lines]] = field(default_factory=lambda: defaultdict(list))

    def tell(self, finding: str, source: str, *, num: int, of: int, **more: Any) -> None:
        """Adds to a count; `of` is what it is a share of."""
        entry = self.found[finding].setdefault(source, {"num": 0, "of": of, "records": [], "details": []})
        entry["num"] += num
        entry |= more

    def put(self, finding: str, source: str, row: Int64, *, part: np.ndarray | None = None, details: Sequence[str] = ()) -> None:
        """Adds lines: records by row, with the part of a record that became several examples."""
        parts = np.zeros(len(row), np.int32) if part is None else part
        self._lines[finding, source].append((row, parts, details or [""] * len(row)))

    def add(
        self,
        finding: str,
        source: str,
        row: Int64,
        *,
        of: int,
        part: np.ndarray | None = None,
        details: Sequence[str] = (),
    ) -> None:
        """Adds lines and counts them; nothing without lines."""
        if len(row):
            self.tell(finding, source, num=len(row), of=of)
            self.put(finding, source, row, part=part, details=details)

    def close(self) -> pa.Table:
        """All lines by finding, source and row (schema FINDINGS); the first of each go into `found`."""
        tables = [FINDINGS.empty_table()]
        for (finding, source), lines in sorted(self._lines.items()):
            table = _table(finding, source, lines, self.names[source])
            head = table.slice(0, MAX_LISTED)
            self.found[finding][source] |= {"records": head["record"].to_pylist(), "details": head["detail"].to_pylist()}
            tables.append(table)
        return pa.concat_tables(tables).unify_dictionaries()


def _table(finding: str, source: str, lines: Sequence[_Lines], names: RecordNames) -> pa.Table:
    row, part = np.concatenate([line[0] for line in lines]), np.concatenate([line[1] for line in lines])
    order = np.lexsort((part, row))
    details = pa.array([detail for line in lines for detail in line[2]], pa.string())
    columns = {
        "finding": pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(row), np.int32)), [finding]),
        "source": pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(row), np.int32)), [source]),
        "row": row[order],
        "part": part[order].astype(np.int32),
        "record": names.of(row[order]),
        "detail": details.take(pa.array(order)),
    }
    return pa.table(columns, schema=FINDINGS)
