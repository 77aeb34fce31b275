"""What a plan's page shows beyond the plan's facts: lengths, visits, rows read back, coverage. Reads the plan's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tutelage.records import Int32, Int64
from tutelage.report.spec import CoverageSpec
from tutelage.store import Artefact
from tutelage.tables import PLACEMENTS, PLANNED, read_table

PILLARS = ("extraction", "generation", "reasoning", "coding", "conversation", "classification")
"""The six kinds of task that a general set covers."""
FEW_VISITS = 4
"""Beyond about four visits repeated records stop paying (arXiv 2305.16264)."""
_NUM_BINS = 24
_NUM_TENTHS = 10


@dataclass(frozen=True)
class PlanArrays:
    """A plan's examples: `task` codes into `tasks`, `num_tokens`, `num_visits`; `visits` is the example of each, in row order."""

    tasks: tuple[str, ...]
    task: Int32
    num_tokens: Int32
    num_visits: Int32
    visits: Int32


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long a task's planned examples are: `counts[i]` have `edges[i]` to `edges[i + 1] - 1` tokens."""

    task: str
    edges: tuple[int, ...]
    counts: tuple[int, ...]
    median: float
    longest: int


@dataclass(frozen=True, slots=True)
class Placed:
    """What of a task was read back from the rows: visits and their tokens, and how often its records are seen."""

    task: str
    examples: int
    tokens: int
    num_often: int
    most_visits: int


@dataclass(frozen=True, slots=True)
class Coverage:
    """A plan beside its target: tasks there are and tasks wanted, tasks with too few examples, pillars without a task."""

    num_tasks: int
    target: CoverageSpec
    small: tuple[tuple[str, int], ...]
    missing_pillars: tuple[str, ...]

    @property
    def is_met(self) -> bool:
        """Whether nothing is missing."""
        return self.num_tasks >= self.target.min_tasks and not self.small and not self.missing_pillars


@dataclass(frozen=True)
class PlanView:
    """Everything the plan's page shows. `facts` are the plan's own; `pictures` the numbers behind the book's five pictures.

    `estimate` is empty for an exact plan; for a preview it says how many records were sampled and how far off it may be.
    """

    facts: Mapping[str, Any]
    pictures: Mapping[str, Any]
    lengths: tuple[Lengths, ...]
    placed: tuple[Placed, ...]
    progress: tuple[Mapping[str, Any], ...]
    coverage: Coverage
    estimate: Mapping[str, Any] = field(default_factory=dict)


def plan_view(
    arrays: PlanArrays,
    facts: Mapping[str, Any],
    pictures: Mapping[str, Any],
    coverage: CoverageSpec,
    *,
    estimate: Mapping[str, Any] | None = None,
) -> PlanView:
    """The view of a plan given as arrays and facts."""
    return PlanView(
        facts=facts,
        pictures=pictures,
        lengths=histograms(arrays, longest=int(facts["capacity"])),
        placed=placed(arrays),
        progress=tuple(facts["deciles"]) if "deciles" in facts else tenths(arrays, facts),
        coverage=cover(facts["mixture"], coverage),
        estimate=estimate or {},
    )


def read_arrays(plan: Artefact) -> PlanArrays:
    """The arrays of a `plan` artefact."""
    planned = read_table(plan.file("planned.parquet"), PLANNED)
    task = planned["task"].combine_chunks().cast(PLANNED.field("task").type)
    return PlanArrays(
        tasks=tuple(task.dictionary.to_pylist()),
        task=task.indices.to_numpy(),
        num_tokens=planned["num_tokens"].to_numpy(),
        num_visits=planned["num_visits"].to_numpy(),
        visits=read_table(plan.file("placements.parquet"), PLACEMENTS)["example"].to_numpy(),
    )


def histograms(arrays: PlanArrays, *, longest: int) -> tuple[Lengths, ...]:
    """Lengths by task, in at most 24 bins that all tasks share, up to the longest that the plan allows; each example once.

    >>> arrays = PlanArrays(("a",), np.zeros(3, np.int32), np.array([3, 9, 48]), np.ones(3, np.int32), np.arange(3))
    >>> histograms(arrays, longest=48)[0].counts[:5], histograms(arrays, longest=48)[0].edges[:3]
    ((0, 1, 0, 0, 1), (1, 3, 5))
    """
    width = -(-longest // _NUM_BINS)
    num_bins = -(-longest // width)
    seen = arrays.num_visits > 0
    table = np.zeros((len(arrays.tasks), num_bins), np.int64)
    np.add.at(table, (arrays.task[seen], (arrays.num_tokens[seen] - 1) // width), 1)
    edges = tuple(1 + width * i for i in range(num_bins + 1))
    out = []
    for t, name in enumerate(arrays.tasks):
        mine = arrays.num_tokens[seen & (arrays.task == t)]
        if len(mine):
            out.append(Lengths(name, edges, tuple(table[t].tolist()), float(np.median(mine)), int(mine.max())))
    return tuple(out)


def placed(arrays: PlanArrays) -> tuple[Placed, ...]:
    """What lies in the rows, by task: counted from the placements, not from what was promised."""
    num = len(arrays.tasks)
    task = arrays.task[arrays.visits]
    examples = np.bincount(task, minlength=num)
    tokens = np.bincount(task, weights=arrays.num_tokens[arrays.visits], minlength=num)
    often = np.bincount(arrays.task[arrays.num_visits > FEW_VISITS], minlength=num)
    most: Int64 = np.zeros(num, np.int64)
    np.maximum.at(most, arrays.task, arrays.num_visits)
    return tuple(
        Placed(name, int(examples[t]), int(tokens[t]), int(often[t]), int(most[t])) for t, name in enumerate(arrays.tasks)
    )


def tenths(arrays: PlanArrays, facts: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The share of each task in every tenth of the run: of examples where rates count those, else of tokens.

    Visits are taken row by row, as training meets them; promised is the share of the whole run. A plan of fewer than ten
    visits has fewer tenths.

    >>> arrays = PlanArrays(("a", "b"), np.array([0, 1]), np.array([5, 5]), np.array([10, 10]), np.tile([0, 1], 10))
    >>> [tenth["realised"] for tenth in tenths(arrays, {"count": "examples", "mixture": []})][:2]
    [{'a': 0.5, 'b': 0.5}, {'a': 0.5, 'b': 0.5}]
    """
    unit = "examples" if facts["count"] == "examples" else "tokens"
    total = sum(line[f"planned_{unit}"] for line in facts["mixture"])
    promised = {line["task"]: line[f"planned_{unit}"] / max(total, 1) for line in facts["mixture"]}
    size = np.ones(len(arrays.visits)) if unit == "examples" else arrays.num_tokens[arrays.visits].astype(float)
    tenth = np.arange(len(arrays.visits)) * _NUM_TENTHS // max(len(arrays.visits), 1)
    num = len(arrays.tasks)
    sums = np.bincount(tenth * num + arrays.task[arrays.visits], weights=size, minlength=_NUM_TENTHS * num)
    sums = sums.reshape(_NUM_TENTHS, num)
    return tuple(
        {
            "from": i / _NUM_TENTHS,
            "to": (i + 1) / _NUM_TENTHS,
            "promised": promised,
            "realised": dict(zip(arrays.tasks, (row / row.sum()).tolist(), strict=True)),
        }
        for i, row in enumerate(sums)
        if row.sum() > 0
    )


def cover(mixture: Sequence[Mapping[str, Any]], target: CoverageSpec) -> Coverage:
    """A mixture beside its target. Pillars are asked for only where two tasks or more carry the name of one.

    >>> cover([{"task": "reasoning", "available_examples": 400}], CoverageSpec(min_tasks=1)).small
    (('reasoning', 400),)
    """
    sizes = {line["task"]: int(line["available_examples"]) for line in mixture}
    small = tuple(sorted((task, size) for task, size in sizes.items() if size < target.min_examples))
    named = {task.lower() for task in sizes} & set(PILLARS)
    missing = tuple(pillar for pillar in PILLARS if len(named) > 1 and pillar not in named)
    return Coverage(sum(size > 0 for size in sizes.values()), target, small, missing)
