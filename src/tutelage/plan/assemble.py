"""Assemble: rates, order and windows joined into the plan of a run. Pure: lists and arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from tutelage.errors import PlanError
from tutelage.plan.budget import Unit
from tutelage.plan.kernels import sort_by_code, sort_by_place
from tutelage.plan.mixtures import examples_between, plan_mixture
from tutelage.plan.normalise import ExampleWeights, plain_weights
from tutelage.plan.order import Behind, Order
from tutelage.plan.rates import Mixture, Supply
from tutelage.plan.rules import UnknownName
from tutelage.plan.schedule_spec import Online
from tutelage.plan.spec import BatchSpec, MixSpec
from tutelage.plan.steps import examples_filling
from tutelage.plan.sums import most_by_label, sum_by_label
from tutelage.plan.windows import DEFAULT_ROWS, WINDOW_STEPS, Cuts, Layout, StepShape, cut_windows, step_shape
from tutelage.records import Float64, Int32, Int64

_ROWS_TO_PACK = 16


@dataclass(frozen=True)
class Strata:
    """What rates name, where that is not the task: `names`, and the index of each candidate's name in them."""

    names: tuple[str, ...]
    code: Int32

    @classmethod
    def of(cls, labels: Sequence[str]) -> Strata:
        """The strata of one label per candidate."""
        names = tuple(sorted(set(labels)))
        place = {name: i for i, name in enumerate(names)}
        return cls(names, np.fromiter(map(place.__getitem__, labels), np.int32, len(labels)))

    def sums(self, values: np.ndarray) -> Int64:
        """The sum of `values` over the candidates of each name."""
        sums: Int64 = sum_by_label(self.code, [values], num_labels=len(self.names))[0]
        return sums

    @cached_property
    def sizes(self) -> Int64:
        """How many candidates each name has."""
        return np.bincount(self.code, minlength=len(self.names))


@dataclass(frozen=True)
class Candidates:
    """The examples that a plan may draw, one entry each: `task` (index into `tasks`), tokens, supervised tokens, target weight.

    Within a stratum their order is the order that passes permute: give it a meaning that does not depend on how files were read.
    """

    tasks: tuple[str, ...]
    task: Int32
    num_tokens: Int32
    num_supervised: Int64
    weight: Float64
    weights: ExampleWeights | None = None
    """How `weight` follows from multipliers; left out, every multiplier is 1 and nothing is normalised."""
    mixed_by: Strata | None = None
    """What rates name; the tasks when left out."""
    lost: Mapping[str, str] = field(default_factory=dict)
    """What became of the records of a name that has none left, by name; `""`: of records that name nothing."""
    behind: Mapping[str, Behind] = field(default_factory=dict)
    """What earlier parts of the same run drew of each stratum."""

    @cached_property
    def strata(self) -> Strata:
        """What rates name: the tasks, or what `mixed_by` says."""
        return Strata(self.tasks, self.task) if self.mixed_by is None else self.mixed_by

    def size(self, count: Unit) -> Int64:
        """The size of each example in a unit."""
        if count == "examples":
            return np.ones(len(self.task), np.int64)
        return self.num_tokens.astype(np.int64) if count == "tokens" else self.num_supervised

    def fate_of(self, name: str) -> str:
        """What an error says of a name that no candidate has."""
        if name in self.lost:
            return f"; of `{name}`, {self.lost[name]}"
        return f"; of records whose task is not known, {self.lost['']}" if "" in self.lost else ""

    def settle_weights(self, num_visits: Int32) -> tuple[Float64, Float64]:
        """The multiplier of each example and its total weight in one visit, normalised over these visits."""
        if self.weights is None:
            return np.ones(len(self.task)), self.weight
        if self.weights.normalise == "token":
            return self.weights.multiplier, self.weight
        return self.weights.settle(num_visits, self.task)

    def supplies(self) -> dict[str, Supply]:
        """What each stratum has to give."""
        sums = [self.strata.sums(self.size(unit)) for unit in ("tokens", "supervised_tokens")]
        units = [each.tolist() for each in (self.strata.sizes, *sums)]
        return {
            name: Supply(
                examples,
                tokens,
                supervised,
                "" if examples else self.lost.get(name, ""),
                self.behind[name].num_drawn if name in self.behind else 0,
            )
            for name, examples, tokens, supervised in zip(self.strata.names, *units, strict=True)
        }


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
    """A run, written ahead: what is where in which step, and what was promised.

    `num_visits`, `multiplier` (on every token weight) and `weight` (of all targets, in one visit) have one entry per candidate.
    """

    tasks: tuple[str, ...]
    mixture: Mixture
    shape: StepShape
    num_visits: Int32
    placements: Placements
    steps: Steps
    notes: tuple[str, ...]
    multiplier: Float64
    weight: Float64

    @property
    def packing_efficiency(self) -> float:
        """Real tokens over slots, of the whole run."""
        return float(self.steps.real_tokens.sum() / self.steps.slots.sum())


def make_plan(
    tasks: Sequence[str],
    num_tokens: Sequence[int] | np.ndarray,
    *,
    weights: Sequence[float] | np.ndarray | ExampleWeights | None = None,
    num_supervised: Sequence[int] | np.ndarray | None = None,
    sources: Sequence[str] | None = None,
    mix: MixSpec | None = None,
    batch: BatchSpec | None = None,
) -> Plan:
    """The `Plan` of examples given as their task names and lengths.

    `weights` is the total target weight of each example and `num_supervised` how many of its targets have weight; both are
    one less than the tokens when left out (every token but the first is a target of weight 1). `weights` of
    `normalise.example_weights` state both, with normalising and multipliers. `sources` names the source of each example, for
    rates with `over: sources`.

    >>> plan = make_plan(["qa"] * 4 + ["maths"] * 2, [6, 5, 4, 3, 8, 2], mix=MixSpec(epochs=2.0),
    ...                  batch=BatchSpec(slots_per_step=16))
    >>> plan.mixture.counts, plan.num_visits.tolist(), len(plan.steps)
    ({'maths': 4, 'qa': 8}, [2, 2, 2, 2, 2, 2], 4)
    >>> plan.steps.real_tokens.tolist(), plan.steps.total_weight.tolist()
    ([16, 16, 16, 8], [12.0, 13.0, 12.0, 7.0])

    PlanError as `plan_counts` and `step_shape` say; `batch.capacity` is the longest example when left out.
    """
    lengths = np.asarray(num_tokens, np.int32)
    if not isinstance(weights, ExampleWeights):
        targets = np.maximum(lengths - 1, 0)
        totals = np.asarray(targets if weights is None else weights, np.float64)
        weights = plain_weights(totals, np.asarray(targets if num_supervised is None else num_supervised, np.int64))
    by_task = Strata.of(tasks)
    candidates = Candidates(
        tasks=by_task.names,
        task=by_task.code,
        num_tokens=lengths,
        num_supervised=weights.num_supervised,
        weight=weights.totals(weights.multiplier),
        weights=weights,
        mixed_by=Strata.of(sources) if sources is not None and mix is not None and mix.over == "sources" else None,
    )
    longest = int(lengths.max(initial=8))
    return plan_candidates(candidates, mix=mix or MixSpec(), batch=batch or BatchSpec(), max_tokens=longest)


def plan_candidates(candidates: Candidates, *, mix: MixSpec, batch: BatchSpec, max_tokens: int) -> Plan:
    """The plan of `candidates`: how many of each task, in which order, in which row of which step."""
    shape = step_shape(batch, max_tokens=max_tokens)
    if not len(candidates.task):
        told = [f"of {name or 'records without a task'}, {fate}" for name, fate in sorted(candidates.lost.items()) if fate]
        raise PlanError("no task has a training record" + (f": {'; '.join(told)}" if told else ""))
    if mix.over == "sources" and candidates.mixed_by is None:
        raise PlanError("mix.over: sources, but the examples come without sources; give their names (`sources=`)")
    if isinstance(mix.schedule, Online) and candidates.weights is not None and candidates.weights.normalise == "task":
        raise PlanError(
            "loss.normalise: task needs every task's visits of the whole run, which an online mix.schedule decides while "
            "training; use normalise: example or token"
        )
    try:
        wanted_steps, mix = mix.total_steps, _in_examples(candidates, mix, shape)
        mixture = plan_mixture(candidates.supplies(), mix, examples_per_step=shape.examples)
    except UnknownName as error:
        raise PlanError(f"{error}{candidates.fate_of(error.name)}") from None
    example, visit = _draw(candidates, mixture, seed=mix.seed)
    num_visits = np.bincount(example, minlength=len(candidates.task)).astype(np.int32)
    multiplier, weight = candidates.settle_weights(num_visits)
    lengths = candidates.num_tokens[example]
    layout = cut_windows(lengths, shape=shape, seed=mix.seed, cuts=_cuts(mixture, lengths, shape))
    placements, steps = place_draws(layout, example, visit, lengths=lengths, weight=weight)
    notes = [*mixture.notes]
    assert wanted_steps in (None, len(steps)), f"{wanted_steps} steps were asked for, and {len(steps)} planned"
    if wanted_steps is not None:
        notes.append(f"mix.total_steps {wanted_steps:,}: {len(example):,} examples fill them")
    if batch.slots_per_step is None and batch.examples_per_step is None:
        notes.append(f"no batch size given: {DEFAULT_ROWS} rows of {shape.capacity:,} slots per step")
    return Plan(candidates.tasks, mixture, shape, num_visits, placements, steps, tuple(notes), multiplier, weight)


def _in_examples(candidates: Candidates, mix: MixSpec, shape: StepShape) -> MixSpec:
    """A budget in steps as the number of examples that fills them; any other budget as it is."""
    if mix.total_steps is None:
        return mix
    supplies = candidates.supplies()

    def of(num_examples: int) -> MixSpec:
        return mix.model_copy(update={"total_steps": None, "total_examples": num_examples})

    def filled(num_examples: int) -> float:
        if shape.examples is not None:
            return num_examples / shape.examples
        mixture = plan_mixture(supplies, of(num_examples), examples_per_step=shape.examples)
        example, _ = _draw(candidates, mixture, seed=mix.seed)
        lengths = candidates.num_tokens[example]
        layout = cut_windows(lengths, shape=shape, seed=mix.seed, cuts=_cuts(mixture, lengths, shape))
        if shape.is_packed:
            used = np.unique(layout.row[layout.row >= layout.first_row[-1]]).size
            return len(layout.slots) - 1 + float(used / shape.rows)
        return len(layout.slots) - 0.5  # one document a row: whether the last step is full shows only when it overflows

    least, most = examples_between(supplies, mix)
    per_step = shape.examples or (shape.slots or 0) / max(candidates.num_tokens.mean(), 1)
    guess = round(mix.total_steps * per_step)
    return of(examples_filling(mix.total_steps, filled, guess=guess, least=least, most=most))


def _cuts(mixture: Mixture, lengths: Int32, shape: StepShape) -> Cuts | None:
    """Where packing must not mix what a schedule keeps apart: at the ends of stages, and no window longer than a stretch.

    In a short run a window has up to three stretches, if it takes these to have rows enough to pack well.
    """
    if mixture.timetable is None:
        return None
    num_steps = len(lengths) / shape.examples if shape.examples else int(lengths.sum()) / (shape.slots or 1)
    of_stretch = num_steps * mixture.timetable.smallest_change
    enough = _ROWS_TO_PACK / (shape.examples or shape.rows)
    steps = int(max(of_stretch, min(enough, 3 * of_stretch)))
    return Cuts(min(max(steps, 1), WINDOW_STEPS), mixture.timetable.stage_ends)


def place_draws(layout: Layout, example: Int32, visit: Int32, *, lengths: Int32, weight: Float64) -> tuple[Placements, Steps]:
    """Draws, in the order of the run, at the places of a layout; `weight` has one entry per candidate."""
    by_place = sort_by_place(layout.row, layout.start, num_rows=int(layout.num_rows.sum()))
    placements = Placements(layout.row[by_place], example[by_place], visit[by_place], layout.start[by_place], lengths[by_place])
    return placements, _steps(layout, placements, weight)


def members_of(code: Int32, num_names: int) -> tuple[Int32, Int64]:
    """The candidates sorted by name (`code` (N,) is each one's), and where those of each name begin."""
    return sort_by_code(code, num_codes=num_names)


def _steps(layout: Layout, placements: Placements, weight: Float64) -> Steps:
    """The steps of a layout, with what lies in each of them added up."""
    first = np.searchsorted(placements.row, layout.first_row)
    return Steps(
        window=layout.window,
        first_row=layout.first_row,
        num_rows=layout.num_rows,
        num_examples=np.diff(np.append(first, len(placements.row))),
        real_tokens=np.add.reduceat(placements.length, first, dtype=np.int64),
        slots=layout.slots,
        total_weight=np.add.reduceat(weight[placements.example], first),
    )


def _draw(candidates: Candidates, mixture: Mixture, *, seed: int) -> tuple[Int32, Int32]:
    """The candidate and its visit at every position of the run."""
    sizes = {task.task: task.supply.num_examples for task in mixture.tasks}
    stretches = mixture.timetable.stretches if mixture.timetable else ()
    order = Order(mixture.counts, sizes=sizes, seed=seed, stretches=stretches, behind=candidates.behind)
    draws = order.window(0, len(order))
    strata = candidates.strata
    members, begins = members_of(strata.code, len(strata.names))
    first = begins[[strata.names.index(name) for name in order.tasks]]
    return members[first[draws.task] + draws.index], draws.visit


def step_facts(steps: Steps) -> dict[str, dict[str, float]]:
    """Least, median and most over the steps of what they hold: total weight, real tokens, examples, padding in their slots.

    >>> plan = make_plan(["a"] * 5, [8, 8, 5, 3, 6], batch=BatchSpec(slots_per_step=16))
    >>> step_facts(plan.steps)["real_tokens"], step_facts(plan.steps)["padding_share"]["most"]
    ({'least': 14.0, 'median': 15.0, 'most': 16.0}, 0.125)
    """
    held = {"weight": steps.total_weight, "real_tokens": steps.real_tokens, "examples": steps.num_examples}
    held["padding_share"] = 1 - steps.real_tokens / steps.slots
    return {
        name: {"least": float(values.min()), "median": float(np.median(values)), "most": float(values.max())}
        for name, values in held.items()
    }


def mixture_facts(
    plan: Plan, candidates: Candidates, strata_lines: list[dict[str, Any]], *, count: Unit = "examples"
) -> list[dict[str, Any]]:
    """One line per task: what it had, what is planned in three units, what was promised, and how often records are seen.

    `strata_lines` are those of `strata_facts`.
    Where rates are over sources, a task is promised what its part of each source comes to, in the unit of `count`.
    """
    if candidates.mixed_by is None:
        return [{"task": line["name"], **{name: line[name] for name in line if name != "name"}} for line in strata_lines]
    strata, sizes = candidates.strata, candidates.size(count)
    promised = np.array([share.promised_share for share in plan.mixture.tasks]) / np.maximum(strata.sums(sizes), 1)
    capped = np.array([share.is_capped for share in plan.mixture.tasks])[strata.code]
    lines = _amounts(plan, candidates, Strata(plan.tasks, candidates.task))
    for i, line in enumerate(lines):
        mine = candidates.task == i
        line |= {
            "task": line.pop("name"),
            "promised_share": float((promised[strata.code] * sizes)[mine].sum()),
            "is_capped": bool(capped[mine & (plan.num_visits > 0)].any()),
        }
    return lines


def strata_facts(plan: Plan, candidates: Candidates) -> list[dict[str, Any]]:
    """One line per name that rates divide between: as `mixture_facts`, and what caps, minima and refill did to it.

    >>> from tutelage.plan.spec import Equal
    >>> mix = MixSpec(rates=Equal(), total_examples=4, max_visits=1)
    >>> plan = make_plan(["qa"] * 4 + ["maths"], [6, 5, 4, 3, 8], mix=mix)
    >>> [(share.task, share.num_promised, share.num_planned) for share in plan.mixture.tasks]
    [('maths', 2, 1), ('qa', 2, 3)]
    """
    lines = _amounts(plan, candidates, candidates.strata)
    for line, share in zip(lines, plan.mixture.tasks, strict=True):
        line |= {
            "promised_share": share.promised_share,
            "promised_examples": share.num_promised,
            "refilled_examples": max(share.num_planned - share.num_promised, 0),
            "unfilled_examples": share.num_unfilled,
            "is_capped": share.is_capped,
        }
    return lines


def _amounts(plan: Plan, candidates: Candidates, labels: Strata) -> list[dict[str, Any]]:
    """What each label has, what is planned of it in three units, and how often its records are seen."""
    counted: dict[str, Unit] = {"examples": "examples", "tokens": "tokens", "supervised": "supervised_tokens"}
    sizes = [candidates.size(unit) for unit in counted.values()]
    num = len(labels.names)
    available = sum_by_label(labels.code, sizes, num_labels=num)
    planned = sum_by_label(labels.code, sizes, num_labels=num, times=plan.num_visits)
    most = most_by_label(labels.code, plan.num_visits, num_labels=num)
    columns: dict[str, np.ndarray] = {f"available_{unit}": sums for unit, sums in zip(counted, available, strict=True)}
    columns |= {f"planned_{unit}": sums for unit, sums in zip(counted, planned, strict=True)}
    columns |= {f"share_{unit}": columns[f"planned_{unit}"] / max(columns[f"planned_{unit}"].sum(), 1) for unit in counted}
    columns["visits_per_record"] = columns["planned_examples"] / np.maximum(columns["available_examples"], 1)
    columns["most_visits"] = most
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    return [{"name": name, **dict(zip(columns, row, strict=True))} for name, row in zip(labels.names, rows, strict=True)]
