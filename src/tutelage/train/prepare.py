"""The model as a recipe wants it trained: in 4 bits or whole, with an adapter or frozen parts; what is wrong is said first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tutelage.errors import ModelError, TrainError
from tutelage.model.freeze import count_weights, freeze
from tutelage.model.load import add_adapter, load_model
from tutelage.model.quantised import load_quantised, require_quantisation
from tutelage.model.spec import Full, ModelSpec, QLora
from tutelage.store import Progress
from tutelage.train.choice import rehearse
from tutelage.train.remarks import rate_remark
from tutelage.train.schedule import check_schedule
from tutelage.train.spec import TrainSpec
from tutelage.world import current


def check_early(spec: TrainSpec, model_spec: ModelSpec, *, num_steps: int, device: str, progress: Progress) -> None:
    """Nothing; raises what a run of so many steps could not be begun or ended with, before the model is loaded.

    What is unusual but possible is a note.
    """
    if spec.parallel == "fsdp" and not current().is_alone:
        _check_cut(spec, model_spec)
    if spec.micro_batch_tokens is not None and not current().is_alone:
        raise TrainError(
            "train.micro_batch_tokens: ranks meet in every pass, and passes cut by documents are not equally many; state "
            "`train.micro_batch_rows`, or smaller rows (`render.max_tokens`)"
        )
    rehearse(spec)
    check_schedule(spec.schedule, num_steps)
    if isinstance(model_spec.adapter, QLora):
        require_quantisation(device)
    if (remark := rate_remark(spec.learning_rate, model_spec.adapter.kind)) is not None:
        progress.note(remark)


def _check_cut(spec: TrainSpec, model_spec: ModelSpec) -> None:
    """Nothing; raises `TrainError` for what cannot be done with weights that are cut over ranks."""
    if isinstance(model_spec.adapter, QLora):
        raise TrainError("train.parallel: fsdp cannot cut weights of 4 bits; use `ddp`, or `model.adapter: lora`")
    if spec.micro_batch_rows == "auto":
        raise TrainError("train.micro_batch_rows: auto would try the whole model on one rank; state a number with `fsdp`")


def starting_model(folder: Path | str, model_spec: ModelSpec, *, device: str, dtype: str) -> Any:
    """The model in `folder` on `device`, its weights in `dtype`, or in 4 bits for `qlora`."""
    if isinstance(model_spec.adapter, QLora):
        require_quantisation(device)
        return load_quantised(folder, device=device, dtype=dtype)
    return load_model(folder, dtype=dtype, device=device)


def adapted(model: Any, model_spec: ModelSpec, *, seed: int, new_token_ids: Sequence[int], progress: Progress) -> Any:
    """`model` with what is trained marked as such: all of it but `model.freeze`, or an adapter beside it, new tokens included.

    Says how many weights that is. Raises `ModelError` when new tokens would stay as they start.
    """
    match model_spec.adapter:
        case Full():
            freeze(model, model_spec.freeze)
            if new_token_ids and not model.get_input_embeddings().weight.requires_grad:
                raise ModelError("model.freeze: the embeddings are frozen, so `model.new_tokens` would stay as they start")
        case lora:
            model = add_adapter(model, lora, seed=seed, new_token_ids=new_token_ids)
    trained, total = count_weights(model)
    progress.note(f"training {trained:,} of {total:,} weights ({100 * trained / total:.3g} %)")
    return model


def settled(spec: TrainSpec, rows: object) -> TrainSpec:
    """`spec` with the rows per pass that were found to fit, where it left them to be found.

    Raises `TrainError` when nobody has found them.
    """
    if spec.micro_batch_rows != "auto":
        return spec
    if not isinstance(rows, int):
        raise TrainError("train.micro_batch_rows: `auto` was not settled; state a number")
    return spec.model_copy(update={"micro_batch_rows": rows})
