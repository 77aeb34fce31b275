"""The gradient of one optimizer step, whatever number of forward passes it is made in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.errors import TrainError
from tutelage.model import Guides, Learner, counted_rows
from tutelage.records import Batch, Document, Float64
from tutelage.store import Progress
from tutelage.train.micro import FlatStep, MicroBatchRows, Pass, check_weight, flatten, not_finite, rows_in_pass
from tutelage.train.objective import Aim, objective_of
from tutelage.train.parallel import Parallel
from tutelage.train.spec import TrainSpec
from tutelage.world import ALONE

NameOf = Callable[[Document], str]
"""What people call a document: its source and row."""


def step_gradients(
    model: Any,
    batch: Batch,
    *,
    micro_batch_rows: MicroBatchRows = None,
    micro_batch_tokens: int | None = None,
    name_of: NameOf | None = None,
    in_time: Callable[[Sequence[Pass]], Iterable[Pass]] = iter,
    parallel: Parallel | None = None,
) -> tuple[FlatStep, Float64]:
    """(the step without padding, the loss of each of its tokens in nats); adds the step's gradient to the weights.

    The gradient is that of sum_i w_i * nll_i / W. W is the plan's total over all rows, so each pass divides by the same
    number and the size of passes changes nothing but memory. Tokens with weight 0 have loss 0 here: they never met the
    head. The model is put in no mode and the gradients are not cleared: both are the caller's. `in_time` may end the step
    between two passes, by raising. With `parallel` this rank runs its share of the passes, and what is returned is the whole
    step's on every rank.

    Raises `TrainError` naming step and documents when a loss is not finite or the step has no weight.
    """
    flat = flatten(batch)
    check_weight(batch, flat)
    device = next(model.parameters()).device
    parallel = parallel or Parallel(model, ALONE)
    aim = Aim.of(parallel.own.objective, flat, step=batch.step, total_weight=batch.total_weight)
    rows_per_pass = rows_in_pass(batch.inputs.shape[1], micro_batch_rows)
    share = parallel.share(flat, num_rows=batch.num_rows, rows_per_pass=rows_per_pass, most_tokens=micro_batch_tokens)
    losses = [
        _pass_gradients(parallel, share.flat, part, aim=aim, device=device)
        for part in parallel.passes(in_time(share.passes), num_passes=len(share.passes))
    ]
    # One wait for the device per step, here, and none per pass.
    mine: Float64 = torch.cat(losses, dim=1).cpu().double().numpy()
    found = parallel.world.total(share.spread(mine, len(flat.inputs)))
    nll_N, kl_N = found[0], found[1] if len(found) == 2 else None
    if bad := not_finite(flat, nll_N):
        raise TrainError(_complaint("the loss is not finite", batch.step, bad, name_of))
    return dataclasses.replace(flat, aimed=aim.reached(flat, nll_N, kl_N)), nll_N


def learner_of(model: Any, spec: TrainSpec, progress: Progress) -> Learner:
    """The model with the recipe's objective; make it before the first update, from which a pull holds it."""
    learner = Learner(model, objective_of(spec))
    if learner.start is not None and learner.start.copied_bytes:
        size = learner.start.copied_bytes / 1e9
        progress.note(f"train.kl: the starting model is kept beside the trained one, {size:.2f} GB; an adapter would need none")
    return learner


def check_norm(norm: float, batch: Batch, name_of: NameOf | None = None) -> None:
    """Nothing; raises `TrainError` when the gradient is not finite though every loss was."""
    if not np.isfinite(norm):
        raise TrainError(_complaint("the gradient is not finite", batch.step, batch.documents, name_of))


def _pass_gradients(parallel: Parallel, flat: FlatStep, part: Pass, *, aim: Aim, device: torch.device) -> Tensor:
    """[1, N] or, with a pull, [2, N]: nll and KL of each token of a pass (detached, on the device); its gradient is added."""
    here = slice(part.start, part.stop)
    pulls = aim.pulls(flat)
    rows = counted_rows(
        flat.targets[here], flat.weights[here], num_words=parallel.own.num_words, pulls=None if pulls is None else pulls[here]
    )
    # Nothing to learn in these rows: no forward pass for them, unless other ranks would wait for it.
    if not len(rows) and parallel.world.is_alone:
        return torch.zeros(1 if pulls is None else 2, part.stop - part.start, device=device)

    def move(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    keys = aim.noise_keys(flat, part)
    guides = Guides(move(rows), None if pulls is None else move(pulls[here]), None if keys is None else move(keys))
    columns = [move(column[here]) for column in (flat.inputs, flat.targets, flat.weights, flat.positions)]
    loss_sum, *found = parallel.learner(*columns[:3], positions_N=columns[3], lengths=part.lengths, guides=guides)
    (loss_sum * parallel.world.size / aim.total_weight).backward()  # gradients of ranks are averaged
    return torch.stack(found)


def _complaint(what: str, step: int, documents: tuple[Document, ...], name_of: NameOf | None) -> str:
    """The message for numbers that are not numbers."""
    name_of = name_of or (lambda document: f"example {document.example}")
    names = ", ".join(name_of(document) for document in documents[:5])
    more = f" and {len(documents) - 5} more" if len(documents) > 5 else ""
    return (
        f"step {step}: {what} in {len(documents)} document{'s' if len(documents) != 1 else ''}: {names}{more}. "
        "Nothing of this step was kept. Look at these records, lower `train.learning_rate`, or use `train.dtype: float32`"
    )
