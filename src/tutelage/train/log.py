"""What a run leaves behind to be read: steps.parquet, events.jsonl, evals.parquet, samples.parquet, and trackers.

All are cut back to the checkpoint when a run goes on from one, so that no step is written twice.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from xxhash import xxh3_64

from tutelage import tables
from tutelage.records import Batch, Sample, Score, StepReport, Tally
from tutelage.store import Json, sync_path


class Measurement(Protocol):
    """One look at a model on held-out data, made by another room. `loss` is in nats per learned token; nan without any."""

    @property
    def loss(self) -> float:
        """What early stopping and the best checkpoint go by."""

    @property
    def scores(self) -> Sequence[Score]:
        """One per held-out example, and those over tasks and all (item "")."""

    @property
    def samples(self) -> Sequence[Sample]:
        """Generations on fixed prompts."""


def step_rows(report: StepReport) -> list[dict[str, Any]]:
    """A report as lines of schema STEPS: "all" first, then each task, source and kind.

    >>> report = StepReport(3, Tally(2.0, 1.0, 1), by_task={"maths": Tally(2.0, 1.0, 1)}, learning_rate=0.1)
    >>> [(row["step"], row["part"], row["loss_sum"], row["learning_rate"]) for row in step_rows(report)]
    [(3, 'all', 2.0, 0.1), (3, 'task maths', 2.0, None)]
    """
    whole = ("grad_norm", "learning_rate", "seconds", "real_tokens", "slots", "memory_bytes", "objective", "kl")
    rows = [_row(report.step, "all", report.loss) | {name: getattr(report, name) for name in whole}]
    for group, parts in (("task", report.by_task), ("source", report.by_source), ("kind", report.by_kind)):
        rows += [_row(report.step, f"{group} {name}", tally) for name, tally in parts.items()]
    return rows


def _row(step: int, part: str, tally: Tally) -> dict[str, Any]:
    blank = dict.fromkeys(tables.STEPS.names)
    return blank | {"step": step, "part": part, "loss_sum": tally.loss_sum, "weight": tally.weight, "tokens": tally.tokens}


def batch_key(batch: Batch) -> str:
    """16 hex digits (XXH3) of everything of a batch that its gradient depends on: equal keys, equal training."""
    digest = xxh3_64()
    for column in (batch.inputs, batch.targets, batch.weights, batch.positions, batch.segments):
        digest.update(np.ascontiguousarray(column).data)
    digest.update(np.float64(batch.total_weight).tobytes())
    return digest.hexdigest()


def step_event(report: StepReport) -> dict[str, Json]:
    """What events.jsonl says of a step."""
    whole = {name: getattr(report, name) for name in ("step", "grad_norm", "learning_rate", "batch_key")}
    return {**whole, "loss": report.loss.mean}


def peak_memory_bytes(device: str) -> int:
    """The most memory in use at once so far: of the GPU where there is one, else of this process."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class StepLog:
    """steps.parquet: lines of steps before `next_step` are kept, later ones are of a lost try and cut off."""

    def __init__(self, path: Path, next_step: int) -> None:
        self._path = path
        table = tables.read_table(path, tables.STEPS) if path.exists() else tables.STEPS.empty_table()
        self._table = table.filter(pc.less(table["step"], next_step))
        self._pending: list[dict[str, Any]] = []

    def add(self, report: StepReport) -> None:
        """Nothing; remembers a step until `flush`."""
        self._pending += step_rows(report)

    def flush(self) -> None:
        """Nothing; the file holds every step so far."""
        new = pa.Table.from_pylist(self._pending, schema=tables.STEPS)
        self._table = pa.concat_tables([self._table, new]).unify_dictionaries().combine_chunks()
        self._pending = []
        _replace(self._path, lambda path: tables.write_table(path, self._table))


class EventLog:
    """events.jsonl: one line per event, readable while the run goes on; cut back to its first `size_bytes` bytes."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._file = path.open("ab")
        if self._file.tell() > size_bytes:
            self._file.truncate(size_bytes)

    def add(self, event: str, **fields: Json) -> None:
        """Nothing; writes `{"event": ..., "time": ..., ...}`."""
        line = {"event": event, "time": round(time.time(), 3), **fields}
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """The size in bytes, all of it durable."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Nothing; closes the file."""
        self._file.close()


class MeasureLog:
    """evals.parquet and samples.parquet: measurements up to `last_step` are kept."""

    def __init__(self, folder: Path, last_step: int) -> None:
        self._evals, self._samples = folder / "evals.parquet", folder / "samples.parquet"
        scores = tables.read_scores(self._evals) if self._evals.exists() else []
        samples = tables.read_samples(self._samples) if self._samples.exists() else []
        self._scores = [score for score in scores if score.step <= last_step]
        self._sampled = [sample for sample in samples if sample.step <= last_step]

    def add(self, measurement: Measurement, step: int) -> None:
        """Nothing; the files hold this measurement too, under the step it was made at."""
        self._scores += [dataclasses.replace(score, step=step) for score in measurement.scores]
        self._sampled += [dataclasses.replace(sample, step=step) for sample in measurement.samples]
        self.flush()

    def flush(self) -> None:
        """Nothing; writes both files."""
        _replace(self._evals, lambda path: tables.write_records(path, tables.SCORES, self._scores))
        _replace(self._samples, lambda path: tables.write_records(path, tables.SAMPLES, self._sampled))


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Nothing; the file is rewritten whole or left as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_path(path.parent)


@dataclass(frozen=True)
class Pace:
    """How fast a run is, for people.

    >>> Pace(loss=1.5, tokens_per_second=412.3, seconds_left=250, memory_bytes=2_400_000_000).text
    'loss 1.500, 412 tokens/s, 2.4 GB, 4 min left'
    """

    loss: float
    tokens_per_second: float
    seconds_left: float
    memory_bytes: int

    @property
    def text(self) -> str:
        """One short line."""
        speed, memory = f"{self.tokens_per_second:,.0f} tokens/s", f"{self.memory_bytes / 1e9:.1f} GB"
        return f"loss {self.loss:.3f}, {speed}, {memory}, {_about(self.seconds_left)} left"


def _about(seconds: float) -> str:
    """A duration to the precision that people plan by.

    >>> _about(42.0), _about(250.0), _about(9000.0)
    ('42 s', '4 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def scalars(report: StepReport) -> dict[str, float]:
    """The numbers of a step that trackers draw as curves."""
    values = {"loss": report.loss.mean, "grad_norm": report.grad_norm, "learning_rate": report.learning_rate}
    values["tokens_per_second"] = report.real_tokens / max(report.seconds, 1e-9)
    values["memory_bytes"] = float(report.memory_bytes)
    values |= {name: value for name in ("objective", "kl") if (value := getattr(report, name)) is not None}
    return values | means("task", report.by_task) | means("kind", report.by_kind)


def means(group: str, tallies: Mapping[str, Tally]) -> dict[str, float]:
    """`{"task/maths": loss}` and so on."""
    return {f"{group}/{name}": tally.mean for name, tally in tallies.items()}


_BESIDE_LOSS = ("train_nll", "copied_share", "ended_share")
"""What of a measurement, beside losses, trackers draw over all tasks."""


def held_out_scalars(measurement: Measurement) -> dict[str, float]:
    """The held-out loss, whole and by task, and what the overfit card shows of all tasks, as trackers draw them."""
    by_task = losses_by_task(measurement)
    beside = {s.metric: s.value for s in measurement.scores if not s.item and not s.task and s.metric in _BESIDE_LOSS}
    return {"held_out_loss": measurement.loss} | {f"held_out/{task}": value for task, value in by_task.items()} | beside


def losses_by_task(measurement: Measurement) -> dict[str, float]:
    """The held-out loss of each task that was measured, in nats per learned token."""
    return {s.task: s.value for s in measurement.scores if s.item == "" and s.metric == "nll" and s.task}
