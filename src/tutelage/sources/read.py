"""Finds files and URLs, opens them, and cuts them into blocks of raw records. The only file of this room that reads data.

A format is told by its name: .jsonl (.ndjson), .json, .csv, .parquet, each plain, .gz or .zst.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import itertools
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import orjson
import pyarrow as pa

from tutelage.errors import DataError, MissingExtra
from tutelage.sources.reasons import Malformed, excerpt_of
from tutelage.sources.scan import Block, split_array, split_lines
from tutelage.tables import in_pieces

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
PACKINGS = {".gz": "gzip", ".zst": "zstd"}
BLOCK_BYTES = 1 << 20
_ROWS_PER_BLOCK = 256
_BOM = b"\xef\xbb\xbf"
_LIST_OF_OBJECTS = re.compile(rb'"((?:[^"\\]|\\.)*)"\s*:\s*(\[)\s*\{')
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_LISTS_LOOKED_AT = 20
_RECORD_KEYS = (
    b"messages",
    b"conversations",
    b"conversation",
    b"instances",
    b"Instances",
    b"Positive Examples",
    b"positive_examples",
)
_OVERLONG = "\0tutelage: too long\0"  # stands for a csv line that was not kept


@dataclass(frozen=True)
class DataFile:
    """One file: `name` as people write it (relative to the recipe), where it is, its format and packing."""

    name: str
    system: fsspec.AbstractFileSystem
    path: str
    format: str
    packing: str | None

    @property
    def local(self) -> Path | None:
        """The path on this machine, None for a URL."""
        is_local = "file" in _as_tuple(self.system.protocol)
        return Path(self.path) if is_local else None

    def remote_digest(self) -> str:
        """A digest of a remote file's content: the server's own tag where it gives one, else all bytes read once."""
        info = self.system.info(self.path)
        for tag in ("ETag", "etag", "md5Hash", "content_md5"):
            if info.get(tag):
                return f"{tag} {info[tag]}"
        digest = hashlib.blake2b(digest_size=16)
        with self.system.open(self.path, "rb") as file:
            while chunk := file.read(BLOCK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()


def _as_tuple(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def find_files(path: str, base: Path) -> list[DataFile]:
    """The files that a path, a glob or an fsspec URL means, by name; relative paths start at `base`.

    DataError when nothing is there, when a folder is named, and when a name has none of the known endings.
    """
    is_url = "://" in path or "::" in path
    try:
        system, pattern = fsspec.core.url_to_fs(path if is_url else str(base / Path(path).expanduser()))
        found = _expand(system, pattern, path)
    except (OSError, ImportError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be opened: {error}") from error
    return [_data_file(system, each, path if is_url and len(found) == 1 else _name(system, each, base, is_url)) for each in found]


def _expand(system: fsspec.AbstractFileSystem, pattern: str, path: str) -> list[str]:
    if system.isfile(pattern):  # first: a bracket in a name is no glob when the file is there
        return [pattern]
    if system.isdir(pattern):
        raise DataError(f"{path}: is a folder; name the files in it, for example {path.rstrip('/')}/*.jsonl")
    found = sorted(each for each in system.glob(pattern) if system.isfile(each)) if set(pattern) & set("*?[") else []
    if not found:
        raise DataError(f"{path}: no such file (looked for {pattern}); relative paths start at the recipe's folder")
    return found


def _name(system: fsspec.AbstractFileSystem, path: str, base: Path, is_url: bool) -> str:
    if is_url:
        return str(system.unstrip_protocol(path))
    with contextlib.suppress(ValueError):
        return Path(path).relative_to(base.absolute()).as_posix()
    return path


def _data_file(system: fsspec.AbstractFileSystem, path: str, name: str) -> DataFile:
    plain = Path(path.split("?")[0])
    packing = PACKINGS.get(plain.suffix.lower())
    ending = (plain.with_suffix("") if packing else plain).suffix.lower()
    if ending not in FORMATS:
        known = ", ".join(FORMATS)
        raise DataError(
            f"{name}: {ending or 'no'} ending is not one of {known} (plain, .gz or .zst); rename it or narrow the path"
        )
    return DataFile(name, system, path, ending, packing)


def read_blocks(file: DataFile, *, max_bytes: int) -> Iterator[Block]:
    """The raw records of a file, a block at a time. DataError when it cannot be read as what its name says."""
    try:
        match file.format:
            case ".jsonl" | ".ndjson":
                yield from split_lines(_bytes(file), max_bytes=max_bytes)
            case ".json":
                yield from _json(file, max_bytes=max_bytes)
            case ".csv":
                yield from _csv(_bytes(file), max_bytes=max_bytes)
            case _:
                yield from _parquet(file)
    except (OSError, EOFError, pa.ArrowException) as error:
        raise DataError(f"{file.name}: cannot be read: {error}; is it whole, and what its ending says?") from error
    except DataError as error:
        raise DataError(f"{file.name}: {error}") from error


def _bytes(file: DataFile) -> Iterator[bytes]:
    """The unpacked bytes in blocks, without a byte order mark."""
    with file.system.open(file.path, "rb") as packed:
        # Arrow's readers say when a packed stream is cut short, which zstandard's does not
        stream = packed if file.packing is None else pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), file.packing)
        first = bytes(stream.read(BLOCK_BYTES))
        if first[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError("is UTF-16; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
        yield first.removeprefix(_BOM)
        with ThreadPoolExecutor(1) as thread:  # unpacks the next block while this one is worked on
            coming = thread.submit(stream.read, BLOCK_BYTES)
            while block := coming.result():
                coming = thread.submit(stream.read, BLOCK_BYTES)
                yield bytes(block)


def _json(file: DataFile, *, max_bytes: int) -> Iterator[Block]:
    """A .json file: an array, an object that holds a list of objects, one object, or (common, though misnamed) JSON lines."""
    blocks = _bytes(file)
    head = next(blocks)
    lead = len(head) - len(head.lstrip())
    if head[lead : lead + 1] != b"{":
        if head[lead : lead + 1] != b"[":
            raise DataError(f"neither an array nor an object: {excerpt_of(head)[:40]!r}")
        yield from split_array(itertools.chain([head], blocks), max_bytes=max_bytes)
        return
    if _holds_lines(head[lead:]):
        yield from split_lines(itertools.chain([head], blocks), max_bytes=max_bytes)
    elif (start := _list_start(head)) is None:
        # one record: an array of one
        yield from split_array(itertools.chain([b"[" + head], blocks, [b"]"]), max_bytes=max_bytes)
    else:
        yield from _wrapped(head, blocks, start=start, max_bytes=max_bytes)


def _holds_lines(head: bytes) -> bool:
    """Whether one of the first lines is an object by itself, and not the last."""
    *lines, _ = head.split(b"\n", 5)
    return any(_is_object(line) for line in lines) and bool(head.partition(b"\n")[2].strip())


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


def _list_start(head: bytes) -> int | None:
    """Where the first list of objects at the top of an object starts; None when the object is a record itself."""
    for found in itertools.islice(_LIST_OF_OBJECTS.finditer(head), _LISTS_LOOKED_AT):
        before = _STRING.sub(b"", head[: found.start()])
        depth = sum(before.count(c) for c in (b"{", b"[")) - sum(before.count(c) for c in (b"}", b"]"))
        if depth == 1:
            return None if found.group(1) in _RECORD_KEYS else found.start(2)
    return None


def _wrapped(head: bytes, blocks: Iterator[bytes], *, start: int, max_bytes: int) -> Iterator[Block]:
    """The elements of the first list in an object; the object may say other things, but hold no second list of objects."""
    seen = b""

    def refuse_second_list(piece: bytes) -> None:
        nonlocal seen
        seen = seen[-1_000:] + piece
        if _LIST_OF_OBJECTS.search(seen):
            raise DataError("an object with several lists of records; write each list to a file of its own")

    whole = itertools.chain([head[start:]], blocks)
    first_line = 1 + head.count(b"\n", 0, start)
    yield from split_array(whole, max_bytes=max_bytes, first_line=first_line, after=refuse_second_list)


def _csv(blocks: Iterator[bytes], *, max_bytes: int) -> Iterator[Block]:
    """The records of a csv file with a header, as dictionaries of texts; a line is where a record starts."""
    csv.field_size_limit(max(csv.field_size_limit(), max_bytes))
    reader = csv.reader(_csv_lines(blocks, max_bytes=max_bytes), strict=True)
    try:
        header = next(fields for fields in reader if fields)
    except (StopIteration, csv.Error) as error:
        raise DataError(f"no header line: {error}") from None
    if len(set(header)) != len(header):
        raise DataError(f"the header names a column twice: {', '.join(header)}")
    lines: list[int] = []
    items: list[Any] = []
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            lines, items = [*lines, line], [*items, Malformed("broken_csv", str(error))]
            continue
        if fields:
            lines.append(line)
            items.append(_csv_record(header, fields, max_bytes))
        if len(items) >= _ROWS_PER_BLOCK:
            yield Block(lines, items)
            lines, items = [], []
    if items:
        yield Block(lines, items)


def _csv_record(header: list[str], fields: list[str], max_bytes: int) -> dict[str, str] | Malformed:
    start = ",".join(fields)[:400]
    if any(_OVERLONG in field for field in fields):
        return Malformed("too_long", f"a line of more than {max_bytes} bytes (intake.max_record_bytes)")
    if not all(field.isascii() or _is_encodable(field) for field in fields):
        return Malformed("invalid_utf8", "bytes that are not UTF-8", excerpt_of(start.encode("utf-8", "surrogateescape")))
    if len(fields) != len(header):
        return Malformed("wrong_field_count", f"{len(fields)} fields; the header has {len(header)}", excerpt_of(start.encode()))
    return dict(zip(header, fields, strict=True))


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _csv_lines(blocks: Iterator[bytes], *, max_bytes: int) -> Iterator[str]:
    for block in split_lines(blocks, max_bytes=max_bytes):
        for item in block.items:
            yield _OVERLONG if isinstance(item, Malformed) else item.decode("utf-8", "surrogateescape") + "\n"


def _parquet(file: DataFile) -> Iterator[Block]:
    """The rows of a Parquet file; a line is a row, from 1."""
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(file.system.open(file.path, "rb"))
        if file.packing is not None:  # Parquet is read from its end: unpack to disk, not to memory
            whole = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(pa.CompressedInputStream(pa.PythonFile(opened, mode="r"), file.packing), whole, BLOCK_BYTES)
            opened = whole
        first = 1
        for batch in in_pieces(opened).iter_batches(batch_size=_ROWS_PER_BLOCK, use_threads=False):
            yield Block(range(first, first + batch.num_rows), _rows(batch))
            first += batch.num_rows


def _rows(batch: pa.RecordBatch) -> list[Any]:
    try:
        rows: list[Any] = batch.to_pylist()
    except UnicodeDecodeError:
        return [_row(batch.slice(index, 1)) for index in range(batch.num_rows)]
    return rows


def _row(one: pa.RecordBatch) -> Any:
    try:
        return one.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Malformed("invalid_utf8", str(error))


@dataclass(frozen=True)
class HubData:
    """A hub dataset, `name` or `name:config`, at one revision (None for a folder on this machine)."""

    dataset: str
    split_name: str
    revision: str | None

    @property
    def name(self) -> str:
        """What stands in the `file` column."""
        return f"{self.dataset}/{self.split_name}"


def find_hub(dataset: str, split_name: str) -> HubData:
    """The dataset at its present revision, so that a later change of it is seen. MissingExtra without `datasets`."""
    try:
        import datasets  # noqa: F401
        import huggingface_hub
    except ImportError:
        raise MissingExtra("datasets", "hub") from None
    name = dataset.partition(":")[0]
    if Path(name).is_dir():
        return HubData(dataset, split_name, None)
    try:
        return HubData(dataset, split_name, huggingface_hub.HfApi().dataset_info(name).sha)
    except Exception as error:
        raise DataError(f"{dataset}: the hub does not give it: {error}; check its name and your connection") from error


def read_hub(data: HubData) -> Iterator[Block]:
    """The rows of a hub dataset, streamed; a line is a row, from 1."""
    import datasets

    name, _, config = data.dataset.partition(":")
    try:
        given = datasets.load_dataset(name, config or None, split=data.split_name, revision=data.revision, streaming=True)
        rows, first = iter(given), 1
        while items := list(itertools.islice(rows, _ROWS_PER_BLOCK)):
            yield Block(range(first, first + len(items)), items)
            first += len(items)
    except (OSError, ValueError) as error:
        raise DataError(f"{data.name}: cannot be read: {error}") from error
