"""What a run came to, for the end of the command line: a few tables, a few lines, or JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage.report import gather, tables, verdict
from tutelage.report.data import Account, Change, ReportData, TaskMixture
from tutelage.report.overfit import Overfit
from tutelage.store import Artefact


@dataclass(frozen=True)
class Summary:
    """The end of a run. Parts that it has not reached are empty."""

    folder: Path
    accounts: tuple[Account, ...]
    mixture: tuple[TaskMixture, ...]
    changes: tuple[Change, ...]
    plan_facts: Mapping[str, Any]
    num_built: int
    files: tuple[Path, ...]
    overfit: Overfit | None = None

    def tables(self) -> list[tables.Table]:
        """The tables worth printing: mixture and steps until training, then held-out loss."""
        out = []
        if self.changes:
            out.append(tables.change_table(self.changes))
        elif self.mixture:
            out += [tables.mixture_table(self.mixture), tables.steps_table(self.plan_facts)]
        else:
            out.append(tables.accounting_table(self.accounts))
        return out

    def lines(self) -> list[str]:
        """The verdict, and where to look."""
        data = ReportData(title="", recipe_name="", recipe_text="", changes=self.changes)
        out = [verdict.headline(data), *verdict.by_task(data.task_changes)] if self.changes else []
        out += [self.overfit.sentence()] if self.overfit is not None else []
        out += [str(note) for note in self.plan_facts.get("notes", ())] if not self.changes else []
        return [*out, *self.done_lines()]

    def done_lines(self) -> list[str]:
        """How many stages ran, and where to look."""
        did = f"{tables.plural(len(self.accounts), 'stage')}, {self.num_built} run now, the rest from the store"
        return [did, *(str(path) for path in self.files)]

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "folder": str(self.folder),
            "stages": tables.accounting_table(self.accounts).as_json(),
            "mixture": tables.mixture_table(self.mixture).as_json(),
            "realised": tables.realised_table(self.mixture).as_json(),
            "steps": {
                name: self.plan_facts[name]
                for name in ("num_steps", "capacity", "slots_per_step", "packing_efficiency")
                if name in self.plan_facts
            },
            "held_out_loss": tables.change_table(self.changes).as_json(),
            "overfit": None if self.overfit is None else self.overfit.as_json(),
            "num_built": self.num_built,
            "files": [str(path) for path in self.files],
        }


def run_summary(artefacts: Mapping[str, Artefact], *, folder: Path) -> Summary:
    """The summary of a run's artefacts by label; `folder` is the run's folder."""
    plan, train = artefacts.get("plan"), artefacts.get("train")
    trained = {line["task"] for line in plan.facts["mixture"] if line["planned_examples"]} if plan is not None else set()
    return Summary(
        folder=folder,
        accounts=tuple(gather.account(label, artefact) for label, artefact in artefacts.items()),
        mixture=gather.mixture(plan, train) if plan is not None else (),
        changes=gather.changes(artefacts.get("measure before"), artefacts.get("measure after"), trained=trained),
        plan_facts=plan.facts if plan is not None else {},
        num_built=sum(not artefact.is_hit for artefact in artefacts.values()),
        overfit=gather.overfit(artefacts.get("measure after"), train),
        files=tuple(folder / name for label, name in (("report", "report.html"), ("train", "model")) if label in artefacts),
    )
