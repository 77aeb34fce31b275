"""What every stage makes of the small recipe, held to digests: output that changes needs a raised stage version.

python tests/test_golden.py        writes tests/golden.json anew, from the artefacts of this tree
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from small_recipe import write_small  # noqa: E402
from tutelage import load_recipe, run  # noqa: E402

GOLDEN = HERE / "golden.json"
LEFT_OUT = ("model", "tokenizer")
"""Stages whose files other packages write."""


def digest(folder: Path) -> str:
    """Of the ordered columns of all tables and arrays of an artefact: values and types, not how a file is compressed."""
    found = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            rows = pa.Table.from_arrays([_plain(column) for column in table.columns], names=table.column_names).to_pylist()
            told = f"{path.name} {table.schema.names} {json.dumps(rows, default=_told)}"
        elif path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            told = f"{path.name} {array.dtype.str} {array.shape} {hashlib.blake2b(array.tobytes()).hexdigest()}"
        else:
            continue
        found.update(told.encode())
    return found.hexdigest()


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _told(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def made(folder: Path) -> dict[str, dict[str, Any]]:
    """Version and digest of every stage up to the plan."""
    file = load_recipe(write_small(folder))
    artefacts = run(file, until="plan", store=folder / "store", runs=folder / "runs").artefacts
    kept = {label: each for label, each in artefacts.items() if each.manifest["stage"] not in LEFT_OUT}
    return {
        label: {"version": each.manifest["ingredients"]["stage version"], "digest": digest(each.path)}
        for label, each in sorted(kept.items())
    }


def test_output_that_changed_has_a_new_version(tmp_path):
    """Kills a stage whose output changed under its old version: a store would go on serving what was made before."""
    golden, now = json.loads(GOLDEN.read_text()), made(tmp_path)
    assert set(now) == set(golden), "stages came or went: python tests/test_golden.py"
    for label, entry in now.items():
        old = golden[label]
        if entry != old:
            assert entry["version"] != old["version"], f"{label}: its output changed, so its stage version has to be raised"
            raise AssertionError(f"{label}: version {entry['version']} is new: python tests/test_golden.py")


def test_a_digest_sees_values_types_and_order(tmp_path):
    """Kills a digest of file names only, one that ignores the order of rows, and one that depends on compression."""

    def digest_of(values, *, compression="zstd", column="n"):
        pq.write_table(pa.table({column: values}), tmp_path / "t.parquet", compression=compression)
        return digest(tmp_path)

    one = digest_of([1, 2])
    assert digest_of([1, 2], compression="none") == one
    assert len({one, digest_of([2, 1]), digest_of([1, 3]), digest_of([1.0, 2.0]), digest_of([1, 2], column="m")}) == 5


if __name__ == "__main__":
    with TemporaryDirectory() as scratch:
        GOLDEN.write_text(json.dumps(made(Path(scratch)), indent=1) + "\n")
