"""A run whose steps are taken by transformers' Trainer, for people who need its callbacks.

    the Trainer's   the order of things: step begin, gradients, clipping, optimizer, schedule, logging, every callback
    ours            the batch of each step, its loss and division by W, the optimizer over float32 masters, the rate of each
                    step; between steps held-out measurement, early stopping, checkpoints and signals, as in `loop.py`

To the Trainer a step is one item of an epoch that is the whole run, so it has nothing to accumulate and nothing to
average: all passes of a step are made in `training_step`, each divided by the plan's W. Numbers, checkpoints and files
are those of the loop; beside each checkpoint lies the Trainer's own state, with what callbacks keep.

With several processes each has a Trainer that knows of no other: the run spreads the model, averages gradients and writes
checkpoints as in the loop. What a callback asks for on one rank (stop, save, evaluate) happens on all of them.
"""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers.trainer_callback import ExportableState

from tutelage.model.loss import unwrapped
from tutelage.records import Batch, Float64
from tutelage.train.engines.callbacks import make_callbacks, require_accelerate
from tutelage.train.log import Measurement
from tutelage.train.loop import Measure, Run
from tutelage.train.micro import FlatStep
from tutelage.train.optimizer import Optimizer
from tutelage.train.schedule import learning_rate_at
from tutelage.train.state import random_state, set_random_state
from tutelage.train.step import check_norm
from tutelage.train.stopping import Abandoned, StopRequest

STATE = "trainer_state.json"
_DONE_TOGETHER = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate")


class TrainerRun(Run):
    """A `Run` whose steps the Trainer takes; `found` is the last measurement, `trainer` is there while steps are taken."""

    trainer: StepTrainer | None = None
    found: Measurement | None = None

    def drive(self, measure: Measure | None, asked: StopRequest) -> None:
        """Nothing; takes the steps through the Trainer. Raises `MissingExtra` without accelerate."""
        require_accelerate()
        if not self.between(measure, asked):
            return
        with _undisturbed(self.model), _kept_random_state(self.device):
            self.trainer = StepTrainer(self, measure, asked)
        states = random_state(self.device)
        try:
            with _undisturbed(self.model):
                self.trainer.train(resume_from_checkpoint=self._trainer_state())
        except Abandoned:
            set_random_state(self.trainer.states_before or states, self.device)
            self._stop_if(asked)
        finally:
            self.trainer = None

    def measure_now(self, measure: Measure | None) -> dict[str, float]:
        """What the Trainer calls metrics; measured at this step if that was not done yet."""
        if measure is not None and self.position.measured_step != self.position.step:
            self._measure(measure)
        return {} if self.found is None else {"eval_loss": self.found.loss}

    def stop(self) -> None:
        """Nothing; a callback asked to stop: the run is over after this step."""
        self.position = dataclasses.replace(self.position, is_stopped=True)
        self.events.add("callback_stop", step=self.position.step)
        self.progress.note(f"a callback stopped the run after step {self.position.step} of {self.num_steps}")

    def rate_at(self, step: int) -> float:
        """The learning rate of a step; schedulers ask once more after the last."""
        step = min(step, self.num_steps - 1)
        peak, schedule = self.task.learning_rate, self.task.spec.schedule
        return learning_rate_at(step, num_steps=self.num_steps, peak=peak, schedule=schedule)

    def agree(self, control: Any) -> None:
        """Nothing; what a callback asked for on one rank, all do: each of these is done together."""
        asked = self.world.total(np.array([float(getattr(control, name)) for name in _DONE_TOGETHER]))
        for name, number in zip(_DONE_TOGETHER, asked.tolist(), strict=True):
            setattr(control, name, number > 0)

    def write_down(self, taken: Taken) -> None:
        """Nothing; the step that was taken is behind us."""
        numbers = {"grad_norm": taken.grad_norm, "learning_rate": taken.learning_rate}
        self._write_down(self._report(taken.batch, taken.flat, taken.nll_N, started=taken.started, **numbers))

    def gradients(self, batch: Batch) -> tuple[FlatStep, Float64]:
        """As the loop's."""
        return self._gradients(batch)

    def save_now(self) -> None:
        """Nothing; a checkpoint of this moment unless there is one."""
        if self.saved != self.position:
            self._save()

    def _judge(self, found: Measurement) -> None:
        self.found = found
        super()._judge(found)
        if self.trainer is not None:
            self.trainer.tell_measured({"eval_loss": found.loss})

    def _save(self) -> None:
        if self.trainer is not None:
            self.trainer.write_state(self._state_folder(self.position.step))
        super()._save()
        if not self.world.is_first:
            return
        kept = {self._state_folder(step) for step in self.checkpoints.steps()}
        for folder in (self.folder / "trainer").glob("step-*"):
            if folder not in kept:
                shutil.rmtree(folder)

    def _state_folder(self, step: int) -> Path:
        return self.folder / "trainer" / self.checkpoints.path(step).name

    def _trainer_state(self) -> str | None:
        """The folder of the Trainer's state at this step; None before the first."""
        folder = self._state_folder(self.position.step)
        return str(folder) if (folder / STATE).is_file() else None


@dataclass
class Taken:
    """A step under way: what is known of it so far."""

    batch: Batch
    flat: FlatStep
    nll_N: Float64
    started: float
    grad_norm: float = float("nan")
    learning_rate: float = float("nan")


class StepTrainer(transformers.Trainer):  # type: ignore[misc]
    """The Trainer over the steps of a `TrainerRun`."""

    def __init__(self, run: TrainerRun, measure: Measure | None, asked: StopRequest) -> None:
        self._run, self._measure_with, self._asked = run, measure, asked
        self._taken: Taken | None = None
        self.control: Any
        self.states_before: dict[str, Tensor] | None = None
        first = run.position.step
        optimizer = _Steps(run.optimizer)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: run.rate_at(first + count))
        callbacks = make_callbacks(run.task.spec.callbacks)
        with _as_if_alone(run):
            super().__init__(run.model, _arguments(run), optimizers=(optimizer, schedule), callbacks=callbacks)
        self.remove_callback(transformers.PrinterCallback)
        # Whoever spreads the model over processes is the run: nothing here may wrap it.
        self.is_distributed_loading_by_transformers = True
        self.args._n_gpu = min(self.args.n_gpu, 1)

    def is_world_process_zero(self) -> bool:
        """Whether this is the rank whose callbacks log and write files."""
        return self._run.world.is_first

    def is_local_process_zero(self) -> bool:
        """Whether this is the first rank of its machine."""
        return self._run.world.local_rank == 0

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        """Nothing: the run has put it where it belongs, or cut it in pieces."""

    def get_train_dataloader(self) -> Any:
        """The steps that are left, in an epoch that is the whole run; no loader, which would draw from the random state."""
        return _Epoch(self._run)

    def training_step(self, model: Any, inputs: dict[str, Batch], num_items_in_batch: Any = None) -> Tensor:
        """The loss of a step, its gradient added to the weights: all its passes, divided by W and by nothing else."""
        started = time.perf_counter()
        model.train()
        self.states_before = random_state(self._run.device)
        batch = inputs["batch"]
        flat, nll_N = self._run.gradients(batch)
        self._taken = Taken(batch, flat, nll_N, started)
        loss = float((flat.weights.astype(np.float64) * nll_N).sum() / batch.total_weight)
        return torch.tensor(loss, dtype=torch.float64, device=self.args.device)

    def floating_point_ops(self, inputs: Any) -> int:
        """0: the Trainer's estimate counts padding and a head at every position, of which there are none here."""
        return 0

    def _clip_grad_norm(self, model: Any) -> Any:
        return self._clip()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return self._clip() if grad_norm is None else grad_norm

    def _clip(self) -> float:
        """The norm before clipping, which is the run's: the gradients may lie in its masters."""
        taken = self._under_way()
        taken.grad_norm = self._run.optimizer.clip()
        check_norm(taken.grad_norm, taken.batch, self._run.task.name_of)
        return taken.grad_norm

    def _get_learning_rate(self) -> float:
        """The rate of the step being taken, kept because the schedule has moved on when the step is written down."""
        rate = float(self.optimizer.param_groups[0]["lr"])
        if self._taken is not None:
            self._taken.learning_rate = rate
        return rate

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Nothing; after the step's callbacks: writes it down, lets the Trainer log, then does what is due between steps."""
        run = self._run
        if self._taken is None:  # the end of the epoch, which is the end of a step too
            return
        run.write_down(self._taken)
        self._taken = None
        self.state.epoch = run.position.step / run.num_steps
        run.agree(self.control)
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.control.should_training_stop and run.position.step < run.num_steps:
            run.measure_now(self._measure_with)
            run.stop()
        if not run.between(self._measure_with, self._asked):
            self.control.should_training_stop = True

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out metrics now: what a callback that sets `should_evaluate` gets."""
        return self._run.measure_now(self._measure_with)

    def tell_measured(self, metrics: dict[str, float]) -> None:
        """Nothing; callbacks hear of a measurement."""
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)

    def write_state(self, folder: Path) -> None:
        """Nothing; the Trainer's state, and that of callbacks which keep one, lies in `folder`."""
        if not self._run.world.is_first:
            return
        self.state.stateful_callbacks = {}
        for keeper in [*self.callback_handler.callbacks, self.control]:
            if isinstance(keeper, ExportableState):
                self.state.stateful_callbacks.setdefault(type(keeper).__name__, []).append(keeper.state())
        folder.mkdir(parents=True, exist_ok=True)
        self.state.save_to_json(str(folder / STATE))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Nothing; a checkpoint of the run: safetensors with digests, not the Trainer's pickles."""
        self._run.save_now()

    def _init_training_state(self, *args: Any) -> Any:
        found = super()._init_training_state(*args)
        self.state.global_step = self._run.position.step
        return found

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run has restored weights, optimizer and random states."""

    _load_optimizer_and_scheduler = _load_scaler = _load_rng_state = _load_from_checkpoint
    _sync_replicated_trainable_parameters = _load_from_checkpoint

    def _under_way(self) -> Taken:
        assert self._taken is not None
        return self._taken


class _Steps(torch.optim.Optimizer):
    """The run's optimizer as torch, and the callbacks of users, know optimizers: one group whose rate is the step's."""

    def __init__(self, inner: Optimizer) -> None:
        self._inner = inner
        super().__init__(list(inner.weights.values()), {"lr": 1.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing; moves the weights, masters and rounded copies, at this group's rate."""
        self._inner.step(float(self.param_groups[0]["lr"]))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing; forgets all gradients."""
        self._inner.zero()


@dataclass(frozen=True)
class _Epoch:
    """The batches of a run from where it stands, as the Trainer's loader; items are dicts, as it expects."""

    run: TrainerRun

    def __len__(self) -> int:
        return self.run.num_steps

    def __iter__(self) -> Iterator[dict[str, Batch]]:
        # By position, not by a range: what an online mixture decides after a step shapes the next.
        while self.run.position.step < self.run.num_steps:
            yield {"batch": self.run.batches[self.run.position.step]}


def _arguments(run: TrainerRun) -> Any:
    """Arguments with which the Trainer divides, averages, clips, saves, measures and seeds nothing by itself."""
    spec = run.task.spec
    return transformers.TrainingArguments(
        output_dir=str(run.folder / "trainer"),
        run_name=run.task.run or None,
        max_steps=run.num_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=run.task.learning_rate,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm or 0.0,
        seed=spec.seed,
        use_cpu=run.device.type == "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        ignore_data_skip=True,
        restore_callback_states_from_checkpoint=True,
        average_tokens_across_devices=False,
    )


@contextmanager
def _as_if_alone(run: TrainerRun) -> Iterator[None]:
    """Nothing; inside, the Trainer does not see that other processes were started, and takes the run's device."""
    hidden = {name: os.environ.pop(name) for name in _STARTED_BY if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
        if run.device.type == "cuda":
            torch.cuda.set_device(run.device)


_STARTED_BY = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Nothing; the Trainer sets `use_cache` in the model's configuration, which would be saved with the model."""
    config = unwrapped(model).config
    was = getattr(config, "use_cache", None)
    try:
        yield
    finally:
        if was is not None:
            config.use_cache = was


@contextmanager
def _kept_random_state(device: torch.device) -> Iterator[None]:
    """Nothing; the Trainer seeds every generator, and dropout must draw what it draws in the loop."""
    states, python, legacy = random_state(device), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        set_random_state(states, device)
        random.setstate(python)
        np.random.set_state(legacy)
