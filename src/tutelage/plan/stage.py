"""The `plan` box: joins renderings with verdicts and the split, and writes the run that training will follow.

planned.parquet      one line per example that is drawn: where its tokens are, its weight, its visits
placements.parquet   one line per visit: which row, where in it
steps.parquet        one line per step: its rows, real tokens, and the total weight its loss is divided by
dropped.parquet      one line per record that is not trained, with the reason
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tutelage.errors import PlanError
from tutelage.plan.assemble import Candidates, Plan, mixture_facts, plan_candidates
from tutelage.plan.spec import BatchSpec, LossRule, MixSpec
from tutelage.plan.weights import weigh_examples
from tutelage.plan.windows import step_shape
from tutelage.records import Float64, Int32, Int64
from tutelage.store import Artefact, Counts, Outcome, Progress, Stage
from tutelage.tables import DROPPED, PLACEMENTS, PLAN_STEPS, PLANNED, SPLIT, VERDICTS, RenderedSet, read_table, write_table

HELD_OUT, NOT_RENDERED, NO_LOSS_WEIGHT, NOT_DRAWN = "held_out", "not_rendered", "no_loss_weight", "not_drawn"
"""Our own reasons, beside the rule names of verdicts and the reasons of rendering. `no_loss_weight`: the loss rule, the
source's weight or the turns' weights leave no target to learn; `not_drawn`: the budget went to other records."""

_SHARDS = ("render", "rerender")


@dataclass(frozen=True)
class PlanInputs:
    """The boxes that a plan joins; dictionaries by source name. Sources without rewrites or rules lack theirs."""

    renders: Mapping[str, Stage]
    rerenders: Mapping[str, Stage]
    screens: Mapping[str, Stage]
    copies: Stage
    split: Stage

    def by_name(self) -> dict[str, Stage]:
        """`render NAME`, `rerender NAME`, `screen NAME`, `copies`, `split`."""
        kinds = {"render": self.renders, "rerender": self.rerenders, "screen": self.screens}
        named = {f"{kind} {name}": stage for kind, stages in kinds.items() for name, stage in stages.items()}
        return named | {"copies": self.copies, "split": self.split}


def plan_stage(
    inputs: PlanInputs,
    *,
    mix: MixSpec,
    loss: LossRule,
    batch: BatchSpec,
    max_tokens: int,
    source_weights: Mapping[str, float],
) -> Stage:
    """The box `plan`. In: every record. Out: the records that training sees. PlanError at once for an impossible batch size.

    The order that files or sources were given in plays no part: sources are taken by name, records by position.
    """
    step_shape(batch, max_tokens=max_tokens)
    wanted = {
        "mix": mix.canonical(),
        "loss": loss.canonical(),
        "batch": batch.canonical(),
        "max_tokens": max_tokens,
        "source_weights": {name: source_weights.get(name, 1.0) for name in inputs.renders},
    }

    def build(folder: Path, artefacts: Mapping[str, Artefact], progress: Progress) -> Outcome:
        names = sorted(inputs.renders)
        progress.start("plan", len(names), "sources")
        sources = []
        for name in names:
            sources.append(_join(name, artefacts, loss=loss, multiplier=source_weights.get(name, 1.0)))
            progress.advance(text=name)
        joined = _Joined(names, sources)
        plan = plan_candidates(joined.candidates, mix=mix, batch=batch, max_tokens=max_tokens)
        _write(folder, joined, plan)
        for note in plan.notes:
            progress.note(note)
        return Outcome(_account(folder, joined, plan), _facts(joined, plan, mix=mix, loss=loss))

    return Stage("plan", 1, wanted, build, inputs=inputs.by_name())


@dataclass(frozen=True)
class _Source:
    """One source joined: the examples that may be drawn (one entry each), and per record why it may not ("" = it may)."""

    name: str
    fate: np.ndarray
    details: dict[int, str]
    multiplier: float
    tasks: tuple[str, ...]
    task: Int32
    shard: Int32
    index: Int64
    row: Int64
    part: Int32
    num_tokens: Int32
    num_supervised: Int64
    weight: Float64

    def at(self, which: np.ndarray) -> _Source:
        """The examples at these positions."""
        arrays: dict[str, Any] = {f: getattr(self, f)[which] for f in _PER_EXAMPLE}
        return dataclasses.replace(self, **arrays)


_PER_EXAMPLE = ("task", "shard", "index", "row", "part", "num_tokens", "num_supervised", "weight")


def _join(name: str, artefacts: Mapping[str, Artefact], *, loss: LossRule, multiplier: float) -> _Source:
    """What may be drawn from one source. One reason per record: held out, else screened, else a copy, else not rendered."""
    is_held_out = _held_out(artefacts["split"], name)
    fate, details = np.full(len(is_held_out), "", object), dict[int, str]()
    parts: list[_Source] = []
    for shard in _SHARDS:
        if f"{shard} {name}" in artefacts:
            rendered = artefacts[f"{shard} {name}"]
            newer = _examples(rendered.path, _SHARDS.index(shard), name, fate, loss=loss, multiplier=multiplier)
            refused = read_table(rendered.file("dropped.parquet"), DROPPED)
            if parts:  # a record rendered anew, or refused then, no longer counts as first rendered
                renewed = np.union1d(newer.row, refused["row"].to_numpy())
                parts = [part.at(~np.isin(part.row, renewed)) for part in parts]
                fate[renewed] = ""
            _set_fates(fate, details, refused, reason="reason", detail="detail")
            parts.append(newer)
    _set_fates(fate, details, _drops(artefacts["copies"], name), reason="rule", detail="reason")
    if f"screen {name}" in artefacts:
        _set_fates(fate, details, _drops(artefacts[f"screen {name}"], name), reason="rule", detail="reason")
    fate[is_held_out] = HELD_OUT
    return _settle_fates(_merge(parts), fate, details)


def _examples(folder: Path, shard: int, name: str, fate: np.ndarray, *, loss: LossRule, multiplier: float) -> _Source:
    rendered = RenderedSet(folder)
    table = rendered.examples
    weight, supervised = weigh_examples(rendered, loss=loss, multiplier=multiplier)
    labels = table["task"].combine_chunks()
    return _Source(
        name=name,
        fate=fate,
        details={},
        multiplier=multiplier,
        tasks=tuple(labels.dictionary.to_pylist()),
        task=labels.indices.to_numpy().astype(np.int32),
        shard=np.full(len(table), shard, np.int32),
        index=np.arange(len(table)),
        row=table["row"].to_numpy(),
        part=table["part"].to_numpy(),
        num_tokens=table["num_tokens"].to_numpy(),
        num_supervised=supervised,
        weight=weight,
    )


def _merge(parts: Sequence[_Source]) -> _Source:
    """The examples of both shards in record order, under one list of tasks."""
    tasks = tuple(sorted({task for part in parts for task in part.tasks}))
    parts = [dataclasses.replace(part, task=_recode(part.task, part.tasks, tasks)) for part in parts]
    arrays: dict[str, Any] = {f: np.concatenate([getattr(part, f) for part in parts]) for f in _PER_EXAMPLE}
    whole = dataclasses.replace(parts[0], tasks=tasks, **arrays)
    return whole.at(np.lexsort((whole.part, whole.row)))


def _recode(codes: Int32, names: Sequence[str], wanted: Sequence[str]) -> Int32:
    place = {name: i for i, name in enumerate(wanted)}
    return np.array([place[name] for name in names] or [0], np.int32)[codes]


def _held_out(split: Artefact, name: str) -> np.ndarray:
    """Whether each record of a source is held out."""
    table = read_table(split.file("split.parquet"), SPLIT)
    mine = table.filter(pc.equal(table["source"].cast(pa.string()), name))
    out = np.zeros(len(mine), bool)
    out[mine["row"].to_numpy()] = mine["is_held_out"].to_numpy(zero_copy_only=False)
    return out


def _drops(artefact: Artefact, name: str) -> pa.Table:
    """The verdicts that drop records of a source."""
    table = read_table(artefact.file("verdicts.parquet"), VERDICTS)
    return table.filter(pc.and_(pc.equal(table["source"].cast(pa.string()), name), pc.invert(table["keep"])))


def _set_fates(fate: np.ndarray, details: dict[int, str], table: pa.Table, *, reason: str, detail: str) -> None:
    """Writes the first reason that a table gives for a record over what another stage said of it."""
    rows, first = np.unique(table["row"].to_numpy(), return_index=True)
    chosen = table.take(pa.array(first))
    fate[rows] = chosen[reason].to_pylist()
    details.update(zip(rows.tolist(), chosen[detail].to_pylist(), strict=True))


def _settle_fates(examples: _Source, fate: np.ndarray, details: dict[int, str]) -> _Source:
    """The examples that may be drawn, and a fate for every record that has none of them."""
    is_open = fate[examples.row] == ""
    fate[np.setdiff1d(np.flatnonzero(fate == ""), examples.row)] = NOT_RENDERED
    tasks_in_training = np.unique(examples.task[fate[examples.row] != HELD_OUT])
    drawable = is_open & (examples.weight > 0)
    fate[np.setdiff1d(examples.row[is_open], examples.row[drawable])] = NO_LOSS_WEIGHT
    tasks = tuple(examples.tasks[i] for i in tasks_in_training)
    codes = np.zeros(len(examples.tasks), np.int32)
    codes[tasks_in_training] = np.arange(len(tasks))
    kept = examples.at(drawable)
    return dataclasses.replace(kept, tasks=tasks, task=codes[kept.task], fate=fate, details=details)


@dataclass(frozen=True)
class _Joined:
    """All sources by name; `source` and the arrays of `candidates` have one entry per example that may be drawn."""

    names: Sequence[str]
    sources: Sequence[_Source]

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
        )


def _write(folder: Path, joined: _Joined, plan: Plan) -> None:
    """The three tables; examples that are never drawn are left out, and the others renumbered."""
    drawn = np.flatnonzero(plan.num_visits)
    number = np.zeros(len(plan.num_visits), np.int32)
    number[drawn] = np.arange(len(drawn))
    source = joined.source[drawn]
    columns = {
        "source": _labels(source, joined.names),
        "shard": _labels(joined.column("shard")[drawn], _SHARDS),
        "task": _labels(joined.candidates.task[drawn], plan.tasks),
        "multiplier": np.array([s.multiplier for s in joined.sources])[source],
        "num_visits": plan.num_visits[drawn],
    }
    columns |= {name: joined.column(name)[drawn] for name in ("index", "row", "part", "num_tokens", "weight")}
    write_table(folder / "planned.parquet", pa.table({name: columns[name] for name in PLANNED.names}, schema=PLANNED))
    placed = dataclasses.replace(plan.placements, example=number[plan.placements.example])
    write_table(folder / "placements.parquet", pa.table(vars(placed), schema=PLACEMENTS))
    steps = {"step": np.arange(len(plan.steps)), **vars(plan.steps)}
    write_table(folder / "steps.parquet", pa.table(steps, schema=PLAN_STEPS))


def _labels(codes: np.ndarray, names: Sequence[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array(list(names), pa.string()))


def _account(folder: Path, joined: _Joined, plan: Plan) -> Counts:
    """Writes dropped.parquet, and counts records."""
    first, tables, reasons, num_in = 0, [], Counter[str](), 0
    for source in joined.sources:
        visits = plan.num_visits[first : first + len(source.row)]
        first += len(source.row)
        fate = source.fate.copy()
        fate[np.setdiff1d(source.row, source.row[visits > 0])] = NOT_DRAWN
        rows = np.flatnonzero(fate != "")
        num_in += len(fate)
        reasons.update(fate[rows])
        tables.append(_dropped_table(source, rows, fate[rows]))
    write_table(folder / "dropped.parquet", pa.concat_tables(tables).unify_dictionaries())
    return Counts(num_in, num_in - reasons.total(), reasons)


def _dropped_table(source: _Source, rows: Int64, reasons: np.ndarray) -> pa.Table:
    """Records by `row`, their join key; file and line stand in the source's conversations."""
    own = {HELD_OUT, NOT_RENDERED, NO_LOSS_WEIGHT, NOT_DRAWN}
    details = [
        "" if reason in own else source.details.get(row, "") for row, reason in zip(rows.tolist(), reasons.tolist(), strict=True)
    ]
    empty = pa.array([""] * len(rows), pa.string())
    columns = {
        "source": pa.array([source.name] * len(rows), pa.string()).dictionary_encode(),
        "file": empty.dictionary_encode(),
        "line": np.full(len(rows), -1),
        "row": rows,
        "reason": pa.array(reasons.tolist(), pa.string()).dictionary_encode(),
        "detail": pa.array(details, pa.string()),
        "excerpt": empty,
    }
    return pa.table({name: columns[name] for name in DROPPED.names}, schema=DROPPED)


def _facts(joined: _Joined, plan: Plan, *, mix: MixSpec, loss: LossRule) -> dict[str, Any]:
    """What `tutelage plan` prints and later stages read."""
    mixture = mixture_facts(plan, joined.candidates)
    summed = [name for name in mixture[0] if name.startswith(("available_", "planned_"))]
    total = {name: sum(line[name] for line in mixture) for name in summed}
    steps = plan.steps
    return {
        "capacity": plan.shape.capacity,
        "slots_per_step": plan.shape.slots,
        "examples_per_step": plan.shape.examples,
        "pack": "best_fit" if plan.shape.is_packed else "none",
        "num_steps": len(steps),
        "num_rows": int(steps.num_rows.sum()),
        "real_tokens": int(steps.real_tokens.sum()),
        "slots": int(steps.slots.sum()),
        "total_weight": float(steps.total_weight.sum()),
        "packing_efficiency": plan.packing_efficiency,
        "count": mix.count,
        "loss": loss.canonical(),
        "tasks": list(plan.tasks),
        "sources": list(joined.names),
        "mixture": mixture,
        "total": total | {"num_unfilled": plan.mixture.num_unfilled},
        "notes": list(plan.notes),
    }
