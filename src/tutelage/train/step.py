"""The gradient of one optimizer step, whatever number of forward passes it is made in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.errors import TrainError
from tutelage.model import Learner
from tutelage.records import Batch, Document, Float64
from tutelage.train.micro import FlatStep, Pass, check_weight, flatten, not_finite, rows_in_pass

NameOf = Callable[[Document], str]
"""What people call a document: its source and row."""


def step_gradients(
    model: Any, batch: Batch, *, micro_batch_rows: int | None = None, name_of: NameOf | None = None
) -> tuple[FlatStep, Float64]:
    """(the step without padding, the loss of each of its tokens in nats); adds the step's gradient to the weights.

    The gradient is that of sum_i w_i * nll_i / W. W is the plan's total over all rows, so each pass divides by the same
    number and `micro_batch_rows` changes nothing but memory. Tokens with weight 0 have loss 0 here: they never met the
    head. The model is put in no mode and the gradients are not cleared: both are the caller's.

    Raises `TrainError` naming step and documents when a loss is not finite or the step has no weight.
    """
    flat = flatten(batch)
    check_weight(batch, flat)
    device = next(model.parameters()).device
    learner = model if isinstance(model, Learner) else Learner(model)
    losses = [
        _pass_gradients(learner, flat, part, total_weight=batch.total_weight, device=device)
        for part in flat.passes(rows_in_pass(batch.inputs.shape[1], micro_batch_rows))
    ]
    # One wait for the device per step, here, and none per pass.
    nll_N: Float64 = torch.cat(losses).cpu().double().numpy()
    if bad := not_finite(flat, nll_N):
        raise TrainError(_complaint("the loss is not finite", batch.step, bad, name_of))
    return flat, nll_N


def check_norm(norm: float, batch: Batch, name_of: NameOf | None = None) -> None:
    """Nothing; raises `TrainError` when the gradient is not finite though every loss was."""
    if not np.isfinite(norm):
        raise TrainError(_complaint("the gradient is not finite", batch.step, batch.documents, name_of))


def _pass_gradients(learner: Learner, flat: FlatStep, part: Pass, *, total_weight: float, device: torch.device) -> Tensor:
    """The loss of each token of a pass (detached, on the device); its share of the step's gradient is added."""
    here = slice(part.start, part.stop)
    if not flat.weights[here].any():  # nothing to learn in these rows: no forward pass for them
        return torch.zeros(part.stop - part.start, device=device)

    def move(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array[here]).to(device, non_blocking=True)

    # TODO(padded-forward): models that cannot isolate packed documents need one row per document here
    nll_N: Tensor
    loss_sum, nll_N = learner(
        move(flat.inputs), move(flat.targets), move(flat.weights), positions_N=move(flat.positions), lengths=part.lengths
    )
    (loss_sum / total_weight).backward()
    return nll_N


def _complaint(what: str, step: int, documents: tuple[Document, ...], name_of: NameOf | None) -> str:
    """The message for numbers that are not numbers."""
    name_of = name_of or (lambda document: f"example {document.example}")
    names = ", ".join(name_of(document) for document in documents[:5])
    more = f" and {len(documents) - 5} more" if len(documents) > 5 else ""
    return (
        f"step {step}: {what} in {len(documents)} document{'s' if len(documents) != 1 else ''}: {names}{more}. "
        "Nothing of this step was kept. Look at these records, lower `train.learning_rate`, or use `train.dtype: float32`"
    )
