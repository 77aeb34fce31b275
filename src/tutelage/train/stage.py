"""Training's door to the store: loads the model, runs the loop, leaves a folder that plain transformers and peft load.

model/                        the adapter or the whole model, tokenizer, chat template, generation config
steps.parquet, events.jsonl   every step and event          evals.parquet, samples.parquet   every measurement
checkpoints/                  the last few and the best     dropped.parquet                  planned, never reached
mixture.jsonl, placements.parquet, plan_steps.parquet      of an online mixture: what was decided, and what it came to
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tutelage import tables
from tutelage.errors import TrainError
from tutelage.model.spec import ModelSpec
from tutelage.records import Batch, Document, Dropped
from tutelage.spec import Spec
from tutelage.store import Artefact, Counts, Json, Outcome, Progress, Stage, write_atomic
from tutelage.train.extend import Beginning, KeptOrFresh, beginning_of, lineage
from tutelage.train.log import peak_memory_bytes
from tutelage.train.remarks import peak_rate
from tutelage.train.spec import TrainSpec
from tutelage.world import current

if TYPE_CHECKING:
    from tutelage.train.loop import Measure, Result, Task

Inputs = Mapping[str, Artefact]

WITHOUT_EFFECT = (
    "trackers",
    "keep_checkpoints",
    "checkpoint_every_steps",
    "stop_within_seconds",
    "requeue_exit_code",
    "parallel",
    "micro_batch_rows",
    "micro_batch_tokens",
)
"""Settings that change what is kept or shown on the way, or how a step is cut into passes, and no number of the result but by
rounding: no part of the key, so that a run can go on with others."""


@dataclass(frozen=True)
class TrainInputs:
    """The boxes that training reads. `shards` are the rendered sets by "render NAME" and "rerender NAME".

    `before` measured the untouched model: its device and precision become training's, so that their losses compare.
    `earlier` is the finished run that this one extends, and `optimizer` says what becomes of that one's optimizer.
    """

    model: Stage
    tokenizer: Stage
    plan: Stage
    shards: Mapping[str, Stage]
    held_out: Stage
    before: Stage | None = None
    earlier: Stage | None = None
    optimizer: KeptOrFresh = "kept"

    def by_name(self) -> dict[str, Stage]:
        """All of them under the names that `build` finds them by."""
        named = {"model": self.model, "tokenizer": self.tokenizer, "plan": self.plan, "held_out": self.held_out}
        measured = {"before": self.before} if self.before is not None else {}
        extended = {"earlier": self.earlier} if self.earlier is not None else {}
        return named | measured | extended | dict(self.shards)


@dataclass(frozen=True)
class Making:
    """What only the pipeline can hand in: the plan's batches, and the measuring that another room knows how to do."""

    batches: Callable[[Inputs], Sequence[Batch]]
    measure: Callable[[Inputs], Measure] | None
    is_packed: bool = True
    """Whether rows hold several documents, as the recipe's `batch.pack` says."""


def train_stage(inputs: TrainInputs, *, model_spec: ModelSpec, spec: TrainSpec, evaluate: Spec, making: Making) -> Stage:
    """The `train` box. Its build finds an earlier try's checkpoints in its folder and goes on from them, to the bit on a CPU.

    `evaluate` is the recipe's section: the loop reads when to measure and stop, the rest is for `making.measure`.
    """
    settings = {name: value for name, value in spec.canonical().items() if name not in WITHOUT_EFFECT}

    def build(folder: Path, artefacts: Inputs, progress: Progress) -> Outcome:
        beginning = beginning_of(artefacts, inputs.optimizer)
        return _Training(folder, artefacts, progress, model_spec, spec, beginning).run(evaluate, making)

    wanted = {"train": settings, **_adaptation(model_spec), "evaluate": evaluate.canonical()}
    wanted |= {"optimizer": inputs.optimizer} if inputs.earlier is not None else {}
    return Stage(
        "train",
        3,
        wanted,
        build,
        inputs=inputs.by_name(),
        packages=("torch", "transformers", "peft"),
        resumable=True,
    )


def _adaptation(model_spec: ModelSpec) -> dict[str, Json]:
    """What of the recipe's `model` is training's; the starting model itself, new tokens included, is an input."""
    said = model_spec.canonical()
    return {name: said[name] for name in ("adapter", "freeze")}


def open_training(
    folder: Path, artefacts: Inputs, progress: Progress, *, of: tuple[ModelSpec, TrainSpec, Spec], making: Making
) -> tuple[Any, Sequence[Batch], Task]:
    """(model, batches, task) as a run in `folder` begins with them, and nothing trained; `of` is model, train, evaluate."""
    model_spec, spec, evaluate = of
    training = _Training(folder, artefacts, progress, model_spec, spec)
    setup = training._setup()
    training, model, batches = training._begun(setup, making)
    return model, batches, training._task(evaluate)


@dataclass(frozen=True)
class _Training:
    """One build: where, from what, and how."""

    folder: Path
    artefacts: Inputs
    progress: Progress
    model_spec: ModelSpec
    spec: TrainSpec
    beginning: Beginning | None = None

    def run(self, evaluate: Spec, making: Making) -> Outcome:
        """The account of the finished run."""
        import torch

        from tutelage.train.loop import train

        setup = self._setup()
        threads = torch.get_num_threads()
        torch.set_num_threads(setup["num_threads"])
        try:
            training, model, batches = self._begun(setup, making)
            measure = making.measure(self.artefacts) if making.measure else None
            task = dataclasses.replace(training._task(evaluate), device=setup["device"])
            result = train(model, batches, task, folder=self.folder, measure=measure, progress=self.progress)
            if not current().is_first:  # the first writes, and accounts for, what there is one of
                return Outcome(Counts(0, 0))
            stop_ids = self._export(model)
            return self._outcome(result, setup | {"stop_ids": stop_ids, "peak_memory_bytes": peak_memory_bytes(setup["device"])})
        finally:
            torch.set_num_threads(threads)

    def _setup(self) -> dict[str, Json]:
        """Device, dtype and threads, decided once and then kept: measured again, a resumed run could get other numbers."""
        path = self.folder / "setup.json"
        if current().is_first and not path.exists():
            decided = _decide(self.spec, self.artefacts.get("before"))
            write_atomic(path, json.dumps(decided, indent=1, sort_keys=True).encode())
        setup: dict[str, Json] = current().first(json.loads(path.read_text()) if current().is_first else None)
        _require_device(setup["device"], path)
        self.progress.note(f"training on {setup['device']} in {setup['dtype']} ({setup['dtype_reason']})")
        return setup

    def _begun(self, setup: dict[str, Json], making: Making) -> tuple[_Training, Any, Sequence[Batch]]:
        """(this with its rows per pass settled, the model, the steps); what can be refused early is."""
        from tutelage.train.prepare import check_early, settled

        batches = making.batches(self.artefacts)
        more: dict[str, Any] = {"device": setup["device"], "progress": self.progress}
        check_early(self.spec, self.model_spec, num_steps=len(batches), **more)
        model = self._model(setup, making)
        if self.spec.micro_batch_rows == "auto" and "micro_batch_rows" not in setup:
            self._settle_rows(setup, model, batches)
        self._compile(setup, model, num_slots=len(batches) * int(batches[0].inputs.size) if len(batches) else 0)
        return dataclasses.replace(self, spec=settled(self.spec, setup.get("micro_batch_rows"))), model, batches

    def _settle_rows(self, setup: dict[str, Json], model: Any, batches: Sequence[Batch]) -> None:
        """Nothing; `setup` and its file say how many rows fit into a pass on every rank, for this try and those after it."""
        from tutelage.train.fitting import find_rows

        world = current()
        rows, why = find_rows(model, batches, num_devices=world.size)
        setup["micro_batch_rows"] = min(world.gather(rows))
        if world.is_first:
            write_atomic(self.folder / "setup.json", json.dumps(setup, indent=1, sort_keys=True).encode())
        self.progress.note(f"micro_batch_rows: {setup['micro_batch_rows']} ({why})")

    def _compile(self, setup: dict[str, Json], model: Any, *, num_slots: int) -> None:
        """Nothing; the layers are compiled where it pays, and `setup` and its file keep the decision: it changes last bits."""
        from tutelage.train.compiling import compile_if_worth

        more: dict[str, Any] = {"device": setup["device"], "num_slots": num_slots, "decided": setup.get("compile")}
        is_sharded = self.spec.parallel == "fsdp" and not current().is_alone
        setup["compile"], why = compile_if_worth(model, self.spec, is_sharded=is_sharded, **more)
        if current().is_first:
            write_atomic(self.folder / "setup.json", json.dumps(setup, indent=1, sort_keys=True).encode())
        self.progress.note(f"layers are {'compiled' if setup['compile'] else 'not compiled'} ({why})")

    def _model(self, setup: Mapping[str, Json], making: Making) -> Any:
        """The starting model, isolated documents proved on it, its adapter put on."""
        from tutelage.model import set_dropout
        from tutelage.train.prepare import adapted, starting_model
        from tutelage.train.unpacking import prove_documents

        source = self.artefacts["model"]
        folder = str(source.facts.get("folder", source.path))
        is_cut = self.spec.parallel == "fsdp" and not current().is_alone  # such a model may be larger than one GPU
        device = "cpu" if is_cut else setup["device"]
        model = starting_model(folder, self.model_spec, device=device, dtype=setup["dtype"])
        prove_documents(model, is_packed=making.is_packed, progress=self.progress)
        if self.spec.dropout is not None:
            fields = set_dropout(model, self.spec.dropout)
            self.progress.note(f"dropout of {self.spec.dropout:g} as the configuration's {', '.join(fields)}")
        new_token_ids = source.facts.get("new_token_ids", ())
        return adapted(model, self.model_spec, seed=self.spec.seed, new_token_ids=new_token_ids, progress=self.progress)

    def _task(self, evaluate: Spec) -> Any:
        from tutelage.train.loop import Task, Watch
        from tutelage.train.micro import Names

        facts = self.artefacts["plan"].facts
        return Task(
            self.spec,
            peak_rate(self.spec.learning_rate, self.model_spec.adapter.kind),
            Names(tuple(facts["tasks"]), tuple(facts["sources"])),
            watch=Watch.of(evaluate.canonical()),
            name_of=self._namer(),
            run=self.artefacts["plan"].key,
            beginning=self.beginning,
        )

    def _namer(self) -> Callable[[Document], str]:
        path = self.artefacts["plan"].file("planned.parquet")

        def name(document: Document) -> str:
            planned = tables.read_table(path, tables.PLANNED).slice(document.example, 1).to_pylist()[0]
            return f"record {planned['row']} of {planned['source']}"

        return name

    def _export(self, model: Any) -> list[int]:
        """The ids that end a turn; `model/` is written whole, an earlier try's left half removed."""
        from tutelage.model import load_tokenizer, save_model

        rendered = [self.artefacts[name] for name in sorted(self.artefacts) if name.startswith(("render ", "rerender "))]
        stop_ids = sorted({int(i) for artefact in rendered for i in artefact.facts["stop_ids"]})
        folder = self.folder / "model"
        if folder.exists():
            shutil.rmtree(folder)
        # An absolute path: peft opens it from wherever the adapter is loaded.
        base = Path(str(self.artefacts["model"].facts.get("folder", self.artefacts["model"].path))).resolve()
        tokenizer = load_tokenizer(self.artefacts["tokenizer"].path)
        save_model(model, folder, tokenizer=tokenizer, stop_ids=stop_ids, base=base)
        return stop_ids

    def _outcome(self, result: Result, setup: Mapping[str, Json]) -> Outcome:
        position = result.position
        counts = self._account(position.step)
        adapter = self.model_spec.adapter
        facts = {
            **setup,
            "model_kind": adapter.kind,
            "num_steps": result.num_steps,
            "steps_done": position.step,
            "final_step": result.final_step,
            "best_step": position.best_step,
            "best_held_out_loss": position.best_loss,
            "is_stopped_early": position.is_stopped,
            "num_trained_weights": result.num_trained_weights,
            "learning_rate": peak_rate(self.spec.learning_rate, adapter.kind),
            "train_seconds": round(position.train_seconds, 3),
            "measure_seconds": round(position.measure_seconds, 3),
            "real_tokens": position.real_tokens,
            "tokens_per_second": round(position.real_tokens / max(position.train_seconds, 1e-9), 1),
            **lineage(self.artefacts, self.beginning),
        }
        return Outcome(counts, facts)

    def _account(self, steps_done: int) -> Counts:
        """Planned examples: those met in some step, and those that early stopping left out, listed in dropped.parquet."""
        plan = self.artefacts["plan"]
        is_online = (self.folder / "plan_steps.parquet").exists()
        stepped, placed = (plan.path / name for name in ("steps.parquet", "placements.parquet"))
        if is_online:
            stepped, placed = self.folder / "plan_steps.parquet", self.folder / "placements.parquet"
        steps = tables.read_table(stepped, tables.PLAN_STEPS).slice(0, steps_done)
        end = max((a + n for a, n in zip(*(steps[c].to_pylist() for c in ("first_row", "num_rows")), strict=True)), default=0)
        placements = tables.read_table(placed, tables.PLACEMENTS)
        rows, examples = placements["row"].to_numpy(), placements["example"].to_numpy()
        planned = tables.read_table(plan.file("planned.parquet"), tables.PLANNED)
        is_met = np.zeros(planned.num_rows, bool)
        is_met[examples[rows < end]] = True
        unmet = planned.filter(pa.array(~is_met))
        reason, detail = "early_stopping", f"the run ended after step {steps_done}, before this record's first visit"
        if is_online:
            reason, detail = "not_drawn", f"in {steps_done} steps the online mixture never came to this record"
        dropped = [
            Dropped(source, "", 0, row, reason, detail)
            for source, row in zip(unmet["source"].to_pylist(), unmet["row"].to_pylist(), strict=True)
        ]
        tables.write_records(self.folder / "dropped.parquet", tables.DROPPED, dropped)
        return Counts(planned.num_rows, int(is_met.sum()), {reason: len(dropped)} if dropped else {})


def _decide(spec: TrainSpec, before: Artefact | None) -> dict[str, Json]:
    """Device, dtype with the reason, and number of threads, for this machine."""
    import torch

    from tutelage.model import choose_device, choose_dtype

    # torchrun starts several processes with one thread each; they share the machine's.
    several = max(1, os.cpu_count() or 1) // current().local_size if current().local_size > 1 else 0
    threads = {"num_threads": spec.num_threads or several or torch.get_num_threads()}
    if before is not None:
        return {name: before.facts[name] for name in ("device", "dtype", "dtype_reason")} | threads
    device = choose_device() if spec.device == "auto" else spec.device
    dtype, reason = choose_dtype(device) if spec.dtype == "auto" else (spec.dtype, "as the recipe says")
    return {"device": device, "dtype": dtype, "dtype_reason": reason, **threads}


def _require_device(device: str, path: Path) -> None:
    """Nothing; raises `TrainError` when the run began on a device that is not here."""
    import torch

    is_here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.get(device, True)
    if not is_here:
        raise TrainError(
            f"{path}: this run began on {device}, which is not available now; go on where it is, or delete "
            f"{path.parent} to begin again on another device"
        )
