"""What a report knows, as frozen plain data: `gather.py` fills it from artefacts, `page.py` and `card.py` show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tutelage.records import Dropped, Sample
from tutelage.report.plan_view import PlanView

if TYPE_CHECKING:  # it needs the tables, which need this module
    from tutelage.report.overfit import Overfit

PLANNED, HELD_OUT, NOT_DRAWN, NOT_SAMPLED = "planned", "held_out", "not_drawn", "not_sampled"
"""The fates of a record that are not a drop: in the plan, kept for measuring, more records than the budget, more than
`max_records` asked for."""

NO_DROPS = (PLANNED, HELD_OUT, NOT_DRAWN, NOT_SAMPLED)

ALL_TASKS = ""
"""The task name of a total."""


@dataclass(frozen=True, slots=True)
class SourceFlow:
    """Where one source's records went: `fates` by name, one of `NO_DROPS` or the reason of a drop.

    >>> SourceFlow("maths", 10, {"planned": 8, "held_out": 1, "exact_duplicate": 1}).num_dropped
    1
    """

    source: str
    num_read: int
    fates: Mapping[str, int]

    def __post_init__(self) -> None:
        assert sum(self.fates.values()) == self.num_read, f"{self.source}: the fates do not add up to what was read"

    @property
    def num_dropped(self) -> int:
        """Records set aside for a reason."""
        return sum(num for fate, num in self.fates.items() if fate not in NO_DROPS)


@dataclass(frozen=True, slots=True)
class DroppedGroup:
    """The records of one source that share a fate: `total` of them, of which `shown` are listed."""

    source: str
    reason: str
    total: int
    shown: tuple[Dropped, ...]


@dataclass(frozen=True, slots=True)
class Account:
    """One stage of the run: what went in and came out, and what it cost."""

    label: str
    key: str
    num_in: int
    num_out: int
    dropped: Mapping[str, int]
    seconds: float
    created: str
    packages: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Amount:
    """A task's size in the three units that mixtures are stated in."""

    examples: int
    tokens: int
    supervised: int


@dataclass(frozen=True, slots=True)
class TaskMixture:
    """One task of the mixture: `realised` is what training really saw, None before training."""

    task: str
    available: Amount
    planned: Amount
    realised: Amount | None
    promised_share: float
    visits_per_record: float
    most_visits: int
    is_capped: bool


@dataclass(frozen=True, slots=True)
class Change:
    """Held-out loss of a task before and after, in nats per token; low and high are the change's paired 95 % interval."""

    task: str
    num_items: int
    num_targets: int
    before: float
    after: float
    low: float
    high: float
    is_trained: bool = True

    @property
    def change(self) -> float:
        """After minus before: negative is better."""
        return self.after - self.before

    @property
    def outcome(self) -> str:
        """`better`, `worse`, or `unclear` when the interval holds 0 or is not known."""
        if self.high < 0:
            return "better"
        return "worse" if self.low > 0 else "unclear"


@dataclass(frozen=True, slots=True)
class Curve:
    """A loss by step, in nats per token; `part` is `train` or `held-out`."""

    task: str
    part: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SamplePair:
    """What the model wrote on one held-out prompt before and after training."""

    task: str
    item: str
    prompt: str
    reference: str
    before: Sample | None
    after: Sample | None


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring tokens of one kind and weight: `pieces` are the texts of the tokens, `ids` their numbers."""

    kind: str
    weight: float
    pieces: tuple[str, ...]
    ids: tuple[int, ...]

    @property
    def text(self) -> str:
        """The run as one piece of text."""
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class ShownExample:
    """One training example as the model saw it."""

    row_id: str
    task: str
    source: str
    num_visits: int
    num_tokens: int
    num_supervised: int
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class ReportData:
    """Everything the page shows. What a run has not reached yet is empty."""

    title: str
    recipe_name: str
    recipe_text: str
    flows: tuple[SourceFlow, ...] = ()
    dropped: tuple[DroppedGroup, ...] = ()
    rewritten: Mapping[str, int] = field(default_factory=dict)
    mixture: tuple[TaskMixture, ...] = ()
    plan_facts: Mapping[str, Any] = field(default_factory=dict)
    plan_notes: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    curves: tuple[Curve, ...] = ()
    learning_rates: tuple[tuple[int, float], ...] = ()
    samples: tuple[SamplePair, ...] = ()
    examples: tuple[ShownExample, ...] = ()
    accounts: tuple[Account, ...] = ()
    train_facts: Mapping[str, Any] = field(default_factory=dict)
    licences: Mapping[str, int] = field(default_factory=dict)
    origins: Mapping[str, int] = field(default_factory=dict)
    audit: Mapping[str, Any] = field(default_factory=dict)
    """What the audit found and measured, as `check --data --json` prints it."""
    plan: PlanView | None = None
    """The plan's pictures and tables; None where only a mixture is known."""
    base_model: str = ""
    adapter: str = ""
    overfit: Overfit | None = None
    """Loss on training records beside held-out loss, and what of the answers was copied; None where it was not measured."""

    @property
    def total(self) -> Change | None:
        """The change over all held-out records; None before measuring."""
        return next((change for change in self.changes if change.task == ALL_TASKS), None)

    @property
    def task_changes(self) -> tuple[Change, ...]:
        """The changes of the single tasks."""
        return tuple(change for change in self.changes if change.task != ALL_TASKS)
