"""The end of `tutelage plan`: what is printed, and the same as JSON. For a preview, everything says that it is estimated."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tutelage.report import gather, plan_tables, tables
from tutelage.report.plan_view import PlanView
from tutelage.report.summary import Summary


@dataclass(frozen=True)
class PlanSummary:
    """A plan as tables and lines; `run` tells of the stages that made it, None for a preview, which leaves no run."""

    view: PlanView
    run: Summary | None = None

    def tables(self) -> list[tables.Table]:
        """The mixture, promised and realised, what is learned, the steps; of a preview, what they rest on comes first."""
        mixture = tables.mixture_table(gather.mixture_lines(self.view.facts["mixture"]))
        made = [
            plan_tables.estimate_table(self.view.estimate),
            plan_tables.drop_table(self.view.estimate),
            mixture,
            plan_tables.promise_table(self.view.facts),
            plan_tables.learned_table(self.view.facts),
            plan_tables.tenths_table(self.view),
            tables.steps_table(self.view.facts),
        ]
        shown = [table for table in made if table.rows]
        if not self.view.estimate:
            return shown
        mark = f"estimated, tokens ± {100 * self.view.estimate['relative_error']:.2g} %"
        return [
            table if "estimated" in table.caption else dataclasses.replace(table, caption=f"{table.caption} ({mark})")
            for table in shown
        ]

    def lines(self) -> list[str]:
        """What the estimate rests on, notes, coverage, advice, and what was run."""
        parts = [
            plan_tables.estimate_line(self.view.estimate),
            *(str(note) for note in self.view.facts.get("notes", ())),
            plan_tables.coverage_line(self.view.coverage),
            *plan_tables.advice_lines(self.view.facts),
            *(self.run.done_lines() if self.run is not None else ()),
        ]
        return [line for line in parts if line]

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        run = self.run.as_json() if self.run is not None else {}
        mixture = tables.mixture_table(gather.mixture_lines(self.view.facts["mixture"])).as_json()
        steps = {key: self.view.facts[key] for key in ("num_steps", "capacity", "slots_per_step", "packing_efficiency")}
        return {"mixture": mixture, "steps": steps, **run, **plan_tables.plan_json(self.view)}
