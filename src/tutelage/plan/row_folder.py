"""A folder of rows that `datasets` opens: Arrow or Parquet shards, written a step at a time, whole or not at all.

    data-00000-of-00002.arrow, ..., dataset_info.json, state.json      `datasets.load_from_disk(folder)`
    train-00000-of-00002.parquet, ...                                  any tool

Neither needs `datasets` here: the format is Arrow's stream format and two small JSON files.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.errors import TutelageError
from tutelage.store import digest_bytes, digest_json, fault_point, sync_path

Format = Literal["datasets", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)
MANIFEST = "export.json"
"""Written last; a folder that has it is an export, and may be overwritten when asked."""

_SHARD_BYTES = 500_000_000
_WRITE_BYTES = 32_000_000
_STEMS: dict[Format, tuple[str, str]] = {"datasets": ("data", "arrow"), "parquet": ("train", "parquet")}


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Nothing; TutelageError when rows cannot be written there: it exists, or the folder it is to stand in does not."""
    if not folder.absolute().parent.is_dir():
        raise TutelageError(f"{folder}: the folder {folder.absolute().parent} does not exist; make it, or name another place")
    if not folder.exists():
        return
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if not (folder / MANIFEST).is_file():
        raise TutelageError(f"{folder} exists and is no export of ours, so it is left alone; name a folder that does not exist")
    if not overwrite:
        raise TutelageError(f"{folder} exists already; name another folder, or replace it with --overwrite (`overwrite=True`)")


class RowFolder:
    """A folder in the making: `write` record batches, then leave the `with` block; an exception or a kill leaves no folder.

    >>> import tempfile
    >>> rows = pa.record_batch({"input_ids": pa.array([[5, 6], [7]], pa.list_(pa.int32()))})
    >>> with tempfile.TemporaryDirectory() as place:
    ...     with RowFolder(Path(place) / "rows", rows.schema) as folder:
    ...         folder.write(rows)
    ...         folder.finish({"README.md": "two rows"}, {"num_rows": 2})
    ...     sorted(path.name for path in (Path(place) / "rows").iterdir())
    ['README.md', 'data-00000-of-00001.arrow', 'dataset_info.json', 'export.json', 'state.json']
    """

    def __init__(self, folder: Path, schema: pa.Schema, *, file_format: Format = "datasets", overwrite: bool = False) -> None:
        self._folder, self._schema, self._format, self._overwrite = folder.absolute(), schema, file_format, overwrite
        self._temporary = self._folder.with_name(f".{folder.name}.exporting")
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_bytes, self._shard_bytes, self._num_shards = 0, 0, 0
        self._writer: Any = None
        self._lock = -1

    def __enter__(self) -> Self:
        check_folder(self._folder, overwrite=self._overwrite)
        self._temporary.mkdir(exist_ok=True)
        self._lock = os.open(self._temporary, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise TutelageError(f"{self._folder} is being written by another export; wait for it, or name another") from None
        for left in self._temporary.iterdir():  # of an export that was killed
            left.unlink()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close_shard()
        try:
            if kind is None:
                assert (self._temporary / MANIFEST).is_file(), "finish() comes before the end"
                self._put_in_place()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)
            os.close(self._lock)

    def write(self, rows: pa.RecordBatch) -> None:
        """Adds rows of the schema; they wait in memory until there are some megabytes of them."""
        self._waiting.append(rows)
        self._waiting_bytes += rows.nbytes
        if self._waiting_bytes >= _WRITE_BYTES:
            self._flush()

    def finish(self, texts: dict[str, str], manifest: dict[str, Any]) -> None:
        """Completes the shards, writes texts by file name, and the manifest last."""
        self._flush()
        self._close_shard()
        names = self._name_shards()
        digests = {name: digest_bytes(self._temporary / name) for name in names}
        if self._format == "datasets":
            texts = texts | _descriptions(self._schema, names, fingerprint=digest_json(digests)[:16])
        for name, text in (texts | {MANIFEST: json.dumps(manifest | {"files": digests}, indent=1)}).items():
            (self._temporary / name).write_text(text, encoding="utf-8")

    def _flush(self) -> None:
        if not self._waiting:
            return
        table = pa.Table.from_batches(self._waiting, self._schema).combine_chunks()
        if self._writer is None:
            self._open_shard()
        self._writer.write_table(table)
        self._shard_bytes += table.nbytes
        self._waiting, self._waiting_bytes = [], 0
        if self._shard_bytes >= _SHARD_BYTES:
            self._close_shard()
        fault_point("export-rows-written")

    def _open_shard(self) -> None:
        path = str(self._temporary / f"{self._num_shards:05d}")
        if self._format == "datasets":
            self._writer = pa.ipc.new_stream(path, self._schema)
        else:
            self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._num_shards, self._shard_bytes = self._num_shards + 1, 0

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _name_shards(self) -> list[str]:
        stem, ending = _STEMS[self._format]
        names = []
        for number in range(self._num_shards):
            name = f"{stem}-{number:05d}-of-{self._num_shards:05d}.{ending}"
            (self._temporary / f"{number:05d}").rename(self._temporary / name)
            names.append(name)
        return names

    def _put_in_place(self) -> None:
        for path in self._temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_path(self._temporary)
        old = self._folder.with_name(f".{self._folder.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        if self._folder.exists():
            self._folder.rename(old)
        self._temporary.rename(self._folder)
        sync_path(self._folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def _descriptions(schema: pa.Schema, names: list[str], *, fingerprint: str) -> dict[str, str]:
    """The two files that make a folder of Arrow streams a data set; the fingerprint is the content's, for caches to go by."""
    info = {
        "citation": "",
        "description": "",
        "features": {f.name: _feature(f.type) for f in schema},
        "homepage": "",
        "license": "",
    }
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    return {"dataset_info.json": json.dumps(info, indent=1), "state.json": json.dumps(state, indent=1)}


def _feature(kind: pa.DataType) -> dict[str, Any]:
    """A column's type in the words of `datasets`; `Sequence` is what its older and newer versions both read."""
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "Sequence"}
    name = {"float": "float32", "double": "float64"}.get(str(kind), str(kind))
    return {"dtype": name, "_type": "Value"}
