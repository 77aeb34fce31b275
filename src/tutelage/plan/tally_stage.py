"""The box `tally` of each rendered set: what any mixture and any loss rule must know of its examples, counted once.

example.npy cell.npy turn_weight.npy count.npy   the columns of a `tally.Tally`: a few entries per example
examples.arrow                                   one line per example: its record, task, length and requests

Nothing is packed: all of it is mapped into memory, which a change of mixture or loss does not have to wait for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa

from tutelage.arrays import ArrayWriter, map_array
from tutelage.plan.tally import Tally, tally_parts
from tutelage.store import Artefact, Counts, Outcome, Progress, Stage
from tutelage.tables import TALLIED, RenderedSet

_ENTRIES = {"example": np.int32, "cell": np.uint8, "turn_weight": np.float32, "count": np.int32}
_EXAMPLES = "examples.arrow"


def tally_stage(rendered: Stage) -> Stage:
    """The box `tally NAME` of a `render NAME`, or `retally NAME` of a `rerender NAME`. In and out: its examples."""

    def build(folder: Path, inputs: Mapping[str, Artefact], progress: Progress) -> Outcome:
        tokens = RenderedSet(inputs["rendered"].path)
        progress.start("tally", len(tokens), "examples")
        write_tally(folder, tally_parts(tokens), tokens.examples, progress)
        return Outcome(Counts(len(tokens), len(tokens)))

    name = {"render": "tally", "rerender": "retally"}[rendered.name]
    return Stage(name, 2, {}, build, slot=rendered.slot, inputs={"rendered": rendered})


def write_tally(folder: Path, parts: Iterable[Tally], examples: pa.Table, progress: Progress) -> None:
    """Writes tallies of sets that follow one another as one, part by part; `examples` has a line for each of their examples."""
    first, requests = 0, [np.zeros(0, np.int32)]
    writer = ArrayWriter(folder, _ENTRIES)
    for part in parts:
        writer.write(**{**vars(part), "example": part.example + np.int32(first)})
        requests.append(part.num_requests)
        first += len(part)
        progress.advance(len(part))
    writer.close()
    table = examples.select([name for name in TALLIED.names if name != "num_requests"])
    table = table.append_column("num_requests", pa.array(np.concatenate(requests))).cast(TALLIED)
    with pa.OSFile(str(folder / _EXAMPLES), "wb") as file, pa.ipc.new_file(file, TALLIED) as out:
        out.write_table(table.unify_dictionaries().combine_chunks())  # in one piece: such a column is read without a copy


def read_tally(artefact: Artefact) -> Tally:
    """The tally that a `tally` box holds."""
    columns = {name: map_array(artefact.file(f"{name}.npy")).view(np.ndarray) for name in _ENTRIES}
    return Tally(**columns, num_requests=read_examples(artefact)["num_requests"].to_numpy())


def read_examples(artefact: Artefact) -> pa.Table:
    """The examples of a `tally` box, of schema TALLIED."""
    return pa.ipc.open_file(pa.memory_map(str(artefact.file(_EXAMPLES)))).read_all()
