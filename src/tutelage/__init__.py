"""Instruction tuning, exact and visible: from raw instruction data to a tuned, evaluated model and the evidence for it.

The public functions are imported on first use, so that `import tutelage` costs nothing:

    load_recipe, run, explain                   one recipe, from raw data to a report
    compute_rates, make_plan, pack_lengths      mixtures and packing on plain lists
    weigh_tokens, Batches                       loss weights and batches for any trainer
    export_plan                                 packed rows as a folder that TRL, axolotl or a Trainer trains on
    render_conversations                        conversations to token ids and kinds
    weighted_loss, evaluate_model               exact loss of a model
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tutelage.evaluate.measure import evaluate_model
    from tutelage.model.loss import weighted_loss
    from tutelage.pipeline import explain, run
    from tutelage.plan.assemble import make_plan
    from tutelage.plan.batch import Batches
    from tutelage.plan.export import export_plan
    from tutelage.plan.fit import pack_lengths
    from tutelage.plan.rates import compute_rates
    from tutelage.plan.weights import weigh_tokens
    from tutelage.recipe import load_recipe
    from tutelage.render.examples import render_conversations

__version__ = "0.1.0"

_HOME = {
    "Batches": "plan.batch",
    "compute_rates": "plan.rates",
    "evaluate_model": "evaluate.measure",
    "explain": "pipeline",
    "export_plan": "plan.export",
    "load_recipe": "recipe",
    "make_plan": "plan.assemble",
    "pack_lengths": "plan.fit",
    "render_conversations": "render.examples",
    "run": "pipeline",
    "weigh_tokens": "plan.weights",
    "weighted_loss": "model.loss",
}

__all__ = [
    "Batches",
    "compute_rates",
    "evaluate_model",
    "explain",
    "export_plan",
    "load_recipe",
    "make_plan",
    "pack_lengths",
    "render_conversations",
    "run",
    "weigh_tokens",
    "weighted_loss",
]


def __getattr__(name: str) -> Any:
    """The public function, imported from its room on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'tutelage' has no attribute {name!r}")
    return getattr(import_module(f"tutelage.{_HOME[name]}"), name)
