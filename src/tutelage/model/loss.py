"""Weighted next-token loss that meets the head only where a weight is above 0, a chunk of rows at a time.

The loss of a step is sum_i w_i * nll_i / W with W known from the plan, so what is returned here is a *sum*: the caller
divides once. Shapes: N positions, S selected positions (weight above 0), D hidden size, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage.errors import ModelError
from tutelage.model.attention import ATTENTION_NAME, packed_documents
from tutelage.model.chunks import Anchor as Anchor
from tutelage.model.chunks import ChunkedLoss, Given, accumulator
from tutelage.model.chunks import Head as Head
from tutelage.model.chunks import LossOptions as LossOptions
from tutelage.model.unpacked import rows_of, unpacked_states
from tutelage.records import Float32, Int64


@dataclass(frozen=True)
class WeightedLoss:
    """`loss_sum`: scalar with its gradient. `nll_N`: detached, 0 where the weight is 0. `weight_sum`: scalar.

    `loss_sum` is the sum of w * nll, or of what the objective makes of it, with the pull of an anchor added; `kl_N` is the KL of
    each position, detached, 0 where the anchor has no weight, None without one. All are float64 when the hidden states
    are, else float32.
    """

    loss_sum: Tensor
    nll_N: Tensor
    weight_sum: Tensor
    kl_N: Tensor | None = None


def weighted_loss(
    hidden_ND: Tensor,
    head_VD: Tensor,
    *,
    targets_N: Tensor,
    weights_N: Tensor,
    options: LossOptions | None = None,
    anchor: Anchor | None = None,
    rows_S: Tensor | None = None,
) -> WeightedLoss:
    """The `WeightedLoss` of N positions: sum_i w_i * -log softmax(logits_i)[target_i] over the positions with w_i > 0.

    `targets_N` is int64 and already shifted: `hidden_ND[i]` predicts `targets_N[i]`; where the weight is 0 it may hold
    anything. Gradients flow to `hidden_ND`, and to head and bias where they ask for one. Logits exist for one chunk of
    positions at a time and never again: the gradient is made in the same pass (one product less than recomputing).
    With 40 % of the positions supervised the head costs 40 %.

    >>> hidden, head = torch.zeros(3, 2), torch.zeros(4, 2)          # every word has probability 1/4
    >>> loss = weighted_loss(hidden, head, targets_N=torch.tensor([0, 1, 2]), weights_N=torch.tensor([0.0, 1.0, 0.5]))
    >>> [round(x, 4) for x in (loss.loss_sum.item(), loss.weight_sum.item(), *loss.nll_N.tolist())]
    [2.0794, 1.5, 0.0, 1.3863, 1.3863]

    With `options.objective` `dft` (Dynamic Fine-Tuning, arXiv 2508.05629, equation 9) the sum is of w_i * p_i * nll_i, where p_i
    = p(target_i) has no gradient: here 1.5 * 1.3863 / 4 = 0.5199. It is divided by the same W as ever.

    >>> loss = weighted_loss(hidden, head, targets_N=torch.tensor([0, 1, 2]), weights_N=torch.tensor([0.0, 1.0, 0.5]),
    ...                      options=LossOptions(objective="dft"))
    >>> round(loss.loss_sum.item(), 4), round(loss.nll_N.sum().item(), 4)
    (0.5199, 2.7726)

    An `anchor` adds the sum of v_i * KL_i. `rows_S` are the positions with some weight (see `counted_rows`), for callers who
    know them and have checked weights and targets: finding them here waits for the device. Raises `ModelError` on a
    negative or non-finite weight, or a supervised target outside the vocabulary.
    """
    options = options or LossOptions()
    if rows_S is None:
        rows_S = _supervised_rows(hidden_ND, targets_N, weights_N, num_words=head_VD.shape[0], anchor=anchor)
    # Asked here because autograd.Function runs its forward with gradients off and would always hear "no".
    is_recording = torch.is_grad_enabled()
    given = Given(targets_N, weights_N, rows_S, anchor)
    loss_sum, nll_N, kl_N = ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_ND.to(head_VD.dtype), head_VD, options.bias, given, options, is_recording
    )
    return WeightedLoss(loss_sum, nll_N, weights_N.to(loss_sum.dtype).sum(), kl_N)


def plain_weighted_loss(
    hidden_ND: Tensor,
    head_VD: Tensor,
    *,
    targets_N: Tensor,
    weights_N: Tensor,
    options: LossOptions | None = None,
    anchor: Anchor | None = None,
) -> WeightedLoss:
    """What `weighted_loss` must return, written plainly with the full [N, V] logits: the reference, and slow."""
    options = options or LossOptions()
    is_on_N = weights_N > 0
    head = Head(head_VD, options.bias, options.softcap, options.scale)
    log_p_NV = _plain_log_probabilities(hidden_ND, head)
    nll_N = F.nll_loss(log_p_NV, targets_N.where(is_on_N, 0), reduction="none").where(is_on_N, 0)
    weights_N = weights_N.to(nll_N.dtype)
    share_N = torch.exp(-nll_N.detach()) if options.objective == "dft" else torch.ones_like(nll_N)
    loss_sum, kl_N = (weights_N * share_N * nll_N).sum(), None
    if anchor is not None:
        log_q_NV = _plain_log_probabilities(anchor.hidden_ND, anchor.head).detach()
        one, other = (log_q_NV, log_p_NV) if anchor.direction == "forward" else (log_p_NV, log_q_NV)
        kl_N = (one.exp() * (one - other)).sum(-1).where(anchor.weights_N > 0, 0)
        loss_sum = loss_sum + (anchor.weights_N * kl_N).sum()
    return WeightedLoss(loss_sum, nll_N.detach(), weights_N.sum(), None if kl_N is None else kl_N.detach())


def _plain_log_probabilities(hidden_ND: Tensor, head: Head) -> Tensor:
    logits_NV = F.linear(hidden_ND.to(head.weight.dtype), head.weight, head.bias).to(accumulator(head.weight.dtype)) * head.scale
    if head.softcap is not None:
        logits_NV = head.softcap * torch.tanh(logits_NV / head.softcap)
    return torch.log_softmax(logits_NV, -1)


def counted_rows(targets: Int64, weights: Float32, *, num_words: int, pulls: Float32 | None = None) -> Int64:
    """int64 (S,): the places that the loss must look at, those with weight above 0 in `weights` or `pulls` (an anchor's).

    Weights and targets are checked here, on the host, so that `weighted_loss(rows_S=...)` need not ask the device.

    >>> counted_rows(np.array([5, 6, -100]), np.array([0, 0.5, 0], np.float32), num_words=9).tolist()
    [1]

    Raises `ModelError` on a negative or non-finite weight, or a supervised target outside the vocabulary.
    """
    given = [weights] if pulls is None else [weights, pulls]
    if not all(np.isfinite(some).all() and (some >= 0).all() for some in given):
        raise ModelError(_ODD_WEIGHT)
    chosen = targets[weights > 0]
    if len(chosen) and not 0 <= chosen.min() <= chosen.max() < num_words:
        raise ModelError(_ODD_TARGET.format(num_words))
    return np.flatnonzero(np.any([some > 0 for some in given], axis=0))


_ODD_WEIGHT = "loss weights must be finite and 0 or more; 0 leaves a position out, 1 is an ordinary target"
_ODD_TARGET = "a supervised target lies outside the vocabulary of {} words; is this the model's own tokenizer?"


def _supervised_rows(hidden_ND: Tensor, targets_N: Tensor, weights_N: Tensor, *, num_words: int, anchor: Anchor | None) -> Tensor:
    """int64 [S]: the positions with some weight. Raises `ModelError` on shapes, weights or targets that mean nothing."""
    if not hidden_ND.shape[:1] == targets_N.shape == weights_N.shape:
        raise ModelError(
            f"the loss needs one target and one weight per hidden state; found hidden {tuple(hidden_ND.shape)}, "
            f"targets {tuple(targets_N.shape)}, weights {tuple(weights_N.shape)}"
        )
    if targets_N.dtype != torch.int64:
        raise ModelError(f"targets must be int64, found {targets_N.dtype}; call .long() on them")
    pulls_N = weights_N if anchor is None else anchor.weights_N
    if bool((~(weights_N >= 0) | weights_N.isinf() | ~(pulls_N >= 0) | pulls_N.isinf()).any()):
        raise ModelError(_ODD_WEIGHT)
    chosen_S = targets_N[torch.nonzero(weights_N > 0).squeeze(1)]
    if bool(((chosen_S < 0) | (chosen_S >= num_words)).any()):
        raise ModelError(_ODD_TARGET.format(num_words))
    return torch.nonzero((weights_N > 0) | (pulls_N > 0)).squeeze(1)


def unwrapped(model: Any) -> Any:
    """The transformers model inside DDP and peft wrappers; adapters stay in place, they live in its layers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), torch.nn.Module):
            model = model.module
        else:
            return model


def hidden_states(
    model: Any,
    ids: Tensor,
    *,
    positions: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    embeddings_ND: Tensor | None = None,
) -> Tensor:
    """[B * T, D]: the last hidden state of every token, through the decoder and its final norm but not the head.

    `ids` and `positions` are int64 [B, T]. With `lengths` there is one row (B = 1) of documents of that many tokens,
    each seeing itself alone; positions must restart at 0 in each and are made so when left out. Without `lengths` each
    row is one sequence from its first token: pad on the right, where causality hides it. A model that cannot keep packed
    documents apart runs them as rows (see `unpacked`). `embeddings_ND` stand in for those of the tokens, N = B * T.

    Raises `ModelError` when the model was loaded without our attention, since lengths would then be ignored without a word.
    """
    base = unwrapped(model)
    if lengths is not None and (rows := rows_of(base)) is not None:
        return unpacked_states(base, ids.flatten(), lengths=lengths, rows=rows, embeddings_ND=embeddings_ND)
    _require_attention(base, lengths)
    if positions is None and lengths is not None:
        positions = torch.cat([torch.arange(n, device=ids.device) for n in lengths])[None]
    places = {} if positions is None else {"position_ids": positions}
    tokens = {"input_ids": ids} if embeddings_ND is None else {"inputs_embeds": embeddings_ND.view(*ids.shape, -1)}
    with packed_documents(lengths, device=ids.device) if lengths is not None else nullcontext():
        output = base.base_model(**tokens, attention_mask=None, use_cache=False, **places)
    hidden_BTD: Tensor = output.last_hidden_state
    return hidden_BTD.flatten(0, 1)


def _require_attention(base: Any, lengths: Sequence[int] | None) -> None:
    """Nothing; raises `ModelError` when documents are packed for a model that attends in some other way."""
    used = getattr(base.config.get_text_config(), "_attn_implementation", None)
    if lengths is not None and used != ATTENTION_NAME:
        raise ModelError(
            f"{type(base).__name__} attends by `{used}`, which mixes packed documents; load it with "
            "tutelage.model.load_model(folder), or set `batch.pack: none`"
        )


def head_of(model: Any) -> Head:
    """The `Head` of a causal language model, adapters or not. Raises `ModelError` when it has none or it is adapted."""
    base = unwrapped(model)
    layer = base.get_output_embeddings()
    if layer is None:
        raise ModelError(f"{type(base).__name__} has no output layer; a causal language model is needed")
    if hasattr(layer, "modules_to_save"):
        layer = layer.modules_to_save[layer.active_adapter if isinstance(layer.active_adapter, str) else layer.active_adapter[0]]
    if hasattr(layer, "lora_A"):
        raise ModelError("an adapter on the output layer is not supported; leave it out of `model.adapter.targets`")
    config = base.config.get_text_config()
    return Head(
        weight=layer.weight,
        bias=getattr(layer, "bias", None),
        softcap=getattr(config, "final_logit_softcapping", None),
        scale=_logit_scale(config),
    )


def _logit_scale(config: Any) -> float:
    """What logits are multiplied by: `logit_scale` (Cohere), 1 / `logits_scaling` (Granite), else 1."""
    if getattr(config, "logit_scale", None) is not None:
        return float(config.logit_scale)
    if getattr(config, "logits_scaling", None) is not None:
        return 1.0 / float(config.logits_scaling)
    return 1.0
