"""The overfit card: how far held-out loss lies above the loss on training records, and what of the answers was copied. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.records import Score
from tutelage.report.tables import Column, Table, write

_FEW_RUNS = 20
_CLEARLY_MORE = 0.1


@dataclass(frozen=True, slots=True)
class TaskFit:
    """One task's line: losses in nats per token on the same kinds of tokens; shares of runs of eight tokens, nan without any."""

    task: str
    train: float
    held_out: float
    copied: float
    reference_copied: float
    num_targets: float = 0.0
    num_runs: float = 0.0

    @property
    def gap(self) -> float:
        """How far held-out loss lies above the loss on training records."""
        return self.held_out - self.train


@dataclass(frozen=True, slots=True)
class Overfit:
    """The card: a line per task, the total, and the gap of all tasks at each measurement of the run."""

    tasks: tuple[TaskFit, ...]
    total: TaskFit
    gaps: tuple[tuple[int, float], ...] = ()

    def sentence(self) -> str:
        """What the numbers say, and no more."""
        return f"{self._of_gap()} {self._of_copies()}"

    def as_json(self) -> dict[str, Any]:
        """The card as plain values."""
        return {"tasks": overfit_table(self).as_json(), "gaps": [list(pair) for pair in self.gaps], "sentence": self.sentence()}

    def _of_gap(self) -> str:
        total = self.total
        side = "above" if total.gap >= 0 else "below"
        now = f"Held-out loss lies {write(abs(total.gap), 'loss')} nats per token {side} the loss on training records"
        if len(self.gaps) < 2:
            return f"{now}."
        first, start = self.gaps[0]
        then = f"after step {first} the difference was {write(start, 'change')}"
        if total.gap > start + _CLEARLY_MORE:
            return f"{now}; {then}: the model learns these records, not only their tasks."
        return f"{now}; {then}, so training has opened no gap to speak of."

    def _of_copies(self) -> str:
        total = self.total
        if math.isnan(total.copied) or total.num_runs < _FEW_RUNS:
            return "Too little was generated to say whether training answers are copied."
        share = (
            f"Of the runs of eight tokens that it writes, {write(total.copied, 'share')} stand in training answers of the task"
        )
        if math.isnan(total.reference_copied):
            return f"{share}."
        base = f"of the held-out answers themselves {write(total.reference_copied, 'share')} do"
        if total.copied > total.reference_copied + _CLEARLY_MORE:
            return f"{share}, {base}: it repeats what it was trained on."
        return f"{share}, {base}: no sign of copying."


def overfit_of(final: Sequence[Score], during: Sequence[Score]) -> Overfit | None:
    """The card of the measure after training and the measurements of the run; None where no training record was measured."""
    values = {(s.metric, s.task): s for s in final if not s.item}
    tasks = sorted(task for metric, task in values if metric == "train_nll" and task and ("nll", task) in values)
    if not tasks:
        return None
    lines = tuple(_line(task, values) for task in tasks)
    total = _total(lines, values)
    return Overfit(lines, total, tuple(_gaps(during, tasks)))


def _line(task: str, values: dict[tuple[str, str], Score]) -> TaskFit:
    def value(metric: str) -> float:
        return values[metric, task].value if (metric, task) in values else math.nan

    runs = values["copied_share", task].weight if ("copied_share", task) in values else 0.0
    return TaskFit(
        task,
        value("train_nll"),
        value("nll"),
        value("copied_share"),
        value("reference_copied_share"),
        values["nll", task].weight,
        runs,
    )


def _total(lines: Sequence[TaskFit], values: dict[tuple[str, str], Score]) -> TaskFit:
    """All tasks together, each with the weight of its held-out targets on both sides: another mixture would be no gap."""
    whole = _line("", values)
    train, held_out = (_mean([(getattr(line, name), line.num_targets) for line in lines]) for name in ("train", "held_out"))
    return TaskFit("", train, held_out, whole.copied, whole.reference_copied, sum(x.num_targets for x in lines), whole.num_runs)


def _mean(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def _gaps(during: Sequence[Score], tasks: Sequence[str]) -> list[tuple[int, float]]:
    """(step, gap of all tasks) of every measurement that has both sides."""
    at = {(s.step, s.metric, s.task): s for s in during if not s.item}
    out = []
    for step in sorted({step for step, metric, _ in at if metric == "train_nll"}):
        pairs = [(at.get((step, "nll", task)), at.get((step, "train_nll", task))) for task in tasks]
        both = [(held.value - train.value, held.weight) for held, train in pairs if held is not None and train is not None]
        if both:
            out.append((step, _mean(both)))
    return out


def overfit_table(card: Overfit) -> Table:
    """The card by task; the total comes last."""
    columns = (
        Column("task", "task", "name"),
        Column("train", "training records", "loss"),
        Column("held_out", "held-out records", "loss"),
        Column("gap", "gap", "change"),
        Column("copied", "answers copied", "share"),
        Column("reference_copied", "held-out data, the same", "share"),
    )
    rows = [(x.task, x.train, x.held_out, x.gap, x.copied, x.reference_copied) for x in (*card.tasks, card.total)]
    caption = "Loss on what the model writes, nats per token, and runs of eight tokens found in training answers"
    return Table(caption, columns, tuple(rows))


def gap_table(card: Overfit) -> Table:
    """The gap of all tasks at each measurement of the run."""
    columns = (Column("step", "after step", "count"), Column("gap", "gap", "change"))
    return Table("Held-out loss minus the loss on training records, while training", columns, card.gaps)
