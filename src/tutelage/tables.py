"""One reader and one writer per record: Parquet (zstd) for tables that people open, NumPy files for tokens.

Every table of an artefact has its schema here, so that a room can read what another wrote without importing it.
Records of a source are numbered: `row` is the position in that source's `conversations.parquet`, the join key everywhere.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tutelage.arrays import ArrayWriter, map_array
from tutelage.records import (
    ROLES,
    Conversation,
    Dropped,
    Float32,
    Int32,
    Int64,
    Origin,
    Rendered,
    Rewrite,
    Sample,
    Score,
    Turn,
    UInt8,
    Verdict,
)

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
TALLIED = pa.schema(  # line i is example i of the rendered set: what a plan must know of it, beside the tally of its targets
    [("row", pa.int64()), ("part", pa.int32()), ("task", _LABEL), ("num_tokens", pa.int32()), ("num_requests", pa.int32())]
)
RECORD_WEIGHTS = pa.schema([("weight", pa.float64())])  # one line per record of a source that states weights
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
FINDINGS = pa.schema(  # what an audit found, one line per example (or record) and finding
    [
        ("finding", _LABEL),
        ("source", _LABEL),
        ("row", pa.int64()),
        ("part", pa.int32()),
        ("record", pa.string()),  # row_id
        ("detail", pa.string()),
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
        ("memory_bytes", pa.int64()),
        ("objective", pa.float64()),  # what was minimised, per unit of weight; null where that is loss_sum / weight
        ("kl", pa.float64()),  # to the starting model; null without a pull to it
    ]
)


def write_table(path: Path | io.BytesIO, table: pa.Table) -> None:
    """Writes Parquet with zstd. Whole numbers of flat tables are kept as differences: half the time, and less on disk."""
    kinds = {field.name: field.type for field in table.schema}
    how: dict[str, Any] = {}
    if not any(pa.types.is_nested(kind) for kind in kinds.values()):
        whole = [name for name, kind in kinds.items() if kind in (pa.int32(), pa.int64())]
        how["use_dictionary"] = [name for name in kinds if name not in whole] or False
        how["column_encoding"] = dict.fromkeys(whole, "DELTA_BINARY_PACKED") or None
    pq.write_table(table, path, compression="zstd", compression_level=1, **how)


@cache
def _without_rows(schema: pa.Schema) -> bytes:
    out = io.BytesIO()
    write_table(out, schema.empty_table())
    return out.getvalue()


def write_empty(path: Path, schema: pa.Schema) -> None:
    """Writes a table without rows: the same bytes every time, which are made once."""
    path.write_bytes(_without_rows(schema))


def read_table(path: Path, schema: pa.Schema | None = None) -> pa.Table:
    """The table in a Parquet file, cast to `schema` where one is given."""
    table = pq.read_table(path)
    return table if schema is None else table.cast(schema)


def write_records(path: Path, schema: pa.Schema, records: Iterable[Any]) -> int:
    """Writes dataclass records as a table and returns how many."""
    rows = [dataclasses.asdict(record) for record in records]
    if not rows:
        write_empty(path, schema)
        return 0
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
    _sealed: list[pa.Array] = field(default_factory=list)

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

    def add_turns(self, columns: Iterable[Iterable[Any]]) -> None:
        """Adds turns given as columns, in the order of the schema TURN."""
        for name, values in zip(TURN.names, columns, strict=True):
            getattr(self, name).extend(values)

    def add_plain_turns(self, roles: list[str], contents: pa.StringArray) -> None:
        """Adds turns of a role and a text only; texts in Arrow take half the memory."""
        self._seal()
        self._sealed.append(contents)
        nothing = [None] * len(roles)
        self.role += roles
        for name in TURN.names[2:]:
            getattr(self, name).extend(nothing)

    def _seal(self) -> None:
        if self.content or not self._sealed:
            self._sealed.append(pa.array(self.content, pa.string()))
            self.content = []

    def table(self) -> pa.Table:
        """The collected records under the schema CONVERSATIONS."""
        self._seal()
        optional = [_column(getattr(self, f.name), f.type) for f in list(TURN)[2:]]
        roles = _column(self.role, _LABEL).cast(pa.string())
        turns = pa.StructArray.from_arrays([roles, pa.concat_arrays(self._sealed), *optional], fields=list(TURN))
        offsets = np.concatenate([[0], np.cumsum(self.num_turns, dtype=np.int64)]).astype(np.int32)
        flat = [_column(getattr(self, f.name), f.type) for f in CONVERSATIONS if f.name != "turns"]
        return pa.table([*flat, pa.ListArray.from_arrays(pa.array(offsets), turns)], schema=CONVERSATIONS)


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """The values as an array; quick where all are null, or few are different."""
    if pa.types.is_dictionary(kind):
        codes = {label: code for code, label in enumerate(dict.fromkeys(values))}
        several = np.fromiter(map(codes.__getitem__, values), np.int32, len(values)) if len(codes) > 1 else None
        indices = np.zeros(len(values), np.int32) if several is None else several
        return pa.DictionaryArray.from_arrays(indices, pa.array(list(codes), pa.string()))
    return pa.nulls(len(values), kind) if values.count(None) == len(values) else pa.array(values, kind)


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


class ArrowTexts(Sequence[str]):
    """Texts of an Arrow array, made Python strings when asked for: one by one for a position, all at once for a slice."""

    def __init__(self, array: pa.StringArray) -> None:
        self.array = array
        self._texts: list[str] | None = None

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, i: Any) -> Any:
        if self._texts is None:
            if not isinstance(i, slice):
                return self.array[i].as_py()
            self._texts = self.array.to_numpy(zero_copy_only=False).tolist()
        return self._texts[i]


@dataclass(frozen=True, slots=True)
class TurnColumns:
    """Consecutive records of one `conversations.parquet` as columns: R records from position `first_row`, T turns, flat.

    `num_turns` i32 (R,); turns of record i are `offsets[i] : offsets[i + 1]` of every flat column. `role` u8 (T,) indexes
    `records.ROLES`; `content` has T texts. `reasoning`, `tool_calls`, `name`, `call_id` have T entries, `tools` has R; each
    is None where no turn (record) of the batch has one. `weight` f32 (T,) is nan where the data gives none, None without
    any. `task_codes` i32 (R,) indexes `task_names`.
    """

    first_row: int
    num_turns: Int32
    role: UInt8
    content: Sequence[str]
    reasoning: list[str | None] | None
    tool_calls: list[str | None] | None
    name: list[str | None] | None
    call_id: list[str | None] | None
    weight: Float32 | None
    tools: list[str | None] | None
    task_codes: Int32
    task_names: list[str]

    def __len__(self) -> int:
        return len(self.num_turns)

    @property
    def offsets(self) -> Int64:
        """First turn of every record, and T: i64 (R + 1,)."""
        return np.concatenate([[0], np.cumsum(self.num_turns, dtype=np.int64)])


def in_pieces(source: Any) -> pq.ParquetFile:
    """A Parquet file to be read a piece at a time: unless it is told, Arrow keeps all pieces of a file that it has read."""
    return pq.ParquetFile(source, pre_buffer=False)


def read_turns(path: Path, *, batch_rows: int = 4096) -> Iterator[TurnColumns]:
    """The turns of a `conversations.parquet`, at most `batch_rows` records at a time, without an object per record."""
    first_row = 0
    for batch in in_pieces(path).iter_batches(batch_rows, columns=["task", "tools", "turns"]):
        turns = dict(zip(TURN.names, batch["turns"].flatten().flatten(), strict=True))
        role = pc.index_in(turns["role"], value_set=pa.array(ROLES))
        assert not role.null_count, "a turn has one of the roles in records.ROLES"
        weight = turns["weight"]
        yield TurnColumns(
            first_row=first_row,
            num_turns=np.diff(batch["turns"].offsets.to_numpy()).astype(np.int32, copy=False),
            role=role.to_numpy().astype(np.uint8),
            content=ArrowTexts(turns["content"]),
            reasoning=_texts(turns["reasoning"]),
            tool_calls=_texts(turns["tool_calls"]),
            name=_texts(turns["name"]),
            call_id=_texts(turns["call_id"]),
            weight=None if weight.null_count == len(weight) else weight.to_numpy(zero_copy_only=False),
            tools=_texts(batch["tools"]),
            task_codes=batch["task"].indices.to_numpy(),
            task_names=batch["task"].dictionary.to_pylist(),
        )
        first_row += batch.num_rows


def _texts(column: pa.Array) -> list[str | None] | None:
    if column.null_count == len(column):
        return None
    texts: list[str | None] = column.to_numpy(zero_copy_only=False).tolist()
    return texts


def records_at(
    path: Path, rows: Sequence[int], *, columns: Sequence[str] = ("file", "line", "part", "turns")
) -> dict[int, dict[str, Any]]:
    """Records of a `conversations.parquet` by position; only these columns, of the row groups that hold them, are read."""
    out: dict[int, dict[str, Any]] = {}
    if not len(rows):
        return out
    wanted = np.unique(np.array(rows, np.int64))
    file, first = in_pieces(path), 0
    for group in range(file.metadata.num_row_groups):
        end = first + file.metadata.row_group(group).num_rows
        here = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, end)]
        if len(here):
            table = file.read_row_group(group, columns=list(columns))
            out |= dict(zip(here.tolist(), table.take(pa.array(here - first)).to_pylist(), strict=True))
        first = end
    return out


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
        return map_array(self.folder / "ids.npy")

    @cached_property
    def kinds(self) -> UInt8:
        """One `Kind` per token."""
        return map_array(self.folder / "kinds.npy")

    @cached_property
    def turns(self) -> np.ndarray:
        """The turn each token belongs to, -1 for none."""
        return map_array(self.folder / "turns.npy")

    @cached_property
    def turn_weights(self) -> Float32:
        """Learn weight of every turn, flat."""
        return map_array(self.folder / "turn_weights.npy")

    @cached_property
    def offsets(self) -> Int64:
        """First token of every example, and the total."""
        return _offsets(self._column("num_tokens"))

    @cached_property
    def turn_offsets(self) -> Int64:
        """First turn of every example, and the total."""
        return _offsets(self._column("num_turns"))

    def _column(self, name: str) -> pa.ChunkedArray:
        return pq.read_table(self.folder / "examples.parquet", columns=[name])[name]

    @staticmethod
    def write(folder: Path, examples: pa.Table, rendered: Sequence[Rendered]) -> None:
        """Writes examples one by one given; `examples` must have one line for each."""
        assert examples.num_rows == len(rendered), "one line per example"
        for name, dtype in RENDERED_ARRAYS.items():
            parts = [getattr(r, name) for r in rendered]
            np.save(folder / f"{name}.npy", np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype))
        write_table(folder / "examples.parquet", examples.cast(EXAMPLES))


RENDERED_ARRAYS: Mapping[str, Any] = {"ids": np.int32, "kinds": np.uint8, "turns": np.int16, "turn_weights": np.float32}
"""The flat arrays of a rendered set, a .npy file each."""
_GROUP_ROWS = 1 << 16
"""Examples per row group: few groups are read many times as fast as many."""


class RenderedWriter:
    """Writes a `RenderedSet` batch by batch, so that memory holds one batch; `close()` makes it readable."""

    def __init__(self, folder: Path) -> None:
        self._arrays = ArrayWriter(folder, RENDERED_ARRAYS)
        self._examples = pq.ParquetWriter(folder / "examples.parquet", EXAMPLES, compression="zstd", compression_level=1)
        self._waiting: list[pa.Table] = []

    def write(self, examples: pa.Table, rendered: Sequence[Rendered]) -> None:
        """Appends examples; `examples` has one line for each."""
        assert examples.num_rows == len(rendered), "one line per example"
        parts = {name: [getattr(r, name) for r in rendered] for name in RENDERED_ARRAYS}
        self.write_arrays(examples, **{name: np.concatenate(some) if some else np.zeros(0) for name, some in parts.items()})

    def write_arrays(self, examples: pa.Table, **arrays: np.ndarray) -> None:
        """Appends examples whose `ids`, `kinds`, `turns` and `turn_weights` lie end to end."""
        self._arrays.write(**arrays)
        self._waiting.append(examples.cast(EXAMPLES))
        if sum(table.num_rows for table in self._waiting) >= _GROUP_ROWS:
            self._write_waiting()

    def _write_waiting(self) -> None:
        if self._waiting:
            self._examples.write_table(pa.concat_tables(self._waiting).unify_dictionaries().combine_chunks())
            self._waiting.clear()

    def close(self) -> None:
        """Writes what is left."""
        self._write_waiting()
        self._arrays.close()
        self._examples.close()


def _offsets(lengths: pa.ChunkedArray) -> Int64:
    return np.concatenate([[0], np.cumsum(lengths.to_numpy(), dtype=np.int64)])


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
