"""Row ids: from `source/file:line#part` to a record and back, and what became of a record that is not in the plan.

Only the narrow columns of a source are read (file, line, part), each source once, whatever the number of records.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tutelage.errors import DataError, did_you_mean
from tutelage.records import Dropped, Origin
from tutelage.report.data import HELD_OUT, NOT_DRAWN
from tutelage.report.fates import Inputs, of_stage
from tutelage.tables import DROPPED, read_table

_ROW_ID = re.compile(r"(?:(?P<place>.*):)?(?P<line>\d+)(?:#(?P<part>\d+))?", re.DOTALL)
_NUM_NAMED = 5
_JUDGES = ("screen", "copies", "render", "rerender")
_MEANING = {
    HELD_OUT: "kept for measuring, never trained",
    NOT_DRAWN: "the budget of `mix` went to other records",
    "not_rendered": "it gave no example",
    "no_loss_weight": "the loss rule leaves it no token to learn",
}


def row_ids(inputs: Inputs, sources: Sequence[str], rows: Sequence[int]) -> list[str]:
    """The row id of each record; `sources` and `rows` (positions in the source's conversations) go in pairs."""
    tables = {source: _places(inputs, source) for source in set(sources)}
    out = []
    for source, row in zip(sources, rows, strict=True):
        file, line, part = (tables[source][name][row].as_py() for name in ("file", "line", "part"))
        out.append(Origin(source, file, line, part).row_id)
    return out


def find_record(inputs: Inputs, row_id: str) -> tuple[str, int]:
    """The (source, row) that a row id, or the unique end of one, names; a full id goes before a suffix.

    DataError when it names no record that was read (saying why, where reading set the line aside) or several.
    """
    wanted = _ROW_ID.fullmatch(row_id.strip())
    if wanted is None:
        raise DataError(f"--row {row_id}: a row id is source/file:line, or the end of one: `maths.jsonl:17`")
    place, line, part = wanted["place"] or "", int(wanted["line"]), int(wanted["part"] or 0)
    found = [(source, row) for source in of_stage(inputs, "read") for row in _rows_at(inputs, source, place, line, part)]
    ids = row_ids(inputs, *zip(*found, strict=True)) if found else []
    if row_id.strip() in ids:
        return found[ids.index(row_id.strip())]
    if len(found) > 1:
        more = ", ..." if len(ids) > _NUM_NAMED else ""
        raise DataError(f"--row {row_id}: {len(ids)} records end so, give more of the id: {', '.join(ids[:_NUM_NAMED])}{more}")
    if not found:
        raise DataError(f"--row {row_id}: {_why_unread(inputs, place, line)}")
    return found[0]


def why_not_planned(inputs: Inputs, source: str, row: int) -> str:
    """What became of a record that the plan does not train on, as one sentence."""
    (row_id,) = row_ids(inputs, [source], [row])
    drops = _drops_of(inputs["plan"].path, source, row)
    if not drops:
        return f"{row_id} is not in the plan"
    reason = drops[0].reason
    label, detail = next(_judgements(inputs, source, row, reason), ("plan", ""))
    detail = drops[0].detail or detail or _MEANING.get(reason, "")
    return f"{row_id} is not in the plan: {reason}, said by `{label}`" + (f" ({detail})" if detail else "")


def _places(inputs: Inputs, source: str) -> pa.Table:
    path = of_stage(inputs, "read")[source].file("conversations.parquet")
    table = pq.read_table(path, columns=["file", "line", "part"])
    return table.set_column(0, "file", table["file"].cast(pa.string()))


def _rows_at(inputs: Inputs, source: str, place: str, line: int, part: int) -> list[int]:
    """The records of a source at this line and part of a file whose `source/file` ends in `place`."""
    table = _places(inputs, source)
    is_there = pc.and_(pc.equal(table["line"], line), pc.equal(table["part"], part))
    rows: list[int] = np.flatnonzero(is_there.to_numpy()).tolist()
    return [row for row in rows if f"{source}/{table['file'][row].as_py()}".endswith(place)]


def _why_unread(inputs: Inputs, place: str, line: int) -> str:
    """Why no record that was read has this place: set aside by reading, no such line, no such file."""
    files: dict[str, int] = {}
    for source, read in of_stage(inputs, "read").items():
        dropped = _dropped_table(read.path)
        for drop in _records(dropped.filter(pc.equal(dropped["line"], line))):
            if f"{source}/{drop.file}".endswith(place):
                detail = f" ({drop.detail})" if drop.detail else ""
                return f"{source}/{drop.file}:{line} was set aside by `read {source}`: {drop.reason}{detail}"
        places = _places(inputs, source)
        lasts = places.group_by("file").aggregate([("line", "max")]).to_pylist()
        files |= {f"{source}/{each['file']}": each["line_max"] for each in lasts}
    known = [name for name in files if name.endswith(place)]
    if known:
        return "no record stands there; the last ones are " + ", ".join(f"{n}:{files[n]}" for n in known[:_NUM_NAMED])
    return f"no source has such a file; {did_you_mean(place, files)}"


def _judgements(inputs: Inputs, source: str, row: int, reason: str) -> Iterator[tuple[str, str]]:
    """The stages that dropped the record for this reason, each with the detail that it wrote."""
    for label, artefact in inputs.items():
        stage, _, name = label.partition(" ")
        if stage in _JUDGES and name in ("", source):
            yield from ((label, drop.detail) for drop in _drops_of(artefact.path, source, row) if drop.reason == reason)


def _drops_of(folder: Path, source: str, row: int) -> list[Dropped]:
    table = _dropped_table(folder)
    return [drop for drop in _records(table.filter(pc.equal(table["row"], row))) if drop.source == source]


def _dropped_table(folder: Path) -> pa.Table:
    path = folder / "dropped.parquet"
    return read_table(path, DROPPED) if path.exists() else DROPPED.empty_table()


def _records(table: pa.Table) -> Iterator[Dropped]:
    lines: list[dict[str, Any]] = table.to_pylist()
    return (Dropped(**line) for line in lines)
