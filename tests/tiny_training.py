"""Small hand-made steps, and a run over them; `python -m tiny_training FOLDER NUM_STEPS` is that run as a process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.model.spec import Lora
from tutelage.records import NO_TARGET, Batch, Document, Kind, Sample, Score

TASKS = ("maths", "chat", "code")
SOURCES = ("left", "right")


@dataclass(frozen=True)
class Doc:
    """Token ids, and one weight per *target*: `weights[i]` is on `ids[i + 1]`."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    task: int = 0
    source: int = 0
    example: int = 0


def make_docs(count: int, *, seed: int, first_example: int = 0, shortest: int = 4, longest: int = 14) -> list[Doc]:
    """Random documents; the first third of each has weight 0, the rest weights of 0.25 to 2."""
    rng = np.random.default_rng(seed)
    docs = []
    for number in range(count):
        length = int(rng.integers(shortest, longest + 1))
        weights = rng.choice([0.25, 0.5, 1.0, 2.0], length - 1)
        weights[: length // 3] = 0.0
        ids = tuple(int(i) for i in rng.integers(0, 128, length))
        docs.append(Doc(ids, tuple(weights.tolist()), task=number % 3, source=number % 2, example=first_example + number))
    return docs


def make_batch(rows: Sequence[Sequence[Doc]], *, step: int = 0, capacity: int = 32) -> Batch:
    """A step of these documents, one list per row, padded to `capacity`."""
    shape = (len(rows), capacity)
    columns: dict[str, Any] = {name: np.zeros(shape, np.int32) for name in ("inputs", "positions", "segments")}
    columns |= {"targets": np.full(shape, NO_TARGET, np.int32), "weights": np.zeros(shape, np.float32)}
    columns |= {name: np.full(shape, -1, np.int16) for name in ("tasks", "sources")}
    columns["kinds"] = np.zeros(shape, np.uint8)
    documents = []
    for row, docs in enumerate(rows):
        start = 0
        for segment, doc in enumerate(docs, 1):
            length = len(doc.ids)
            assert len(doc.weights) == length - 1 and start + length <= capacity
            here, before = slice(start, start + length), slice(start, start + length - 1)
            columns["inputs"][row, here] = doc.ids
            columns["positions"][row, here] = range(length)
            columns["segments"][row, here] = segment
            columns["tasks"][row, here], columns["sources"][row, here] = doc.task, doc.source
            columns["targets"][row, before], columns["weights"][row, before] = doc.ids[1:], doc.weights
            columns["kinds"][row, before] = [Kind.ASSISTANT if w else Kind.USER for w in doc.weights]
            documents.append(Document(row, start, length, doc.example, 0))
            start += length
    total = float(sum(w for docs in rows for doc in docs for w in doc.weights))
    return Batch(**columns, documents=tuple(documents), step=step, total_weight=total)


def make_batches(num_steps: int) -> list[Batch]:
    """Steps of three rows of two documents."""
    steps = []
    for step in range(num_steps):
        docs = make_docs(6, seed=step + 1, first_example=6 * step)
        steps.append(make_batch([docs[0:2], docs[2:4], docs[4:6]], step=step))
    return steps


@dataclass(frozen=True)
class Look:
    """A measurement as evaluation makes it."""

    loss: float
    scores: tuple[Score, ...] = ()
    samples: tuple[Sample, ...] = ()


def measure_with(losses: Callable[[int], float]) -> Callable[[Any, int], Look]:
    """A measure that reports `losses(step)` and draws from the random generator, as a careless one would."""
    import torch

    def measure(model: Any, step: int) -> Look:
        torch.rand(7)
        loss = losses(step)
        sample = Sample("", step, "maths", "left/a:1", "1+1", "2", "3", True, 1)
        return Look(loss, (Score("", step, "maths", "", "nll", loss, 10.0),), (sample,))

    return measure


def run_tiny(folder: Path, num_steps: int, *, measure: Any = None, progress: Any = None, **changes: Any) -> Any:
    """(result, model) of a LoRA run with dropout, in float64, over `make_batches`.

    `changes` go to TrainSpec, to Watch, and to the adapter (`dropout`).
    """
    from toy import tiny_llama
    from tutelage.model import add_adapter
    from tutelage.train.loop import Task, Watch, train
    from tutelage.train.micro import Names
    from tutelage.train.spec import TrainSpec

    watch = {name: changes.pop(name) for name in list(changes) if name in Watch.__dataclass_fields__}
    dropout = changes.pop("dropout", 0.1)
    spec = TrainSpec(**({"checkpoint_every_steps": 2, "micro_batch_rows": 2, "seed": 5} | changes))
    model = add_adapter(tiny_llama(), Lora(rank=4, alpha=8.0, dropout=dropout), seed=5)
    task = Task(spec, 1e-2, Names(TASKS, SOURCES), watch=Watch(**watch))
    return train(model, make_batches(num_steps), task, folder=folder, measure=measure, progress=progress), model


def trained_weights(model: Any) -> dict[str, Any]:
    """Every trainable weight, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    run_tiny(Path(sys.argv[1]), int(sys.argv[2]), measure=measure_with(lambda step: 3.0 - step / 10), every_steps=3)
