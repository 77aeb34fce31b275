"""The proof, on the model at hand, that documents packed into one row do not see each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tutelage.errors import ModelError
from tutelage.model.loss import Head, head_of, hidden_states, unwrapped
from tutelage.model.unpacked import Rows, mark_rows

PROBE_LENGTHS = (7, 12, 3, 11, 12)
"""Unequal, with near-equal ones among them, so that documents are both grouped and padded."""

NOISE_SHARE = {torch.float64: 1e-6, torch.float32: 0.02, torch.float16: 0.3, torch.bfloat16: 0.5}
"""Largest difference from the lone runs that passes as rounding, as a share of the standard deviation of the logits.

Measured on a real 135M model, whose depth multiplies rounding on text as odd as the probe's: float64 1e-14, float32 0.002;
contaminated in either 5. What bfloat16 is too coarse to see here, `leak` sees.
"""

LEAK_SHARE = 1e-5
"""Largest answer to a change in another document, as a share of the same: it should be exactly 0 in every dtype."""


@dataclass(frozen=True)
class _Probe:
    """`difference`: packed against alone. `leak`: how far later documents move when the first one changes. Largest, absolute."""

    difference: float
    leak: float
    spread: float
    dtype: torch.dtype


def isolation_probe(model: Any, *, lengths: Sequence[int] = PROBE_LENGTHS) -> float:
    """The largest absolute difference in any logit between documents packed together and each run alone.

    The packed side is what training uses (`hidden_states`, then `head_of`); the lone side is the model's own forward
    with its own attention rules. So a leak, positions that do not restart, and a head that does more to its logits than
    `head_of` knows all show. Zero but for rounding when all is well.
    """
    return _probe(model, lengths).difference


def require_isolation(model: Any) -> float:
    """`isolation_probe(model)`; raises `ModelError`, naming the architecture, when it is more than rounding.

    Run once before the first packed step: some architectures (state-space models, recurrent layers, chunked attention)
    carry state along the row and cannot keep documents apart. Besides comparing with the lone runs it changes the first
    document and looks whether any other moves, which needs no allowance for rounding.
    """
    name = type(unwrapped(model)).__name__
    try:
        probe = _probe(model, PROBE_LENGTHS)
    except (TypeError, AttributeError, RuntimeError) as error:
        raise ModelError(f"{name} cannot run packed documents ({error}); set `batch.pack: none`") from error
    # Written as "not <=" so that a NaN fails.
    if not probe.leak <= LEAK_SHARE * probe.spread:
        raise ModelError(
            f"{name} does not keep packed documents apart: changing one moves another's logits by {probe.leak:.2g} (their spread "
            f"is {probe.spread:.2g}); set `batch.pack: none`"
        )
    if not probe.difference <= NOISE_SHARE[probe.dtype] * probe.spread:
        raise ModelError(
            f"{name} does not keep packed documents as they are alone: logits differ by {probe.difference:.2g} (their spread is "
            f"{probe.spread:.2g}); set `batch.pack: none`"
        )
    return probe.difference


def require_unpacked(model: Any) -> Rows:
    """How right-padded rows of this model must be run; from here on `hidden_states` runs its documents so.

    For models that `require_isolation` refuses. A row alone must give what it gives beside longer rows with padding behind
    it: first without an attention mask, then with one. Raises `ModelError`, naming the architecture, when neither does.
    """
    base = unwrapped(model)
    name = type(base).__name__
    found: dict[Rows, str] = {}
    for rows in ("plain", "masked"):
        mark_rows(base, rows)
        try:
            probe = _probe(model, PROBE_LENGTHS)
        except (TypeError, AttributeError, RuntimeError) as error:
            found[rows] = str(error)
        else:
            # Logits that are no numbers are not judged here: the loss will name them.
            is_as_alone = probe.difference <= NOISE_SHARE[probe.dtype] * probe.spread and probe.leak <= LEAK_SHARE * probe.spread
            if is_as_alone or math.isnan(probe.spread):
                return rows
            found[rows] = f"logits differ by {probe.difference:.2g}, their spread is {probe.spread:.2g}"
    mark_rows(base, None)
    raise ModelError(
        f"{name} gives a row other logits when padding stands behind it (without a mask: {found['plain']}; with one: "
        f"{found['masked']}): it looks ahead, so its next-token loss means nothing; take a causal model"
    )


@torch.no_grad()
def _probe(model: Any, lengths: Sequence[int]) -> _Probe:
    """Both measurements on one set of documents, in eval mode."""
    base = unwrapped(model)
    device = base.get_input_embeddings().weight.device
    ids = _probe_ids(sum(lengths), base.config.get_text_config().vocab_size).to(device)
    changed = torch.cat([ids[: lengths[0]].flip(0), ids[lengths[0] :]])
    head = head_of(model)
    with _evaluating(model):
        hidden_ND = hidden_states(model, ids[None], lengths=lengths)
        packed_NV = logits_of(hidden_ND, head).double()
        other_NV = logits_of(hidden_states(model, changed[None], lengths=lengths), head).double()
        alone = [base(input_ids=part[None], use_cache=False).logits[0].double() for part in torch.split(ids, list(lengths))]
    alone_NV = torch.cat(alone)
    return _Probe(
        difference=(packed_NV - alone_NV).abs().max().item(),
        leak=(packed_NV - other_NV)[lengths[0] :].abs().amax().item() if len(lengths) > 1 else 0.0,
        spread=alone_NV.std().item(),
        dtype=hidden_ND.dtype,
    )


def logits_of(hidden_ND: Tensor, head: Head) -> Tensor:
    """[N, V] logits of a few hidden states; for probes and tests, never for the loss."""
    logits_NV = torch.nn.functional.linear(hidden_ND.to(head.weight.dtype), head.weight, head.bias) * head.scale
    return logits_NV if head.softcap is None else head.softcap * torch.tanh(logits_NV / head.softcap)


def _probe_ids(count: int, num_words: int) -> Tensor:
    """int64 [count]: ids spread over the vocabulary, the same on every run and taking nothing from any random state."""
    return (torch.arange(count) * 7919 + 17) % num_words


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Nothing; dropout is off while it is open."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
