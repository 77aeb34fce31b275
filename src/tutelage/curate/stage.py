"""The room's door to the store: rewrites, verdicts on single records, and copies across sources."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from tutelage.curate.boilerplate import rewrites_of
from tutelage.curate.copies import Copies
from tutelage.curate.rules import judge
from tutelage.curate.spec import CurateSpec, Rule, StripBoilerplate
from tutelage.records import Conversation, Dropped, Rewrite, Verdict
from tutelage.store import Artefact, Counts, Outcome, Progress, Stage
from tutelage.tables import (
    DROPPED,
    REWRITES,
    SPLIT,
    VERDICTS,
    Conversations,
    apply_rewrites,
    read_rewrites,
    read_table,
    read_verdicts,
    write_records,
)

_REPORT_EVERY = 1024
_EXCERPT_CHARACTERS = 200


def rewrite_stage(read: Stage, *, rules: Sequence[Rule]) -> Stage | None:
    """The stage that strips what the rewriting rules name from one source's answers; None when there is no such rule."""
    rewriting = tuple(rule for rule in rules if isinstance(rule, StripBoilerplate))
    if not rewriting:
        return None

    def build(folder: Path, inputs: Mapping[str, Artefact], progress: Progress) -> Outcome:
        conversations = Conversations.read(inputs["read"].path, read.slot)
        rewrites = [
            rewrite
            for row, conversation in _reported(conversations, f"rewrite {read.slot}", progress)
            for rewrite in rewrites_of(conversation, row, rewriting)
        ]
        write_records(folder / "rewrites.parquet", REWRITES, rewrites)
        num_rewritten = Counter(rule for _, rule in {(rewrite.row, rewrite.rule) for rewrite in rewrites})
        facts = {"num_rewritten": {rule.kind: num_rewritten[rule.kind] for rule in rewriting}}
        return Outcome(Counts(len(conversations), len(conversations)), facts)

    ingredients = {"source": read.slot, "rules": [rule.canonical() for rule in rewriting]}
    return Stage("rewrite", 1, ingredients, build, slot=read.slot, inputs={"read": read})


def screen_stage(read: Stage, *, rewrite: Stage | None, rules: Sequence[Rule]) -> Stage:
    """The stage that judges one source's records, as rewritten; only drops and flags are listed."""
    judging = [rule for rule in rules if not isinstance(rule, StripBoilerplate)]

    def build(folder: Path, inputs: Mapping[str, Artefact], progress: Progress) -> Outcome:
        outlet = _Outlet()
        if not judging:
            return outlet.close(folder, num_in=_num_records(inputs["read"]))
        texts = _Texts.open(read.slot, inputs["read"], inputs.get("rewrite"))
        for row, conversation in texts.reported(f"screen {read.slot}", progress):
            for verdict in judge(conversation, row, judging):
                outlet.add(verdict, conversation)
        return outlet.close(folder, num_in=len(texts.conversations))

    inputs = {"read": read} | ({"rewrite": rewrite} if rewrite else {})
    ingredients = {"source": read.slot, "rules": [rule.canonical() for rule in judging]}
    return Stage("screen", 1, ingredients, build, slot=read.slot, inputs=inputs)


def copies_stage(
    reads: Mapping[str, Stage],
    *,
    rewrites: Mapping[str, Stage],
    screens: Mapping[str, Stage],
    split: Stage,
    spec: CurateSpec,
) -> Stage:
    """The stage that drops exact duplicates, near duplicates and leaks across all sources; `reads` is in recipe order.

    What a screen dropped takes no part, so it cannot shadow a good copy; the stage counts in what the screens let out.
    """
    order = list(reads)

    def build(folder: Path, inputs: Mapping[str, Artefact], progress: Progress) -> Outcome:
        held_out = _held_out_rows(inputs["split"])
        screened = {name: _screened_rows(inputs[f"screen {name}"]) for name in order}
        if spec.near_duplicates is None and spec.exact_duplicates == "keep" and not any(held_out.values()):
            num_in = sum(_num_records(inputs[f"read {name}"]) - len(screened[name]) for name in order)
            return _Outlet().close(folder, num_in=num_in)  # all copies may stay, and none can leak
        texts = {name: _Texts.open(name, inputs[f"read {name}"], inputs.get(f"rewrite {name}")) for name in order}
        copies = Copies(spec, lambda source, row: texts[source].at(row))
        for name in order:
            for row, conversation in texts[name].reported(f"compare {name}", progress):
                if row not in screened[name]:
                    copies.add(conversation, row, is_held_out=row in held_out[name])
        progress.start("copies", len(copies.entries), "records")
        outlet = _Outlet()
        for verdict in copies.verdicts(progress.advance):
            outlet.add(verdict, texts[verdict.source].at(verdict.row))
        return outlet.close(folder, num_in=len(copies.entries))

    boxes = [("read", reads), ("rewrite", rewrites), ("screen", screens)]
    inputs = {f"{kind} {name}": stages[name] for kind, stages in boxes for name in order if name in stages}
    ingredients = {
        "order": order,  # the first of equal records is kept
        "exact_duplicates": spec.exact_duplicates,
        "near_duplicates": spec.near_duplicates.canonical() if spec.near_duplicates else None,
    }
    return Stage("copies", 1, ingredients, build, inputs={**inputs, "split": split}, packages=("rensa",))


@dataclass(frozen=True)
class _Texts:
    """One source's records with their rewrites applied."""

    conversations: Conversations
    rewrites: Mapping[int, Sequence[Rewrite]]

    @classmethod
    def open(cls, source: str, read: Artefact, rewrite: Artefact | None) -> _Texts:
        by_row: dict[int, list[Rewrite]] = defaultdict(list)
        for found in read_rewrites(rewrite.file("rewrites.parquet")) if rewrite else ():
            by_row[found.row].append(found)
        return cls(Conversations.read(read.path, source), dict(by_row))

    def at(self, row: int) -> Conversation:
        return apply_rewrites(self.conversations[row], self.rewrites.get(row, ()))

    def reported(self, label: str, progress: Progress) -> Iterator[tuple[int, Conversation]]:
        for row, conversation in _reported(self.conversations, label, progress):
            rewrites = self.rewrites.get(row)
            yield row, apply_rewrites(conversation, rewrites) if rewrites else conversation


@dataclass
class _Outlet:
    """Collects verdicts and what they drop; `close` writes both tables and the account."""

    verdicts: list[Verdict] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)

    def add(self, verdict: Verdict, conversation: Conversation) -> None:
        self.verdicts.append(verdict)
        if not verdict.keep:
            where = conversation.where
            self.dropped.append(
                Dropped(where.source, where.file, where.line, verdict.row, verdict.rule, verdict.reason, _excerpt(conversation))
            )

    def close(self, folder: Path, *, num_in: int) -> Outcome:
        write_records(folder / "verdicts.parquet", VERDICTS, self.verdicts)
        write_records(folder / "dropped.parquet", DROPPED, self.dropped)
        dropped = Counter(record.reason for record in self.dropped)
        flagged = Counter(verdict.rule for verdict in self.verdicts if verdict.keep)
        counts = Counts(num_in, num_in - len(self.dropped), dict(sorted(dropped.items())))
        return Outcome(counts, {"num_flagged": dict(sorted(flagged.items()))})


def _reported(conversations: Conversations, label: str, progress: Progress) -> Iterator[tuple[int, Conversation]]:
    """Every record with its row, telling `progress` now and then."""
    progress.start(label, len(conversations), "records")
    for row, conversation in enumerate(conversations):
        if row % _REPORT_EVERY == _REPORT_EVERY - 1:
            progress.advance(_REPORT_EVERY)
        yield row, conversation
    progress.advance(len(conversations) % _REPORT_EVERY)


def _held_out_rows(split: Artefact) -> Mapping[str, set[int]]:
    table = read_table(split.file("split.parquet"), SPLIT)
    held_out = table.filter(table["is_held_out"]).select(["source", "row"]).to_pydict()
    rows: dict[str, set[int]] = defaultdict(set)
    for source, row in zip(held_out["source"], held_out["row"], strict=True):
        rows[source].add(row)
    return rows


def _screened_rows(screen: Artefact) -> set[int]:
    return {verdict.row for verdict in read_verdicts(screen.file("verdicts.parquet")) if not verdict.keep}


def _num_records(read: Artefact) -> int:
    return int(pq.read_metadata(read.file("conversations.parquet")).num_rows)


def _excerpt(conversation: Conversation) -> str:
    """How the record begins: its first request and answer, cut."""
    said = " → ".join(" ".join(turn.content.split()) for turn in conversation.turns if turn.role in ("user", "assistant"))
    return said if len(said) <= _EXCERPT_CHARACTERS else said[: _EXCERPT_CHARACTERS - 1] + "…"
