"""The boxes `held_out` (which records are measured) and `measure` (before and after) of the pipeline."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from tutelage.errors import ModelError
from tutelage.evaluate.held_out import Candidate, HeldOut, choose_subset, num_targets
from tutelage.evaluate.overfit import Planned
from tutelage.evaluate.spec import EvaluateSpec
from tutelage.evaluate.stats import changes, total_change
from tutelage.model.stage import model_folder
from tutelage.records import Dropped, Origin, Score
from tutelage.store import Artefact, Counts, Json, Outcome, Progress, Stage
from tutelage.tables import (
    DROPPED,
    HELD_OUT,
    PLANNED,
    SAMPLES,
    SCORES,
    SPLIT,
    RenderedSet,
    Shards,
    read_dropped,
    read_samples,
    read_scores,
    read_table,
    read_verdicts,
    write_records,
    write_table,
)

if TYPE_CHECKING:
    from tutelage.evaluate.measure import Measure, Measurement

SEARCHED_TOKENS = 20_000_000
"""Planned tokens up to which answers are searched for copies while training; it takes some seconds."""
NOTHING_LEARNED, NOT_DRAWN = "nothing_learned", "not_drawn"
"""Reasons of our own: no token of the record is the model's to write; the budget went to other records."""


@dataclass(frozen=True)
class HeldOutInputs:
    """The boxes that say which records are held out and what they look like as tokens; dictionaries by source name."""

    reads: Mapping[str, Stage]
    renders: Mapping[str, Stage]
    split: Stage
    copies: Stage
    screens: Mapping[str, Stage] = field(default_factory=dict)
    rerenders: Mapping[str, Stage] = field(default_factory=dict)

    def by_name(self) -> dict[str, Stage]:
        """`read NAME`, `render NAME`, `rerender NAME`, `screen NAME`, `split`, `copies`."""
        kinds = {"read": self.reads, "render": self.renders, "rerender": self.rerenders, "screen": self.screens}
        named = {f"{kind} {name}": stage for kind, stages in kinds.items() for name, stage in stages.items()}
        return {**named, "split": self.split, "copies": self.copies}


@dataclass(frozen=True)
class MeasureInputs:
    """What a measurement needs: the untouched model, its tokenizer, the held-out set and the renderings that it points into."""

    model: Stage
    tokenizer: Stage
    held_out: Stage
    renders: Mapping[str, Stage]
    rerenders: Mapping[str, Stage] = field(default_factory=dict)
    plan: Stage | None = None
    """What was trained on, for the overfit card; the measure before needs none, so that recipes of other plans share it."""

    def by_name(self) -> dict[str, Stage]:
        """`model`, `tokenizer`, `held_out`, `render NAME`, `rerender NAME`, and `plan` where there is one."""
        kinds = {"render": self.renders, "rerender": self.rerenders}
        named = {f"{kind} {name}": stage for kind, stages in kinds.items() for name, stage in stages.items()}
        planned = {"plan": self.plan} if self.plan is not None else {}
        return {"model": self.model, "tokenizer": self.tokenizer, "held_out": self.held_out, **planned, **named}


def held_out_stage(inputs: HeldOutInputs, *, spec: EvaluateSpec) -> Stage:
    """The box `held_out`: held_out.parquet (HELD_OUT) names the examples that are measured, dropped.parquet the records left out.

    In: every held-out record. Out: those measured. Dropped: by a screen or as a copy (the rule's name), by the rendering
    (its reason), `nothing_learned`, `not_drawn`. facts: `num_examples`, `num_tokens`, `num_targets`, and `tasks` with
    `records`, `tokens`, `targets`, `available_records`, `available_tokens` of each task, zeros where none is held out.
    """

    def build(folder: Path, artefacts: Mapping[str, Artefact], progress: Progress) -> Outcome:
        return _build_held_out(folder, artefacts, spec, progress)

    wanted = {"max_tokens": spec.max_tokens, "seed": spec.seed}
    return Stage("held_out", 1, wanted, build, inputs=inputs.by_name(), packages=("pyarrow",))


@dataclass(frozen=True)
class _Record:
    """A held-out record on its way: where it was read, and its examples as (shard, index) or the reason why it has none."""

    where: Origin
    row: int
    reason: str = ""
    detail: str = ""
    places: tuple[tuple[str, int], ...] = ()


def _build_held_out(folder: Path, artefacts: Mapping[str, Artefact], spec: EvaluateSpec, progress: Progress) -> Outcome:
    shards = open_shards(artefacts)
    sources = [name.removeprefix("read ") for name in artefacts if name.startswith("read ")]
    held = _held_rows(artefacts["split"])
    duplicates = _drop_verdicts(artefacts["copies"])
    records: list[_Record] = []
    for source in sources:
        screened = artefacts.get(f"screen {source}")
        verdicts = duplicates.get(source, {}) | (_drop_verdicts(screened).get(source, {}) if screened else {})
        records += _records(source, artefacts, shards, rows=held.get(source, []), verdicts=verdicts)
    records = [_checked(record, shards) for record in records]
    candidates = {i: _candidate(record, shards) for i, record in enumerate(records) if not record.reason}
    kept = list(candidates)
    chosen = {kept[i] for i in choose_subset(list(candidates.values()), max_tokens=spec.max_tokens, seed=spec.seed)}
    measured = [record for i, record in enumerate(records) if i in chosen]
    left_out = [
        record if record.reason else dataclasses.replace(record, reason=NOT_DRAWN)
        for i, record in enumerate(records)
        if i not in chosen
    ]
    table = _held_out_table(measured, shards)
    write_table(folder / "held_out.parquet", table)
    write_records(folder / "dropped.parquet", DROPPED, map(_dropped, left_out))
    facts = _held_out_facts(table, shards, [candidates[i] for i in sorted(chosen)], list(candidates.values()))
    for task in (task for task, numbers in facts["tasks"].items() if not numbers["records"]):
        progress.note(f"task {task} has no held-out record and cannot be measured")
    return Outcome(Counts(len(records), len(measured), Counter(record.reason for record in left_out)), facts)


def _held_rows(split: Artefact) -> dict[str, list[int]]:
    """Source to the ascending rows of its held-out records."""
    table = read_table(split.file("split.parquet"), SPLIT)
    held = table.filter(table["is_held_out"])
    rows: dict[str, list[int]] = {}
    for source, row in zip(held["source"].to_pylist(), held["row"].to_pylist(), strict=True):
        rows.setdefault(source, []).append(row)
    return {source: sorted(of_source) for source, of_source in rows.items()}


def _drop_verdicts(artefact: Artefact) -> dict[str, dict[int, tuple[str, str]]]:
    """Source to row to (rule, reason) of the first verdict that drops it."""
    out: dict[str, dict[int, tuple[str, str]]] = {}
    for verdict in read_verdicts(artefact.file("verdicts.parquet")):
        if not verdict.keep:
            out.setdefault(verdict.source, {}).setdefault(verdict.row, (verdict.rule, verdict.reason))
    return out


def _records(
    source: str, artefacts: Mapping[str, Artefact], shards: Shards, *, rows: list[int], verdicts: Mapping[int, tuple[str, str]]
) -> list[_Record]:
    """The held-out records of one source. A row that was rendered anew, or refused then, no longer counts as first rendered."""
    wanted = set(rows)
    places, refusals = _renderings(artefacts[f"render {source}"], shards, source, "render", wanted)
    if f"rerender {source}" in artefacts:
        newer_places, newer_refusals = _renderings(artefacts[f"rerender {source}"], shards, source, "rerender", wanted)
        for row in {*newer_places, *newer_refusals}:
            places.pop(row, None)
            refusals.pop(row, None)
        places |= newer_places
        refusals |= newer_refusals
    out = []
    for row, where in zip(rows, _origins(source, artefacts[f"read {source}"], rows), strict=True):
        reason, detail = verdicts.get(row) or ("", "")
        if not reason and row not in places:
            reason, detail = refusals.get(row, ("not_rendered", ""))
        out.append(_Record(where, row, reason, detail, tuple(places.get(row, ()))))
    return out


def _renderings(
    artefact: Artefact, shards: Shards, source: str, shard: str, wanted: set[int]
) -> tuple[dict[int, list[tuple[str, int]]], dict[int, tuple[str, str]]]:
    """(row to its (shard, index) places, row to (reason, detail) where rendering dropped it), of the wanted rows."""
    places: dict[int, list[tuple[str, int]]] = {}
    for index, row in enumerate(shards.set(source, shard).examples["row"].to_pylist()):
        if row in wanted:
            places.setdefault(row, []).append((shard, index))
    dropped = read_dropped(artefact.file("dropped.parquet"))
    return places, {d.row: (d.reason, d.detail) for d in dropped if d.row in wanted}


def _origins(source: str, read: Artefact, rows: list[int]) -> list[Origin]:
    """Where each of these rows was read; only the three columns that say so are loaded."""
    table = pq.read_table(read.file("conversations.parquet"), columns=["file", "line", "part"]).take(pa.array(rows, pa.int64()))
    columns = (table[name].to_pylist() for name in ("file", "line", "part"))
    return [Origin(source, file, line, part) for file, line, part in zip(*columns, strict=True)]


def _checked(record: _Record, shards: Shards) -> _Record:
    """The record, with a reason when no token of it can be measured."""
    targets = (num_targets(shards.example(record.where.source, shard, index)) for shard, index in record.places)
    if record.reason or any(targets):
        return record
    return dataclasses.replace(record, reason=NOTHING_LEARNED, detail="no token is the model's to write")


def _candidate(record: _Record, shards: Shards) -> Candidate:
    tasks, sizes = zip(*(_task_and_size(shards.set(record.where.source, s), i) for s, i in record.places), strict=True)
    return Candidate(record.where.row_id, tasks[0], sum(sizes))


def _task_and_size(rendered: RenderedSet, index: int) -> tuple[str, int]:
    return rendered.examples["task"][index].as_py(), rendered.examples["num_tokens"][index].as_py()


def _dropped(record: _Record) -> Dropped:
    where = record.where
    return Dropped(where.source, where.file, where.line, record.row, record.reason, record.detail)


def _held_out_table(records: list[_Record], shards: Shards) -> pa.Table:
    """One line of HELD_OUT per example, records in the order given, examples by part."""
    rows: list[dict[str, Any]] = []
    for record in records:
        source = record.where.source
        for shard, index in record.places:
            task, num_tokens = _task_and_size(shards.set(source, shard), index)
            part = shards.set(source, shard).examples["part"][index].as_py()
            place = {"source": source, "shard": shard, "index": index, "row": record.row, "part": part}
            rows.append({**place, "task": task, "num_tokens": num_tokens, "item": record.where.row_id})
    return pa.table({name: [row[name] for row in rows] for name in HELD_OUT.names}, schema=HELD_OUT)


def _held_out_facts(table: pa.Table, shards: Shards, chosen: list[Candidate], available: list[Candidate]) -> dict[str, Json]:
    """Totals, and the numbers of each task that any rendered record belongs to."""
    every = {task for s, shard in shards.folders for task in shards.set(s, shard).examples["task"].unique().to_pylist()}
    names = ("records", "tokens", "targets", "available_records", "available_tokens")
    tasks: dict[str, dict[str, int]] = {task: dict.fromkeys(names, 0) for task in sorted(every)}
    for prefix, records in (("", chosen), ("available_", available)):
        for record in records:
            tasks[record.task][f"{prefix}records"] += 1
            tasks[record.task][f"{prefix}tokens"] += record.num_tokens
    for source, shard, index, task in zip(*(table[n].to_pylist() for n in ("source", "shard", "index", "task")), strict=True):
        tasks[task]["targets"] += num_targets(shards.example(source, shard, index))
    totals: dict[str, Json] = {f"num_{name}": sum(numbers[name] for numbers in tasks.values()) for name in ("tokens", "targets")}
    return {"num_examples": int(table.num_rows), **totals, "tasks": tasks}


def measure_stage(
    inputs: MeasureInputs,
    *,
    spec: EvaluateSpec,
    device: str = "auto",
    dtype: str = "auto",
    trained: Stage | None = None,
    before: Stage | None = None,
) -> Stage:
    """The box `measure before`, or with `trained` and `before` (the first one's box) `measure after`.

    scores.parquet (SCORES): per held-out example `nll` (value = sum in nats, weight = number of targets); with item "" and
    per task, and over all with task "", the mean `nll` per target and its interval; `ended_share` and `generated_tokens`
    over all samples; after training also `nll_change`, the paired change. samples.parquet (SAMPLES): the fixed prompts.

    Before depends on the model, the held-out set and the settings of measuring alone, so that every recipe which shares
    these shares it. `device` and `dtype` (`auto`, or names as in `train`) are settled there and recorded in its facts; after
    reads them from these facts, so that the two are never measured in different precision.
    """
    assert (trained is None) == (before is None), "`trained` and `before` go together"
    settings: dict[str, Json] = {"samples": spec.samples, "max_new_tokens": spec.max_new_tokens, "seed": spec.seed}
    if inputs.plan is not None:
        settings["overfit_tokens"] = spec.overfit_tokens
    stages = inputs.by_name()
    if trained is None or before is None:
        slot, settings = "before", settings | {"device": device, "dtype": dtype}
    else:
        slot, stages = "after", {**stages, "train": trained, "before": before}

    def build(folder: Path, artefacts: Mapping[str, Artefact], progress: Progress) -> Outcome:
        return _build_measure(folder, artefacts, spec, progress, precision=(device, dtype))

    packages = ("torch", "transformers", "peft")
    return Stage("measure", 1, settings, build, slot=slot, inputs=stages, packages=packages)


def open_shards(artefacts: Mapping[str, Artefact]) -> Shards:
    """The rendered sets among artefacts named `render NAME` and `rerender NAME`."""
    named = [(*name.partition(" "), artefact) for name, artefact in artefacts.items()]
    return Shards({(source, kind): a.path for kind, _, source, a in named if kind in ("render", "rerender") and source})


def open_measure(
    artefacts: Mapping[str, Artefact], *, spec: EvaluateSpec, run: str = "", on_progress: Callable[[int], None] | None = None
) -> Measure:
    """The callable `measure(model, step)` over the artefacts `held_out`, `tokenizer`, `render NAME` and `rerender NAME`.

    Training is handed this one too, so what it sees while it runs is what `measure` reports before and after.
    """
    from tutelage.evaluate.measure import Measure
    from tutelage.model.load import load_tokenizer

    shards = open_shards(artefacts)
    held_out = HeldOut.read(artefacts["held_out"].file("held_out.parquet"), shards)
    rendered = [a for name, a in artefacts.items() if name.startswith(("render ", "rerender "))]
    return Measure(
        held_out=held_out,
        tokenizer=load_tokenizer(artefacts["tokenizer"].path),
        stop_ids=sorted({int(i) for artefact in rendered for i in artefact.facts["stop_ids"]}),
        num_samples=spec.samples,
        max_new_tokens=spec.max_new_tokens,
        seed=spec.seed,
        run=run,
        on_progress=on_progress,
        **_trained(artefacts, held_out, shards, spec=spec, run=run),
    )


def _trained(
    artefacts: Mapping[str, Artefact], held_out: HeldOut, shards: Shards, *, spec: EvaluateSpec, run: str
) -> dict[str, Any]:
    """What the overfit card is made from; nothing without a plan. While training, a large set is not searched for copies."""
    if "plan" not in artefacts or spec.overfit_tokens == 0:
        return {}
    planned = Planned(read_table(artefacts["plan"].file("planned.parquet"), PLANNED), shards)
    sample = planned.sample(held_out, max_tokens=spec.overfit_tokens, seed=spec.seed)
    is_searched = run == "after" or planned.num_tokens <= SEARCHED_TOKENS
    return {"trained": sample, "planned": planned if is_searched else None}


def recorded(before: Artefact, *, run: str) -> Measurement:
    """What a finished `measure` artefact found, as a measurement by `run`: the untouched model needs no second look."""
    from tutelage.evaluate.measure import Measurement

    scores = [dataclasses.replace(score, run=run) for score in read_scores(before.file("scores.parquet"))]
    samples = [dataclasses.replace(sample, run=run) for sample in read_samples(before.file("samples.parquet"))]
    loss = before.facts["loss"]
    return Measurement(0, scores, samples, math.nan if loss is None else float(loss))


def _build_measure(
    folder: Path, artefacts: Mapping[str, Artefact], spec: EvaluateSpec, progress: Progress, *, precision: tuple[str, str]
) -> Outcome:
    from tutelage.model.load import load_model

    before = artefacts.get("before")
    used = _settled(*precision) if before is None else {name: before.facts[name] for name in ("device", "dtype", "dtype_reason")}
    where = model_folder(artefacts["model"]) if before is None else artefacts["train"].file("model")
    step = 0 if before is None else int(artefacts["train"].facts["final_step"])
    measure = open_measure(artefacts, spec=spec, run="before" if before is None else "after", on_progress=progress.advance)
    progress.start("held-out loss", artefacts["held_out"].facts["num_tokens"], "tokens")
    found = measure(load_model(where, dtype=used["dtype"], device=used["device"]), step)
    _require_finite(found.scores)
    was = read_scores(before.file("scores.parquet")) if before is not None else []
    scores = [*found.scores, *(changes(was, found.scores, seed=spec.seed) if was else [])]
    write_records(folder / "scores.parquet", SCORES, scores)
    write_records(folder / "samples.parquet", SAMPLES, found.samples)
    num_records = len({(score.task, score.item) for score in scores if score.metric == "nll" and score.item})
    change = total_change(scores)
    facts = {
        **used,
        "loss": None if math.isnan(found.loss) else found.loss,
        "num_records": num_records,
        "change": None if change is None else _without_nan(dataclasses.asdict(change)),
    }
    return Outcome(Counts(num_records, num_records), facts)


def _settled(device: str, dtype: str) -> dict[str, str]:
    """The device and precision that `auto` stands for on this machine, and why; other names as they are."""
    from tutelage.model.load import choose_device, choose_dtype

    device = choose_device() if device == "auto" else device
    dtype, reason = choose_dtype(device) if dtype == "auto" else (dtype, "as the recipe says")
    return {"device": device, "dtype": dtype, "dtype_reason": reason}


def _require_finite(scores: list[Score]) -> None:
    """Nothing; raises `ModelError` naming the first record whose loss is not a number."""
    for score in scores:
        if score.metric == "nll" and score.item and not math.isfinite(score.value):
            raise ModelError(
                f"{score.item}: held-out loss is {score.value}; the model's weights or this precision cannot be used "
                "(train.dtype: float32 is the safe one)"
            )


def _without_nan(values: dict[str, Json]) -> dict[str, Json]:
    """The same, None in the place of nan: manifests are plain JSON."""
    return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in values.items()}
