"""Training's door to the store: loads the model, runs the loop, leaves a folder that plain transformers and peft load.

model/                        the adapter or the whole model, tokenizer, chat template, generation config
steps.parquet, events.jsonl   every step and event          evals.parquet, samples.parquet   every measurement
checkpoints/                  the last few and the best     dropped.parquet                  planned, never reached
mixture.jsonl, placements.parquet, plan_steps.parquet      of an online mixture: what was decided, and what it came to
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tutelage import tables
from tutelage.errors import TrainError
from tutelage.model.spec import Full, Lora, ModelSpec
from tutelage.records import Batch, Document, Dropped
from tutelage.spec import Spec
from tutelage.store import Artefact, Counts, Json, Outcome, Progress, Stage, write_atomic
from tutelage.train.spec import TrainSpec

if TYPE_CHECKING:
    from tutelage.train.loop import Measure, Result

Inputs = Mapping[str, Artefact]

WITHOUT_EFFECT = ("trackers", "keep_checkpoints", "checkpoint_every_steps")
"""Settings that change what is kept or shown on the way and no number of the result: no part of the key."""


@dataclass(frozen=True)
class TrainInputs:
    """The boxes that training reads. `shards` are the rendered sets by "render NAME" and "rerender NAME".

    `before` measured the untouched model: its device and precision become training's, so that their losses compare.
    """

    model: Stage
    tokenizer: Stage
    plan: Stage
    shards: Mapping[str, Stage]
    held_out: Stage
    before: Stage | None = None

    def by_name(self) -> dict[str, Stage]:
        """All of them under the names that `build` finds them by."""
        named = {"model": self.model, "tokenizer": self.tokenizer, "plan": self.plan, "held_out": self.held_out}
        measured = {"before": self.before} if self.before is not None else {}
        return named | measured | dict(self.shards)


@dataclass(frozen=True)
class Making:
    """What only the pipeline can hand in: the plan's batches, and the measuring that another room knows how to do."""

    batches: Callable[[Inputs], Sequence[Batch]]
    measure: Callable[[Inputs], Measure] | None


def train_stage(inputs: TrainInputs, *, model_spec: ModelSpec, spec: TrainSpec, evaluate: Spec, making: Making) -> Stage:
    """The `train` box. Its build finds an earlier try's checkpoints in its folder and goes on from them, to the bit on a CPU.

    `evaluate` is the recipe's section: the loop reads when to measure and stop, the rest is for `making.measure`.
    """
    settings = {name: value for name, value in spec.canonical().items() if name not in WITHOUT_EFFECT}

    def build(folder: Path, artefacts: Inputs, progress: Progress) -> Outcome:
        return _Training(folder, artefacts, progress, model_spec, spec).run(evaluate, making)

    return Stage(
        "train",
        1,
        {"train": settings, "adapter": model_spec.canonical()["adapter"], "evaluate": evaluate.canonical()},
        build,
        inputs=inputs.by_name(),
        packages=("torch", "transformers", "peft"),
        resumable=True,
    )


@dataclass(frozen=True)
class _Training:
    """One build: where, from what, and how."""

    folder: Path
    artefacts: Inputs
    progress: Progress
    model_spec: ModelSpec
    spec: TrainSpec

    def run(self, evaluate: Spec, making: Making) -> Outcome:
        """The account of the finished run."""
        import torch

        from tutelage.train.loop import train

        setup = self._setup()
        threads = torch.get_num_threads()
        torch.set_num_threads(setup["num_threads"])
        try:
            model = self._model(setup)
            batches = making.batches(self.artefacts)
            measure = making.measure(self.artefacts) if making.measure else None
            result = train(model, batches, self._task(evaluate), folder=self.folder, measure=measure, progress=self.progress)
            stop_ids = self._export(model)
            return self._outcome(result, setup | {"stop_ids": stop_ids, "peak_memory_bytes": _peak_memory(setup["device"])})
        finally:
            torch.set_num_threads(threads)

    def _setup(self) -> dict[str, Json]:
        """Device, dtype and threads, decided once and then kept: measured again, a resumed run could get other numbers."""
        path = self.folder / "setup.json"
        if path.exists():
            setup: dict[str, Json] = json.loads(path.read_text())
            _require_device(setup["device"], path)
        else:
            setup = _decide(self.spec, self.artefacts.get("before"))
            write_atomic(path, json.dumps(setup, indent=1, sort_keys=True).encode())
        self.progress.note(f"training on {setup['device']} in {setup['dtype']} ({setup['dtype_reason']})")
        return setup

    def _model(self, setup: Mapping[str, Json]) -> Any:
        """The starting model, isolated documents proved on it, its adapter put on."""
        from tutelage.model import add_adapter, load_model, require_isolation

        source = self.artefacts["model"]
        model = load_model(str(source.facts.get("folder", source.path)), dtype=setup["dtype"], device=setup["device"])
        require_isolation(model)
        match self.model_spec.adapter:
            case Full():
                return model
            case Lora() as lora:
                return add_adapter(model, lora, seed=self.spec.seed)

    def _task(self, evaluate: Spec) -> Any:
        from tutelage.train.loop import Task, Watch
        from tutelage.train.micro import Names

        facts = self.artefacts["plan"].facts
        default = 2e-5 if isinstance(self.model_spec.adapter, Full) else 2e-4
        return Task(
            self.spec,
            self.spec.learning_rate or default,
            Names(tuple(facts["tasks"]), tuple(facts["sources"])),
            watch=Watch.of(evaluate.canonical()),
            name_of=self._namer(),
            run=self.artefacts["plan"].key,
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
            "learning_rate": self.spec.learning_rate or (2e-5 if isinstance(adapter, Full) else 2e-4),
            "train_seconds": round(position.train_seconds, 3),
            "measure_seconds": round(position.measure_seconds, 3),
            "real_tokens": position.real_tokens,
            "tokens_per_second": round(position.real_tokens / max(position.train_seconds, 1e-9), 1),
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

    threads = {"num_threads": spec.num_threads or torch.get_num_threads()}
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


def _peak_memory(device: str) -> int:
    """The most memory in use at once, in bytes: of the GPU where there is one, else of this process."""
    import resource

    import torch

    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
