"""The box `tally` of each rendered set: what any loss rule must know of its examples, counted once.

tally.arrow     `tally.Tally`: a few lines per example
requests.arrow  one line per example
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from tutelage.plan.tally import Tally, tally_parts
from tutelage.store import Artefact, Counts, Outcome, Progress, Stage
from tutelage.tables import REQUESTS, TALLY, RenderedSet

_FILES = {"tally.arrow": TALLY, "requests.arrow": REQUESTS}
"""Plain Arrow, not Parquet: it is mapped into memory, ten times faster on every change of the loss."""


def tally_stage(rendered: Stage) -> Stage:
    """The box `tally NAME` of a `render NAME`, or `retally NAME` of a `rerender NAME`. In and out: its examples."""

    def build(folder: Path, inputs: Mapping[str, Artefact], progress: Progress) -> Outcome:
        tokens = RenderedSet(inputs["rendered"].path)
        progress.start("tally", len(tokens), "examples")
        write_tally(folder, tally_parts(tokens), progress)
        return Outcome(Counts(len(tokens), len(tokens)))

    name = {"render": "tally", "rerender": "retally"}[rendered.name]
    return Stage(name, 1, {}, build, slot=rendered.slot, inputs={"rendered": rendered})


def write_tally(folder: Path, parts: Iterable[Tally], progress: Progress) -> None:
    """Writes tallies of sets that follow one another as one, part by part."""
    first = 0
    with ExitStack() as stack:
        writers = {name: stack.enter_context(_writing(folder / name, schema)) for name, schema in _FILES.items()}
        for part in parts:
            columns = {**vars(part), "example": part.example + np.int32(first)}
            for name, schema in _FILES.items():
                writers[name].write(pa.table({field: columns[field] for field in schema.names}, schema=schema))
            first += len(part)
            progress.advance(len(part))


def read_tally(artefact: Artefact) -> Tally:
    """What a `tally` box holds."""
    tables = [pa.ipc.open_file(pa.memory_map(str(artefact.file(name)))).read_all() for name in _FILES]
    return Tally(**{field: table[field].to_numpy() for table in tables for field in table.column_names})


@contextmanager
def _writing(path: Path, schema: pa.Schema) -> Iterator[pa.ipc.RecordBatchFileWriter]:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        yield writer
