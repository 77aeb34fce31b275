"""The loop of this room: raw records to the columns of `conversations.parquet`, or to lines of `dropped.parquet`."""

from __future__ import annotations

import contextlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.disk import EarlyWriteback
from tutelage.sources.bulk import Bulk, bulk_named
from tutelage.sources.detect import Decision, check_columns, choose, shape_named, spread
from tutelage.sources.keys import ROLE_OF_LETTER, TurnRow, content_key, encoded, keys_of_all, prompt_key
from tutelage.sources.parse import Record, parse, parse_all
from tutelage.sources.reasons import MALFORMED, MAX_EXCERPT_CHARACTERS, Malformed, excerpt_of, printable
from tutelage.sources.scan import Block
from tutelage.sources.shapes import placeholders, split_instances
from tutelage.sources.spec import IntakeSpec, SourceSpec
from tutelage.tables import CONVERSATIONS, DROPPED, ConversationColumns, write_empty

ROWS_PER_GROUP = 20_000
CHARACTERS_PER_GROUP = 16_000_000  # bounds memory where records are long
MANY = 512
"""Records that are taken together where all are ordinary; where one is not, FEW are tried, and then single ones."""
FEW = 32
REPEATED_COLUMNS = ["file", "task", "licence", "origin", "turns.list.element.role"]
"""Of conversations.parquet: what is written as a code per value; texts and keys hardly ever repeat."""
ROW_UNKNOWN = -1
LARGEST_WEIGHT = 3e38
"""What a 32-bit number holds."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A sound record that the recipe does not want."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Labels:
    """How a record gets its task, licence and origin, and which of them are let in."""

    source: str
    spec: SourceSpec
    intake: IntakeSpec

    @property
    def columns(self) -> list[str]:
        """The columns that every record must have."""
        return [name for name in (self.spec.task_column, self.spec.licence_column, self.spec.origin_column) if name]

    def constant(self) -> tuple[str, str, str] | Refusal | None:
        """Labels that are the same for every record, None when a column decides."""
        return None if self.columns else self.of({})

    def of(self, record: Record) -> tuple[str, str, str] | Refusal:
        """(task, licence, origin) of one record, or why it is not let in; Malformed when a column holds no label."""
        task = self._label(record, self.spec.task_column, self.spec.task or self.source)
        licence = self._label(record, self.spec.licence_column, self.spec.licence)
        origin = self._label(record, self.spec.origin_column, self.spec.origin)
        if self.spec.origin_column and origin != "human" and not (origin.startswith("model:") and len(origin) > len("model:")):
            raise Malformed("bad_label", f"`{self.spec.origin_column}` is {origin!r}; an origin is `human` or `model:NAME`")
        if self.intake.licences is not None and licence not in self.intake.licences:
            return Refusal("licence_not_allowed", f"{licence}; allowed: {', '.join(self.intake.licences)}")
        if self.intake.origins is not None and not is_origin_allowed(origin, self.intake.origins):
            return Refusal("origin_not_allowed", f"{origin}; allowed: {', '.join(self.intake.origins)}")
        return task, licence, origin

    def of_all(self, records: Sequence[Record]) -> Sequence[Sequence[str]] | None:
        """As `of` for each of many records, as three columns; None when not all are let in by labels that are texts."""
        columns = [[record.get(name) for record in records] for name in self.columns]
        if not {str}.issuperset(map(type, chain.from_iterable(columns))):
            return None
        values = list(zip(*columns, strict=True)) if columns else [()]
        found = {value: self._of_texts(value) for value in set(values)}
        labels = [label for value in values if (label := found[value]) is not None]
        if len(labels) < len(values):
            return None
        return list(zip(*labels, strict=True)) if columns else [[label] * len(records) for label in labels[0]]

    def weight(self, record: Record) -> float:
        """The weight that a record states for itself, 1 where the recipe names no field; Malformed for what is none."""
        name = self.spec.weight_field
        if name is None:
            return 1.0
        value = record.get(name)
        if type(value) is str:  # csv knows only texts
            with contextlib.suppress(ValueError):
                value = float(value)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= LARGEST_WEIGHT:
            found = "absent" if value is None else repr(value)[:40]
            raise Malformed("bad_weight", f"`{name}` is {found}; a weight is a number of 0 or more")
        return float(value)

    def weights_of_all(self, records: Sequence[Record]) -> Sequence[float] | None:
        """As `weight` for each of many records; None when one of them states none."""
        if self.spec.weight_field is None:
            return ()
        try:
            return [self.weight(record) for record in records]
        except Malformed:
            return None

    def _of_texts(self, values: Sequence[str]) -> tuple[str, str, str] | None:
        try:
            labels = self.of(dict(zip(self.columns, values, strict=True)))
        except Malformed:
            return None
        return None if isinstance(labels, Refusal) else labels

    @staticmethod
    def _label(record: Record, column: str | None, otherwise: str) -> str:
        if column is None:
            return otherwise
        value = record.get(column)
        if type(value) is int:
            return str(value)
        if type(value) is not str or not value.strip():
            raise Malformed("bad_label", f"`{column}` is {'absent' if value is None else repr(value)[:40]}")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise Malformed("lone_surrogate", f"in `{column}`") from None
        return value


def is_origin_allowed(origin: str, allowed: Iterable[str]) -> bool:
    """Whether an origin is one of the allowed ones; `model:*` allows every model.

    >>> is_origin_allowed("model:gpt-4", ["human", "model:*"]), is_origin_allowed("human", ["model:*"])
    (True, False)
    """
    return any(origin == each or (each.endswith("*") and origin.startswith(each[:-1])) for each in allowed)


@dataclass
class DroppedWriter:
    """Lines of `dropped.parquet`, written in groups, and their count by reason."""

    source: str
    path: Path
    counts: Counter[str] = field(default_factory=Counter)
    _lines: list[tuple[str, str, int, int, str, str, str]] = field(default_factory=list)
    _writer: pq.ParquetWriter | None = None

    def add(self, file: str, line: int, reason: str, *, detail: str = "", excerpt: str = "", row: int = ROW_UNKNOWN) -> None:
        """One record that was set aside."""
        self.counts[reason] += 1
        excerpt = printable(excerpt, MAX_EXCERPT_CHARACTERS)
        self._lines.append((self.source, file, line, row, reason, printable(detail), excerpt))
        if len(self._lines) >= ROWS_PER_GROUP:
            self._flush()

    def close(self) -> None:
        """Writes what is left; the file is there even when it has no line."""
        if self._writer is None and not self._lines:
            write_empty(self.path, DROPPED)
            return
        self._flush()
        assert self._writer is not None
        self._writer.close()

    def _flush(self) -> None:
        columns = zip(*self._lines, strict=True) if self._lines else [() for _ in DROPPED]
        arrays = [pa.array(list(values), _plain(kind)).cast(kind) for values, kind in zip(columns, DROPPED.types, strict=True)]
        self._writer = write_group(self._writer, self.path, pa.table(arrays, schema=DROPPED))
        self._lines = []


def _plain(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_dictionary(kind) else kind


def write_group(writer: pq.ParquetWriter | None, path: Path, table: pa.Table) -> pq.ParquetWriter:
    """Appends a table as one row group, opening the file at the first."""
    writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd", compression_level=1)
    writer.write_table(table)
    return writer


class GroupWriter:
    """Row groups of a Parquet file, compressed and written by a thread of its own while the next one is gathered."""

    def __init__(self, path: Path) -> None:
        self._thread = ThreadPoolExecutor(1)
        # Packing texts to 0.6 of their size, and unpacking them, takes as long as parsing their JSON.
        self._writer = pq.ParquetWriter(path, CONVERSATIONS, compression="none", use_dictionary=REPEATED_COLUMNS)
        self._writeback = EarlyWriteback(path)
        self._waiting: Future[None] | None = None

    def write(self, columns: ConversationColumns) -> None:
        """Takes the next row group, once the last one is written; raises what went wrong with that one."""
        self._wait()
        self._waiting = self._thread.submit(self._append, columns)

    def close(self) -> None:
        """The file is whole, or raises."""
        self._wait()
        self._writer.close()
        self._thread.shutdown()

    def _wait(self) -> None:
        if self._waiting is not None:
            self._waiting.result()

    def _append(self, columns: ConversationColumns) -> None:
        self._writer.write_table(columns.table())
        self._writeback.begin()


@dataclass
class Gatherer:
    """Takes the blocks of a source's files; bounded memory, whatever their size."""

    labels: Labels
    path: Path
    dropped: DroppedWriter
    num_kept: int = 0
    num_records: int = 0
    weights: array[float] = field(default_factory=lambda: array("d"))
    """What each kept record states as its weight; empty where the recipe names no field."""
    _columns: ConversationColumns = field(default_factory=ConversationColumns)
    _turns: list[TurnRow] = field(default_factory=list)
    _num_characters: int = 0

    def __post_init__(self) -> None:
        self._groups = GroupWriter(self.path)

    def take_file(self, name: str, blocks: Iterator[Block], advance: Callable[[int], None]) -> dict[str, Any]:
        """Reads one file and returns its facts: records, bad ones, shape, why."""
        blocks, decision = self._decide(blocks)
        before, bad_before = self.num_records, self.num_bad
        for block in blocks:
            seen = self.num_records
            self._take_block(name, block, decision.name)
            advance(self.num_records - seen)
        records, bad = self.num_records - before, self.num_bad - bad_before
        return {"records": records, "bad": bad, "shape": decision.name, "why": decision.why}

    def close(self) -> None:
        """Writes what is left; the file is there even when it has no record."""
        self._flush()
        self._groups.close()

    @property
    def num_bad(self) -> int:
        """Malformed records so far."""
        return sum(count for reason, count in self.dropped.counts.items() if reason in MALFORMED)

    def _decide(self, blocks: Iterator[Block]) -> tuple[Iterator[Block], Decision]:
        """The blocks unchanged, and the shape of the file by its first one."""
        first = next((block for block in blocks if any(not _is_blank(item) for item in block.items)), None)
        spec = self.labels.spec
        if first is None:
            return iter(()), Decision(spec.shape, "the file holds no record")
        sample = [_look(item) for item in spread([item for item in first.items if not _is_blank(item)])]
        needed = self.labels.columns
        if spec.columns is not None:
            templates = [spec.columns.user, spec.columns.assistant, spec.columns.system or ""]
            needed = [*needed, *(name for template in templates if template for name in placeholders(template))]
        check_columns(sample, [*needed, *([spec.weight_field] if spec.weight_field else [])])
        decision = choose(sample) if spec.shape == "auto" else Decision(spec.shape, "as the recipe says")
        return chain([first], blocks), decision

    def _take_block(self, file: str, block: Block, shape: str) -> None:
        is_refused = isinstance(self.labels.constant(), Refusal)
        bulk = None if is_refused else bulk_named(shape, self.labels.spec.columns)
        for many in _parts(block, MANY):
            if not self._take_together(file, many, bulk):
                for few in _parts(many, FEW):
                    if not self._take_together(file, few, bulk):
                        self._take_singly(file, few, shape)

    def _take_together(self, file: str, block: Block, bulk: Bulk | None) -> bool:
        """Takes all of these records at once, or none when one of them is not ordinary."""
        if bulk is None:
            return False
        kinds = set(map(type, block.items))
        records = parse_all(block.items) if kinds == {bytes} else block.items if kinds == {dict} else None
        if records is None or (labels := self.labels.of_all(records)) is None or (texts := bulk(records)) is None:
            return False
        weights = self.labels.weights_of_all(records)
        num_characters = sum(map(len, texts.contents))
        contents = encoded(texts.contents) if num_characters < CHARACTERS_PER_GROUP else None
        if contents is None or weights is None:
            return False
        content_keys, prompt_keys = keys_of_all(texts.orders, contents)
        self._unload()
        columns = self._columns
        columns.content_key += content_keys
        columns.prompt_key += prompt_keys
        columns.file += [file] * len(records)
        columns.line += block.lines
        columns.part += [0] * len(records)
        for column, values in zip((columns.task, columns.licence, columns.origin), labels, strict=True):
            column += values
        columns.tools += [None] * len(records)
        self.weights.extend(weights)
        columns.num_turns += map(len, texts.orders)
        columns.add_plain_turns([ROLE_OF_LETTER[letter] for letter in "".join(texts.orders)], contents)
        self._count(len(records), num_characters)
        return True

    def _take_singly(self, file: str, block: Block, shape: str) -> None:
        convert = shape_named(shape, self.labels.spec.columns)
        is_task = shape == "natural_instructions"
        constant = self.labels.constant()
        for line, item in zip(block.lines, block.items, strict=True):
            if _is_blank(item):
                continue
            try:
                record = parse(item) if type(item) is bytes else _as_record(item)
                labels = constant or self.labels.of(record)
                if type(labels) is Refusal:
                    self._refuse(file, line, labels, split_instances(record) if is_task else (record,))
                    continue
                weight = self.labels.weight(record)
                if not is_task:
                    turns, tools = convert(record)
                    self._keep(file, line, 0, labels, turns, tools)
                    self._weigh(weight)
                    continue
                parts = split_instances(record)
            except Malformed as error:
                self._set_aside(file, line, error, item)
                continue
            for part, instance in enumerate(parts):
                try:
                    turns, tools = convert(_as_record(instance))
                    self._keep(file, line, part, labels, turns, tools)
                    self._weigh(weight)
                except Malformed as error:
                    self._set_aside(file, line, error, instance, part=part)

    def _keep(self, file: str, line: int, part: int, labels: Any, turns: list[TurnRow], tools: str | None) -> None:
        columns = self._columns
        columns.content_key.append(content_key(turns, tools))  # first: it may refuse the record
        columns.prompt_key.append(prompt_key(turns))
        columns.file.append(file)
        columns.line.append(line)
        columns.part.append(part)
        columns.task.append(labels[0])
        columns.licence.append(labels[1])
        columns.origin.append(labels[2])
        columns.tools.append(tools)
        columns.num_turns.append(len(turns))
        self._turns += turns
        self._count(1, sum(len(turn[1]) for turn in turns))

    def _weigh(self, weight: float) -> None:
        if self.labels.spec.weight_field is not None:
            self.weights.append(weight)

    def _count(self, num_records: int, num_characters: int) -> None:
        self.num_records += num_records
        self._num_characters += num_characters
        if len(self._columns) >= ROWS_PER_GROUP or self._num_characters >= CHARACTERS_PER_GROUP:
            self._flush()

    def _set_aside(self, file: str, line: int, error: Malformed, item: Any, part: int | None = None) -> None:
        self.num_records += 1
        where = "" if part is None else f"instance {part}: "
        self.dropped.add(file, line, error.reason, detail=where + error.detail, excerpt=error.excerpt or _excerpt(item))

    def _refuse(self, file: str, line: int, refusal: Refusal, parts: Sequence[Any]) -> None:
        for part in parts:
            self.num_records += 1
            self.dropped.add(file, line, refusal.reason, detail=refusal.detail, excerpt=_excerpt(part))

    def _unload(self) -> None:
        """Hands the turns of single records to the columns."""
        if self._turns:
            self._columns.add_turns(zip(*self._turns, strict=True))
            self._turns = []

    def _flush(self) -> None:
        self._unload()
        self.num_kept += len(self._columns)
        self._groups.write(self._columns)
        self._columns, self._num_characters = ConversationColumns(), 0


def _parts(block: Block, size: int) -> Iterator[Block]:
    for first in range(0, len(block.items), size):
        yield Block(block.lines[first : first + size], block.items[first : first + size])


def _is_blank(item: Any) -> bool:
    return type(item) is bytes and (not item or item.isspace())


def _as_record(item: Any) -> Record:
    if isinstance(item, Malformed):
        raise item
    if type(item) is not dict:
        raise Malformed("not_an_object", f"a {type(item).__name__}")
    return item


def _look(item: Any) -> Record | Malformed:
    try:
        return parse(item) if type(item) is bytes else _as_record(item)
    except Malformed as error:
        return error


def _excerpt(item: Any) -> str:
    if isinstance(item, bytes):
        return excerpt_of(item)
    if isinstance(item, Malformed):
        return item.excerpt
    shown = {key: value for key, value in item.items() if key != "lead"} if isinstance(item, dict) else item
    return json.dumps(shown, ensure_ascii=False, default=str)[:MAX_EXCERPT_CHARACTERS]
