r"""The stages in order: what a recipe means as boxes, running them, and explaining which would run and why.

    read -> rewrite -> screen --\
      \-> split -----------------> copies --\
      \-> render (+ rerender) -> tally -----> plan -> audit -> train -> after --> report
                               \------------> held_out -> before --------/
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tutelage.ahead import Job, do_ahead, num_processes
from tutelage.allocator import collecting_as_usual, collecting_rarely
from tutelage.audit.stage import Audit, AuditInputs, Rule, audit_stage, check_audit, read_audit
from tutelage.audit.tokens import Stretch
from tutelage.curate.stage import copies_stage, rewrite_stage, screen_stage
from tutelage.errors import TutelageError
from tutelage.evaluate.spec import EvaluateSpec
from tutelage.evaluate.stage import (
    HeldOutInputs,
    MeasureInputs,
    held_out_stage,
    measure_stage,
    open_measure,
    open_shards,
    recorded,
)
from tutelage.extend_spec import RunPart, parts_of
from tutelage.model.stage import model_stage, tokenizer_stage
from tutelage.plan.batch import Batches
from tutelage.plan.online_batches import OnlineBatches
from tutelage.plan.onward import Part
from tutelage.plan.pictures import picture_data
from tutelage.plan.spec import KindWeights, LossRule
from tutelage.plan.stage import PlanInputs, plan_stage
from tutelage.plan.weights import kind_table, weigh_tokens
from tutelage.recipe import Recipe, RecipeFile, resolved_text
from tutelage.records import Batch, Float32, Kind, Rendered
from tutelage.render.stage import is_open, render_stage, rerender_stage, warm_up
from tutelage.report.stage import report_stage
from tutelage.sources.stage import check_bad_share, read_stage, split_stage
from tutelage.store import Artefact, Progress, Silent, Stage, Store, write_atomic
from tutelage.together import dismiss, follow, is_led, produce_together
from tutelage.train.stage import Making, TrainInputs, train_stage
from tutelage.world import current

UNTIL = {
    "sources": "split",
    "curate": "copies",
    "render": "render",
    "plan": "plan",
    "audit": "audit",
    "train": "train",
    "eval": "measure after",
    "report": "report",
}
"""What `run --until` can name, and the last stage (or every stage of that name) it asks for."""


@dataclass(frozen=True)
class Pipeline:
    """All boxes of one recipe by label (`read maths`, `plan`, ...), upstream first."""

    file: RecipeFile
    store: Store
    stages: Mapping[str, Stage]

    def needed(self, until: str) -> list[str]:
        """The labels that must exist for `until` (a key of UNTIL), upstream first."""
        if until not in UNTIL:
            raise TutelageError(f"--until {until}: is not one of: {', '.join(UNTIL)}")
        wanted = {label for label, stage in self.stages.items() if UNTIL[until] in (label, stage.name)}
        for label in reversed(list(self.stages)):
            if label in wanted:
                wanted |= {self._label_of(stage) for stage in self.stages[label].inputs.values()}
                # The gate before training. No input of it, or a new version of the audit would train everything again.
                is_training = self.stages[label].name == "train"
                wanted |= {label.replace("train", "audit", 1)} & self.stages.keys() if is_training else set()
        return [label for label in self.stages if label in wanted]

    @cached_property
    def _labels(self) -> dict[str, str]:
        return {f"{stage.name}/{stage.key}": label for label, stage in self.stages.items()}

    def _label_of(self, stage: Stage) -> str:
        return self._labels[f"{stage.name}/{stage.key}"]


@dataclass(frozen=True)
class Run:
    """What `run` leaves: the run's folder and every artefact by label."""

    folder: Path
    artefacts: Mapping[str, Artefact]

    @property
    def num_built(self) -> int:
        """How many stages were not in the store."""
        return sum(not artefact.is_hit for artefact in self.artefacts.values())


@dataclass(frozen=True)
class StageStatus:
    """One line of `explain`. `why` names the changed ingredients of a miss; counts are None until it has run."""

    label: str
    stage: str
    key: str
    is_hit: bool
    why: tuple[str, ...] = ()
    counts: Mapping[str, Any] | None = None
    seconds: float | None = None
    size_bytes: int | None = None

    def as_json(self) -> dict[str, Any]:
        """The line as plain values, the account spelled out as in, out, dropped."""
        counts = self.counts or {"in": None, "out": None, "dropped": None}
        return {
            "label": self.label,
            "stage": self.stage,
            "key": self.key,
            "status": "hit" if self.is_hit else "miss",
            "why": list(self.why),
            **counts,
            "seconds": self.seconds,
            "size_bytes": self.size_bytes,
        }


def build_pipeline(file: RecipeFile, *, store: Store) -> Pipeline:
    """The boxes of a recipe. Reads the data files' digests, and nothing else."""
    recipe = file.recipe
    boxes: dict[str, Stage] = {}

    def add(stage: Stage) -> Stage:
        boxes[stage.label] = stage
        return stage

    reads, rewrites, screens = {}, {}, {}
    sizes = _sizes(file)
    with ThreadPoolExecutor(num_processes(), "digest") as pool:  # files that were never seen are read for their digests
        begun = {
            name: pool.submit(read_stage, name, recipe.sources[name], intake=recipe.intake, base=file.folder, store=store)
            for name in sorted(recipe.sources, key=lambda name: -sizes.get(name, 0))
        }
    for name in recipe.sources:
        reads[name] = add(begun[name].result())
        if (rewrite := rewrite_stage(reads[name], rules=recipe.curate.rules)) is not None:
            rewrites[name] = add(rewrite)
        screens[name] = add(screen_stage(reads[name], rewrite=rewrites.get(name), rules=recipe.curate.rules))
    split = add(split_stage(reads, spec=recipe.split))
    copies = add(copies_stage(reads, rewrites=rewrites, screens=screens, split=split, spec=recipe.curate))
    model = add(model_stage(file.model_name, store=store, new_tokens=recipe.model.new_tokens))
    tokenizer = add(tokenizer_stage(file.model_name, model=model, store=store, new_tokens=recipe.model.new_tokens))
    renders, rerenders = _render_boxes(file, reads, rewrites, tokenizer, store)
    for stage in [*renders.values(), *rerenders.values()]:
        add(stage)
    _add_training(recipe, _Groups(reads, renders, rerenders, screens, copies, split, model, tokenizer), add)
    more: dict[str, Any] = {"name": recipe.name, "spec": recipe.report, "model": recipe.model.name}
    more["told"] = {"audit": _audited(recipe), "plan": lambda plan: picture_data(plan.facts["strata"], recipe.mix)}
    add(report_stage(dict(boxes), recipe=resolved_text(file), weigh=weigher(recipe.loss), **more))
    return Pipeline(file, store, boxes)


@dataclass(frozen=True)
class _Groups:
    reads: dict[str, Stage]
    renders: dict[str, Stage]
    rerenders: dict[str, Stage]
    screens: dict[str, Stage]
    copies: Stage
    split: Stage
    model: Stage
    tokenizer: Stage

    @property
    def shards(self) -> dict[str, Stage]:
        """The rendered sets by label."""
        return {stage.label: stage for stage in [*self.renders.values(), *self.rerenders.values()]}


def _add_training(recipe: Recipe, groups: _Groups, add: Callable[[Stage], Stage]) -> None:
    """Plan, held-out set, the measure before, training, the measure after; plan and training once more for each extension."""
    weighted = {name: groups.reads[name] for name, source in recipe.sources.items() if source.weight_field is not None}
    inputs = PlanInputs(groups.renders, groups.rerenders, groups.screens, groups.copies, groups.split, weighted)
    for tally in inputs.tallies.values():
        add(tally)
    of_records = HeldOutInputs(groups.reads, groups.renders, groups.split, groups.copies, groups.screens, groups.rerenders)
    held_out = held_out_stage(of_records, spec=recipe.evaluate)
    measured = MeasureInputs(groups.model, groups.tokenizer, held_out, groups.renders, groups.rerenders)
    on: dict[str, Any] = {"spec": recipe.evaluate, "device": recipe.train.device, "dtype": recipe.train.dtype}
    before = measure_stage(measured, **on)
    earlier: list[Part] = []
    for part in parts_of(recipe.mix, recipe.train, recipe.extend):
        plan = add(_in_slot(part.slot, _plan_box(recipe, part, dataclasses.replace(inputs, earlier=tuple(earlier)))))
        if recipe.audit.enabled:
            audited = AuditInputs(plan, groups.reads, groups.renders, groups.rerenders, groups.tokenizer)
            add(_in_slot(part.slot, audit_stage(audited, rule=_audit_rule(recipe))))
        for stage in () if earlier else (held_out, before):
            add(stage)
        follows: dict[str, Any] = {"earlier": earlier[-1].train, "optimizer": part.optimizer} if earlier else {}
        boxes = TrainInputs(groups.model, groups.tokenizer, plan, groups.shards, held_out, before, **follows)
        earlier.append(Part(plan, add(_in_slot(part.slot, _train_box(recipe, part, boxes)))))
    measured = dataclasses.replace(measured, plan=earlier[-1].plan)
    add(measure_stage(measured, **on, trained=earlier[-1].train, before=before))


def _in_slot(slot: str, stage: Stage) -> Stage:
    """The box of one part of a run; the last part has no slot."""
    return dataclasses.replace(stage, slot=slot)


def _plan_box(recipe: Recipe, part: RunPart, inputs: PlanInputs) -> Stage:
    return plan_stage(
        inputs,
        mix=part.mix,
        loss=recipe.loss,
        batch=recipe.batch,
        max_tokens=recipe.render.max_tokens,
        source_weights={name: source.weight for name, source in recipe.sources.items()},
        source_tasks={name: s.task or name for name, s in recipe.sources.items() if s.task_column is None},
    )


def _train_box(recipe: Recipe, part: RunPart, boxes: TrainInputs) -> Stage:
    is_packed = recipe.batch.pack != "none"
    making = Making(open_batches, lambda artefacts: _measure(artefacts, recipe.evaluate), is_packed=is_packed)
    return train_stage(boxes, model_spec=recipe.model, spec=part.train, evaluate=recipe.evaluate, making=making)


def weigher(loss: LossRule) -> Callable[[Rendered], Float32]:
    """The loss weight of each token of an example, f32 (T,), under a recipe's rule."""
    return lambda example: weigh_tokens(example.kinds, loss=loss, turns=example.turns, turn_weights=example.turn_weights)


def _audit_rule(recipe: Recipe) -> Rule:
    """What the audit must know of loss, template and sources."""
    loss = recipe.loss

    def weigh(of: Stretch) -> Float32:
        more: dict[str, Any] = {"turns": of.turns, "turn_weights": of.turn_weights}
        return weigh_tokens(of.kinds, loss=loss, offsets=of.offsets, turn_offsets=of.turn_offsets, **more)

    return Rule(
        weigh,
        asks_scaffold=bool(kind_table(loss)[Kind.SCAFFOLD] > 0),
        leaves_stop_out=isinstance(loss, KindWeights) and loss.weights.get("stop") == 0,
        has_own_template=recipe.render.template == "model",
        silent_sources=frozenset(name for name, source in recipe.sources.items() if source.weight == 0),
    )


def _audited(recipe: Recipe) -> Callable[[Artefact], dict[str, Any]]:
    """The audit under the recipe's thresholds, as plain values for the report."""
    return lambda artefact: read_audit(artefact, recipe.audit).as_json()


def _measure(artefacts: Mapping[str, Artefact], spec: EvaluateSpec) -> Callable[[Any, int], Any]:
    """What training calls; at step 0 the model is still the one that `before` measured."""
    measure = dataclasses.replace(open_measure(artefacts, spec=spec, run="during"), world=current())
    if "earlier" in artefacts:  # an extension starts from a model that nobody has measured yet
        return measure
    first = recorded(artefacts["before"], run="during")
    return lambda model, step: measure.beside(model, first) if step == 0 else measure(model, step)


def open_batches(artefacts: Mapping[str, Artefact]) -> Sequence[Batch]:
    """The steps of a plan, or those that an online mixture makes on the way."""
    opened = OnlineBatches if "online" in artefacts["plan"].facts else Batches
    return opened(artefacts["plan"].path, open_shards(artefacts))


def _render_boxes(
    file: RecipeFile, reads: dict[str, Stage], rewrites: dict[str, Stage], tokenizer: Stage, store: Store
) -> tuple[dict[str, Stage], dict[str, Stage]]:
    more: dict[str, Any] = {"tokenizer": tokenizer, "spec": file.recipe.render, "base": file.folder, "store": store}
    renders = {name: render_stage(read, **more) for name, read in reads.items()}
    rerenders = {name: rerender_stage(reads[name], rewrite=rewrite, **more) for name, rewrite in rewrites.items()}
    return renders, rerenders


def read_notes(artefacts: Mapping[str, Artefact]) -> Iterable[str]:
    """What people should hear of the reading: the shape decided for each file."""
    for label, artefact in artefacts.items():
        if label.startswith("read "):
            for name, facts in artefact.facts["files"].items():
                bad = f", {facts['bad']:,} set aside" if facts["bad"] else ""
                yield f"{label}: {name}: {facts['records']:,} records{bad}; shape {facts['shape']} ({facts['why']})"


def run(
    file: RecipeFile,
    *,
    until: str = "report",
    store: Store | Path | str = ".tutelage",
    runs: Path | str = "runs",
    progress: Progress | None = None,
    gate: bool = True,
) -> Run:
    """The finished run of a recipe: every stage up to `until` in the store, and `runs/NAME` filled.

    Stages that the store already has are not run again. A killed run goes on where it was when called again.
    Raises a TutelageError for anything the user can mend; AuditError, with `gate`, for data that would make training wrong.
    Under torchrun the first process does so, the others train with it and get a run without artefacts.
    """
    place = store if isinstance(store, Store) else Store(store)
    progress = progress or Silent()
    folder = Path(runs) / file.recipe.name
    if is_led():
        follow(lambda: (place, build_pipeline(file, store=place).stages))
        return Run(folder, {})
    with place.in_use(), collecting_rarely():
        pipeline = build_pipeline(file, store=place)
        artefacts: dict[str, Artefact] = {}
        labels = pipeline.needed(until)
        for label, artefact in produced(pipeline, labels, progress):
            artefacts[label] = artefact
            if gate and pipeline.stages[label].name == "audit":
                check_audit(artefacts[label], file.recipe.audit)
        _publish(pipeline, artefacts, folder)
    dismiss()
    return Run(folder, artefacts)


def produced(pipeline: Pipeline, labels: Sequence[str], progress: Progress) -> Iterator[tuple[str, Artefact]]:
    """The artefacts of these boxes, upstream first, each built when it is not in the store; `labels` as `needed` gives them."""
    artefacts: dict[str, Artefact] = {}
    fresh = _build_sources_ahead(pipeline, labels, progress)
    for label in labels:
        artefacts[label] = _produce(pipeline, label, artefacts, progress, is_fresh=label in fresh)
        yield label, artefacts[label]


def audit(
    file: RecipeFile,
    *,
    store: Store | Path | str = ".tutelage",
    runs: Path | str = "runs",
    progress: Progress | None = None,
) -> Audit:
    """The audit of everything that a recipe would train on; nothing is trained. It never raises for what it finds."""
    if not file.recipe.audit.enabled:
        raise TutelageError("audit.enabled: is false in this recipe, so there is nothing to show; set it to true")
    done = run(file, until="audit", store=store, runs=runs, progress=progress, gate=False)
    return read_audit(done.artefacts["audit"], file.recipe.audit)


BEFORE_RENDERING, RENDERING = ("read", "rewrite", "screen"), ("render", "rerender", "tally", "retally")
OF_SOURCES = (*BEFORE_RENDERING, *RENDERING)
"""Stages that each source has for itself. The tokenizer is opened while those before rendering are done."""
WITH_A_MODEL = ("model", "measure", "train")
"""Stages in whose garbage there may be tensors."""
WORTH_PROCESSES = 16_000_000
"""Bytes of data from which a process per source pays."""


def _build_sources_ahead(pipeline: Pipeline, labels: Sequence[str], progress: Progress) -> set[str]:
    """Builds what the sources need and the store has not, the largest source first, on all cores; returns the labels."""
    absent = [label for label in labels if pipeline.stages[label].name in (*OF_SOURCES, "model", "tokenizer")]
    absent = [label for label in absent if pipeline.store.find(pipeline.stages[label]) is None]
    missing = [label for label in absent if pipeline.stages[label].name in OF_SOURCES]
    sizes = _sizes(pipeline.file)
    sources = sorted({pipeline.stages[label].slot for label in missing}, key=lambda name: (-sizes.get(name, 0), name))
    processes = num_processes()
    if processes < 2 or len(sources) < 2 or sum(sizes.get(name, 0) for name in sources) < WORTH_PROCESSES:
        return set()

    def jobs(names: Sequence[str]) -> list[Job]:
        def job(source: str) -> Job:
            mine = [label for label in labels if pipeline.stages[label].slot == source and pipeline.stages[label].name in names]
            return lambda told: _build_source(pipeline, mine, told)

        return [job(source) for source in sources]

    progress.start(f"read and render on {processes} cores", 2 * len(sources), "steps of sources")
    do_ahead(
        jobs(BEFORE_RENDERING),
        processes=processes,
        progress=progress,
        then=jobs(RENDERING),
        meanwhile=None if _is_tokenizer_open(pipeline) else lambda: _open_tokenizer_ahead(pipeline, missing, progress),
    )
    return {label for label in absent if pipeline.store.find(pipeline.stages[label]) is not None}


def _is_tokenizer_open(pipeline: Pipeline) -> bool:
    """Whether this process has opened the recipe's tokenizer and proved its engine before."""
    stage = next((stage for stage in pipeline.stages.values() if stage.name == "tokenizer"), None)
    found = None if stage is None else pipeline.store.find(stage)
    return found is not None and is_open(found.path)


def _open_tokenizer_ahead(pipeline: Pipeline, missing: Sequence[str], progress: Progress) -> None:
    """Opens the tokenizer here once, for all processes; what is wrong with it is told when its stage's turn comes."""
    if not any(pipeline.stages[label].name in ("render", "rerender") for label in missing):
        return
    with contextlib.suppress(TutelageError):
        done: dict[str, Artefact] = {}
        for label in pipeline.needed("render"):
            if pipeline.stages[label].name in ("model", "tokenizer"):
                done[label] = _produce(pipeline, label, done, progress)
        warm_up(done["tokenizer"].path, spec=pipeline.file.recipe.render, base=pipeline.file.folder)


def _build_source(pipeline: Pipeline, labels: Sequence[str], progress: Progress) -> Callable[[], Artefact] | None:
    """Builds all stages of one source, in the process of its own; what is returned commits the last."""
    commit = None
    for stage in (pipeline.stages[label] for label in labels):
        if commit is not None:
            commit()
        inputs = {name: pipeline.store.find(upstream) for name, upstream in stage.inputs.items()}
        found = {name: artefact for name, artefact in inputs.items() if artefact is not None}
        if len(found) < len(inputs):  # its own child met an error, which is told when its turn comes
            return None
        commit = pipeline.store.begin(stage, found, progress)
    return commit


def _sizes(file: RecipeFile) -> dict[str, int]:
    """Bytes of each source's files on this machine; packed ones count four times."""
    sizes = {}
    for name, source in file.recipe.sources.items():
        if source.path is not None and "://" not in source.path:
            paths = glob.glob(str(file.folder / Path(source.path).expanduser()), recursive=True)
            sizes[name] = sum(Path(path).stat().st_size * (4 if path.endswith((".gz", ".zst")) else 1) for path in paths)
    return sizes


def _produce(
    pipeline: Pipeline, label: str, done: Mapping[str, Artefact], progress: Progress, *, is_fresh: bool = False
) -> Artefact:
    """A stage's artefact; `is_fresh` says that this run has built it already."""
    stage = pipeline.stages[label]
    inputs = {name: done[pipeline._label_of(upstream)] for name, upstream in stage.inputs.items()}
    with collecting_as_usual() if stage.name in WITH_A_MODEL else contextlib.nullcontext():
        artefact = produce_together(pipeline.store, pipeline.stages, label, inputs, progress)
    if is_fresh:
        artefact = dataclasses.replace(artefact, is_hit=False)
    if stage.name == "read":
        for line in () if artefact.is_hit else read_notes({label: artefact}):
            progress.note(line)
        check_bad_share(artefact, pipeline.file.recipe.intake)
    return artefact


def explain(file: RecipeFile, *, store: Store | Path | str = ".tutelage") -> list[StageStatus]:
    """Hit or miss per stage, and on a miss what changed since its nearest earlier artefact. Runs nothing."""
    store = store if isinstance(store, Store) else Store(store)
    pipeline = build_pipeline(file, store=store)
    return [_status(store, label, stage) for label, stage in pipeline.stages.items()]


def _status(store: Store, label: str, stage: Stage) -> StageStatus:
    found = store.find(stage)
    if found is None:
        return StageStatus(label, stage.name, stage.key, False, tuple(store.why_missing(stage)))
    manifest = found.manifest
    size = sum(entry["size_bytes"] for entry in manifest["files"].values())
    return StageStatus(label, stage.name, stage.key, True, (), manifest["counts"], manifest["seconds"], size)


def _publish(pipeline: Pipeline, artefacts: Mapping[str, Artefact], folder: Path) -> None:
    """Fills the run's folder with copies of what people open, and tells the store what it refers to.

    Copies, not links: whoever edits a file in a run folder must not edit the store.
    """
    keys = {f"{a.stage}/{a.key}": label for label, a in artefacts.items()}
    record = folder / "run.json"
    if "train" not in artefacts and (folder / "model").exists():  # what is there is of one finished run, and stays so
        finished = json.loads(record.read_text())["artefacts"] if record.exists() else {}
        pipeline.store.remember_run(folder, finished | keys)
        return
    text = json.dumps({"recipe": str(pipeline.file.path), "artefacts": keys}, indent=1)
    if record.exists() and record.read_text() == text:
        return
    folder.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    write_atomic(folder / "recipe.yaml", resolved_text(pipeline.file, relative_to=folder).encode())
    for label, name, target in _PUBLISHED:
        if label in artefacts and (artefacts[label].path / name).exists():
            _copy(artefacts[label].path / name, folder / target)
    pipeline.store.remember_run(folder, keys)
    write_atomic(record, text.encode())


_PUBLISHED = (
    ("train", "model", "model"),
    ("train", "steps.parquet", "steps.parquet"),
    ("train", "events.jsonl", "events.jsonl"),
    ("train", "mixture.jsonl", "mixture.jsonl"),
    ("train", "evals.parquet", "evals.parquet"),
    ("train", "samples.parquet", "samples.parquet"),
    ("report", "report.html", "report.html"),
    ("report", "model_card.md", "model/README.md"),
)
"""(stage, file of its artefact, where it goes in the run's folder)."""


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    else:
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        shutil.copyfile(source, temporary)
        temporary.replace(target)
