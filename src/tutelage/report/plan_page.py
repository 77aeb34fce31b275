"""The page of `tutelage plan --html`: what would be trained on, before anything is trained. Text in, text out.

Like the report it loads nothing and sends nothing.
"""

from __future__ import annotations

from markupsafe import Markup

import tutelage
from tutelage.report import gather, plan_tables, tables
from tutelage.report.page import content_policy, environment, package_file
from tutelage.report.plan_context import plan_context
from tutelage.report.plan_view import PlanView


def render_plan(view: PlanView, *, title: str, recipe_text: str) -> str:
    """The whole page. Raises `MissingExtra` without Altair."""
    template, css, js = (package_file(name) for name in ("plan.html.j2", "page.css", "page.js"))
    return (
        environment()
        .from_string(template)
        .render(
            view=view,
            title=title,
            recipe_text=recipe_text,
            policy=content_policy(css, js),
            css=Markup(css),
            js=Markup(js),
            version=tutelage.__version__,
            headline=headline(view),
            figures=figures(view),
            warnings=plan_tables.warnings(view),
            notes=[str(note) for note in view.facts.get("notes", ())],
            advice=view.facts.get("advice", ()),
            estimate_line=plan_tables.estimate_line(view.estimate),
            estimate_table=plan_tables.estimate_table(view.estimate),
            drop_table=plan_tables.drop_table(view.estimate),
            mixture_table=tables.mixture_table(gather.mixture_lines(view.facts["mixture"])),
            steps=tables.steps_table(view.facts).texts(),
            **plan_context(view),
        )
    )


def headline(view: PlanView) -> str:
    """What would be trained on, in one sentence."""
    facts, total = view.facts, view.facts["total"]
    about = "About " if view.estimate else ""
    num = tables.plural(total["planned_examples"], "example")
    learned = total["planned_supervised"] / max(total["planned_tokens"], 1)
    budget = plan_tables.budget_line(facts)
    said = (
        f"{about}{num} from {tables.plural(sum(line['planned_examples'] > 0 for line in facts['mixture']), 'task')} "
        f"in {tables.plural(facts['num_steps'], 'step')}: {total['planned_tokens']:,} tokens, "
        f"{tables.write(learned, 'share')} of them learned."
    )
    return f"{said} {budget[:1].upper()}{budget[1:]}." if budget else said


def figures(view: PlanView) -> list[tuple[str, str]]:
    """The few numbers that people look for first."""
    facts, total = view.facts, view.facts["total"]
    several = plan_tables.multi_turn_share(facts)
    passes = total["planned_examples"] / max(total["available_examples"], 1)
    given: list[tuple[str, str]] = [
        ("optimizer steps", tables.write(facts["num_steps"], "count")),
        ("visits per record, all tasks", tables.write(passes, "ratio")),
        ("most visits of a record", tables.write(max((p.most_visits for p in view.placed), default=0), "count")),
        ("packing efficiency", tables.write(facts["packing_efficiency"], "share")),
        ("padding", tables.write(1 - facts["packing_efficiency"], "share")),
    ]
    if several is not None:
        low, high = plan_tables.MULTI_TURN_ADVICE
        given.append((f"with several turns ({low:.0%} to {high:.0%} advised)", tables.write(several, "share")))
    return given
