"""What the templates of a plan need: tables, pictures and sentences by name. The run's report shows the same section."""

from __future__ import annotations

from typing import Any

from tutelage.report import plan_charts, plan_tables
from tutelage.report.plan_tables import UNIT_LABELS, UNITS, promises
from tutelage.report.plan_view import PlanView
from tutelage.report.tables import write


def plan_context(view: PlanView) -> dict[str, Any]:
    """The variables of `plan_section.html.j2`. Raises `MissingExtra` without Altair."""
    return {
        "promise_table": plan_tables.promise_table(view.facts),
        "promise_sentence": promise_sentence(view),
        "pictures": plan_charts.pictures(view),
        "learned_table": plan_tables.learned_table(view.facts),
        "coverage_line": plan_tables.coverage_line(view.coverage),
        "coverage_table": plan_tables.coverage_table(view.coverage),
        "often_table": plan_tables.often_table(view.placed),
    }


def promise_sentence(view: PlanView) -> str:
    """What rates count, what was read back from the rows, and the largest gap in each unit, in percentage points."""
    unit = view.facts["count"].replace("supervised_", "learned ").replace("_", " ")
    examples, tokens = sum(p.examples for p in view.placed), sum(p.tokens for p in view.placed)
    gaps = [f"{_gap(view, name):.2f} points of {UNIT_LABELS[name]}" for name in UNITS]
    source = "Estimated rows" if view.estimate else "Rows"
    return (
        f"Rates count {unit}. {source} read back hold {write(examples, 'count')} examples and {write(tokens, 'count')} tokens. "
        f"Between the shares of the exact counts and those in the rows lie at most {', '.join(gaps[:-1])} and {gaps[-1]}."
    )


def _gap(view: PlanView, unit: str) -> float:
    """The largest distance between the shares of the exact counts and the realised ones, in percentage points."""
    lines = [line for line in promises(view.facts) if line["unit"] == unit]
    return max((100 * abs(line["realised"] - line["counted"]) for line in lines), default=0.0)
