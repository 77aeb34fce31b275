"""Weighted next-token loss that meets the head only where a weight is above 0, a chunk of rows at a time.

The loss of a step is sum_i w_i * nll_i / W with W known from the plan, so what is returned here is a *sum*: the caller
divides once. Shapes: N positions, S selected positions (weight above 0), D hidden size, V vocabulary, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tutelage.errors import ModelError
from tutelage.model.attention import ATTENTION_NAME, packed_documents


@dataclass(frozen=True)
class LossOptions:
    """How hidden states become logits, and how many rows at once: z = scale * (h W^T + bias), then softcap * tanh(z / softcap).

    `chunk_rows` sets the memory of the loss and nothing else: 512 rows of a 49,152-word vocabulary are 100 MB in float32.
    """

    chunk_rows: int = 512
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class WeightedLoss:
    """`loss_sum`: scalar sum of w * nll with its gradient. `nll_N`: detached, 0 where the weight is 0. `weight_sum`: scalar.

    All three are float64 when the hidden states are, else float32.
    """

    loss_sum: Tensor
    nll_N: Tensor
    weight_sum: Tensor


@dataclass(frozen=True)
class Head:
    """The output layer of a model: `weight` [V, D], `bias` [V] or None, and what is done to the logits."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def options(self, *, chunk_rows: int = 512) -> LossOptions:
        """The `LossOptions` of this head."""
        return LossOptions(chunk_rows=chunk_rows, bias=self.bias, softcap=self.softcap, scale=self.scale)


def weighted_loss(
    hidden_ND: Tensor,
    head_VD: Tensor,
    *,
    targets_N: Tensor,
    weights_N: Tensor,
    options: LossOptions | None = None,
) -> WeightedLoss:
    """The `WeightedLoss` of N positions: sum_i w_i * -log softmax(logits_i)[target_i] over the positions with w_i > 0.

    `targets_N` is int64 and already shifted: `hidden_ND[i]` predicts `targets_N[i]`; where the weight is 0 it may hold
    anything. Gradients flow to `hidden_ND`, and to head and bias where they ask for one. Logits exist for `chunk_rows`
    positions at a time and never again: the gradient is made in the same pass (one product less than recomputing).
    With 40 % of the positions supervised the head costs 40 %.

    >>> hidden, head = torch.zeros(3, 2), torch.zeros(4, 2)          # every word has probability 1/4
    >>> loss = weighted_loss(hidden, head, targets_N=torch.tensor([0, 1, 2]), weights_N=torch.tensor([0.0, 1.0, 0.5]))
    >>> [round(x, 4) for x in (loss.loss_sum.item(), loss.weight_sum.item(), *loss.nll_N.tolist())]
    [2.0794, 1.5, 0.0, 1.3863, 1.3863]

    Raises `ModelError` on a negative or non-finite weight, or a supervised target outside the vocabulary.
    """
    options = options or LossOptions()
    rows_S = _supervised_rows(hidden_ND, targets_N, weights_N, num_words=head_VD.shape[0])
    # Asked here because autograd.Function runs its forward with gradients off and would always hear "no".
    is_recording = torch.is_grad_enabled()
    loss_sum, nll_N = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_ND.to(head_VD.dtype), head_VD, options.bias, _Targets(targets_N, weights_N, rows_S), options, is_recording
    )
    return WeightedLoss(loss_sum, nll_N, weights_N.to(loss_sum.dtype).sum())


def plain_weighted_loss(
    hidden_ND: Tensor,
    head_VD: Tensor,
    *,
    targets_N: Tensor,
    weights_N: Tensor,
    options: LossOptions | None = None,
) -> WeightedLoss:
    """What `weighted_loss` must return, written plainly with the full [N, V] logits: the reference, and slow."""
    options = options or LossOptions()
    is_on_N = weights_N > 0
    logits_NV = F.linear(hidden_ND.to(head_VD.dtype), head_VD, options.bias).to(_accumulator(head_VD.dtype))
    logits_NV = logits_NV * options.scale
    if options.softcap is not None:
        logits_NV = options.softcap * torch.tanh(logits_NV / options.softcap)
    nll_N = F.cross_entropy(logits_NV, targets_N.where(is_on_N, 0), reduction="none").where(is_on_N, 0)
    weights_N = weights_N.to(nll_N.dtype)
    return WeightedLoss((weights_N * nll_N).sum(), nll_N.detach(), weights_N.sum())


def _supervised_rows(hidden_ND: Tensor, targets_N: Tensor, weights_N: Tensor, *, num_words: int) -> Tensor:
    """int64 [S]: the positions with weight above 0. Raises `ModelError` on shapes, weights or targets that mean nothing."""
    if not hidden_ND.shape[:1] == targets_N.shape == weights_N.shape:
        raise ModelError(
            f"the loss needs one target and one weight per hidden state; found hidden {tuple(hidden_ND.shape)}, "
            f"targets {tuple(targets_N.shape)}, weights {tuple(weights_N.shape)}"
        )
    if targets_N.dtype != torch.int64:
        raise ModelError(f"targets must be int64, found {targets_N.dtype}; call .long() on them")
    if bool((~(weights_N >= 0) | weights_N.isinf()).any()):
        raise ModelError("loss weights must be finite and 0 or more; 0 leaves a position out, 1 is an ordinary target")
    rows_S = torch.nonzero(weights_N > 0).squeeze(1)
    chosen_S = targets_N[rows_S]
    if bool(((chosen_S < 0) | (chosen_S >= num_words)).any()):
        raise ModelError(
            f"a supervised target lies outside the vocabulary of {num_words} words; is this the model's own tokenizer?"
        )
    return rows_S


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and sums: float64 stays, everything narrower becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Targets:
    """Targets int64 [N], weights [N], and the positions [S] whose weight is above 0."""

    targets_N: Tensor
    weights_N: Tensor
    rows_S: Tensor


@dataclass
class _Gradients:
    """Gradients of the loss sum, filled chunk by chunk; None where nobody asked.

    Head and bias are summed over chunks in the accumulator's dtype: added up in bfloat16, late chunks would vanish.
    """

    hidden_ND: Tensor | None
    head_VD: Tensor | None
    bias_V: Tensor | None


class _ChunkedLoss(torch.autograd.Function):
    """(loss_sum, nll_N). The gradients for a loss gradient of 1 are made in the forward and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        given: _Targets,
        options: LossOptions,
        is_recording: bool,
    ) -> tuple[Tensor, Tensor]:
        wants = [is_recording and need for need in ctx.needs_input_grad[:3]]
        dtype = _accumulator(head_VD.dtype)
        grads = _Gradients(
            torch.zeros_like(hidden_ND) if wants[0] else None,
            torch.zeros_like(head_VD, dtype=dtype) if wants[1] else None,
            torch.zeros_like(bias_V, dtype=dtype) if wants[2] and bias_V is not None else None,
        )
        nll_N = torch.zeros(hidden_ND.shape[0], dtype=dtype, device=hidden_ND.device)
        loss_sum = nll_N.new_zeros(())
        for rows_R in torch.split(given.rows_S, options.chunk_rows):
            weights_R = given.weights_N[rows_R].to(dtype)
            nll_R, slopes_RV = _chunk(hidden_ND[rows_R], head_VD, bias_V, given.targets_N[rows_R], options=options)
            nll_N[rows_R] = nll_R
            loss_sum += weights_R @ nll_R
            if any(wants):
                _add_gradients(grads, slopes_RV.mul_(weights_R[:, None]), hidden_ND, head_VD, rows_R=rows_R)
        made = (grads.hidden_ND, grads.head_VD, grads.bias_V)
        ctx.save_for_backward(*(g if g is None else g.to(head_VD.dtype) for g in made))
        ctx.mark_non_differentiable(nll_N)
        return loss_sum, nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (g if g is None else g * grad_outputs[0] for g in ctx.saved_tensors)
        return (*scaled, None, None, None)


def _chunk(
    hidden_RD: Tensor, head_VD: Tensor, bias_V: Tensor | None, targets_R: Tensor, *, options: LossOptions
) -> tuple[Tensor, Tensor]:
    """(nll_R, slopes_RV): the loss of R rows and its derivative by the head's raw output, made in the logits' own memory."""
    logits_RV = F.linear(hidden_RD, head_VD, bias_V).to(_accumulator(head_VD.dtype))
    if options.scale != 1.0:
        logits_RV *= options.scale
    bend_RV = None
    if options.softcap is not None:
        bend_RV = torch.tanh_(logits_RV.div_(options.softcap))
        logits_RV = bend_RV * options.softcap
    norm_R = logits_RV.logsumexp(-1)
    targets_R1 = targets_R[:, None]
    nll_R = norm_R - logits_RV.gather(1, targets_R1).squeeze(1)
    slopes_RV = logits_RV.sub_(norm_R[:, None]).exp_()
    slopes_RV.scatter_add_(1, targets_R1, slopes_RV.new_full(targets_R1.shape, -1.0))
    if bend_RV is not None:
        slopes_RV *= 1 - bend_RV.square_()
    if options.scale != 1.0:
        slopes_RV *= options.scale
    return nll_R, slopes_RV


def _add_gradients(grads: _Gradients, slopes_RV: Tensor, hidden_ND: Tensor, head_VD: Tensor, *, rows_R: Tensor) -> None:
    """Nothing; adds one chunk's part to `grads`."""
    narrow_RV = slopes_RV.to(head_VD.dtype)
    if grads.hidden_ND is not None:
        grads.hidden_ND[rows_R] = narrow_RV @ head_VD
    if grads.head_VD is not None:
        grads.head_VD += narrow_RV.T @ hidden_ND[rows_R]
    if grads.bias_V is not None:
        grads.bias_V += slopes_RV.sum(0)


def unwrapped(model: Any) -> Any:
    """The transformers model inside DDP and peft wrappers; adapters stay in place, they live in its layers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), torch.nn.Module):
            model = model.module
        else:
            return model


def hidden_states(model: Any, ids: Tensor, *, positions: Tensor | None = None, lengths: Sequence[int] | None = None) -> Tensor:
    """[B * T, D]: the last hidden state of every token, through the decoder and its final norm but not the head.

    `ids` and `positions` are int64 [B, T]. With `lengths` there is one row (B = 1) of documents of that many tokens,
    each seeing itself alone; positions must restart at 0 in each and are made so when left out. Without `lengths` each
    row is one sequence from its first token: pad on the right, where causality hides it. Raises `ModelError` when the
    model was loaded without our attention, since lengths would then be ignored without a word.
    """
    base = unwrapped(model)
    _require_attention(base, lengths)
    if positions is None and lengths is not None:
        positions = torch.cat([torch.arange(n, device=ids.device) for n in lengths])[None]
    places = {} if positions is None else {"position_ids": positions}
    with packed_documents(lengths, device=ids.device) if lengths is not None else nullcontext():
        output = base.base_model(input_ids=ids, attention_mask=None, use_cache=False, **places)
    hidden_BTD: Tensor = output.last_hidden_state
    return hidden_BTD.flatten(0, 1)


def _require_attention(base: Any, lengths: Sequence[int] | None) -> None:
    """Nothing; raises `ModelError` when documents are packed for a model that attends in some other way."""
    used = getattr(base.config.get_text_config(), "_attn_implementation", None)
    if lengths is not None and used != ATTENTION_NAME:
        raise ModelError(
            f"{type(base).__name__} attends by `{used}`, which mixes packed documents; load it with "
            "tutelage.model.load_model(folder), or set `plan.pack: none`"
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
