"""What `tutelage plan` shows: the exact plan, a preview of it from a sample, and the page with its pictures."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tutelage.errors import TutelageError
from tutelage.pipeline import Pipeline, Run, build_pipeline, produced
from tutelage.plan import preview as sampling
from tutelage.plan.pictures import picture_data
from tutelage.plan.preview import Measured, SampledSource
from tutelage.plan.sample import Totals, add_totals
from tutelage.recipe import RecipeFile, resolved_text
from tutelage.records import Float64, Int64, Rewrite
from tutelage.report.plan_view import PlanView, plan_view, read_arrays
from tutelage.store import Artefact, Outcome, Progress, Silent, Stage, Store, write_atomic
from tutelage.tables import (
    DROPPED,
    PLANNED,
    SPLIT,
    VERDICTS,
    ConversationColumns,
    Conversations,
    apply_rewrites,
    in_pieces,
    read_rewrites,
    read_table,
    write_table,
)

NUM_SAMPLED = 2000
"""Records of each source that a preview renders."""
_SEED = 0
_BATCH_ROWS = 8192


def exact_view(file: RecipeFile, done: Run) -> PlanView:
    """The plan of a finished run, to be shown."""
    plan = done.artefacts["plan"]
    return _view(file, plan, plan.facts)


def preview(
    file: RecipeFile, *, num: int = NUM_SAMPLED, store: Store | Path | str = ".tutelage", progress: Progress | None = None
) -> PlanView:
    """The plan as it will be, from about `num` rendered records of each source; sources already rendered count exactly.

    Reading, cleaning and the split are done for good, in the store; the sample's renderings and the plan made of them are
    not kept. TutelageError for `num` below 2, and whatever a plan of these sizes would raise.
    """
    if num < 2:
        raise TutelageError(f"--sample {num}: an error can be stated from 2 records up; the default is {NUM_SAMPLED:,}")
    if file.recipe.extend:
        raise TutelageError("--preview: an extension goes on from a whole run, and a sample is none; plan it without --preview")
    store = store if isinstance(store, Store) else Store(store)
    progress = progress or Silent()
    with store.in_use(), tempfile.TemporaryDirectory(prefix="tutelage-preview-") as folder:
        pipeline = build_pipeline(file, store=store)
        job = _Preview(pipeline, num, Path(folder), progress)
        plan = pipeline.stages["plan"]
        made = _built(plan, job.inputs(plan), Path(folder) / "plan", progress)
        return _view(file, made, made.facts, estimate=job.estimate(made))


def write_page(view: PlanView, file: RecipeFile, path: Path) -> dict[str, Any]:
    """Writes the page of a plan; its facts: `html`, `size_bytes`. TutelageError when the page's folder does not exist."""
    from tutelage.report.plan_page import render_plan

    check_page(path)
    title = file.recipe.report.title or file.recipe.name
    page = render_plan(view, title=title, recipe_text=resolved_text(file)).encode("utf-8", "replace")
    write_atomic(path, page)
    return {"html": str(path), "size_bytes": len(page)}


def check_page(path: Path) -> None:
    """TutelageError where no page can be written, or nothing can draw it: said before the work, not after it."""
    from tutelage.report.charts import require_charts

    if not path.parent.is_dir():
        raise TutelageError(f"--html {path}: the folder {path.parent} does not exist; make it, or name another file")
    require_charts()


def page_line(facts: Mapping[str, Any]) -> str:
    """What is said of a page that was written.

    >>> page_line({"html": "plan.html", "size_bytes": 412_300})
    'plan.html: 0.41 MB; open it in a browser'
    """
    return f"{facts['html']}: {facts['size_bytes'] / 1e6:.2f} MB; open it in a browser"


def _view(file: RecipeFile, plan: Artefact, facts: Mapping[str, Any], *, estimate: dict[str, Any] | None = None) -> PlanView:
    pictures = picture_data(facts["strata"], file.recipe.mix)
    return plan_view(read_arrays(plan), facts, pictures, file.recipe.report.coverage, estimate=estimate)


@dataclass
class _Preview:
    """One preview under way. A source is either in the store as rendered, or sampled."""

    pipeline: Pipeline
    num: int
    folder: Path
    progress: Progress

    def __post_init__(self) -> None:
        self._sampled: dict[str, tuple[SampledSource, Measured]] = {}
        self._exact: Counter[str] = Counter()

    def inputs(self, plan: Stage) -> dict[str, Artefact]:
        """What the plan reads, by its own names: from the store, or made up from a sample."""
        stages, store = self.pipeline.stages, self.pipeline.store
        rendered = {name: stage for name, stage in plan.inputs.items() if stage.name in ("render", "rerender")}
        sources = sorted({stage.slot for stage in rendered.values()})
        missing = {stage.slot for stage in rendered.values() if store.find(stage) is None}
        of_sources = [label for label in stages if stages[label].slot in set(sources) - missing]
        wanted = {*self.pipeline.needed("curate"), "model", "tokenizer"}
        wanted |= {label for label in of_sources if stages[label].name in ("render", "rerender", "tally", "retally")}
        labels = [label for label in stages if label in wanted]
        done = dict(produced(self.pipeline, labels, self.progress))
        self.progress.start("preview", len(missing), "sources")
        made = {(stages[label].name, stages[label].key): artefact for label, artefact in done.items()}
        of_plan = {name: (stage.name, stage.key) for name, stage in plan.inputs.items()}
        out = {name: made[box] for name, box in of_plan.items() if box in made}
        for source in sources:
            if source in missing:
                out = {name: a for name, a in out.items() if not _is_of(name, source)} | self._sample(source, done)
                self.progress.advance(text=source)
            else:
                self._count_drops(source, done)
        return out

    def _sample(self, source: str, done: Mapping[str, Artefact]) -> dict[str, Artefact]:
        """Renders a sample of one source, and makes it up to the whole."""
        recipe, stages = self.pipeline.file.recipe, self.pipeline.stages
        read = done[f"read {source}"]
        tasks, lengths = _sizes(read.file("conversations.parquet"))
        rows = np.flatnonzero(_is_eligible(source, done, num_records=len(lengths)))
        sampled = sampling.draw_source(source, rows=rows, tasks=tasks[rows], lengths=lengths[rows], num=self.num, seed=_SEED)
        texts = self.folder / source / "read"
        texts.mkdir(parents=True)
        write_table(texts / "conversations.parquet", _texts(read, source, sampled.rows, done.get(f"rewrite {source}")))
        render, tally = stages[f"render {source}"], stages[f"tally {source}"]
        sample = {"read": Artefact("read", "sample", texts, read.manifest), "tokenizer": done["tokenizer"]}
        rendered = _built(render, sample, self.folder / source / "render", Silent())
        tallied = _built(tally, {"rendered": rendered}, self.folder / source / "tally", Silent())
        measured = sampling.measure_sample(rendered.path, tallied, num_lines=len(sampled.rows), loss=recipe.loss)
        self._sampled[source] = sampled, measured
        whole, counted = (self.folder / source / f"whole-{kind}" for kind in ("render", "tally"))
        for folder in (whole, counted):
            folder.mkdir()
        sampling.impute(sampled, rendered.path, tallied, into=whole, tally_into=counted)
        return {
            f"render {source}": Artefact("render", "preview", whole, rendered.manifest),
            f"tally {source}": Artefact("tally", "preview", counted, tallied.manifest),
        }

    def _count_drops(self, source: str, done: Mapping[str, Artefact]) -> None:
        """What rendering set aside of a source that is in the store, where no earlier stage did."""
        num = pq.read_metadata(done[f"read {source}"].file("conversations.parquet")).num_rows
        is_eligible, reasons = _is_eligible(source, done, num_records=num), dict[int, str]()
        for shard in ("render", "rerender"):
            if f"{shard} {source}" in done:
                table = read_table(done[f"{shard} {source}"].file("dropped.parquet"), DROPPED)
                reasons |= zip(table["row"].to_pylist(), table["reason"].to_pylist(), strict=True)
        self._exact.update(reason for row, reason in reasons.items() if is_eligible[row])

    def estimate(self, plan: Artefact) -> dict[str, Any]:
        """How far off the plan may be, as plain values."""
        facts = plan.facts
        mix = self.pipeline.file.recipe.mix
        by_task, by_name, hides = dict[str, list[Totals]](), dict[str, list[Totals]](), dict[str, sampling.Hidden]()
        for source, (sampled, measured) in self._sampled.items():
            for task, found in sampling.estimate_strata(sampled, measured):
                by_task.setdefault(task, []).append(found)
                by_name.setdefault(source if mix.over == "sources" else task, []).append(found)
            for task, unseen in sampling.hidden(sampled, measured):
                hides[task] = hides[task] + unseen if task in hides else unseen
        totals, of_names = ({name: add_totals(parts) for name, parts in group.items()} for group in (by_task, by_name))
        tasks = sampling.task_intervals(facts["mixture"], totals, hides)
        more: dict[str, Any] = {"mix": mix, "num_steps": facts["num_steps"], "seed": _SEED, "spread": _spread(plan, mix.over)}
        planned = sampling.plan_intervals(facts["strata"], of_names, **more)
        sources = [source for source, _ in self._sampled.values()]
        return {
            "num_sampled": sum(len(source.rows) for source in sources),
            "num_records": sum(source.num_records for source in sources),
            "sources": {source.name: {"sampled": len(source.rows), "of": source.num_records} for source in sources},
            "relative_error": sampling.relative_error(tasks, totals),
            "tasks": tasks,
            "planned": {unit: planned[unit] for unit in sampling.MEASURES},
            "steps": planned["steps"],
            "dropped": sampling.estimate_drops(self._sampled, self._exact),
        }


def _is_of(name: str, source: str) -> bool:
    """Whether an input of the plan holds renderings of this source."""
    kind, _, slot = name.partition(" ")
    return slot == source and kind in ("render", "rerender", "tally", "retally")


def _spread(plan: Artefact, over: str) -> dict[str, Float64]:
    """The standard deviation of one example's measures, by task (or source): 0, its tokens, its learned tokens.

    The last goes by the weight of its targets, scaled to the tokens learned.
    """
    planned = read_table(plan.file("planned.parquet"), PLANNED)
    label = planned["source" if over == "sources" else "task"].cast(pa.string()).to_numpy(zero_copy_only=False)
    tokens, weight = planned["num_tokens"].to_numpy(), planned["weight"].to_numpy()
    out = {}
    for line in plan.facts["strata"]:
        mine = label == line["name"]
        learned = (
            line["available_supervised"]
            / max(line["available_examples"], 1)
            / max(weight[mine].mean() if mine.any() else 1.0, 1e-9)
        )
        ends = (tokens[mine].std(), weight[mine].std() * learned) if mine.any() else (0.0, 0.0)
        out[line["name"]] = np.array([0.0, *ends])
    return out


def _built(stage: Stage, inputs: Mapping[str, Artefact], folder: Path, progress: Progress) -> Artefact:
    """A stage's build outside the store."""
    folder.mkdir()
    outcome: Outcome = stage.build(folder, inputs, progress)
    return Artefact(stage.name, "preview", folder, {"facts": dict(outcome.facts)}, is_hit=False)


def _is_eligible(source: str, done: Mapping[str, Artefact], *, num_records: int) -> np.ndarray:
    """Which records of a source get as far as being rendered for training: neither held out nor dropped before."""
    out = np.ones(num_records, bool)
    split = read_table(done["split"].file("split.parquet"), SPLIT)
    mine = split.filter(pc.equal(split["source"].cast(pa.string()), source))
    out[mine.filter(mine["is_held_out"])["row"].to_numpy()] = False
    for label in (f"screen {source}", "copies"):
        if label in done:
            table = read_table(done[label].file("verdicts.parquet"), VERDICTS)
            drops = table.filter(pc.and_(pc.equal(table["source"].cast(pa.string()), source), pc.invert(table["keep"])))
            out[drops["row"].to_numpy()] = False
    return out


def _sizes(path: Path) -> tuple[np.ndarray, Int64]:
    """The task of each record, and the bytes of its texts."""
    tasks, lengths = [], []
    for batch in in_pieces(path).iter_batches(_BATCH_ROWS, columns=["task", "turns"]):
        turns, offsets = batch["turns"].flatten(), batch["turns"].offsets.to_numpy().astype(np.int64)
        size = np.zeros(len(turns), np.int64)
        for name in ("content", "reasoning", "tool_calls"):
            size += pc.fill_null(pc.binary_length(turns.field(name)), 0).to_numpy(zero_copy_only=False)
        total = np.concatenate([[0], np.cumsum(size)])
        lengths.append(np.diff(total[offsets - offsets[0]]))
        tasks.append(np.asarray(batch["task"].cast(pa.string()).to_numpy(zero_copy_only=False), object))
    return np.concatenate([np.zeros(0, object), *tasks]), np.concatenate([np.zeros(0, np.int64), *lengths])


def _texts(read: Artefact, source: str, rows: Int64, rewrite: Artefact | None) -> pa.Table:
    """The records at these rows, as rules rewrote them."""
    edits: dict[int, list[Rewrite]] = {}
    for edit in read_rewrites(rewrite.file("rewrites.parquet")) if rewrite is not None else ():
        edits.setdefault(edit.row, []).append(edit)
    columns = ConversationColumns()
    for part in _taken(read.file("conversations.parquet"), rows):
        for conversation in Conversations(source, part):
            columns.append(apply_rewrites(conversation, edits.get(int(rows[len(columns)]), ())))
    return columns.table()


def _taken(path: Path, rows: Int64) -> Iterator[pa.Table]:
    """The lines of a Parquet file at these sorted positions, a batch at a time."""
    first = 0
    for batch in in_pieces(path).iter_batches(_BATCH_ROWS):
        here = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + batch.num_rows)]
        if len(here):
            yield pa.table(batch).take(pa.array(here - first))
        first += batch.num_rows
