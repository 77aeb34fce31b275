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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tutelage.errors import PlanError
from tutelage.plan.advice import advise
from tutelage.plan.assemble import Plan, mixture_facts, plan_candidates, step_facts, strata_facts
from tutelage.plan.deciles import decile_facts
from tutelage.plan.fates import OPEN, Fates
from tutelage.plan.join import (
    HELD_OUT,
    NOT_DRAWN,
    NOT_RENDERED,
    SHARDS,
    Joined,
    SourceExamples,
    flags_at,
    held_out_records,
    join_source,
)
from tutelage.plan.mixtures import online_rule
from tutelage.plan.online import OnlineRule
from tutelage.plan.onward import Part, earlier_by_name, what_is_behind
from tutelage.plan.schedule_spec import Online
from tutelage.plan.spec import BatchSpec, LossRule, MixSpec
from tutelage.plan.supervision import length_facts, supervise, supervision_facts
from tutelage.plan.tally_stage import tally_stage
from tutelage.plan.windows import step_shape
from tutelage.records import Int64
from tutelage.store import Artefact, Counts, Outcome, Progress, Stage
from tutelage.tables import DROPPED, PLACEMENTS, PLAN_STEPS, PLANNED, write_table

_THREADS = 4
"""Sources joined at a time: most of it is reading, which needs no lock."""


@dataclass(frozen=True)
class PlanInputs:
    """The boxes that a plan joins; dictionaries by source name. Sources without rewrites or rules lack theirs."""

    renders: Mapping[str, Stage]
    rerenders: Mapping[str, Stage]
    screens: Mapping[str, Stage]
    copies: Stage
    split: Stage
    weighted_reads: Mapping[str, Stage] = field(default_factory=dict)
    """The `read` boxes of the sources whose records state weights."""
    earlier: Sequence[Part] = ()
    """The parts of a run that this one goes on from: passes continue, and caps count the visits of all parts."""

    @cached_property
    def tallies(self) -> dict[str, Stage]:
        """`tally NAME` and `retally NAME`."""
        return {box.label: box for stage in [*self.renders.values(), *self.rerenders.values()] for box in [tally_stage(stage)]}

    def by_name(self) -> dict[str, Stage]:
        """`render NAME`, `rerender NAME`, `tally NAME`, `retally NAME`, `screen NAME`, `read NAME`, `copies`, `split`."""
        kinds = {"render": self.renders, "rerender": self.rerenders, "screen": self.screens, "read": self.weighted_reads}
        named = {f"{kind} {name}": stage for kind, stages in kinds.items() for name, stage in stages.items()}
        return named | self.tallies | {"copies": self.copies, "split": self.split} | earlier_by_name(self.earlier)


def plan_stage(
    inputs: PlanInputs,
    *,
    mix: MixSpec,
    loss: LossRule,
    batch: BatchSpec,
    max_tokens: int,
    source_weights: Mapping[str, float],
    source_tasks: Mapping[str, str] | None = None,
) -> Stage:
    """The box `plan`. In: every record. Out: the records that training sees. PlanError at once for an impossible batch size.

    `source_tasks` gives the task of the sources whose records all have the same, known before anything is read.

    The order that files or sources were given in plays no part: sources are taken by name, records by position.
    """
    step_shape(batch, max_tokens=max_tokens)
    wanted = {
        "mix": mix.canonical(),
        "loss": loss.canonical(),
        "batch": batch.canonical(),
        "max_tokens": max_tokens,
        "source_weights": {name: source_weights.get(name, 1.0) for name in inputs.renders},
        "source_tasks": dict(source_tasks or {}),
    }

    def build(folder: Path, artefacts: Mapping[str, Artefact], progress: Progress) -> Outcome:
        names = sorted(inputs.renders)
        progress.start("plan", len(names), "sources")
        held_out = held_out_records(artefacts["split"], names)

        def join(name: str) -> SourceExamples:
            weight, task = source_weights.get(name, 1.0), (source_tasks or {}).get(name)
            made = join_source(name, artefacts, is_held_out=held_out[name], loss=loss, source_weight=weight, task=task)
            progress.advance(text=name)
            return made

        with ThreadPoolExecutor(_THREADS, "join") as pool:
            sources = list(pool.map(join, names))
        joined = Joined(names, sources, loss, mix.over)
        behind = what_is_behind(joined, artefacts, num_parts=len(inputs.earlier), seed=mix.seed)
        candidates = dataclasses.replace(joined.candidates, behind=behind.draws)
        plan = plan_candidates(candidates, mix=mix, batch=batch, max_tokens=max_tokens)
        rule = _online_rule(joined, plan, mix=mix, loss=loss)
        may_be_drawn = plan.num_visits > 0 if rule is None else np.isin(plan.tasks, list(rule.shares))[joined.candidates.task]
        with ThreadPoolExecutor(2, "write") as pool:  # beside the sums
            planned = pool.submit(_write_planned, folder, joined, plan, may_be_drawn)
            counts = pool.submit(_write_order, folder, joined, plan, may_be_drawn)
            facts = _facts(joined, plan, mix=mix, loss=loss) | _online_facts(rule, plan, mix=mix) | behind.facts()
            facts["notes"] = [*behind.notes(), *plan.notes]
            for note in facts["notes"]:
                progress.note(note)
            planned.result()
            return Outcome(counts.result(), facts)

    return Stage("plan", 2, wanted, build, inputs=inputs.by_name())


def _online_rule(joined: Joined, plan: Plan, *, mix: MixSpec, loss: LossRule) -> OnlineRule | None:
    """What training decides by, where the mixture is online: then any example of a task that has a share may be drawn."""
    if not isinstance(mix.schedule, Online):
        return None
    if loss.normalise == "task":
        raise PlanError(
            "loss.normalise: task, weighs tasks by the visits of the whole run, which an online mixture does not know; choose "
            "`token` or `example`, or a schedule that is known ahead"
        )
    return online_rule(joined.candidates.supplies(), mix, examples_per_step=plan.shape.examples)


def _online_facts(rule: OnlineRule | None, plan: Plan, *, mix: MixSpec) -> dict[str, Any]:
    if rule is None or not isinstance(mix.schedule, Online):
        return {}
    about = {"every_steps": mix.schedule.every_steps, "seed": mix.seed, "shape": dataclasses.asdict(plan.shape)}
    return {"online": {"rule": rule.as_json(), **about}}


def _write_planned(folder: Path, joined: Joined, plan: Plan, may_be_drawn: np.ndarray) -> None:
    """The examples; those that are never drawn are left out."""
    drawn = np.flatnonzero(may_be_drawn)
    columns = {
        "source": _labels(joined.source[drawn], joined.names),
        "shard": _labels(joined.column("shard")[drawn], SHARDS),
        "task": _labels(joined.candidates.task[drawn], plan.tasks),
        "multiplier": plan.multiplier[drawn],
        "weight": plan.weight[drawn],
        "num_visits": plan.num_visits[drawn],
        "num_tokens": joined.candidates.num_tokens[drawn],
    }
    columns |= {name: joined.column(name)[drawn] for name in ("index", "row", "part")}
    write_table(folder / "planned.parquet", pa.table({name: columns[name] for name in PLANNED.names}, schema=PLANNED))


def _write_order(folder: Path, joined: Joined, plan: Plan, may_be_drawn: np.ndarray) -> Counts:
    """The visits and the steps, with examples numbered as `_write_planned` does; and the account."""
    number = np.cumsum(may_be_drawn, dtype=np.int32) - np.int32(1)
    placed = dataclasses.replace(plan.placements, example=number[plan.placements.example])
    write_table(folder / "placements.parquet", pa.table(vars(placed), schema=PLACEMENTS))
    steps = {"step": np.arange(len(plan.steps)), **vars(plan.steps)}
    write_table(folder / "steps.parquet", pa.table(steps, schema=PLAN_STEPS))
    return _account(folder, joined, may_be_drawn)


def _labels(codes: np.ndarray, names: Sequence[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array(list(names), pa.string()))


def _account(folder: Path, joined: Joined, may_be_drawn: np.ndarray) -> Counts:
    """Writes dropped.parquet, and counts records."""
    first, tables, reasons, num_in = 0, [], Counter[str](), 0
    for source in joined.sources:
        drawn = may_be_drawn[first : first + len(source.row)]
        first += len(source.row)
        fate = source.fate.copy()
        num = len(fate)
        fate.put(flags_at(source.row, num) & ~flags_at(source.row[drawn], num), NOT_DRAWN)
        rows = np.flatnonzero(~fate.are(OPEN))
        num_in += num
        reasons.update({reason: count for reason, count in fate.counts().items() if reason != OPEN})
        tables.append(_dropped_table(source, rows, fate))
    write_table(folder / "dropped.parquet", pa.concat_tables(tables).unify_dictionaries())
    return Counts(num_in, num_in - reasons.total(), reasons)


def _dropped_table(source: SourceExamples, rows: Int64, fate: Fates) -> pa.Table:
    """Records by `row`, their join key; file and line stand in the source's conversations."""
    reasons, num = fate.labels(rows), len(rows)
    empty = pa.repeat(pa.scalar("", pa.string()), num)
    columns = {
        "source": pa.repeat(pa.scalar(source.name, pa.string()), num).dictionary_encode(),
        "file": empty.dictionary_encode(),
        "line": np.full(num, -1),
        "row": rows,
        "reason": reasons,
        "detail": _details(source, rows, reasons),
        "excerpt": empty,
    }
    return pa.table({name: columns[name] for name in DROPPED.names}, schema=DROPPED)


def _details(source: SourceExamples, rows: Int64, reasons: pa.DictionaryArray) -> pa.Array:
    """What the stages before said of these records; nothing where the reason is our own."""
    own = {HELD_OUT, NOT_RENDERED, NOT_DRAWN}
    is_told = np.array([reason not in own for reason in reasons.dictionary.to_pylist()] or [False])
    details = np.full(len(rows), "", object)
    told = np.flatnonzero(is_told[reasons.indices.to_numpy()])
    details[told] = [source.details.get(row, "") for row in rows[told].tolist()]
    return pa.array(details, pa.string())


def _facts(joined: Joined, plan: Plan, *, mix: MixSpec, loss: LossRule) -> dict[str, Any]:
    """What `tutelage plan` prints and later stages read."""
    strata = strata_facts(plan, joined.candidates)
    mixture = mixture_facts(plan, joined.candidates, strata, count=mix.count)
    found = supervise(list(joined.tallied(plan)), num_tasks=len(plan.tasks), loss=loss)
    summed = [name for name in mixture[0] if name.startswith(("available_", "planned_"))]
    total = {name: sum(line[name] for line in mixture) for name in summed}
    for i, line in enumerate(mixture):
        line |= length_facts(found.targets[i], num_multi_turn=found.num_multi_turn[i], mixture=line)
    total |= length_facts(found.targets.sum(axis=0), num_multi_turn=found.num_multi_turn.sum(), mixture=total)
    weights = supervision_facts(found, tasks=plan.tasks, loss=loss)
    shares = weights["kind_weight_by_policy"]["recipe"]
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
        "padding_share": 1 - plan.packing_efficiency,
        "steps": step_facts(steps),
        "count": mix.count,
        "loss": loss.canonical(),
        "tasks": list(plan.tasks),
        "sources": list(joined.names),
        "mixture": mixture,
        "over": mix.over,
        "strata": strata,
        "schedule": None if mix.schedule is None else mix.canonical()["schedule"],
        "deciles": decile_facts(plan, joined.candidates, mix=mix),
        "total": total | {"num_unfilled": plan.mixture.num_unfilled},
        "notes": list(plan.notes),
        **weights,
        "advice": [vars(advice) for advice in advise(mixture, total, loss=loss, prompt_share=shares["user"] + shares["system"])],
    }
