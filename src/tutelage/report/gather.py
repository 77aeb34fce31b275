"""Artefacts to `ReportData`: reads what the other rooms wrote, through the schemas of `tables.py` alone.

Inputs are found by the labels of their stages (`read NAME`, `plan`, `measure before`, ...). What a run has not reached is
left empty, so that a page can be made as soon as there is a plan.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tutelage.records import Float32, Rendered, Score
from tutelage.report.data import (
    ALL_TASKS,
    Account,
    Amount,
    Change,
    Curve,
    ReportData,
    SamplePair,
    ShownExample,
    TaskMixture,
)
from tutelage.report.fates import Inputs, dropped_groups, flows, labels, of_stage, rewritten
from tutelage.report.look import Decode, runs, shortened, token_texts
from tutelage.report.overfit import Overfit, overfit_of
from tutelage.report.spec import ReportSpec
from tutelage.store import Artefact
from tutelage.tables import PLACEMENTS, PLAN_STEPS, STEPS, Shards, read_samples, read_scores, read_table, records_at
from tutelage.tables import PLANNED as PLANNED_SCHEMA

Weigh = Callable[[Rendered], Float32]
"""An example to the loss weight of each of its tokens as a target, f32 (T,): the plan's rule, handed in by the pipeline."""

_MAX_BINS = 80
_HEAD_TOKENS, _TAIL_TOKENS = 500, 200


def gather(inputs: Inputs, *, title: str, recipe: str, name: str, spec: ReportSpec, weigh: Weigh) -> ReportData:
    """Everything the page shows of these artefacts."""
    inputs = {label.removeprefix("measure "): artefact for label, artefact in inputs.items()}
    plan, train = inputs["plan"], inputs.get("train")
    planned = read_table(plan.file("planned.parquet"), PLANNED_SCHEMA)
    return ReportData(
        title=title,
        recipe_name=name,
        recipe_text=recipe,
        flows=flows(inputs, planned),
        dropped=dropped_groups(inputs, spec.num_dropped),
        rewritten=rewritten(inputs),
        mixture=mixture(plan, train),
        plan_facts=plan.facts,
        plan_notes=tuple(plan.facts.get("notes", ())),
        changes=changes(inputs.get("before"), inputs.get("after"), trained=set(planned["task"].to_pylist())),
        curves=_curves(train),
        learning_rates=_learning_rates(train),
        samples=_samples(inputs.get("before"), inputs.get("after")),
        examples=_examples(inputs, planned, spec.num_examples, weigh),
        accounts=tuple(account(label, artefact) for label, artefact in inputs.items()),
        train_facts=train.facts if train is not None else {},
        overfit=overfit(inputs.get("after"), train),
        licences=labels(inputs, planned, "licence"),
        origins=labels(inputs, planned, "origin"),
    )


def account(label: str, artefact: Artefact) -> Account:
    """A stage's line of the provenance table."""
    manifest = artefact.manifest
    packages = {
        key.removeprefix("package "): str(value)
        for key, value in manifest["ingredients"].items()
        if key.startswith("package ") and value
    }
    counts = manifest["counts"]
    return Account(
        label=f"measure {label.removeprefix('measure ')}" if artefact.stage == "measure" else label,
        key=artefact.key,
        num_in=counts["in"],
        num_out=counts["out"],
        dropped=counts["dropped"],
        seconds=manifest["seconds"],
        created=manifest["created"],
        packages=packages,
    )


def mixture(plan: Artefact, train: Artefact | None) -> tuple[TaskMixture, ...]:
    """The plan's mixture, with what training really saw beside it."""
    return mixture_lines(plan.facts["mixture"], _realised(plan, train) if train is not None else None)


def mixture_lines(lines: Sequence[Mapping[str, Any]], realised: Mapping[str, Amount] | None = None) -> tuple[TaskMixture, ...]:
    """The mixture of a plan's facts; `realised` is what training saw of each task, None before training."""
    return tuple(
        TaskMixture(
            task=line["task"],
            available=_amount(line, "available"),
            planned=_amount(line, "planned"),
            realised=realised.get(line["task"], Amount(0, 0, 0)) if realised is not None else None,
            promised_share=line["promised_share"],
            visits_per_record=line["visits_per_record"],
            most_visits=line["most_visits"],
            is_capped=line["is_capped"],
        )
        for line in lines
    )


def _amount(line: Mapping[str, Any], part: str) -> Amount:
    return Amount(line[f"{part}_examples"], line[f"{part}_tokens"], line[f"{part}_supervised"])


def _realised(plan: Artefact, train: Artefact) -> dict[str, Amount]:
    """Examples and tokens of the steps that were taken, from the placements; supervised tokens as training counted them."""
    trained = read_table(train.file("steps.parquet"), STEPS)
    parts = trained["part"].cast(pa.string())
    num_steps = len(pc.unique(trained.filter(pc.equal(parts, "all"))["step"]))
    placed, stepped = plan.path / "placements.parquet", plan.path / "steps.parquet"
    if (train.path / "plan_steps.parquet").exists():  # an online mixture: the plan as it became
        placed, stepped = train.file("placements.parquet"), train.file("plan_steps.parquet")
    steps = read_table(stepped, PLAN_STEPS).slice(0, num_steps)
    end = max(
        (first + num for first, num in zip(*(steps[n].to_pylist() for n in ("first_row", "num_rows")), strict=True)), default=0
    )
    placements = read_table(placed, PLACEMENTS)
    placements = placements.filter(pc.less(placements["row"], end))
    tasks = read_table(plan.file("planned.parquet"), PLANNED_SCHEMA)["task"].combine_chunks()
    names = tasks.dictionary.to_pylist()
    task = tasks.indices.to_numpy()[placements["example"].to_numpy()]
    examples = np.bincount(task, minlength=len(names))
    tokens = np.bincount(task, weights=placements["length"].to_numpy(), minlength=len(names))
    supervised = {name: pc.sum(trained.filter(pc.equal(parts, f"task {name}"))["tokens"]).as_py() or 0 for name in names}
    return {name: Amount(int(examples[i]), int(tokens[i]), int(supervised[name])) for i, name in enumerate(names)}


def changes(before: Artefact | None, after: Artefact | None, *, trained: set[str]) -> tuple[Change, ...]:
    """Held-out loss per task and over all, with the paired interval that the measure after training holds."""
    if before is None or after is None:
        return ()
    was, now = read_scores(before.file("scores.parquet")), read_scores(after.file("scores.parquet"))
    old, new, paired = _aggregates(was, "nll"), _aggregates(now, "nll"), _aggregates(now, "nll_change")
    items: Counter[str] = Counter(task for task, _ in {(s.task, s.item) for s in now if s.metric == "nll" and s.item})
    items[ALL_TASKS] = sum(items.values())
    nan = float("nan")
    return tuple(
        Change(
            task=task,
            num_items=items[task],
            num_targets=int(new[task].weight),
            before=old[task].value,
            after=new[task].value,
            low=paired[task].low if task in paired else nan,
            high=paired[task].high if task in paired else nan,
            is_trained=task in trained or task == ALL_TASKS,
        )
        for task in new
        if task in old
    )


def overfit(after: Artefact | None, train: Artefact | None) -> Overfit | None:
    """The overfit card; None before the measure after training, or where no training record was measured."""
    if after is None or train is None:
        return None
    evals = train.path / "evals.parquet"
    return overfit_of(read_scores(after.file("scores.parquet")), read_scores(evals) if evals.exists() else [])


def _aggregates(scores: Sequence[Score], metric: str) -> dict[str, Score]:
    return {score.task: score for score in scores if score.metric == metric and not score.item}


def _curves(train: Artefact | None) -> tuple[Curve, ...]:
    """Training loss by step, in at most eighty bins, and held-out loss at each measurement; by task and over all."""
    if train is None:
        return ()
    table = read_table(train.file("steps.parquet"), STEPS)
    parts = table["part"].cast(pa.string())
    out = []
    for part in pc.unique(parts).to_pylist():
        if part == "all" or part.startswith("task "):
            task = ALL_TASKS if part == "all" else part.removeprefix("task ")
            out.append(_train_curve(task, table.filter(pc.equal(parts, part))))
    evals = train.path / "evals.parquet"
    if evals.exists():
        out += _held_out_curves(read_scores(evals))
    return tuple(curve for curve in out if curve.steps)


def _train_curve(task: str, table: pa.Table) -> Curve:
    """Sum of loss over sum of weight per bin: a bin is a mean over its targets, never a mean of means."""
    table = table.filter(pc.greater(table["weight"], 0)).sort_by("step")
    steps, losses, weights = (table[name].to_numpy() for name in ("step", "loss_sum", "weight"))
    bins = [part for part in np.array_split(np.arange(len(steps)), min(len(steps), _MAX_BINS) or 1) if len(part)]
    return Curve(
        task,
        "train",
        tuple(int(steps[part[-1]]) for part in bins),
        tuple(float(losses[part].sum() / weights[part].sum()) for part in bins),
    )


def _held_out_curves(scores: Sequence[Score]) -> list[Curve]:
    by_task: dict[str, dict[int, float]] = defaultdict(dict)
    for score in scores:
        if score.metric == "nll" and not score.item:
            by_task[score.task][score.step] = score.value
    return [Curve(task, "held-out", *zip(*sorted(points.items()), strict=True)) for task, points in by_task.items()]


def _learning_rates(train: Artefact | None) -> tuple[tuple[int, float], ...]:
    if train is None:
        return ()
    table = read_table(train.file("steps.parquet"), STEPS)
    table = table.filter(pc.equal(table["part"].cast(pa.string()), "all")).sort_by("step")
    pairs = list(zip(table["step"].to_pylist(), table["learning_rate"].to_pylist(), strict=True))
    stride = max(1, len(pairs) // (4 * _MAX_BINS))
    return tuple(pairs[::stride]) if len(pairs) > 1 else ()


def _samples(before: Artefact | None, after: Artefact | None) -> tuple[SamplePair, ...]:
    """Answers on the same prompts, paired by record."""
    sides = [
        {(s.task, s.item): s for s in read_samples(a.file("samples.parquet"))}
        if a is not None and (a.path / "samples.parquet").exists()
        else {}
        for a in (before, after)
    ]
    out = []
    for key in dict.fromkeys([*sides[1], *sides[0]]):
        any_side = sides[1].get(key) or sides[0][key]
        out.append(SamplePair(*key, any_side.prompt, any_side.reference, sides[0].get(key), sides[1].get(key)))
    return tuple(out)


def _examples(inputs: Inputs, planned: pa.Table, num_examples: int, weigh: Weigh) -> tuple[ShownExample, ...]:
    """Planned examples chosen by digest, one task after the other, with the weights that training gives their tokens."""
    if not num_examples or not planned.num_rows or "tokenizer" not in inputs:
        return ()
    decode = open_decoder(inputs["tokenizer"].path)
    shards = Shards(
        {(source, stage): a.path for stage in ("render", "rerender") for source, a in of_stage(inputs, stage).items()}
    )
    chosen = planned.take(pa.array(_choose(planned, num_examples), pa.int64())).to_pylist()
    reads = of_stage(inputs, "read")
    out = []
    for line in chosen:
        where = records_at(reads[line["source"]].file("conversations.parquet"), [line["row"]])[line["row"]]
        rendered = shards.example(line["source"], line["shard"], line["index"])
        row_id = f"{line['source']}/{where['file']}:{where['line']}"
        weights = weigh(rendered) * np.float32(line["multiplier"])
        out.append(
            show_example(
                rendered, weights, decode, row_id=row_id, task=line["task"], source=line["source"], num_visits=line["num_visits"]
            )
        )
    return tuple(out)


def show_example(
    rendered: Rendered, weights: Float32, decode: Decode, *, row_id: str, task: str, source: str, num_visits: int = 1
) -> ShownExample:
    """An example ready to be shown. `weights` f32 (T,) are those of the tokens as targets; the first token never is one."""
    weights = weights.astype(np.float32, copy=True)
    weights[:1] = 0.0
    parts = runs(rendered, weights, token_texts(rendered.ids.tolist(), decode))
    num_supervised = int((weights > 0).sum())
    shown = shortened(parts, head=_HEAD_TOKENS, tail=_TAIL_TOKENS)
    return ShownExample(row_id, task, source, num_visits, len(rendered.ids), num_supervised, shown)


def _choose(planned: pa.Table, num_examples: int) -> list[int]:
    """Positions of examples: each task in turn, in the order of a digest of where they come from."""
    columns = (planned[name].to_pylist() for name in ("task", "source", "row", "part", "num_visits"))
    by_task: dict[str, list[tuple[bytes, int]]] = defaultdict(list)
    for index, (task, source, row, part, num_visits) in enumerate(zip(*columns, strict=True)):
        if num_visits:
            digest = hashlib.blake2b(json.dumps([source, row, part]).encode(), digest_size=8).digest()
            by_task[task].append((digest, index))
    queues = [sorted(by_task[task]) for task in sorted(by_task)]
    longest = max(map(len, queues), default=0)
    order = [queue[turn][1] for turn in range(longest) for queue in queues if turn < len(queue)]
    return order[:num_examples]


def open_decoder(folder: Path) -> Decode:
    """Ids to text with special tokens written out, by the tokenizer of this folder."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    return decode
