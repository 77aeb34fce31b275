"""The box `report`: every artefact of a run in, `report.html` and the model card out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tutelage.report.spec import ReportSpec
from tutelage.store import Artefact, Counts, Outcome, Progress, Stage

if TYPE_CHECKING:
    from tutelage.report.gather import Weigh
    from tutelage.report.plan_view import PlanView

Told = Callable[[Artefact], Mapping[str, Any]]
"""What another room makes of an artefact, as plain values."""

_SHOWN = (
    "read",
    "rewrite",
    "screen",
    "split",
    "copies",
    "model",
    "tokenizer",
    "render",
    "rerender",
    "plan",
    "audit",
    "held_out",
    "train",
    "measure",
)


def report_stage(
    boxes: Mapping[str, Stage],
    *,
    recipe: str,
    name: str,
    spec: ReportSpec,
    weigh: Weigh,
    model: str = "",
    told: Mapping[str, Told] = MappingProxyType({}),
) -> Stage:
    """The box `report`. `boxes` are the run's other boxes by label; `train` and both measures may be missing.

    `recipe` is the resolved recipe with the origin of each value. `weigh` gives the loss weight of each token of an example,
    f32 (T,): the plan's rule, which this room may not know. It changes only with the plan, so the plan's key covers it.
    `model` is the name of the starting model, for the model card. `told` holds by label what else other
    rooms make of an artefact: `audit` judges it under the recipe's thresholds, `plan` gives the numbers of its pictures.
    """
    from tutelage.report.page import page_digest

    inputs = {label: stage for label, stage in boxes.items() if stage.name in _SHOWN}
    wanted = {"report": spec.canonical(), "recipe": recipe, "name": name, "page": page_digest(), "model": model}

    def build(folder: Path, artefacts: Mapping[str, Artefact], progress: Progress) -> Outcome:
        from tutelage.report.card import model_card
        from tutelage.report.gather import gather
        from tutelage.report.page import render_page

        data = gather(artefacts, title=spec.title or name, recipe=recipe, name=name, spec=spec, weigh=weigh)
        found = told["audit"](artefacts["audit"]) if told.keys() & artefacts.keys() >= {"audit"} else {}
        view = _plan_view(artefacts["plan"], spec, told["plan"]) if "plan" in told else None
        data = dataclasses.replace(data, base_model=model, audit=found, plan=view)
        page = render_page(data).encode("utf-8", "replace")
        (folder / "report.html").write_bytes(page)
        (folder / "model_card.md").write_text(model_card(data), encoding="utf-8", errors="replace")
        return Outcome(Counts(1, 1), {"size_bytes": len(page), "num_examples": len(data.examples)})

    return Stage("report", 1, wanted, build, inputs=inputs, packages=("altair", "vl-convert-python", "jinja2"))


def _plan_view(plan: Artefact, spec: ReportSpec, pictured: Told) -> PlanView:
    """The plan's pictures and tables."""
    from tutelage.report.plan_view import plan_view, read_arrays

    return plan_view(read_arrays(plan), plan.facts, pictured(plan), spec.coverage)
