"""The room's door to the store: `render` makes every record of a source an example, `rerender` those that a rule rewrote."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.compiled import kernel
from tutelage.errors import TemplateError
from tutelage.records import LEARNED_KINDS, Dropped, Int64, Rewrite
from tutelage.render.engines import EngineDiffers
from tutelage.render.examples import Renderer
from tutelage.render.finish import Block
from tutelage.render.forms import columns_of
from tutelage.render.kernels import count_learned, is_worth_a_kernel, load_kernels
from tutelage.render.provenance import Refusal
from tutelage.render.sheet import Sheet
from tutelage.render.spec import RenderSpec
from tutelage.render.template import read_template
from tutelage.render.tokenizer import OpenTokenizer, open_tokenizer
from tutelage.render.tokens import BATCH_TEXTS
from tutelage.store import Artefact, Counts, Outcome, Progress, Stage, Store
from tutelage.tables import (
    DROPPED,
    Conversations,
    RenderedWriter,
    TurnColumns,
    apply_rewrites,
    read_rewrites,
    read_turns,
    records_at,
    write_records,
)

VERSION = 2
PACKAGES = ("tokenizers", "transformers", "jinja2")

TEMPLATE_REASONS = frozenset(
    [
        "template_refuses",
        "unproved",
        "turn_hidden",
        "tool_call_hidden",
        "reasoning_hidden",
        "shown_twice",
        "no_stop",
        "merged_away",
    ]
)
"""Refusals that say something about the template. When every record meets the same one, the template is wrong, not the data."""

_LEARNED = np.uint32(sum(1 << kind for kind in LEARNED_KINDS))


def render_stage(read: Stage, *, tokenizer: Stage, spec: RenderSpec, base: Path, store: Store) -> Stage:
    """All records of a source as read, rendered: a `RenderedSet`, and dropped.parquet and lost.parquet with reasons."""
    template = read_template(spec.template, base=base)

    def build(folder: Path, inputs: Mapping[str, Artefact], progress: Progress) -> Outcome:
        path = inputs["read"].file("conversations.parquet")
        job = _Job(folder, read.slot, path, Renderer(_opened(inputs["tokenizer"].path), spec, template=template), progress)
        progress.start(f"render {read.slot}", pq.ParquetFile(path).metadata.num_rows, "records")
        job.run(lambda: ((columns, _numbers(columns)) for columns in read_turns(path, batch_rows=BATCH_TEXTS)))
        job.require_some_template()
        return job.finish()

    return Stage(
        name="render",
        version=VERSION,
        slot=read.slot,
        ingredients=_ingredients(spec, template),
        inputs={"read": read, "tokenizer": tokenizer},
        packages=PACKAGES,
        build=build,
    )


def rerender_stage(read: Stage, *, rewrite: Stage, tokenizer: Stage, spec: RenderSpec, base: Path, store: Store) -> Stage:
    """The records of a source that a rule rewrote, rendered with their new text; `row` still counts the source's records."""
    template = read_template(spec.template, base=base)

    def build(folder: Path, inputs: Mapping[str, Artefact], progress: Progress) -> Outcome:
        by_row: dict[int, list[Rewrite]] = {}
        for edit in read_rewrites(inputs["rewrite"].file("rewrites.parquet")):
            by_row.setdefault(edit.row, []).append(edit)
        rows = sorted(by_row)
        path = inputs["read"].file("conversations.parquet")
        records = Conversations.read(inputs["read"].path, read.slot).take(rows)
        job = _Job(folder, read.slot, path, Renderer(_opened(inputs["tokenizer"].path), spec, template=template), progress)
        progress.start(f"render rewritten {read.slot}", len(rows), "records")

        def batches() -> Iterator[_Batch]:
            rewritten = zip(rows, (apply_rewrites(r, by_row[row]) for row, r in zip(rows, records, strict=True)), strict=True)
            while some := list(islice(rewritten, BATCH_TEXTS)):
                yield columns_of([record for _, record in some]), np.array([row for row, _ in some], np.int64)

        job.run(batches)
        return job.finish()

    return Stage(
        name="rerender",
        version=VERSION,
        slot=read.slot,
        ingredients=_ingredients(spec, template),
        inputs={"read": read, "rewrite": rewrite, "tokenizer": tokenizer},
        packages=PACKAGES,
        build=build,
    )


_Batch = tuple[TurnColumns, Int64]
"""Records as columns, and their rows in the source."""


def _numbers(columns: TurnColumns) -> Int64:
    return np.arange(columns.first_row, columns.first_row + len(columns), dtype=np.int64)


def _ingredients(spec: RenderSpec, template: str | None) -> dict[str, Any]:
    """The recipe's slice; a template file counts by its text, not by its path."""
    text = "model" if template is None else hashlib.blake2b(template.encode(), digest_size=16).hexdigest()
    # Every engine gives the same ids, so which one is used changes nothing.
    said = {name: value for name, value in spec.canonical().items() if name != "tokenizer_engine"}
    return {"render": {**said, "template": text}}


def warm_up(tokenizer: Path, *, spec: RenderSpec, base: Path) -> None:
    """Opens a tokenizer artefact, proves its engine and learns its template, so that processes forked from here need not."""
    Renderer(_opened(tokenizer), spec, template=read_template(spec.template, base=base)).describe()
    load_kernels()
    _warm.add(tokenizer)


_warm: set[Path] = set()


def is_open(tokenizer: Path) -> bool:
    """Whether `warm_up` has had this artefact."""
    return tokenizer in _warm


@lru_cache(maxsize=2)
def _opened(folder: Path) -> OpenTokenizer:
    """The tokenizer of an artefact, which never changes: parsing it takes longer than rendering a small source."""
    return open_tokenizer(folder)


class _Refused(NamedTuple):
    """A record set aside: its row, why, and how its text begins."""

    row: int
    refusal: Refusal
    excerpt: str


EXCERPT = 200
"""Characters of a record's first text that are kept with the reason why it was set aside."""


@dataclass
class _Job:
    """One stage's build: batches in, files out, an account of everything.

    The main thread lays out a batch while another encodes, checks and writes the one before.
    """

    folder: Path
    source: str
    path: Path
    renderer: Renderer
    progress: Progress
    refused: list[_Refused] = field(default_factory=list)
    lost: list[_Refused] = field(default_factory=list)
    totals: Counter[str] = field(default_factory=Counter)

    def run(self, batches: Callable[[], Iterator[_Batch]]) -> None:
        """Renders everything, a bounded batch at a time; from the start again when a fast engine is found not to be exact."""
        engine = self.renderer.encoder.engine
        if not engine.is_fast and self.renderer.spec.tokenizer_engine == "auto":
            self.progress.note(f"render {self.source}: ids come from {engine.engine.name}: {engine.why}")
        try:
            self._run(batches())
        except EngineDiffers as error:
            self.progress.note(
                f"render {self.source}: {self.renderer.encoder.engine.engine.name} gives {error}; tokenizers takes over"
            )
            self.renderer.use_reference(str(error))
            self.refused, self.lost, self.totals = [], [], Counter()
            self._run(batches())
        _write_refusals(self.folder / "dropped.parquet", self.source, self.path, self.refused)
        _write_refusals(self.folder / "lost.parquet", self.source, self.path, self.lost)

    def _run(self, batches: Iterator[_Batch]) -> None:
        pending: Future[None] | None = None
        with closing(RenderedWriter(self.folder)) as writer, ThreadPoolExecutor(1, "render") as second:
            for columns, rows in batches:
                sheet = self.renderer.lay(columns)
                if pending is not None:
                    pending.result()
                pending = second.submit(self._finish, writer, columns, rows, sheet)
            if pending is not None:
                pending.result()

    def _finish(self, writer: RenderedWriter, columns: TurnColumns, rows: Int64, sheet: Sheet) -> None:
        """A batch's second half, to its place on disk."""
        block = self.renderer.finish(columns, sheet, names=_Names(self.path, self.source, rows))
        learned = num_learned(block)
        table = pa.table(
            {
                "row": rows[block.records],
                "part": block.parts,
                "task": pa.DictionaryArray.from_arrays(columns.task_codes[block.records], columns.task_names),
                "num_tokens": block.num_tokens.astype(np.int32),
                "num_turns": block.num_turns.astype(np.int32),
                "num_learned_tokens": learned.astype(np.int32),
                "flags": block.flags,
            }
        )
        writer.write_arrays(table, ids=block.ids, kinds=block.kinds, turns=block.turns, turn_weights=block.turn_weights)
        for kept, found in ((self.refused, block.refusals), (self.lost, block.lost)):
            first = columns.offsets[[record for record, _ in found]] if found else ()
            excerpts = [columns.content[int(turn)][:EXCERPT] for turn in first]
            kept += [_Refused(int(rows[record]), refusal, text) for (record, refusal), text in zip(found, excerpts, strict=True)]
        self.totals["num_in"] += len(columns)
        self.totals["num_examples"] += len(block)
        self.totals["num_tokens"] += len(block.ids)
        self.totals["num_learned_tokens"] += int(learned.sum())
        self.progress.advance(len(columns))

    def require_some_template(self) -> None:
        """TemplateError when every single record was refused for the same cause, and that cause is the template."""
        reasons = {each.refusal.reason for each in self.refused}
        if self.totals["num_in"] and not self.totals["num_examples"] and len(reasons) == 1 and reasons <= TEMPLATE_REASONS:
            row, refusal, _ = self.refused[0]
            where = records_at(self.path, [row])[row]
            raise TemplateError(
                f"source {self.source}: the chat template fails for every one of its {self.totals['num_in']:,} records "
                f"({refusal.reason}). First, {where['file']}:{where['line']}: {_detail(refusal)}. "
                "Name another template in `render.template`"
            )

    def finish(self) -> Outcome:
        """The account."""
        reasons = Counter(each.refusal.reason for each in self.refused)
        renderer, counts = self.renderer, self.renderer.counts
        names = ("forged", "truncated", "dropped_system", "hidden_turns", "by_offsets", "rewritten", "windows", "lost_examples")
        closing = renderer.default.closing
        facts: dict[str, Any] = {name: self.totals[name] for name in ("num_examples", "num_tokens", "num_learned_tokens")}
        facts |= {name: counts[name] for name in names}
        facts |= {"stop_ids": renderer.stop_ids, "generation_prompt": closing.header}
        facts |= {"stop_text": closing.last.text[: closing.last.length] if closing.last else renderer.default.eos}
        facts |= {"template": renderer.describe(), "pad_is_end": renderer.tokenizer.pads_with_end}
        facts |= {"tokenizer_engine": renderer.encoder.engine.facts(), "tokenizer_opened": renderer.tokenizer.engine}
        num_in = self.totals["num_in"]
        return Outcome(Counts(num_in, num_in - len(self.refused), dict(reasons)), facts)


def num_learned(block: Block) -> Int64:
    """Per example: tokens that a model writes (marks too), in turns that are to be learned; the first token is no target."""
    counts = np.zeros(len(block), np.int64)
    tokens, turns = (np.concatenate([[0], np.cumsum(each, dtype=np.int64)]) for each in (block.num_tokens, block.num_turns))
    how = kernel(count_learned) if is_worth_a_kernel(len(block.ids)) else count_learned
    how(block.kinds, block.turns, tokens, turns, block.turn_weights, _LEARNED, counts)
    return counts


class _Names(Sequence[str]):
    """The ids of a batch's records, read when an error needs one."""

    def __init__(self, path: Path, source: str, rows: Int64) -> None:
        self.path, self.source, self.rows = path, source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, record: Any) -> Any:
        row = int(self.rows[record])
        where = records_at(self.path, [row])[row]
        return f"{self.source}/{where['file']}:{where['line']}"


def _detail(refusal: Refusal) -> str:
    return f"turn {refusal.turn}: {refusal.detail}" if refusal.turn >= 0 else refusal.detail


def _write_refusals(path: Path, source: str, conversations: Path, refused: Sequence[_Refused]) -> None:
    """A table of records set aside, each with where it was read."""
    where = records_at(conversations, [each.row for each in refused], columns=("file", "line"))
    rows = []
    for row, refusal, excerpt in refused:
        at = where[row]
        rows.append(Dropped(source, at["file"], at["line"], row, refusal.reason, _detail(refusal), excerpt))
    write_records(path, DROPPED, rows)
