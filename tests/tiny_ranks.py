"""A tiny run that is the same whatever the number of processes: float64, and steps that no number of ranks divides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiny_training import SOURCES, TASKS, make_batches
from tutelage import tables
from tutelage.model.spec import Lora
from tutelage.records import Batch


@dataclass(frozen=True)
class Tiny:
    """What the run trains and how; `narrow` is bfloat16."""

    adapter: bool = False
    tied: bool = True
    parallel: str = "ddp"
    narrow: bool = False
    num_steps: int = 3
    micro_batch_rows: int = 1
    dropout: float = 0.0
    seed: int = 5
    save_every: int = 9
    changes: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Found:
    """What a run left: per step, and at its end. `weights` are empty where a rank holds none."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, np.ndarray]


def tiny_model_of(tiny: Tiny) -> Any:
    """The model that a run starts from."""
    import torch

    from toy import tiny_llama
    from tutelage.model import add_adapter

    model = tiny_llama(tied=tiny.tied, dtype=torch.bfloat16 if tiny.narrow else torch.float64)
    return add_adapter(model, Lora(rank=4, alpha=8.0, dropout=tiny.dropout), seed=tiny.seed) if tiny.adapter else model


def batches_of(num_steps: int) -> list[Batch]:
    """Steps of three rows; in every other one a row without any weight, which a rank must not skip."""
    batches = make_batches(num_steps)
    for batch in batches[1::2]:
        batch.weights[1] = 0.0
    return [Batch(**{**_fields(batch), "total_weight": float(batch.weights.sum(dtype=np.float64))}) for batch in batches]


def _fields(batch: Batch) -> dict[str, Any]:
    return {name: getattr(batch, name) for name in batch.__dataclass_fields__}


def run_tiny_ranks(folder: Path, tiny: Tiny, measure: Any = None) -> Found:
    """What this rank finds after the run."""
    from tutelage.train.loop import Task, train
    from tutelage.train.micro import Names
    from tutelage.train.spec import TrainSpec

    changes = {"checkpoint_every_steps": tiny.save_every, "max_grad_norm": 0.5, **dict(tiny.changes)}
    spec = TrainSpec(parallel=tiny.parallel, micro_batch_rows=tiny.micro_batch_rows, **changes)
    model = tiny_model_of(tiny)
    train(model, batches_of(tiny.num_steps), Task(spec, 1e-2, Names(TASKS, SOURCES)), folder=folder, measure=measure)
    whole = {name: p.detach().float() if tiny.narrow else p.detach() for name, p in model.named_parameters() if not p.is_meta}
    rows = tables.read_table(folder / "steps.parquet", tables.STEPS).to_pylist()
    steps = [row for row in rows if row["part"] == "all"]
    weights = {name: p.numpy() for name, p in whole.items()}
    return Found([row["loss_sum"] for row in steps], [row["grad_norm"] for row in steps], weights)
