"""The box `report`: every artefact of a run in, `report.html` and the model card out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.report.spec import ReportSpec
from tutelage.store import Artefact, Counts, Outcome, Progress, Stage

if TYPE_CHECKING:
    from tutelage.report.gather import Weigh

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
    audited: Callable[[Artefact], Mapping[str, Any]] | None = None,
) -> Stage:
    """The box `report`. `boxes` are the run's other boxes by label; `train` and both measures may be missing.

    `recipe` is the resolved recipe with the origin of each value. `weigh` gives the loss weight of each token of an example,
    f32 (T,): the plan's rule, which this room may not know. It changes only with the plan, so the plan's key covers it.
    `model` is the name of the starting model, for the model card; `audited` judges the audit under the recipe's thresholds.
    """
    from tutelage.report.page import page_digest

    inputs = {label: stage for label, stage in boxes.items() if stage.name in _SHOWN}
    wanted = {"report": spec.canonical(), "recipe": recipe, "name": name, "page": page_digest(), "model": model}

    def build(folder: Path, artefacts: Mapping[str, Artefact], progress: Progress) -> Outcome:
        from tutelage.report.card import model_card
        from tutelage.report.gather import gather
        from tutelage.report.page import render_page

        data = gather(artefacts, title=spec.title or name, recipe=recipe, name=name, spec=spec, weigh=weigh)
        found = audited(artefacts["audit"]) if audited is not None and "audit" in artefacts else {}
        data = dataclasses.replace(data, base_model=model, audit=found)
        page = render_page(data).encode("utf-8", "replace")
        (folder / "report.html").write_bytes(page)
        (folder / "model_card.md").write_text(model_card(data), encoding="utf-8", errors="replace")
        return Outcome(Counts(1, 1), {"size_bytes": len(page), "num_examples": len(data.examples)})

    return Stage("report", 1, wanted, build, inputs=inputs, packages=("altair", "vl-convert-python", "jinja2"))
