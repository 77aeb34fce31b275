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
from tutelage.evaluate.overfit import Planned, answer_runs, copy_scores, reference_runs
from tutelage.evaluate.samples import Prompt, as_samples, choose_prompts, prompt_answers, score_samples
from tutelage.evaluate.stats import aggregates
from tutelage.model.isolation import require_isolation, require_unpacked
from tutelage.model.loss import Head, head_of, hidden_states, unwrapped, weighted_loss
from tutelage.model.save import generation_config
from tutelage.model.unpacked import rows_of
from tutelage.records import Float64, Rendered, Sample, Score
from tutelage.world import ALONE, World

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
    world: World = ALONE
    """The ranks that call it together, each with the same model, and share the held-out records."""
    trained: HeldOut | None = None
    """Training records that are measured beside the held-out ones: `train_nll`."""
    planned: Planned | None = None
    """What training draws: how much of the answers it holds is `copied_share`, and of what the data answers
    `reference_copied_share`."""

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The fixed prompts, the same at every call."""
        return choose_prompts(self.held_out, num_prompts=self.num_samples, seed=self.seed)

    def __call__(self, model: Any, step: int) -> Measurement:
        """The measurement of `model` after `step` steps."""
        with undisturbed(model):
            scores = [*self._losses(model, self.held_out, on_progress=self.on_progress), *self.train_scores(model)]
            samples, copied = self._samples(model)
        scores = [replace(score, run=self.run, step=step) for score in [*scores, *score_samples(samples), *copied]]
        loss = next((s.value for s in scores if s.metric == "nll" and not s.item and not s.task), float("nan"))
        return Measurement(step, scores, [replace(sample, run=self.run, step=step) for sample in samples], loss)

    def beside(self, model: Any, found: Measurement) -> Measurement:
        """A measurement of this same model that was made without its training records, with these too."""
        scores = [replace(score, run=self.run, step=found.step) for score in self.train_scores(model)]
        return replace(found, scores=[*found.scores, *scores])

    def train_scores(self, model: Any) -> list[Score]:
        """`train_nll` per task and over all: the loss on training records, measured like the held-out ones."""
        if self.trained is None or not len(self.trained):
            return []
        scores = self._losses(model, self.trained, on_progress=None)  # the bar counts held-out tokens
        return [replace(score, metric="train_nll") for score in scores if not score.item]

    def _losses(self, model: Any, records: HeldOut, *, on_progress: Callable[[int], None] | None) -> list[Score]:
        more: dict[str, Any] = {"batch_tokens": self.batch_tokens, "on_progress": on_progress, "world": self.world}
        return evaluate_model(model, records, seed=self.seed, **more)

    def _samples(self, model: Any) -> tuple[list[Sample], list[Score]]:
        """The generations, and how much of them training answers hold."""
        ends = generation_config(unwrapped(model), self.stop_ids, pad_id=None).eos_token_id or []
        more: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "stop_ids": ends}
        answers = prompt_answers(model, self.tokenizer, self.prompts, **more)
        samples = as_samples(self.prompts, answers, self.tokenizer)
        if self.planned is None:
            return samples, []
        runs = answer_runs([prompt.task for prompt in self.prompts], [answer.ids for answer in answers])
        return samples, [*copy_scores("copied_share", runs, self.planned), *self._reference_scores]

    @cached_property
    def _reference_scores(self) -> list[Score]:
        assert self.planned is not None
        return copy_scores("reference_copied_share", reference_runs(self.held_out), self.planned)


def evaluate_model(
    model: Any,
    held_out: HeldOut,
    *,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    on_progress: Callable[[int], None] | None = None,
    world: World = ALONE,
) -> list[Score]:
    """One `nll` score per example that has targets, then those per task and over all (see `stats.aggregates`).

    An example's value is the *sum* of nll over its targets in nats and its weight their number; what stands under item ""
    is the mean per target. `seed` makes the intervals.
    """
    nll = sum_nll(model, held_out.examples, batch_tokens=batch_tokens, on_progress=on_progress, world=world)
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
    world: World = ALONE,
) -> Float64:
    """float64 [len(examples), 2]: sum of nll in nats over each example's targets, and their number.

    Examples are packed by length into rows of at most `batch_tokens` tokens (a longer one has a row to itself), each
    seeing itself alone; a model that cannot keep documents apart gets one example per row instead. Every nll is made in
    float32 and summed in float64, so `batch_tokens` changes nothing but rounding. `on_progress` hears the tokens done. Ranks
    of a `world` share the rows and all get the whole answer.
    """
    out = np.zeros((len(examples), 2))
    with undisturbed(model):
        is_packed = keeps_documents_apart(model)
        if not is_packed:
            require_unpacked(model)
        head = head_of(model)
        lengths = [len(example.ids) for example in examples]
        todo = list(batches(lengths, batch_tokens=batch_tokens, is_packed=is_packed))
        for batch, is_own in own_turns(todo, rank=world.rank, size=world.size):
            found = _batch_nll(model, head, [examples[i] for i in batch])
            if is_own:
                out[batch] = found
            if on_progress is not None:
                on_progress(sum(lengths[i] for i in batch))
    return world.total(out)


def own_turns(todo: Sequence[list[int]], *, rank: int, size: int) -> Iterator[tuple[list[int], bool]]:
    """(batch, whether it counts) of a rank's turns: equally many on every rank, since they may meet in each forward pass.

    >>> todo = [[0], [1], [2]]
    >>> [list(own_turns(todo, rank=rank, size=2)) for rank in (0, 1)]
    [[([0], True), ([2], True)], [([1], True), ([0], False)]]
    """
    for turn in range(0, len(todo), size):
        is_own = turn + rank < len(todo)
        yield todo[turn + rank if is_own else 0], is_own


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
    if rows_of(unwrapped(model)) is not None:
        return False
    try:
        require_isolation(model)
    except ModelError:
        return False
    return True


def _batch_nll(model: Any, head: Head, examples: Sequence[Rendered]) -> Float64:
    """float64 [len(examples), 2] of one forward pass: as one packed row, or as right-padded rows where the model needs them."""
    lengths = [len(example.ids) for example in examples]
    device = head.weight.device
    ids_N, targets_N, counts_N = (torch.from_numpy(column).to(device) for column in _columns(examples))
    with torch.no_grad():
        hidden_ND = hidden_states(model, ids_N[None], lengths=lengths)
        loss = weighted_loss(hidden_ND, head.weight, targets_N=targets_N, weights_N=counts_N, options=head.options())
    return np.stack([_sums(loss.nll_N, lengths), _sums(counts_N, lengths)], axis=1)


def _columns(examples: Sequence[Rendered]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat (ids int64, targets int64, weights float32) [N] of the examples one after another."""
    ids = np.concatenate([np.asarray(example.ids, np.int64) for example in examples])
    pairs = [next_targets(example) for example in examples]
    targets = np.concatenate([targets for targets, _ in pairs]).astype(np.int64)
    return ids, targets, np.concatenate([counts for _, counts in pairs]).astype(np.float32)


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
