"""Our sides of the plan's benchmark: the whole plan, the first batch, rows over ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from peer_meter import Meter, own_peak_bytes

from tutelage.plan.assemble import Plan, make_plan, step_facts
from tutelage.plan.fit import pack_lengths
from tutelage.plan.spec import BatchSpec, MixSpec
from tutelage.ranks import document_cost, share_rows

Job = dict[str, Any]
ROWS_PER_STEP, NUM_RANKS, ROWS_PER_LARGE_STEP = 8, 8, 64
MIX = {"rates": {"kind": "temperature", "temperature": 2.0}, "max_visits": 3, "epochs": 1.3}


def _set(job: Job) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names and lengths of the job's examples, and their tasks as numbers. A part of a set has part of each task."""
    folder = Path(job["set"])
    sizes, lengths = np.load(folder / "sizes.npy"), np.load(folder / "lengths.npy")
    kept = np.unique(np.linspace(0, len(lengths) - 1, job["num_examples"]).astype(np.int64))
    task = np.repeat(np.arange(len(sizes)), sizes)[kept].astype(np.int32)
    names = [f"task {i:03}" for i in range(len(sizes))]
    return [names[i] for i in task.tolist()], lengths[kept], task


def _warm() -> None:
    """The compiled loops loaded, or compiled: done once per machine."""
    make_plan(["a", "b"] * 8, [3, 5] * 8, mix=MixSpec(epochs=2.0), batch=BatchSpec(slots_per_step=16))
    pack_lengths([1], capacity=8)


def _planned(job: Job, *, count: str = "examples", rows: int = ROWS_PER_STEP) -> tuple[Plan, np.ndarray, np.ndarray, Job]:
    names, lengths, task = _set(job)
    mix = MixSpec.model_validate(MIX | {"count": count})
    batch = BatchSpec(capacity=job["capacity"], slots_per_step=rows * job["capacity"])
    _warm()
    meter = Meter()
    with meter:
        plan = make_plan(names, lengths, mix=mix, batch=batch)
        first = plan.placements.example[: int(np.searchsorted(plan.placements.row, plan.steps.num_rows[0]))]
    assert len(first) == plan.steps.num_examples[0]
    facts = {
        "efficiency": plan.packing_efficiency,
        "num_visits": len(plan.placements.row),
        "num_rows": int(plan.steps.num_rows.sum()),
        "steps": step_facts(plan.steps),
    }
    return plan, lengths, task, meter.spent | {"peak_bytes": own_peak_bytes()} | facts


def whole_plan(job: Job, *, count: str = "examples") -> Job:
    """The plan of every example, and how far its windows of 100 steps are from the promise."""
    plan, lengths, task, result = _planned(job, count=count)
    return result | _shares(plan, lengths, task, is_tokens=count == "tokens")


def _shares(plan: Plan, lengths: np.ndarray, task: np.ndarray, *, is_tokens: bool) -> Job:
    """The promise is what the rates come to under the cap on visits. The last window is left out unless it has 100 steps."""
    num_tasks = int(task.max()) + 1
    unit = np.bincount(task, weights=lengths) / np.bincount(task) if is_tokens else np.ones(num_tasks)
    promised = np.array([plan.mixture.counts[name] for name in plan.tasks]) * unit
    promised /= promised.sum()
    window = plan.steps.window[np.repeat(np.arange(len(plan.steps)), plan.steps.num_rows)[plan.placements.row]]
    num_full = int((np.bincount(plan.steps.window) == 100).sum())
    weights = plan.placements.length if is_tokens else None
    cells = np.bincount(
        window * num_tasks + task[plan.placements.example], weights=weights, minlength=(window.max() + 1) * num_tasks
    )
    held = cells.reshape(-1, num_tasks)[:num_full]
    distance = np.abs(held / held.sum(1, keepdims=True) - promised)
    return {"worst_share": float(distance.max()), "mean_share": float(distance.mean()), "num_windows": num_full}


def first_batch(job: Job) -> Job:
    """A million examples to the placements of the first step; a static plan is written whole, so that is the whole plan."""
    return _planned(job)[-1]


def ranks(job: Job) -> Job:
    """Cost of the dearest rank over the mean, rows dealt in order and shared by cost: the mean over a hundred steps."""
    plan = _planned(job, rows=ROWS_PER_LARGE_STEP)[0]
    placed, dealt, shared, lockstep = plan.placements, [], [], []
    for first in plan.steps.first_row[:100].tolist():
        a, b = np.searchsorted(placed.row, [first, first + ROWS_PER_LARGE_STEP])
        row, lengths = placed.row[a:b] - first, placed.length[a:b]
        by_row = np.bincount(row, weights=document_cost(lengths), minlength=ROWS_PER_LARGE_STEP)
        by_rank = by_row.reshape(NUM_RANKS, -1).sum(1)
        found = share_rows(row, lengths, num_rows=ROWS_PER_LARGE_STEP, num_ranks=NUM_RANKS)
        dealt.append(by_rank.max() / by_rank.mean())
        shared.append(found.imbalance)
        lockstep.append((found.lockstep_imbalance, by_row.reshape(NUM_RANKS, -1).max(0).sum() / by_rank.mean()))
    meet = np.mean(lockstep, axis=0)
    said = (
        f"dearest of {NUM_RANKS} ranks over the mean: {np.mean(shared):.4f} shared by cost, {np.mean(dealt):.4f} dealt in order"
    )
    said += f"; meeting in every micro-batch {meet[0]:.4f} and {meet[1]:.4f}"
    return {"imbalance": float(np.mean(shared)), "in_order": float(np.mean(dealt)), "lockstep": meet.tolist(), "said": said}


SIDES: dict[str, Callable[[Job], Job]] = {
    "plan": whole_plan,
    "plan/tokens": lambda job: whole_plan(job, count="tokens"),
    "first batch": first_batch,
    "ranks": ranks,
}
