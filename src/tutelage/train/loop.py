"""One step after another: the clock of a run, and the only place that knows when to measure, keep, stop or go on."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from tutelage.allocator import keep_memory
from tutelage.errors import TrainError
from tutelage.records import Batch, Float64, StepReport
from tutelage.store import Json, Progress, Silent, write_atomic
from tutelage.train.extend import Beginning, begin_from
from tutelage.train.log import (
    Measurement,
    Pace,
    batch_key,
    held_out_scalars,
    losses_by_task,
    peak_memory_bytes,
    scalars,
    step_event,
)
from tutelage.train.micro import FlatStep, Names, tally
from tutelage.train.objective import aimed_numbers
from tutelage.train.optimizer import Optimizer
from tutelage.train.parallel import parallelise
from tutelage.train.rank_logs import open_logs
from tutelage.train.schedule import learning_rate_at
from tutelage.train.shared_state import SharedCheckpoints, rank_seed
from tutelage.train.spec import TrainSpec
from tutelage.train.state import Position, Snapshot, random_state, set_random_state
from tutelage.train.step import NameOf, check_norm, learner_of, step_gradients
from tutelage.train.stopping import Abandoned, StopRequest, listening
from tutelage.train.trackers import Tracker, open_trackers
from tutelage.world import current

Measure = Callable[[Any, int], Measurement | None]
"""`measure(model, steps_done)`: what the model scores now, or None where there is nothing to say at this step."""


@runtime_checkable
class Mixing(Protocol):
    """Batches whose mixture is decided while training goes on, by the held-out loss of each task; made by another room."""

    def is_due(self, step: int) -> bool:
        """Whether something is to be decided before this step."""

    def look(self, step: int, losses: Mapping[str, float]) -> Mapping[str, Json] | None:
        """What was decided after a measurement of these losses by task, None where nothing was due."""

    def history(self) -> Sequence[Mapping[str, Json]]:
        """All that was decided so far, a line each."""

    def state(self) -> dict[str, Json]:
        """What checkpoints keep."""

    def restore(self, state: Mapping[str, Json]) -> None:
        """Nothing; goes on from a state."""

    def write(self, folder: Path, steps_done: int) -> None:
        """Nothing; placements.parquet and plan_steps.parquet tell which documents these steps held."""


@dataclass(frozen=True)
class Watch:
    """When to measure (None = a quarter of the run) and what follows from it; names and meanings are the recipe's `evaluate`."""

    every_steps: int | None = None
    stop_after: int | None = None
    min_gain: float = 0.0
    keep_best: bool = True

    @classmethod
    def of(cls, section: Mapping[str, Json]) -> Watch:
        """The part of a recipe section that the loop needs; other keys are for those who measure."""
        return cls(**{field.name: section[field.name] for field in dataclasses.fields(cls)})


@dataclass(frozen=True)
class Task:
    """What is to be done: the recipe's `train`, the peak learning rate, when to measure, and what numbers stand for.

    `device` is where sharded weights go when the model itself is left on the CPU.
    """

    spec: TrainSpec
    learning_rate: float
    names: Names
    watch: Watch = Watch()
    name_of: NameOf | None = None
    run: str = ""
    device: str | None = None
    beginning: Beginning | None = None
    """The finished run that this one extends."""


@dataclass(frozen=True)
class Result:
    """How a run ended: `position` after the last step, and the step whose weights the model now holds."""

    position: Position
    final_step: int
    num_steps: int
    num_trained_weights: int


def train(
    model: Any,
    batches: Sequence[Batch],
    task: Task,
    *,
    folder: Path,
    measure: Measure | None = None,
    progress: Progress | None = None,
) -> Result:
    """How the run ended; `model` then holds the final weights (the best by held-out loss, or the last).

    `batches[i]` is optimizer step i. Logs and checkpoints go to `folder`; a folder with checkpoints of this same run is
    gone on from, to the bit on a CPU with the same number of threads. Ctrl-C and SIGTERM lead to a checkpoint within
    `train.stop_within_seconds` and raise `Stopped`; a second one ends the process at once. The caller's random state is left
    as it was.

    `batches` that are `Mixing` hear of every measurement, are measured when they are due, and are as they were after a resume;
    what they decide is an event, and a line of `mixture.jsonl`.

    Raises `TrainError` when numbers are not finite, a step has no weight, or the checkpoints are of another run.
    """
    device = next(model.parameters()).device
    if task.spec.micro_batch_tokens is None:  # who asks for small passes wants memory rather than the last bit of speed
        keep_memory()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(rank_seed(task.spec.seed, rank=current().rank))
        run = _engine(task.spec)(model, batches, task, folder=folder, progress=progress or Silent())
        try:
            with listening(run.asked):
                run.go_on()
                return run.finish(measure, run.asked)
        finally:
            run.close()


def _engine(spec: TrainSpec) -> type[Run]:
    """Who takes the steps."""
    if spec.engine == "loop":
        return Run
    from tutelage.train.engines.hf_trainer import TrainerRun

    return TrainerRun


class Run:
    """A run between its first step and its last: weights, position and logs that belong together."""

    def __init__(self, model: Any, batches: Sequence[Batch], task: Task, *, folder: Path, progress: Progress) -> None:
        self.model, self.batches, self.task, self.progress = model, batches, task, progress
        self.world = current()
        more: dict[str, Any] = {"kind": task.spec.parallel, "device": task.device, "note": progress.note}
        self.parallel = parallelise(learner_of(model, task.spec, progress), self.world, **more)
        self.learner = self.parallel.own
        self.device = next(model.parameters()).device
        self.optimizer = Optimizer(model, task.spec, peak=task.learning_rate, used_in=self.parallel.used_in)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        more = {"seed": task.spec.seed, "keep": task.spec.keep_checkpoints, "progress": progress}
        self.checkpoints = SharedCheckpoints(folder / "checkpoints", self.world, self.optimizer.weights, **more)
        self.position = Position()
        self.saved: Position | None = None
        more = {"requeue_exit_code": task.spec.requeue_exit_code, "agree": self.world.agree}
        self.asked = StopRequest(task.spec.stop_within_seconds, **more)
        self.num_steps = len(batches)
        tenth, quarter = math.ceil(self.num_steps / 10), math.ceil(self.num_steps / 4)
        self.save_every = task.spec.checkpoint_every_steps or max(1, tenth)
        self.measure_every = task.watch.every_steps or max(1, quarter)
        self.mixing = batches if isinstance(batches, Mixing) else None
        self.recent: deque[StepReport] = deque(maxlen=10)
        self.trackers: list[Tracker] = []

    def go_on(self) -> None:
        """Nothing; weights, position and logs are those of the newest whole checkpoint, or of a fresh start."""
        snapshot = self.checkpoints.latest()
        if snapshot is not None:
            self.position = snapshot.position
            self.saved = self.position
            self.optimizer.restore(dict(snapshot.weights), dict(snapshot.optimizer))
            set_random_state(snapshot.random, self.device)
            if self.mixing is not None and self.position.mixing is not None:
                self.mixing.restore(self.position.mixing)
        elif self.task.beginning is not None:
            begin_from(self.task.beginning, self.checkpoints, self.optimizer, self.device)
            self.progress.note(self.task.beginning.text)
        self._write_mixture()
        self.events, self.steps, self.measurements = open_logs(self.folder, self.position, self.world)
        trackers = self.task.spec.trackers if self.world.is_first else ()
        self.trackers = open_trackers(trackers, self.folder / "trackers", run=self.task.run, next_step=self.position.step)
        if snapshot is not None:
            self.progress.note(f"going on from the checkpoint after step {self.position.step} of {self.num_steps}")
        self.events.add("start" if snapshot is None else "resume", step=self.position.step, num_steps=self.num_steps)

    def finish(self, measure: Measure | None, asked: StopRequest) -> Result:
        """How the run ended. Between steps, in this order: measure, save, stop."""
        if self.mixing is not None and measure is None:
            raise TrainError("mix.schedule: an online mixture follows held-out losses, and nothing is measured in this run")
        self.model.train()
        self.progress.start("train", total=self.num_steps, unit="step")
        self.progress.advance(self.position.step)
        self.drive(measure, asked)
        return self._choose()

    def drive(self, measure: Measure | None, asked: StopRequest) -> None:
        """Nothing; takes the steps. Another engine takes them otherwise, with the same `between`."""
        while self.between(measure, asked):
            states = random_state(self.device)
            try:
                self._step()
            except Abandoned:  # dropout must draw again what the dropped step drew
                set_random_state(states, self.device)
            self._stop_if(asked)

    def between(self, measure: Measure | None, asked: StopRequest) -> bool:
        """Whether there is another step to take, after doing what is due before it."""
        if measure is not None and self._is_measuring_due():
            self._measure(measure)
        if self._is_saving_due():
            self._save()
        self._stop_if(asked)
        return not self._is_over()

    def close(self) -> None:
        """Nothing; files are closed and the model's gradients work as before."""
        self.optimizer.close()
        for tracker in self.trackers:
            tracker.close()
        if hasattr(self, "events"):
            self.events.close()

    def _is_over(self) -> bool:
        return self.position.is_stopped or self.position.step == self.num_steps

    def _is_measuring_due(self) -> bool:
        step = self.position.step
        is_due = step % self.measure_every == 0 or step == self.num_steps
        is_due = is_due or (self.mixing is not None and self.mixing.is_due(step))
        return is_due and not self.position.is_stopped and self.position.measured_step != step

    def _is_saving_due(self) -> bool:
        step = self.position.step
        is_due = self._is_over() or (step > 0 and step % self.save_every == 0) or self.position.best_step == step
        return is_due and self.saved != self.position

    def _step(self) -> None:
        """Nothing; takes one optimizer step and writes it down."""
        started = time.perf_counter()
        step, spec = self.position.step, self.task.spec
        batch = self.batches[step]
        flat, nll_N = self._gradients(batch)
        norm = self.optimizer.clip()
        check_norm(norm, batch, self.task.name_of)
        rate = learning_rate_at(step, num_steps=self.num_steps, peak=self.task.learning_rate, schedule=spec.schedule)
        self.optimizer.step(rate)
        self._write_down(self._report(batch, flat, nll_N, grad_norm=norm, learning_rate=rate, started=started))

    def _gradients(self, batch: Batch) -> tuple[FlatStep, Float64]:
        """As `step_gradients`; the weights' gradients are those of this step alone."""
        self.optimizer.zero()
        more: dict[str, Any] = {"name_of": self.task.name_of, "in_time": self.asked.in_time, "parallel": self.parallel}
        more |= {name: getattr(self.task.spec, name) for name in ("micro_batch_rows", "micro_batch_tokens")}
        found = step_gradients(self.learner, batch, **more)
        self.parallel.average(self.optimizer.weights)
        return found

    def _report(self, batch: Batch, flat: FlatStep, nll_N: Float64, *, started: float, **numbers: float) -> StepReport:
        """What a step came to; `numbers` are its gradient norm and learning rate, `started` the clock before it."""
        sums = tally(flat, nll_N, self.task.names)
        return StepReport(
            step=self.position.step,
            loss=sums.loss,
            by_task=sums.by_task,
            by_source=sums.by_source,
            by_kind=sums.by_kind,
            **numbers,
            seconds=time.perf_counter() - started,
            real_tokens=batch.real_tokens,
            slots=int(batch.inputs.size),
            memory_bytes=peak_memory_bytes(self.device.type),
            batch_key=batch_key(batch),
            **aimed_numbers(flat),
        )

    def _write_down(self, report: StepReport) -> None:
        """Nothing; the step is behind us: position, logs, trackers and the bar say so."""
        self.position = dataclasses.replace(
            self.position,
            step=report.step + 1,
            real_tokens=self.position.real_tokens + report.real_tokens,
            train_seconds=self.position.train_seconds + report.seconds,
        )
        self.steps.add(report)
        self.events.add("step", **step_event(report))
        self.asked.took(step=report.seconds)
        for tracker in self.trackers:
            tracker.add(report.step, scalars(report))
        self.recent.append(report)
        self.progress.advance(1, self._pace().text)

    def _pace(self) -> Pace:
        seconds = sum(report.seconds for report in self.recent)
        tokens = sum(report.real_tokens for report in self.recent)
        last, step, every = self.recent[-1], self.position.step, self.measure_every
        left = (self.num_steps - step) * seconds / len(self.recent)
        num_measured = (step - 1) // every + 1
        left += math.ceil((self.num_steps - step) / every) * self.position.measure_seconds / num_measured
        return Pace(last.loss.mean, tokens / max(seconds, 1e-9), left, last.memory_bytes)

    def _measure(self, measure: Measure) -> None:
        """Nothing; measures, in eval mode and with random states put back, and decides what is best and whether to stop."""
        started = time.perf_counter()
        states = random_state(self.device)
        self.optimizer.zero()
        self.model.eval()
        try:
            with torch.no_grad(), self.asked.cut_short():
                found = self.parallel.within(lambda model: measure(model, self.position.step))
        except Abandoned:  # measured anew when the run goes on
            return
        finally:
            self.model.train()
            set_random_state(states, self.device)
        seconds = self.position.measure_seconds + time.perf_counter() - started
        self.position = dataclasses.replace(self.position, measured_step=self.position.step, measure_seconds=seconds)
        if found is not None:
            self.world.require_same(f"the held-out loss after step {self.position.step}", found.loss)
            self._judge(found)
        if self.mixing is not None:
            self._mix(self.mixing, losses_by_task(found) if found is not None else {})

    def _mix(self, mixing: Mixing, losses: Mapping[str, float]) -> None:
        """Nothing; the batches know how each task is doing, and what they decide is kept and written down."""
        decided = mixing.look(self.position.step, losses)
        self.position = dataclasses.replace(self.position, mixing=mixing.state())
        if decided is not None:
            self._write_mixture()
            self.events.add("mixture", step=self.position.step, **decided)

    def _write_mixture(self) -> None:
        if self.mixing is not None and self.world.is_first:
            lines = [json.dumps(line, sort_keys=True) for line in self.mixing.history()]
            write_atomic(self.folder / "mixture.jsonl", "".join(f"{line}\n" for line in lines).encode())

    def _judge(self, found: Measurement) -> None:
        step, best, watch = self.position.step, self.position.best_loss, self.task.watch
        is_better = math.isfinite(found.loss) and (best is None or found.loss < best - watch.min_gain)
        if is_better:
            self.position = dataclasses.replace(self.position, best_step=step, best_loss=found.loss, num_without_gain=0)
        else:
            num = self.position.num_without_gain + 1
            is_stopped = watch.stop_after is not None and num >= watch.stop_after
            self.position = dataclasses.replace(self.position, num_without_gain=num, is_stopped=is_stopped)
        self.measurements.add(found, step)
        loss = found.loss if math.isfinite(found.loss) else None
        self.events.add("measure", step=step, loss=loss, is_best=is_better)
        for tracker in self.trackers:
            tracker.add(step, held_out_scalars(found))
        self.progress.note(f"held-out loss after step {step}: {found.loss:.4f}{' (best)' if is_better else ''}")
        if self.position.is_stopped:
            self.events.add("early_stop", step=step, best_step=self.position.best_step)
            self.progress.note(
                f"stopping after step {step} of {self.num_steps}: {watch.stop_after} measurements without a better one"
            )

    def _save(self) -> None:
        """Nothing; a checkpoint of this moment, and logs that reach exactly as far."""
        started = time.perf_counter()
        self.steps.flush()
        self.measurements.flush()
        self.events.add("checkpoint", step=self.position.step)
        self.position = dataclasses.replace(self.position, events_bytes=self.events.sync())
        weights, memory = self.optimizer.weights, self.optimizer.memory()
        self.checkpoints.save(Snapshot(self.position, weights, memory, random_state(self.device)))
        self.saved = self.position
        self.asked.took(save=time.perf_counter() - started)

    def _stop_if(self, asked: StopRequest) -> None:
        """Nothing; raises `Stopped`, with everything so far on disk, when a signal has come."""
        if not (number := asked.number()):
            return
        if self.saved != self.position:
            self._save()
        raise asked.stopped(
            f"stopped after step {self.position.step} of {self.num_steps}; everything so far is kept. "
            "The same command goes on from here.",
            number,
        )

    def _choose(self) -> Result:
        """How the run ended, after putting the chosen weights into the model."""
        step, best = self.position.step, self.position.best_step
        final = best if self.task.watch.keep_best and best is not None else step
        if final != step:
            self.optimizer.restore(dict(self.checkpoints.load(final).weights))
        if final == 0 and step > 0:
            self.progress.note("the held-out loss never fell below that of the starting model, which is therefore kept")
        if self.mixing is not None and self.world.is_first:
            self.mixing.write(self.folder, step)
        self.optimizer.zero()
        self.model.eval()
        num_weights = self.optimizer.num_weights
        self.parallel.collect()
        return Result(self.position, final, self.num_steps, num_weights)
