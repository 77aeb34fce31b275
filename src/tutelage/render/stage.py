"""The room's door to the store: `render` makes every record of a source an example, `rerender` those that a rule rewrote."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tutelage.errors import TemplateError
from tutelage.records import LEARNED_KINDS, Conversation, Dropped, Kind, Rendered, Rewrite
from tutelage.render.examples import Renderer
from tutelage.render.provenance import Refusal
from tutelage.render.spec import RenderSpec
from tutelage.render.template import read_template
from tutelage.render.tokenizer import OpenTokenizer, open_tokenizer
from tutelage.render.tokens import BATCH_TEXTS
from tutelage.store import Artefact, Counts, Outcome, Progress, Stage, Store
from tutelage.tables import (
    DROPPED,
    EXAMPLES,
    Conversations,
    RenderedWriter,
    apply_rewrites,
    read_rewrites,
    write_records,
)

VERSION = 1
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

_IS_LEARNED = np.isin(np.arange(len(Kind)), LEARNED_KINDS)
_Row = tuple[int, Conversation]


def render_stage(read: Stage, *, tokenizer: Stage, spec: RenderSpec, base: Path, store: Store) -> Stage:
    """All records of a source as read, rendered: a `RenderedSet`, and dropped.parquet with reasons."""
    template = read_template(spec.template, base=base)

    def build(folder: Path, inputs: Mapping[str, Artefact], progress: Progress) -> Outcome:
        records = Conversations.read(inputs["read"].path, read.slot)
        job = _Job(folder, read.slot, Renderer(_opened(inputs["tokenizer"].path), spec, template=template), progress)
        progress.start(f"render {read.slot}", len(records), "records")
        job.run(enumerate(records))
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
        records = Conversations.read(inputs["read"].path, read.slot).take(rows)
        job = _Job(folder, read.slot, Renderer(_opened(inputs["tokenizer"].path), spec, template=template), progress)
        progress.start(f"render rewritten {read.slot}", len(rows), "records")
        job.run((row, apply_rewrites(record, by_row[row])) for row, record in zip(rows, records, strict=True))
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


def _ingredients(spec: RenderSpec, template: str | None) -> dict[str, Any]:
    """The recipe's slice; a template file counts by its text, not by its path."""
    text = "model" if template is None else hashlib.blake2b(template.encode(), digest_size=16).hexdigest()
    return {"render": {**spec.canonical(), "template": text}}


@lru_cache(maxsize=2)
def _opened(folder: Path) -> OpenTokenizer:
    """The tokenizer of an artefact, which never changes: parsing it takes longer than rendering a small source."""
    return open_tokenizer(folder)


@dataclass
class _Job:
    """One stage's build: batches in, files out, an account of everything."""

    folder: Path
    source: str
    renderer: Renderer
    progress: Progress
    dropped: list[Dropped] = field(default_factory=list)
    totals: Counter[str] = field(default_factory=Counter)

    def run(self, rows: Iterator[_Row]) -> None:
        """Renders everything, a bounded batch at a time."""
        writer = RenderedWriter(self.folder)
        while batch := list(islice(rows, BATCH_TEXTS)):
            results = self.renderer.render([conversation for _, conversation in batch])
            self._write(writer, batch, results)
            self.progress.advance(len(batch))
        writer.close()
        write_records(self.folder / "dropped.parquet", DROPPED, self.dropped)

    def _write(self, writer: RenderedWriter, batch: Sequence[_Row], results: Sequence[Rendered | Refusal]) -> None:
        made = [(row, c, r) for (row, c), r in zip(batch, results, strict=True) if isinstance(r, Rendered)]
        num_learned = [_num_learned(r) for _, _, r in made]
        lines = {
            "row": [row for row, _, _ in made],
            "part": [0] * len(made),
            "task": [conversation.task for _, conversation, _ in made],
            "num_tokens": [len(r.ids) for _, _, r in made],
            "num_turns": [len(r.turn_weights) for _, _, r in made],
            "num_learned_tokens": num_learned,
            "flags": [0] * len(made),
        }
        plain = {
            name: pa.array(values, pa.string() if name == "task" else EXAMPLES.field(name).type) for name, values in lines.items()
        }
        writer.write(pa.table(plain).cast(EXAMPLES), [r for _, _, r in made])
        self.dropped += [_dropped(row, c, r) for (row, c), r in zip(batch, results, strict=True) if isinstance(r, Refusal)]
        self.totals["num_in"] += len(batch)
        self.totals["num_examples"] += len(made)
        self.totals["num_tokens"] += sum(len(r.ids) for _, _, r in made)
        self.totals["num_learned_tokens"] += sum(num_learned)

    def require_some_template(self) -> None:
        """TemplateError when every single record was refused for the same cause, and that cause is the template."""
        reasons = {dropped.reason for dropped in self.dropped}
        if self.totals["num_in"] and not self.totals["num_examples"] and len(reasons) == 1 and reasons <= TEMPLATE_REASONS:
            first = self.dropped[0]
            raise TemplateError(
                f"source {self.source}: the chat template fails for every one of its {self.totals['num_in']:,} records "
                f"({first.reason}). First, {first.file}:{first.line}: {first.detail}. Name another template in `render.template`"
            )

    def finish(self) -> Outcome:
        """The account."""
        reasons = Counter(dropped.reason for dropped in self.dropped)
        counts = self.renderer.counts
        names = ("forged", "truncated", "dropped_system", "hidden_turns", "by_offsets")
        closing = self.renderer.default.closing
        facts: dict[str, Any] = {name: self.totals[name] for name in ("num_examples", "num_tokens", "num_learned_tokens")}
        facts |= {name: counts[name] for name in names}
        facts |= {"stop_ids": self.renderer.stop_ids, "generation_prompt": closing.header}
        facts |= {"stop_text": closing.last.text[: closing.last.length] if closing.last else self.renderer.default.eos}
        facts |= {"tokenizer_engine": self.renderer.tokenizer.engine}
        return Outcome(Counts(self.totals["num_in"], self.totals["num_examples"], dict(reasons)), facts)


def _num_learned(example: Rendered) -> int:
    """Tokens that a model writes, in turns that are to be learned; the first token of an example is never a target."""
    learned = _IS_LEARNED[example.kinds[1:]]
    if bool((example.turn_weights > 0).all()):
        return int(learned.sum())
    return int((learned & (example.turn_weights[np.maximum(example.turns[1:], 0)] > 0)).sum())


def _dropped(row: int, conversation: Conversation, refusal: Refusal) -> Dropped:
    where = conversation.where
    detail = f"turn {refusal.turn}: {refusal.detail}" if refusal.turn >= 0 else refusal.detail
    excerpt = conversation.turns[0].content[:200] if conversation.turns else ""
    return Dropped(where.source, where.file, where.line, row, refusal.reason, detail, excerpt)
