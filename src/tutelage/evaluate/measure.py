"""A model to what it scores on the held-out records, leaving it as it was.

Shapes: T tokens of a packed row, N positions, D hidden size, B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tutelage.errors import ModelError
from tutelage.evaluate.held_out import HeldOut, next_targets
from tutelage.evaluate.samples import Prompt, answer_prompts, choose_prompts, score_samples
from tutelage.evaluate.stats import aggregates
from tutelage.model.isolation import require_isolation
from tutelage.model.loss import Head, head_of, hidden_states, unwrapped, weighted_loss
from tutelage.model.save import generation_config
from tutelage.records import Float64, Rendered, Sample, Score

BATCH_TOKENS = 4096
"""Tokens of one forward pass; sets memory and speed, and the result only by rounding."""


@dataclass(frozen=True)
class Measurement:
    """One look at the model: `loss` is held-out nats per token over all tasks, nan when nothing is held out."""

    step: int
    scores: list[Score]
    samples: list[Sample]
    loss: float


@dataclass(frozen=True)
class Measure:
    """What training calls: `measure(model, step)` gives a `Measurement` and changes nothing about the model or any random state.

    `stop_ids` are the ids that the rendering used as stops; generation also ends at the model's own, as the saved model does.
    """

    held_out: HeldOut
    tokenizer: Any
    stop_ids: Sequence[int]
    num_samples: int = 8
    max_new_tokens: int = 96
    seed: int = 0
    run: str = ""
    batch_tokens: int = BATCH_TOKENS
    on_progress: Callable[[int], None] | None = None

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The fixed prompts, the same at every call."""
        return choose_prompts(self.held_out, num_prompts=self.num_samples, seed=self.seed)

    def __call__(self, model: Any, step: int) -> Measurement:
        """The measurement of `model` after `step` steps."""
        with undisturbed(model):
            scores = evaluate_model(
                model, self.held_out, seed=self.seed, batch_tokens=self.batch_tokens, on_progress=self.on_progress
            )
            samples = self._samples(model)
        scores = [replace(score, run=self.run, step=step) for score in [*scores, *score_samples(samples)]]
        loss = next((s.value for s in scores if s.metric == "nll" and not s.item and not s.task), float("nan"))
        return Measurement(step, scores, [replace(sample, run=self.run, step=step) for sample in samples], loss)

    def _samples(self, model: Any) -> list[Sample]:
        ends = generation_config(unwrapped(model), self.stop_ids, pad_id=None).eos_token_id or []
        return answer_prompts(model, self.tokenizer, self.prompts, max_new_tokens=self.max_new_tokens, stop_ids=ends)


def evaluate_model(
    model: Any,
    held_out: HeldOut,
    *,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    on_progress: Callable[[int], None] | None = None,
) -> list[Score]:
    """One `nll` score per example that has targets, then those per task and over all (see `stats.aggregates`).

    An example's value is the *sum* of nll over its targets in nats and its weight their number; what stands under item ""
    is the mean per target. `seed` makes the intervals.
    """
    nll = sum_nll(model, held_out.examples, batch_tokens=batch_tokens, on_progress=on_progress)
    scores = [
        Score("", 0, task, item, "nll", value, float(count))
        for task, item, (value, count) in zip(held_out.tasks, held_out.items, nll.tolist(), strict=True)
        if count > 0
    ]
    return [*scores, *(aggregates(scores, seed=seed) if scores else [])]


def sum_nll(
    model: Any,
    examples: Sequence[Rendered],
    *,
    batch_tokens: int = BATCH_TOKENS,
    on_progress: Callable[[int], None] | None = None,
) -> Float64:
    """float64 [len(examples), 2]: sum of nll in nats over each example's targets, and their number.

    Examples are packed by length into rows of at most `batch_tokens` tokens (a longer one has a row to itself), each
    seeing itself alone; a model that cannot keep documents apart gets one example per row instead. Every nll is made in
    float32 and summed in float64, so `batch_tokens` changes nothing but rounding. `on_progress` hears the tokens done.
    """
    out = np.zeros((len(examples), 2))
    with undisturbed(model):
        is_packed = keeps_documents_apart(model)
        head = head_of(model)
        lengths = [len(example.ids) for example in examples]
        for batch in batches(lengths, batch_tokens=batch_tokens, is_packed=is_packed):
            out[batch] = _batch_nll(model, head, [examples[i] for i in batch], is_packed=is_packed)
            if on_progress is not None:
                on_progress(sum(lengths[i] for i in batch))
    return out


def batches(lengths: Sequence[int], *, batch_tokens: int, is_packed: bool) -> Iterator[list[int]]:
    """Positions of examples, longest first, cut where the next would pass `batch_tokens`; unpacked rows count with their padding.

    >>> list(batches([3, 9, 4, 2], batch_tokens=9, is_packed=True))
    [[1], [2, 0, 3]]
    >>> list(batches([3, 9, 4, 2], batch_tokens=9, is_packed=False))
    [[1], [2, 0], [3]]
    """
    batch: list[int] = []
    size = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        cost = lengths[index] if is_packed or not batch else lengths[batch[0]]
        if batch and size + cost > batch_tokens:
            yield batch
            batch, size, cost = [], 0, lengths[index]
        batch.append(index)
        size += cost
    if batch:
        yield batch


def keeps_documents_apart(model: Any) -> bool:
    """Whether packed documents of this model see only themselves (probed with a few dozen tokens, not assumed)."""
    try:
        require_isolation(model)
    except ModelError:
        return False
    return True


def _batch_nll(model: Any, head: Head, examples: Sequence[Rendered], *, is_packed: bool) -> Float64:
    """float64 [len(examples), 2] of one forward pass: as one packed row, or as right-padded rows that causality keeps clean."""
    widths = [len(example.ids) for example in examples] if is_packed else [len(examples[0].ids)] * len(examples)
    device = head.weight.device
    ids_N, targets_N, counts_N = (torch.from_numpy(column).to(device) for column in _columns(examples, widths))
    with torch.no_grad():
        if is_packed:
            hidden_ND = hidden_states(model, ids_N[None], lengths=widths)
        else:
            hidden_ND = hidden_states(model, ids_N.view(len(examples), -1))
        loss = weighted_loss(hidden_ND, head.weight, targets_N=targets_N, weights_N=counts_N, options=head.options())
    return np.stack([_sums(loss.nll_N, widths), _sums(counts_N, widths)], axis=1)


def _columns(examples: Sequence[Rendered], widths: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat (ids int64, targets int64, weights float32) [N], each example filled up to its width with weight 0."""
    ids = np.zeros(sum(widths), np.int64)
    targets, counts = np.zeros_like(ids), np.zeros(len(ids), np.float32)
    start = 0
    for example, width in zip(examples, widths, strict=True):
        place = slice(start, start + len(example.ids))
        ids[place] = example.ids
        targets[place], counts[place] = next_targets(example)
        start += width
    return ids, targets, counts


def _sums(values_N: Tensor, widths: Sequence[int]) -> Float64:
    """float64: the sum over each stretch of `widths`."""
    starts = np.cumsum([0, *widths[:-1]])
    sums: Float64 = np.add.reduceat(values_N.cpu().double().numpy(), starts)
    return sums


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Nothing; evaluates inside, and afterwards every module's mode, gradients on or off and torch's random states are as before.

    Modes are kept module by module: a frozen part may be in eval mode inside a model in training.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, was_training in modes:
                module.training = was_training
