"""Assemble: rates, order and windows joined into the plan of a run. Pure: lists and arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tutelage.plan.order import Order
from tutelage.plan.rates import Mixture, Supply, TaskShare, plan_counts
from tutelage.plan.spec import BatchSpec, MixSpec
from tutelage.plan.windows import DEFAULT_ROWS, Layout, StepShape, cut_windows, step_shape
from tutelage.records import Float64, Int32, Int64


@dataclass(frozen=True)
class Candidates:
    """The examples that a plan may draw, one entry each: `task` (index into `tasks`), tokens, supervised tokens, target weight.

    Within a task their order is the order that passes permute: give it a meaning that does not depend on how files were read.
    """

    tasks: tuple[str, ...]
    task: Int32
    num_tokens: Int32
    num_supervised: Int64
    weight: Float64

    def per_task(self, values: np.ndarray) -> Int64:
        """The sum of `values` over the examples of each task."""
        return np.bincount(self.task, weights=values, minlength=len(self.tasks)).astype(np.int64)

    def supplies(self) -> dict[str, Supply]:
        """What each task has to give."""
        units = (np.ones(len(self.task)), self.num_tokens, self.num_supervised)
        sums = zip(*(self.per_task(unit).tolist() for unit in units), strict=True)
        return {name: Supply(*amounts) for name, amounts in zip(self.tasks, sums, strict=True)}


@dataclass(frozen=True)
class Placements:
    """One entry per visit, sorted by (row, start): document `example` lies at `start : start + length` of packed row `row`."""

    row: Int64
    example: Int32
    visit: Int32
    start: Int32
    length: Int32


@dataclass(frozen=True)
class Steps:
    """One entry per step. `total_weight` is the denominator of its loss."""

    window: Int64
    first_row: Int64
    num_rows: Int64
    num_examples: Int64
    real_tokens: Int64
    slots: Int64
    total_weight: Float64

    def __len__(self) -> int:
        return len(self.slots)


@dataclass(frozen=True)
class Plan:
    """A run, written ahead: what is where in which step, and what was promised. `num_visits` has one entry per candidate."""

    tasks: tuple[str, ...]
    mixture: Mixture
    shape: StepShape
    num_visits: Int32
    placements: Placements
    steps: Steps
    notes: tuple[str, ...]

    @property
    def packing_efficiency(self) -> float:
        """Real tokens over slots, of the whole run."""
        return float(self.steps.real_tokens.sum() / self.steps.slots.sum())


def make_plan(
    tasks: Sequence[str],
    num_tokens: Sequence[int] | np.ndarray,
    *,
    weights: Sequence[float] | np.ndarray | None = None,
    num_supervised: Sequence[int] | np.ndarray | None = None,
    mix: MixSpec | None = None,
    batch: BatchSpec | None = None,
) -> Plan:
    """The `Plan` of examples given as their task names and lengths.

    `weights` is the total target weight of each example and `num_supervised` how many of its targets have weight; both are
    one less than the tokens when left out (every token but the first is a target of weight 1).

    >>> plan = make_plan(["qa"] * 4 + ["maths"] * 2, [6, 5, 4, 3, 8, 2], mix=MixSpec(epochs=2.0),
    ...                  batch=BatchSpec(slots_per_step=16))
    >>> plan.mixture.counts, plan.num_visits.tolist(), len(plan.steps)
    ({'maths': 4, 'qa': 8}, [2, 2, 2, 2, 2, 2], 4)
    >>> plan.steps.real_tokens.tolist(), plan.steps.total_weight.tolist()
    ([16, 16, 16, 8], [12.0, 13.0, 12.0, 7.0])

    PlanError as `plan_counts` and `step_shape` say; `batch.capacity` is the longest example when left out.
    """
    lengths = np.asarray(num_tokens, np.int32)
    targets = np.maximum(lengths - 1, 0)
    names = tuple(sorted(set(tasks)))
    place = {name: i for i, name in enumerate(names)}
    candidates = Candidates(
        tasks=names,
        task=np.fromiter((place[name] for name in tasks), np.int32, len(lengths)),
        num_tokens=lengths,
        num_supervised=np.asarray(targets if num_supervised is None else num_supervised, np.int64),
        weight=np.asarray(targets if weights is None else weights, np.float64),
    )
    longest = int(lengths.max(initial=8))
    return plan_candidates(candidates, mix=mix or MixSpec(), batch=batch or BatchSpec(), max_tokens=longest)


def plan_candidates(candidates: Candidates, *, mix: MixSpec, batch: BatchSpec, max_tokens: int) -> Plan:
    """The plan of `candidates`: how many of each task, in which order, in which row of which step."""
    shape = step_shape(batch, max_tokens=max_tokens)
    mixture = plan_counts(candidates.supplies(), mix)
    example, visit = _draw(candidates, mixture, seed=mix.seed)
    lengths = candidates.num_tokens[example]
    layout = cut_windows(lengths, shape=shape, seed=mix.seed)
    by_place = np.argsort(layout.row << 32 | layout.start)
    placements = Placements(layout.row[by_place], example[by_place], visit[by_place], layout.start[by_place], lengths[by_place])
    steps = _steps(layout, placements, candidates.weight)
    notes = [*mixture.notes]
    if batch.slots_per_step is None and batch.examples_per_step is None:
        notes.append(f"no batch size given: {DEFAULT_ROWS} rows of {shape.capacity:,} slots per step")
    num_visits = np.bincount(example, minlength=len(candidates.task)).astype(np.int32)
    return Plan(candidates.tasks, mixture, shape, num_visits, placements, steps, tuple(notes))


def _steps(layout: Layout, placements: Placements, weight: Float64) -> Steps:
    """The steps of a layout, with what lies in each of them added up."""
    step = np.repeat(np.arange(len(layout.slots)), layout.num_rows)[placements.row]

    def per_step(values: np.ndarray) -> Float64:
        return np.bincount(step, weights=values, minlength=len(layout.slots)).astype(np.float64)

    return Steps(
        window=layout.window,
        first_row=layout.first_row,
        num_rows=layout.num_rows,
        num_examples=np.bincount(step, minlength=len(layout.slots)),
        real_tokens=per_step(placements.length).astype(np.int64),
        slots=layout.slots,
        total_weight=per_step(weight[placements.example]),
    )


def _draw(candidates: Candidates, mixture: Mixture, *, seed: int) -> tuple[Int32, Int32]:
    """The candidate and its visit at every position of the run."""
    sizes = {task.task: task.supply.num_examples for task in mixture.tasks}
    order = Order(mixture.counts, sizes=sizes, seed=seed)
    draws = order.window(0, len(order))
    members = np.argsort(candidates.task.astype(np.int16), kind="stable").astype(np.int32)
    first = np.searchsorted(candidates.task[members], [candidates.tasks.index(name) for name in order.tasks])
    return members[first[draws.task] + draws.index], draws.visit


def mixture_facts(plan: Plan, candidates: Candidates) -> list[dict[str, Any]]:
    """One line per task: what it had, what is planned in three units, what was promised, and how often records are seen."""
    visits = plan.num_visits
    planned = {
        "examples": candidates.per_task(visits),
        "tokens": candidates.per_task(visits * candidates.num_tokens.astype(np.int64)),
        "supervised": candidates.per_task(visits * candidates.num_supervised),
    }
    most = np.zeros(len(plan.tasks), np.int64)
    np.maximum.at(most, candidates.task, visits)
    lines = []
    for i, task in enumerate(plan.mixture.tasks):
        amounts = {unit: int(planned[unit][i]) for unit in planned}
        shares = {f"share_{unit}": amounts[unit] / max(float(planned[unit].sum()), 1.0) for unit in planned}
        lines.append(
            _available(task) | {f"planned_{unit}": n for unit, n in amounts.items()} | shares | _visits(task, int(most[i]))
        )
    return lines


def _available(task: TaskShare) -> dict[str, Any]:
    supply = task.supply
    return {
        "task": task.task,
        "available_examples": supply.num_examples,
        "available_tokens": supply.num_tokens,
        "available_supervised": supply.num_supervised,
        "promised_share": task.promised_share,
    }


def _visits(task: TaskShare, most: int) -> dict[str, Any]:
    return {
        "visits_per_record": task.num_planned / max(task.supply.num_examples, 1),
        "most_visits": most,
        "is_capped": task.is_capped,
    }
