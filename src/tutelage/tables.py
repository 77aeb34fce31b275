"""One reader and one writer per record: Parquet (zstd) for tables that people open, NumPy files for tokens.

Every table of an artefact has its schema here, so that a room can read what another wrote without importing it.
Records of a source are numbered: `row` is the position in that source's `conversations.parquet`, the join key everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.records import Conversation, Dropped, Float32, Int64, Origin, Rendered, Rewrite, Sample, Score, Turn, UInt8, Verdict

R = TypeVar("R")
_LABEL = pa.dictionary(pa.int32(), pa.string())

TURN = pa.struct(
    [
        pa.field("role", pa.string(), nullable=False),
        pa.field("content", pa.string(), nullable=False),
        pa.field("reasoning", pa.string()),
        pa.field("tool_calls", pa.string()),
        pa.field("name", pa.string()),
        pa.field("call_id", pa.string()),
        pa.field("weight", pa.float32()),
    ]
)
CONVERSATIONS = pa.schema(
    [
        ("file", _LABEL),
        ("line", pa.int64()),
        ("part", pa.int32()),
        ("task", _LABEL),
        ("licence", _LABEL),
        ("origin", _LABEL),
        ("content_key", pa.binary(16)),
        ("prompt_key", pa.binary(16)),
        ("tools", pa.string()),
        ("turns", pa.list_(TURN)),
    ]
)
DROPPED = pa.schema(
    [
        ("source", _LABEL),
        ("file", _LABEL),
        ("line", pa.int64()),
        ("row", pa.int64()),
        ("reason", _LABEL),
        ("detail", pa.string()),
        ("excerpt", pa.string()),
    ]
)
REWRITES = pa.schema(
    [
        ("source", _LABEL),
        ("row", pa.int64()),
        ("turn", pa.int32()),
        ("rule", _LABEL),
        ("before", pa.string()),
        ("after", pa.string()),
    ]
)
VERDICTS = pa.schema([("source", _LABEL), ("row", pa.int64()), ("rule", _LABEL), ("keep", pa.bool_()), ("reason", pa.string())])
SPLIT = pa.schema([("source", _LABEL), ("row", pa.int64()), ("is_held_out", pa.bool_())])
EXAMPLES = pa.schema(
    [
        ("row", pa.int64()),
        ("part", pa.int32()),
        ("task", _LABEL),
        ("num_tokens", pa.int32()),
        ("num_turns", pa.int32()),
        ("num_learned_tokens", pa.int32()),
        ("flags", pa.int32()),  # records.Flag
    ]
)
PLANNED = pa.schema(  # line i is example i of the plan
    [
        ("source", _LABEL),
        ("shard", _LABEL),  # "render", or "rerender" for a record whose text a rule rewrote
        ("index", pa.int64()),  # position in that rendered set
        ("row", pa.int64()),  # position in the source's conversations
        ("part", pa.int32()),
        ("task", _LABEL),
        ("num_tokens", pa.int32()),
        ("multiplier", pa.float64()),  # on every token weight: source and row weights, normalisation
        ("weight", pa.float64()),  # total weight of its targets in one visit
        ("num_visits", pa.int32()),
    ]
)
PLACEMENTS = pa.schema(  # sorted by (row, start)
    [("row", pa.int64()), ("example", pa.int32()), ("visit", pa.int32()), ("start", pa.int32()), ("length", pa.int32())]
)
PLAN_STEPS = pa.schema(
    [
        ("step", pa.int64()),
        ("window", pa.int64()),
        ("first_row", pa.int64()),
        ("num_rows", pa.int64()),
        ("num_examples", pa.int64()),
        ("real_tokens", pa.int64()),
        ("slots", pa.int64()),
        ("total_weight", pa.float64()),
    ]
)
HELD_OUT = pa.schema(
    [
        ("source", _LABEL),
        ("shard", _LABEL),
        ("index", pa.int64()),
        ("row", pa.int64()),
        ("part", pa.int32()),
        ("task", _LABEL),
        ("num_tokens", pa.int32()),
        ("item", pa.string()),  # row_id
    ]
)
SCORES = pa.schema(
    [
        ("run", _LABEL),
        ("step", pa.int64()),
        ("task", _LABEL),
        ("item", pa.string()),
        ("metric", _LABEL),
        ("value", pa.float64()),
        ("weight", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)
SAMPLES = pa.schema(
    [
        ("run", _LABEL),
        ("step", pa.int64()),
        ("task", _LABEL),
        ("item", pa.string()),
        ("prompt", pa.string()),
        ("reference", pa.string()),
        ("output", pa.string()),
        ("ended", pa.bool_()),
        ("num_tokens", pa.int64()),
    ]
)
STEPS = pa.schema(
    [
        ("step", pa.int64()),
        ("part", _LABEL),  # "all", or one of the next three followed by a name: "task maths", "source chat", "kind assistant"
        ("loss_sum", pa.float64()),
        ("weight", pa.float64()),
        ("tokens", pa.int64()),
        ("grad_norm", pa.float64()),  # this and what follows on the "all" line only
        ("learning_rate", pa.float64()),
        ("seconds", pa.float64()),
        ("real_tokens", pa.int64()),
        ("slots", pa.int64()),
    ]
)


def write_table(path: Path, table: pa.Table) -> None:
    """Writes Parquet with zstd."""
    pq.write_table(table, path, compression="zstd", compression_level=1)


def read_table(path: Path, schema: pa.Schema | None = None) -> pa.Table:
    """The table in a Parquet file, cast to `schema` where one is given."""
    table = pq.read_table(path)
    return table if schema is None else table.cast(schema)


def write_records(path: Path, schema: pa.Schema, records: Iterable[Any]) -> int:
    """Writes dataclass records as a table and returns how many."""
    rows = [dataclasses.asdict(record) for record in records]
    columns = {name: [row[name] for row in rows] for name in schema.names}
    write_table(path, pa.table(columns, schema=schema))
    return len(rows)


def _read_records(path: Path, schema: pa.Schema, record: type[R]) -> list[R]:
    columns = read_table(path, schema).to_pydict()
    return [record(*values) for values in zip(*(columns[name] for name in schema.names), strict=True)]


def read_dropped(path: Path) -> list[Dropped]:
    """All records of a `dropped.parquet`."""
    return _read_records(path, DROPPED, Dropped)


def read_rewrites(path: Path) -> list[Rewrite]:
    """All records of a `rewrites.parquet`."""
    return _read_records(path, REWRITES, Rewrite)


def read_verdicts(path: Path) -> list[Verdict]:
    """All records of a `verdicts.parquet`."""
    return _read_records(path, VERDICTS, Verdict)


def read_scores(path: Path) -> list[Score]:
    """All records of a `scores.parquet`."""
    return _read_records(path, SCORES, Score)


def read_samples(path: Path) -> list[Sample]:
    """All records of a `samples.parquet`."""
    return _read_records(path, SAMPLES, Sample)


@dataclass
class ConversationColumns:
    """Conversations being collected, one Python list per column; `table()` turns them into Arrow without a row object.

    Turns are flat: `num_turns[i]` of them belong to record i.
    """

    file: list[str] = field(default_factory=list)
    line: list[int] = field(default_factory=list)
    part: list[int] = field(default_factory=list)
    task: list[str] = field(default_factory=list)
    licence: list[str] = field(default_factory=list)
    origin: list[str] = field(default_factory=list)
    content_key: list[bytes] = field(default_factory=list)
    prompt_key: list[bytes] = field(default_factory=list)
    tools: list[str | None] = field(default_factory=list)
    num_turns: list[int] = field(default_factory=list)
    role: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    reasoning: list[str | None] = field(default_factory=list)
    tool_calls: list[str | None] = field(default_factory=list)
    name: list[str | None] = field(default_factory=list)
    call_id: list[str | None] = field(default_factory=list)
    weight: list[float | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.line)

    def append(self, conversation: Conversation) -> None:
        """Adds one record."""
        where = conversation.where
        self.file.append(where.file)
        self.line.append(where.line)
        self.part.append(where.part)
        for name in ("task", "licence", "origin", "content_key", "prompt_key", "tools"):
            getattr(self, name).append(getattr(conversation, name))
        self.num_turns.append(len(conversation.turns))
        for turn in conversation.turns:
            for name in TURN.names:
                getattr(self, name).append(getattr(turn, name))

    def table(self) -> pa.Table:
        """The collected records under the schema CONVERSATIONS."""
        turns = pa.StructArray.from_arrays([pa.array(getattr(self, f.name), f.type) for f in TURN], fields=list(TURN))
        offsets = np.concatenate([[0], np.cumsum(self.num_turns, dtype=np.int64)]).astype(np.int32)
        flat = [pa.array(getattr(self, f.name), _plain(f.type)).cast(f.type) for f in CONVERSATIONS if f.name != "turns"]
        return pa.table([*flat, pa.ListArray.from_arrays(pa.array(offsets), turns)], schema=CONVERSATIONS)


def _plain(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_dictionary(kind) else kind


@dataclass(frozen=True)
class Conversations:
    """A source's records as columns; `[i]` is the one-row view.

    `apply(rewrites)` gives the text that will be trained; the table itself is never changed.
    """

    source: str
    table: pa.Table

    @classmethod
    def read(cls, folder: Path, source: str) -> Conversations:
        """The records of a finished `read` artefact."""
        return cls(source, read_table(folder / "conversations.parquet", CONVERSATIONS))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, row: int) -> Conversation:
        return _conversation(self.source, self.table.slice(row, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Conversation]:
        for batch in self.table.to_batches(max_chunksize=4096):
            for record in batch.to_pylist():
                yield _conversation(self.source, record)

    def strings(self, column: str) -> list[str]:
        """A label column (task, file, licence, origin) as Python strings."""
        return [str(value) for value in self.table[column].to_pylist()]

    def take(self, rows: Sequence[int]) -> Conversations:
        """The records at these positions, in this order."""
        return Conversations(self.source, self.table.take(pa.array(rows, pa.int64())))


def _conversation(source: str, record: dict[str, Any]) -> Conversation:
    return Conversation(
        where=Origin(source, record["file"], record["line"], record["part"]),
        turns=tuple(Turn(**turn) for turn in record["turns"]),
        task=record["task"],
        licence=record["licence"],
        origin=record["origin"],
        tools=record["tools"],
        content_key=record["content_key"],
        prompt_key=record["prompt_key"],
    )


def apply_rewrites(conversation: Conversation, rewrites: Sequence[Rewrite]) -> Conversation:
    """The conversation with each rewritten turn's content replaced by the last rule's text.

    >>> c = Conversation(Origin("s", "f", 1), (Turn("user", "q"), Turn("assistant", "Sure! 4")), "t", "MIT", "human")
    >>> apply_rewrites(c, [Rewrite("s", 0, 1, "strip_boilerplate", "Sure! 4", "4")]).turns[1].content
    '4'
    """
    turns = list(conversation.turns)
    for rewrite in rewrites:
        assert turns[rewrite.turn].content == rewrite.before, f"{conversation.row_id}: rewrite does not fit its turn"
        turns[rewrite.turn] = dataclasses.replace(turns[rewrite.turn], content=rewrite.after)
    return dataclasses.replace(conversation, turns=tuple(turns))


@dataclass(frozen=True)
class RenderedSet:
    """All examples of one source, flat and memory-mapped.

    ids i32, kinds u8, turns i16 are (total_tokens,); example i is `offsets[i] : offsets[i + 1]`. `turn_weights` f32 is flat
    by example too, `turn_offsets[i] : turn_offsets[i + 1]`. `examples` is a table of schema EXAMPLES.
    """

    folder: Path

    def __len__(self) -> int:
        return int(self.examples.num_rows)

    def __getitem__(self, index: int) -> Rendered:
        a, b = self.offsets[index], self.offsets[index + 1]
        c, d = self.turn_offsets[index], self.turn_offsets[index + 1]
        return Rendered(self.ids[a:b], self.kinds[a:b], self.turns[a:b], self.turn_weights[c:d])

    @cached_property
    def examples(self) -> pa.Table:
        """One line per example."""
        return read_table(self.folder / "examples.parquet", EXAMPLES)

    @cached_property
    def ids(self) -> np.ndarray:
        """Token ids."""
        return _map(self.folder / "ids.npy")

    @cached_property
    def kinds(self) -> UInt8:
        """One `Kind` per token."""
        return _map(self.folder / "kinds.npy")

    @cached_property
    def turns(self) -> np.ndarray:
        """The turn each token belongs to, -1 for none."""
        return _map(self.folder / "turns.npy")

    @cached_property
    def turn_weights(self) -> Float32:
        """Learn weight of every turn, flat."""
        return _map(self.folder / "turn_weights.npy")

    @cached_property
    def offsets(self) -> Int64:
        """First token of every example, and the total."""
        return _offsets(self.examples["num_tokens"])

    @cached_property
    def turn_offsets(self) -> Int64:
        """First turn of every example, and the total."""
        return _offsets(self.examples["num_turns"])

    @staticmethod
    def write(folder: Path, examples: pa.Table, rendered: Sequence[Rendered]) -> None:
        """Writes examples one by one given; `examples` must have one line for each."""
        assert examples.num_rows == len(rendered), "one line per example"
        for name, dtype in (("ids", np.int32), ("kinds", np.uint8), ("turns", np.int16), ("turn_weights", np.float32)):
            parts = [getattr(r, name) for r in rendered]
            np.save(folder / f"{name}.npy", np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype))
        write_table(folder / "examples.parquet", examples.cast(EXAMPLES))


class RenderedWriter:
    """Writes a `RenderedSet` batch by batch, so that memory holds one batch; `close()` makes it readable.

    A .npy header states the length, so it is written last, over a placeholder of the same size.
    """

    _ARRAYS = (("ids", np.int32), ("kinds", np.uint8), ("turns", np.int16), ("turn_weights", np.float32))

    def __init__(self, folder: Path) -> None:
        self._files = {name: (folder / f"{name}.npy").open("w+b") for name, _ in self._ARRAYS}
        self._lengths = dict.fromkeys(self._files, 0)
        for name, dtype in self._ARRAYS:
            self._write_header(name, dtype)
        self._examples = pq.ParquetWriter(folder / "examples.parquet", EXAMPLES, compression="zstd", compression_level=1)

    def write(self, examples: pa.Table, rendered: Sequence[Rendered]) -> None:
        """Appends examples; `examples` has one line for each."""
        assert examples.num_rows == len(rendered), "one line per example"
        for name, dtype in self._ARRAYS:
            parts = [getattr(r, name) for r in rendered]
            array = np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)
            self._files[name].write(array.tobytes())
            self._lengths[name] += len(array)
        self._examples.write_table(examples.cast(EXAMPLES))

    def close(self) -> None:
        """Fills in the lengths."""
        for name, dtype in self._ARRAYS:
            self._write_header(name, dtype)
            self._files[name].close()
        self._examples.close()

    def _write_header(self, name: str, dtype: Any) -> None:
        file = self._files[name]
        file.seek(0)
        descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
        # numpy pads this header so that a first axis of up to 21 digits fits in place
        header = {"descr": descr, "fortran_order": False, "shape": (self._lengths[name],)}
        np.lib.format.write_array_header_1_0(file, header)


def _offsets(lengths: pa.ChunkedArray) -> Int64:
    return np.concatenate([[0], np.cumsum(lengths.to_numpy(), dtype=np.int64)])


def _map(path: Path) -> np.ndarray:
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


@dataclass(frozen=True)
class Shards:
    """The rendered sets of a run by (source, shard), opened on first use."""

    folders: dict[tuple[str, str], Path]

    @cached_property
    def _sets(self) -> dict[tuple[str, str], RenderedSet]:
        return {name: RenderedSet(folder) for name, folder in self.folders.items()}

    def set(self, source: str, shard: str) -> RenderedSet:
        """One rendered set."""
        return self._sets[source, shard]

    def example(self, source: str, shard: str, index: int) -> Rendered:
        """One example."""
        return self._sets[source, shard][index]
