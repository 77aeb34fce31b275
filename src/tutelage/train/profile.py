"""Where a training step's time goes, and how near its arithmetic comes to what this machine can do. Changes no run.

The ceiling is the rate of a large matrix product in the model's own precision, measured at once: no table of devices.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tutelage.errors import TrainError
from tutelage.model.loss import unwrapped
from tutelage.records import Batch, Float64, StepReport
from tutelage.store import Progress, Silent
from tutelage.train.flops import ModelWork, StepFlops, executed, step_flops
from tutelage.train.loop import Measure, Result, Run, Task
from tutelage.train.micro import FlatStep, rows_in_pass
from tutelage.train.stopping import StopRequest
from tutelage.train.work import work_of
from tutelage.world import current

PARTS = ("data", "forward", "loss", "backward", "clip", "optimizer", "logging", "waiting")
"""data: making the batch and taking out its padding. loss: head and cross-entropy with their own backward. waiting: the rest."""

NUM_WARM_UP = 1
CEILING_SIZE, CEILING_SECONDS = 4096, 2.0


@dataclass(frozen=True)
class StepProfile:
    """Some steps: `seconds` by part adds up to `step_seconds`; `ceiling` is in operations per second."""

    num_steps: int
    seconds: dict[str, float]
    step_seconds: float
    flops: StepFlops
    ceiling: float
    real_tokens: int
    slots: int
    supervised_tokens: int
    device: str
    dtype: str
    num_threads: int

    @property
    def shares(self) -> dict[str, float]:
        """The share of the time by part."""
        return {part: self.seconds[part] / self.step_seconds for part in PARTS}

    @property
    def flops_per_second(self) -> float:
        """Executed operations a second, over the whole step."""
        return self.flops.total / self.step_seconds

    @property
    def ceiling_share(self) -> float:
        """How much of the ceiling that is."""
        return self.flops_per_second / self.ceiling

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values; times are sums over the steps."""
        flops = {name: getattr(self.flops, name) for name in ("linear", "attention", "head", "total")}
        rates = {
            "tokens_per_second": self.real_tokens / self.step_seconds,
            "supervised_tokens_per_second": self.supervised_tokens / self.step_seconds,
            "flops_per_second": self.flops_per_second,
            "ceiling_flops_per_second": self.ceiling,
            "ceiling_share": self.ceiling_share,
        }
        plain = ("num_steps", "step_seconds", "seconds", "shares", "real_tokens", "slots", "supervised_tokens")
        machine = {name: getattr(self, name) for name in ("device", "dtype", "num_threads")}
        return {name: getattr(self, name) for name in plain} | {"flops": flops} | rates | machine

    def lines(self) -> list[str]:
        """What people read: tokens a second and the achieved rate beside the ceiling."""
        threads = f", {_counted(self.num_threads, 'thread')}" if self.device == "cpu" else ""
        steps = f"{_counted(self.num_steps, 'step')} of {self.slots // self.num_steps:,} slots"
        return [
            f"{steps} on {self.device} in {self.dtype}{threads}: "
            f"{self.step_seconds / self.num_steps:.2f} s a step, {self.real_tokens / self.step_seconds:,.0f} tokens/s, "
            f"{self.supervised_tokens / self.step_seconds:,.0f} supervised tokens/s",
            f"{self.flops_per_second / 1e9:,.0f} GFLOP/s of executed work, {self.ceiling_share:.0%} of the "
            f"{self.ceiling / 1e9:,.0f} GFLOP/s that a large matrix product reaches here",
        ]


def _counted(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def profile_steps(
    model: Any, batches: Sequence[Batch], task: Task, *, num_steps: int = 3, progress: Progress | None = None
) -> StepProfile:
    """The `StepProfile` of the first steps of `batches`, after one to warm up, by the loop that trains.

    What is written goes to a temporary folder, and nothing to trackers. The model is trained by so many steps: throw it away.
    Raises `TrainError` when there are no steps, under another engine or in several processes, and as a step does.
    """
    _check(batches, task)
    task = dataclasses.replace(task, spec=task.spec.model_copy(update={"trackers": ()}))
    device = next(model.parameters()).device
    work = work_of(model)
    used = [batches[number % len(batches)] for number in range(NUM_WARM_UP + num_steps)]
    watch = _Stopwatch(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(task.spec.seed)
        run = _WatchedRun(model, _Watched(used, watch), task, folder=Path(folder), progress=progress or Silent())
        run.take_steps(watch)
    used, flats = used[NUM_WARM_UP:], run.flats[NUM_WARM_UP:]
    dtype = unwrapped(model).dtype
    return StepProfile(
        num_steps=num_steps,
        seconds=watch.parts(),
        step_seconds=watch.total,
        flops=_executed(work, used, flats, task),
        ceiling=matmul_ceiling(dtype, device),
        real_tokens=sum(batch.real_tokens for batch in used),
        slots=sum(int(batch.inputs.size) for batch in used),
        supervised_tokens=sum(int((flat.weights > 0).sum()) for flat in flats),
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        num_threads=torch.get_num_threads(),
    )


def _check(batches: Sequence[Batch], task: Task) -> None:
    """Nothing; raises `TrainError` for what cannot be timed."""
    if not len(batches):
        raise TrainError("the plan has no step to profile; see `tutelage plan RECIPE`")
    if task.spec.engine != "loop":
        raise TrainError(f"train.engine: {task.spec.engine} takes the steps itself, so only `loop` can be profiled; leave it out")
    if not current().is_alone:
        raise TrainError("a profile is of one process; start it without torchrun")


def _executed(work: ModelWork, batches: Sequence[Batch], flats: Sequence[FlatStep], task: Task) -> StepFlops:
    """What these steps ran."""
    flops = StepFlops(0, 0, 0)
    for flat, batch in zip(flats, batches, strict=True):
        lengths, num_targets = executed(flat, rows_in_pass(batch.inputs.shape[1], task.spec.micro_batch_rows))
        flops += step_flops(work, lengths, num_targets=num_targets)
    return flops


class _Stopwatch:
    """Seconds by part. On a GPU each reading waits for it, so that a part is charged what it started."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.clear()

    def clear(self) -> None:
        """Nothing; forgets everything."""
        self.seconds: dict[str, float] = {}
        self.total = 0.0

    def now(self) -> float:
        """Seconds, with nothing left to do on the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def add(self, part: str, seconds: float) -> None:
        """Nothing; charges a part."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    @contextmanager
    def span(self, part: str) -> Iterator[None]:
        """Nothing; charges a part with what happens inside."""
        started = self.now()
        yield
        self.add(part, self.now() - started)

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A call that charges a part."""

        def charged(*args: Any, **more: Any) -> Any:
            with self.span(part):
                return call(*args, **more)

        return charged

    def parts(self) -> dict[str, float]:
        """Every part of PARTS; `waiting` is what no other was charged with."""
        named = {part: self.seconds.get(part, 0.0) for part in PARTS}
        return named | {"waiting": max(0.0, self.total - sum(named.values()))}


class _Watched(Sequence[Batch]):
    """Batches; what making one takes is charged to data."""

    def __init__(self, batches: Sequence[Batch], watch: _Stopwatch) -> None:
        self._batches, self._watch = batches, watch

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        with self._watch.span("data"):
            return self._batches[index]


class _WatchedRun(Run):
    """The loop with a stopwatch at its seams: it neither measures nor keeps anything."""

    def take_steps(self, watch: _Stopwatch) -> None:
        """Nothing; takes every step, and forgets the time of the first `NUM_WARM_UP`."""
        self.watch, self.flats = watch, list[FlatStep]()
        self._marks: list[tuple[str, float]] = []
        was_training = self.model.training
        decoder = unwrapped(self.model).base_model
        hooks = [
            hook for module, name in ((self.learner, "learner"), (decoder, "decoder")) for hook in self._marking(module, name)
        ]
        self._time_optimizer()
        self.go_on()
        try:
            self.finish(None, self.asked)
        finally:
            for hook in hooks:
                hook.remove()
            self.optimizer.zero()
            self.close()
            self.model.train(was_training)

    def _time_optimizer(self) -> None:
        """Nothing; clipping and the update charge their own parts from here on."""
        for name, part in (("clip", "clip"), ("step", "optimizer")):
            setattr(self.optimizer, name, self.watch.timed(part, getattr(self.optimizer, name)))

    def _marking(self, module: torch.nn.Module, name: str) -> tuple[Any, Any]:
        """Hooks that note when a module's forward begins and ends."""

        def note(what: str) -> Any:
            return lambda *_: self._marks.append((f"{what} {name}", self.watch.now()))

        return module.register_forward_pre_hook(note("begin")), module.register_forward_hook(note("end"))

    def between(self, measure: Measure | None, asked: StopRequest) -> bool:
        """Whether there is another step; nothing is measured or saved."""
        if self.position.step == NUM_WARM_UP:
            self.watch.clear()
        return self.position.step < self.num_steps

    def _step(self) -> None:
        started = self.watch.now()
        super()._step()
        self.watch.total += self.watch.now() - started

    def _gradients(self, batch: Batch) -> tuple[FlatStep, Float64]:
        self._marks = [("begin gradients", self.watch.now())]
        found = super()._gradients(batch)
        self._marks.append(("end gradients", self.watch.now()))
        for part, seconds in split_marks(self._marks).items():
            self.watch.add(part, seconds)
        self.flats.append(found[0])
        return found

    def _report(self, *args: Any, **more: Any) -> StepReport:
        with self.watch.span("logging"):
            return super()._report(*args, **more)

    def _write_down(self, report: StepReport) -> None:
        with self.watch.span("logging"):
            super()._write_down(report)
            self.steps.flush()

    def _choose(self) -> Result:
        return Result(self.position, self.position.step, self.num_steps, self.optimizer.num_weights)


def split_marks(marks: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Seconds of data, forward, loss and backward from when modules began and ended, in order of time.

    What is before the first forward is data (padding taken out); what is outside the learner afterwards is backward; what is
    inside it but outside the decoder is loss.

    >>> split_marks([("begin gradients", 0), ("begin learner", 1), ("begin decoder", 1), ("end decoder", 4),
    ...              ("end learner", 6), ("end gradients", 11)])
    {'data': 1, 'backward': 5, 'loss': 2, 'forward': 3}
    """
    parts: dict[str, float] = {"data": 0, "backward": 0, "loss": 0, "forward": 0}
    inside: list[str] = []
    before = marks[0][1]
    has_begun = False
    for mark, moment in marks:
        part = {"gradients": "backward" if has_begun else "data", "learner": "loss", "decoder": "forward"}
        if inside:
            parts[part[inside[-1]]] += moment - before
        verb, _, name = mark.partition(" ")
        has_begun |= name == "learner"
        inside = [*inside, name] if verb == "begin" else inside[:-1]
        before = moment
    return parts


def matmul_ceiling(dtype: torch.dtype, device: torch.device | str) -> float:
    """Operations per second of a 4,096-cubed product: the best of at least three within two seconds.

    A machine that would take long (one without bfloat16 instructions) is measured with the largest of 512, 1,024, ... that it
    does at once.
    """
    size = 512
    while size < CEILING_SIZE and 8 * _product_seconds(size, dtype, device) < CEILING_SECONDS:
        size *= 2
    started, best, number = time.perf_counter(), math.inf, 0
    while number < 3 or (number < 50 and time.perf_counter() - started < CEILING_SECONDS):
        best, number = min(best, _product_seconds(size, dtype, device)), number + 1
    return 2 * size**3 / best


def _product_seconds(size: int, dtype: torch.dtype, device: torch.device | str) -> float:
    """Seconds of one product; reading a number back waits for a GPU."""
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    start = time.perf_counter()
    (matrix @ matrix)[0, 0].item()
    return time.perf_counter() - start
