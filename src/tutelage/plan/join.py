"""Join: what the stages before say of each record, and which examples of it may be drawn.

split, verdicts, renderings, tallies, record weights  ->  one reason per record that is left out  +  arrays of the others
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tutelage.errors import PlanError
from tutelage.plan.assemble import Candidates, Plan, Strata
from tutelage.plan.fates import OPEN, Fates
from tutelage.plan.kernels import sort_by_code
from tutelage.plan.normalise import ExampleWeights
from tutelage.plan.spec import LossRule
from tutelage.plan.sums import sum_targets
from tutelage.plan.supervision import TalliedSet
from tutelage.plan.tally import Tally
from tutelage.plan.tally_stage import read_examples, read_tally
from tutelage.plan.weights import cell_table, weigh_tally
from tutelage.records import Float64, Int32, Int64
from tutelage.store import Artefact
from tutelage.tables import DROPPED, RECORD_WEIGHTS, SPLIT, VERDICTS, read_table

HELD_OUT, NOT_RENDERED, NO_LOSS_WEIGHT, NOT_DRAWN = "held_out", "not_rendered", "no_loss_weight", "not_drawn"
"""Our own reasons, beside the rule names of verdicts and the reasons of rendering. `no_loss_weight`: the loss rule, or
the weight of the source, the record or its turns, leaves no target to learn; `not_drawn`: the budget went to other records."""

SHARDS, _TALLIES = ("render", "rerender"), ("tally", "retally")
UNKNOWN_TASK = ""
RECORD_WEIGHT_0 = "the record's own weight is 0"
"""Told of a record without loss weight that the data itself asked for."""


@dataclass(frozen=True)
class SourceExamples:
    """One source joined: the examples that may be drawn (one entry each), and per record why it may not."""

    name: str
    fate: Fates
    details: dict[int, str]
    tallies: Mapping[int, Tally]
    loss: LossRule
    tasks: tuple[str, ...]
    task: Int32
    shard: Int32
    index: Int64
    row: Int64
    part: Int32
    num_tokens: Int32
    num_supervised: Int64
    multiplier: Float64
    weight: Float64
    lost: Mapping[str, Counter[str]] = dataclasses.field(default_factory=dict)
    """Reasons of the records that are left out, by task, as far as a task has no other records."""

    def totals(self, multiplier: Float64) -> Float64:
        """The total weight of each example when its token weights are multiplied so."""
        out = np.zeros(len(self.row))
        for shard, tally in self.tallies.items():
            mine = self.shard == shard
            out[mine] = weigh_tally(tally, loss=self.loss).totals(self.spread(multiplier, shard))[self.index[mine]]
        return out

    def spread(self, values: np.ndarray, shard: int) -> np.ndarray:
        """Values of the examples of one shard, laid out over all that were rendered there; 0 for the others."""
        num = len(self.tallies[shard])
        if self._is_whole and num == len(values):
            return values
        mine = self.shard == shard
        whole = np.zeros(num, values.dtype)
        whole[self.index[mine]] = values[mine]
        return whole

    @cached_property
    def _is_whole(self) -> bool:
        """Whether these are all examples of one shard, in its order."""
        return len(self.tallies) == 1 and bool((self.index == np.arange(len(self.index))).all())

    def at(self, which: np.ndarray) -> SourceExamples:
        """The examples at these positions."""
        arrays: dict[str, Any] = {f: getattr(self, f)[which] for f in _PER_EXAMPLE}
        return dataclasses.replace(self, **arrays)


_PER_EXAMPLE = ("task", "shard", "index", "row", "part", "num_tokens", "num_supervised", "multiplier", "weight")


def join_source(
    name: str,
    artefacts: Mapping[str, Artefact],
    *,
    is_held_out: np.ndarray,
    loss: LossRule,
    source_weight: float,
    task: str | None = None,
) -> SourceExamples:
    """What may be drawn from one source. One reason per record: held out, else screened, else a copy, else not rendered.

    `is_held_out` (records,) is the source's entry in `held_out_records`.
    `task` is the task of all its records where the recipe gives one: so it is known even when none could be rendered.
    """
    fate, details = Fates(len(is_held_out)), dict[int, str]()
    record_weights = _record_weights(artefacts, name, num_records=len(fate))
    multiplier = source_weight * record_weights
    parts: list[SourceExamples] = []
    for shard in SHARDS:
        if f"{shard} {name}" in artefacts:
            rendered = artefacts[f"{shard} {name}"]
            newer = _examples(name, SHARDS.index(shard), artefacts, multiplier=multiplier, loss=loss)
            refused = read_table(rendered.file("dropped.parquet"), DROPPED)
            if parts:  # a record rendered anew, or refused then, no longer counts as first rendered
                renewed = np.union1d(newer.row, refused["row"].to_numpy())
                parts = [part.at(~np.isin(part.row, renewed)) for part in parts]
                fate.put(renewed, OPEN)
            _set_fates(fate, details, refused, reason="reason", detail="detail")
            parts.append(newer)
    _set_fates(fate, details, _drops(artefacts["copies"], name), reason="rule", detail="reason")
    if f"screen {name}" in artefacts:
        _set_fates(fate, details, _drops(artefacts[f"screen {name}"], name), reason="rule", detail="reason")
    fate.put(is_held_out, HELD_OUT)
    rendered_examples = _merge(parts)
    settled = _settle_fates(rendered_examples, fate, details, record_weights=record_weights)
    return _tell_lost(settled, rendered_examples, task)


def _record_weights(artefacts: Mapping[str, Artefact], name: str, *, num_records: int) -> Float64:
    """The weight that each record of a source states for itself, 1 without."""
    if f"read {name}" not in artefacts:
        return np.ones(num_records)
    weights: Float64 = read_table(artefacts[f"read {name}"].file("weights.parquet"), RECORD_WEIGHTS)["weight"].to_numpy()
    assert len(weights) == num_records, "one weight per record"
    return weights


def _examples(name: str, shard: int, artefacts: Mapping[str, Artefact], *, multiplier: Float64, loss: LossRule) -> SourceExamples:
    """One rendered set; `multiplier` has an entry per record."""
    box = artefacts[f"{_TALLIES[shard]} {name}"]
    tally, table = read_tally(box), read_examples(box)
    row = table["row"].to_numpy()
    labels = table["task"].combine_chunks()
    alike = len(row) > 0 and bool((multiplier == multiplier[0]).all())
    factors = multiplier[:1] if alike else multiplier[row]
    weight, num_supervised = sum_targets(tally, table=cell_table(loss), factors=factors.astype(np.float32))
    return SourceExamples(
        name=name,
        fate=Fates(0),
        details={},
        tallies={shard: tally},
        loss=loss,
        tasks=tuple(labels.dictionary.to_pylist()),
        task=labels.indices.to_numpy(),
        shard=np.full(len(table), shard, np.int32),
        index=np.arange(len(table)),
        row=row,
        part=table["part"].to_numpy(),
        num_tokens=table["num_tokens"].to_numpy(),
        num_supervised=num_supervised,
        multiplier=np.full(len(row), multiplier[0]) if alike else factors,
        weight=weight,
    )


def _merge(parts: Sequence[SourceExamples]) -> SourceExamples:
    """The examples of both shards in record order, under one list of tasks."""
    tasks = tuple(sorted({task for part in parts for task in part.tasks}))
    parts = [dataclasses.replace(part, tasks=tasks, task=_recode(part.task, part.tasks, tasks)) for part in parts]
    whole = parts[0]
    if len(parts) > 1:
        arrays: dict[str, Any] = {f: np.concatenate([getattr(part, f) for part in parts]) for f in _PER_EXAMPLE}
        tallies = {shard: tally for part in parts for shard, tally in part.tallies.items()}
        whole = dataclasses.replace(whole, tallies=tallies, **arrays)
    place = whole.row << 32 | whole.part
    return whole if (place[1:] > place[:-1]).all() else whole.at(np.argsort(place))


def _recode(codes: Int32, names: Sequence[str], wanted: Sequence[str]) -> Int32:
    if tuple(names) == tuple(wanted):
        return codes
    place = {name: i for i, name in enumerate(wanted)}
    return np.array([place[name] for name in names] or [0], np.int32)[codes]


def held_out_records(split: Artefact, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Whether each record of each source is held out, by source."""
    table = read_table(split.file("split.parquet"), SPLIT).unify_dictionaries()
    sources = table["source"].combine_chunks()
    known = sources.dictionary.to_pylist()
    code = sources.indices.to_numpy().copy()  # for arrays that cannot be written to the loop would be compiled anew
    of_source, begins = sort_by_code(code, num_codes=len(known))
    rows, is_held_out = table["row"].to_numpy(), table["is_held_out"].to_numpy()
    found = {name: np.zeros(0, bool) for name in names}  # a source may have no record
    for name, mine in zip(known, np.split(of_source, begins[1:]), strict=True):
        if name in found:
            found[name] = np.zeros(len(mine), bool)
            found[name][rows[mine]] = is_held_out[mine]
    return found


def _drops(artefact: Artefact, name: str) -> pa.Table:
    """The verdicts that drop records of a source."""
    table = read_table(artefact.file("verdicts.parquet"), VERDICTS)
    return table.filter(pc.and_(pc.equal(table["source"].cast(pa.string()), name), pc.invert(table["keep"])))


def _set_fates(fate: Fates, details: dict[int, str], table: pa.Table, *, reason: str, detail: str) -> None:
    """Writes the first reason that a table gives for a record over what another stage said of it."""
    rows, first = np.unique(table["row"].to_numpy(), return_index=True)
    chosen = table.take(pa.array(first))
    fate.put_each(rows, chosen[reason])
    details.update(zip(rows.tolist(), chosen[detail].to_pylist(), strict=True))


def flags_at(rows: Int64, num: int) -> np.ndarray:
    """Bool (num,): which of so many records are among these rows; many times faster than a set of them.

    >>> flags_at(np.array([2, 0, 2]), 4).tolist()
    [True, False, True, False]
    """
    flags = np.zeros(num, bool)
    flags[rows] = True
    return flags


def _settle_fates(examples: SourceExamples, fate: Fates, details: dict[int, str], *, record_weights: Float64) -> SourceExamples:
    """The examples that may be drawn, and a fate for every record that has none of them."""
    is_open_record, is_held_out = fate.are(OPEN), fate.are(HELD_OUT)
    is_open = is_open_record[examples.row]
    drawable = is_open & (examples.weight > 0)
    fate.put(is_open_record & ~flags_at(examples.row, len(fate)), NOT_RENDERED)
    unweighted = np.zeros(0, np.int64)
    if not (drawable == is_open).all():
        unweighted = np.flatnonzero(flags_at(examples.row[is_open], len(fate)) & ~flags_at(examples.row[drawable], len(fate)))
    fate.put(unweighted, NO_LOSS_WEIGHT)
    in_training = examples.task if not is_held_out.any() else examples.task[~is_held_out[examples.row]]
    tasks_in_training = np.flatnonzero(np.bincount(in_training, minlength=len(examples.tasks)))
    details.update((row, RECORD_WEIGHT_0 if record_weights[row] == 0 else "") for row in unweighted.tolist())
    tasks = tuple(examples.tasks[i] for i in tasks_in_training)
    kept = examples if drawable.all() else examples.at(drawable)
    if len(tasks) < len(examples.tasks):
        codes = np.zeros(len(examples.tasks), np.int32)
        codes[tasks_in_training] = np.arange(len(tasks))
        kept = dataclasses.replace(kept, task=codes[kept.task])
    return dataclasses.replace(kept, tasks=tasks, fate=fate, details=details)


def _tell_lost(settled: SourceExamples, rendered: SourceExamples, task: str | None) -> SourceExamples:
    """With the fates of the tasks that have nothing left, and the source's own task on the list though nothing was rendered."""
    lost, num = {}, len(settled.fate)
    num_left = np.bincount(settled.task, minlength=len(settled.tasks)).tolist()
    has_left = {name for name, left in zip(settled.tasks, num_left, strict=True) if left}
    for i, name in enumerate(rendered.tasks):
        if name not in has_left:
            lost[name] = settled.fate.counts(flags_at(rendered.row[rendered.task == i], num))
    unrendered = settled.fate.counts(~flags_at(rendered.row, num))
    if task is None:
        return dataclasses.replace(settled, lost=lost | {UNKNOWN_TASK: unrendered})
    if task not in settled.tasks and not settled.fate.are(HELD_OUT).all():
        settled = dataclasses.replace(settled, tasks=(*settled.tasks, task))
    lost[task] = lost.get(task, Counter()) + unrendered
    return dataclasses.replace(settled, lost=lost)


@dataclass(frozen=True)
class Joined:
    """All sources by name; `source` and the arrays of `candidates` have one entry per example that may be drawn."""

    names: Sequence[str]
    sources: Sequence[SourceExamples]
    loss: LossRule
    over: Literal["tasks", "sources"] = "tasks"

    @cached_property
    def source(self) -> Int32:
        """The source of each candidate."""
        return np.repeat(np.arange(len(self.sources), dtype=np.int32), [len(source.row) for source in self.sources])

    def column(self, field: str) -> np.ndarray:
        """One array over all sources."""
        return np.concatenate([getattr(source, field) for source in self.sources])

    @cached_property
    def candidates(self) -> Candidates:
        """What the plan draws from. A task whose records were all dropped stays on the list: it may have a share."""
        tasks = tuple(sorted({task for source in self.sources for task in source.tasks}))
        if not tasks:
            raise PlanError("no source has a rendered training record; look at what the stages before dropped, and why")
        return Candidates(
            tasks=tasks,
            task=np.concatenate([_recode(source.task, source.tasks, tasks) for source in self.sources]),
            num_tokens=self.column("num_tokens"),
            num_supervised=self.column("num_supervised"),
            weight=self.column("weight"),
            weights=ExampleWeights(self.totals, self.column("num_supervised"), self.column("multiplier"), self.loss.normalise),
            mixed_by=self._by_source() if self.over == "sources" else None,
            lost=self._lost(),
        )

    def _by_source(self) -> Strata:
        """The sources as strata; one that is kept for measuring as a whole is none, as it is with tasks."""
        is_open = np.array([set(source.fate.counts()) != {HELD_OUT} for source in self.sources])
        names = tuple(name for name, kept in zip(self.names, is_open, strict=True) if kept)
        return Strata(names, (np.cumsum(is_open) - 1)[self.source].astype(np.int32))

    def _lost(self) -> dict[str, str]:
        """What became of the records, by task or by source, where it may explain why there is nothing to draw."""
        told: dict[str, Counter[str]] = {}
        for name, source in zip(self.names, self.sources, strict=True):
            if self.over == "sources":
                told[name] = Counter({fate: num for fate, num in source.fate.counts().items() if fate != OPEN})
                continue
            for task, fates in source.lost.items():
                told[task] = told.get(task, Counter()) + fates
        return {name: _fates_text(fates) for name, fates in told.items() if fates or name}

    def totals(self, multiplier: Float64) -> Float64:
        """The total weight of each candidate when its token weights are multiplied so."""
        return np.concatenate([source.totals(part) for source, part in zip(self.sources, self.split(multiplier), strict=True)])

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        """Values of the candidates, source by source."""
        return np.split(values, np.cumsum([len(source.row) for source in self.sources])[:-1])

    def tallied(self, plan: Plan) -> Iterator[TalliedSet]:
        """The rendered sets as the plan uses them."""
        columns = [self.split(values) for values in (plan.num_visits, self.candidates.task, plan.multiplier)]
        for source, visits, task, multiplier in zip(self.sources, *columns, strict=True):
            for shard, tally in source.tallies.items():
                spread = [source.spread(values, shard) for values in (visits, task, multiplier, source.multiplier)]
                yield TalliedSet(tally, *spread)


def _fates_text(fates: Counter[str]) -> str:
    """`12 records were left out: 10 too_long, 2 length`."""
    if not fates:
        return "no record was read"
    num = fates.total()
    parts = ", ".join(f"{count:,} {fate}" for fate, count in sorted(fates.items(), key=lambda pair: (-pair[1], pair[0])))
    return f"{num:,} record{'s were' if num > 1 else ' was'} left out: {parts}"
