"""The chunked part of the loss: logits of some positions, their losses and slopes, the gradient in the same pass, the next.

Shapes: N positions, S selected positions, D hidden size, V vocabulary, R rows of a chunk. Memory is that of one chunk of
logits and of the gradients; nothing here grows with S x V.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tutelage.model.slopes import RowRule, fits_loop, loss_and_slopes

CHUNK_BYTES = 128 << 20
"""Logits of one chunk, in the head's precision: enough rows that adding up the head's gradient costs less than its product."""

BLOCK_BYTES = {"cpu": 8 << 20, "gpu": 256 << 20}
"""The head's gradient is made this much at once, counted in float32: on a CPU so little that it is added while in the cache."""

Wants = tuple[bool, bool, bool]


@dataclass(frozen=True)
class LossOptions:
    """How hidden states become logits, and how many rows at once: z = scale * (h W^T + bias), then softcap * tanh(z / softcap).

    `chunk_rows` sets the memory of the loss and nothing else; None takes `CHUNK_BYTES` worth of logits. `objective`: `nll`, or
    `dft`, where each position's loss counts p(target) times, as a number without a gradient of its own.
    """

    chunk_rows: int | None = None
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    objective: Literal["nll", "dft"] = "nll"


@dataclass(frozen=True)
class Head:
    """The output layer of a model: `weight` [V, D], `bias` [V] or None, and what is done to the logits."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def options(self, *, chunk_rows: int | None = None, objective: Literal["nll", "dft"] = "nll") -> LossOptions:
        """The `LossOptions` of this head."""
        return LossOptions(chunk_rows, self.bias, self.softcap, self.scale, objective)


@dataclass(frozen=True)
class Anchor:
    """What the model is held close to: the starting model's last hidden states [N, D] and head, both without gradients.

    Adds sum_i v_i * KL_i to the loss sum, over the whole vocabulary, with v = `weights_N` (0 = not here). `forward` is
    KL(start || model) = sum_v q log(q / p), which punishes what the model has forgotten; `reverse` is KL(model || start) =
    sum_v p log(p / q), which punishes what it has made up.
    """

    hidden_ND: Tensor
    head: Head
    weights_N: Tensor
    direction: Literal["forward", "reverse"] = "forward"


@dataclass(frozen=True)
class Given:
    """What the loss is told beside tensors with gradients: targets int64 [N], weights [N], positions that count int64 [S]."""

    targets_N: Tensor
    weights_N: Tensor
    rows_S: Tensor
    anchor: Anchor | None = None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of softmax and sums: float64 stays, everything narrower becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cut(rows_S: Tensor, head_VD: Tensor, chunk_rows: int | None) -> Sequence[Tensor]:
    """The positions in chunks: as stated, else as few of equal size as keep logits under `CHUNK_BYTES`; at least one."""
    if chunk_rows is None:
        most = max(1, CHUNK_BYTES // (head_VD.shape[0] * head_VD.element_size()))
        chunk_rows = math.ceil(len(rows_S) / max(1, math.ceil(len(rows_S) / most)))
    return torch.split(rows_S, max(1, chunk_rows))


class ChunkedLoss(torch.autograd.Function):
    """(loss_sum, nll_N, kl_N or None). The gradients for a loss gradient of 1 are made in the forward, scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        head_VD: Tensor,
        bias_V: Tensor | None,
        given: Given,
        options: LossOptions,
        is_recording: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The three, and the gradients kept for `backward`."""
        wants = tuple(is_recording and need for need in ctx.needs_input_grad[:3])
        chunks = cut(given.rows_S, head_VD, options.chunk_rows)
        sums = _Sums(hidden_ND, head_VD, wants=(wants[0], wants[1], wants[2]), num_chunks=len(chunks))
        nll_N = torch.zeros(hidden_ND.shape[0], dtype=accumulator(head_VD.dtype), device=hidden_ND.device)
        kl_N = torch.zeros_like(nll_N) if given.anchor is not None else None
        loss_sum = nll_N.new_zeros(())
        takes_loop = given.anchor is None and options.softcap is None and fits_loop(head_VD, len(given.rows_S))
        for rows_R in chunks:
            logits_RV = F.linear(hidden_ND[rows_R], head_VD, bias_V)
            chunk = _by_loop if takes_loop else _by_tensors
            found = chunk(logits_RV, rows_R, given, options=options, wants_slopes=any(wants))
            nll_N[rows_R] = found.nll_R
            loss_sum += found.loss_sum
            if kl_N is not None and found.kl_R is not None:
                kl_N[rows_R] = found.kl_R
            if found.slopes_RV is not None:
                sums.add(found.slopes_RV, hidden_ND, head_VD, rows_R=rows_R)
        ctx.dtype = head_VD.dtype
        ctx.save_for_backward(sums.hidden_ND, sums.head_VD, sums.bias_V)
        ctx.mark_non_differentiable(*(x for x in (nll_N, kl_N) if x is not None))
        return loss_sum, nll_N, kl_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, head and bias, scaled and rounded in one pass: they are as large as the head."""
        scale = grad_outputs[0]
        made = (g if g is None else torch.mul(g, scale, out=torch.empty_like(g, dtype=ctx.dtype)) for g in ctx.saved_tensors)
        return (*made, None, None, None)


@dataclass(frozen=True)
class _Found:
    """One chunk's numbers: its part of the loss sum, nll and KL of each row, and the slopes by the head's raw output."""

    loss_sum: Tensor
    nll_R: Tensor
    kl_R: Tensor | None
    slopes_RV: Tensor | None


class _Sums:
    """Gradients of the loss sum, filled chunk by chunk; None where nobody asked.

    Head and bias are added up in the accumulator's dtype: in bfloat16, late chunks would vanish. A single chunk adds nothing up
    and keeps its product as it is.
    """

    def __init__(self, hidden_ND: Tensor, head_VD: Tensor, *, wants: Wants, num_chunks: int) -> None:
        self._wants = wants
        self._dtype = head_VD.dtype if num_chunks == 1 else accumulator(head_VD.dtype)
        self.hidden_ND = torch.zeros_like(hidden_ND) if wants[0] else None
        self.head_VD: Tensor | None = None
        self.bias_V: Tensor | None = None

    def add(self, slopes_RV: Tensor, hidden_ND: Tensor, head_VD: Tensor, *, rows_R: Tensor) -> None:
        """Nothing; one chunk's part is in."""
        narrow_RV = slopes_RV.to(head_VD.dtype)
        if self.hidden_ND is not None:
            self.hidden_ND[rows_R] = narrow_RV @ head_VD
        if self._wants[1]:
            self._add_to_head(narrow_RV, hidden_ND[rows_R], head_VD)
        if self._wants[2]:
            part_V = slopes_RV.sum(0, dtype=accumulator(head_VD.dtype))
            self.bias_V = part_V if self.bias_V is None else self.bias_V.add_(part_V)

    def _add_to_head(self, narrow_RV: Tensor, hidden_RD: Tensor, head_VD: Tensor) -> None:
        """Nothing; the product goes in some words at a time: as one it would be a second head in memory, and slow to add."""
        is_first = self.head_VD is None
        if self.head_VD is None:
            self.head_VD = torch.empty_like(head_VD, dtype=self._dtype)
        num_bytes = BLOCK_BYTES["cpu" if head_VD.device.type == "cpu" else "gpu"]
        num_words = max(1, num_bytes // (4 * head_VD.shape[1]))
        for slopes_RB, total_BD in zip(torch.split(narrow_RV, num_words, 1), torch.split(self.head_VD, num_words), strict=True):
            part_BD = slopes_RB.T @ hidden_RD
            total_BD.copy_(part_BD) if is_first else total_BD.add_(part_BD)


def _by_loop(logits_RV: Tensor, rows_R: Tensor, given: Given, *, options: LossOptions, wants_slopes: bool) -> _Found:
    """One chunk by the compiled loop; `logits_RV` becomes the slopes."""
    weights_R = given.weights_N[rows_R].float()
    is_dft = options.objective == "dft"
    rule = RowRule(options.scale, is_dft, wants_slopes)
    nll_R = loss_and_slopes(logits_RV, given.targets_N[rows_R], weights_R, rule=rule)
    return _Found(weights_R @ _counted(nll_R, options), nll_R, None, logits_RV if wants_slopes else None)


def _by_tensors(logits_RV: Tensor, rows_R: Tensor, given: Given, *, options: LossOptions, wants_slopes: bool) -> _Found:
    """One chunk in plain torch, whatever the device, precision and objective."""
    dtype = accumulator(logits_RV.dtype)
    weights_R = given.weights_N[rows_R].to(dtype)
    is_on_R = weights_R > 0
    logits_RV, bend_RV = _shaped(logits_RV.to(dtype), scale=options.scale, softcap=options.softcap)
    log_p_RV = logits_RV.sub_(logits_RV.logsumexp(-1, keepdim=True))
    targets_R1 = given.targets_N[rows_R].where(is_on_R, 0)[:, None]
    nll_R = -log_p_RV.gather(1, targets_R1).squeeze(1).where(is_on_R, 0)
    factor_R = _slope_weights(weights_R, nll_R, options)
    loss_sum = weights_R @ _counted(nll_R, options)
    pull = None if given.anchor is None else _pull(log_p_RV, given.anchor, rows_R)
    if pull is not None:
        loss_sum = loss_sum + pull.loss_sum
    if not wants_slopes:
        return _Found(loss_sum, nll_R, pull.kl_R if pull else None, None)
    slopes_RV = log_p_RV.exp_().mul_(factor_R[:, None])
    slopes_RV.scatter_add_(1, targets_R1, -factor_R[:, None])
    if pull is not None:
        slopes_RV += pull.slopes_RV
    if bend_RV is not None:
        slopes_RV *= 1 - bend_RV.square_()
    if options.scale != 1.0:
        slopes_RV *= options.scale
    return _Found(loss_sum, nll_R, pull.kl_R if pull else None, slopes_RV)


def _shaped(logits_RV: Tensor, *, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Logits after scale and cap, in place where it can be; and tanh, from which the cap's derivative 1 - tanh^2 is made."""
    if scale != 1.0:
        logits_RV = logits_RV * scale
    if softcap is None:
        return logits_RV, None
    bend_RV = torch.tanh(logits_RV / softcap)
    return bend_RV * softcap, bend_RV


def _counted(nll_R: Tensor, options: LossOptions) -> Tensor:
    """What a position of weight 1 adds to the loss: nll, or p * nll. Where p is 0 that is 0, though nll may be infinite."""
    if options.objective == "nll":
        return nll_R
    return (torch.exp(-nll_R) * nll_R).where(nll_R != math.inf, 0)


def _slope_weights(weights_R: Tensor, nll_R: Tensor, options: LossOptions) -> Tensor:
    """What p - onehot is multiplied by: w, or w * p(target) for `dft`, whose p is a number like w."""
    return weights_R if options.objective == "nll" else weights_R * torch.exp(-nll_R)


@dataclass(frozen=True)
class _Pull:
    """One chunk's part of the KL term: its weighted sum, KL per row (0 where it has no weight), slopes by the logits."""

    loss_sum: Tensor
    kl_R: Tensor
    slopes_RV: Tensor


def _pull(log_p_RV: Tensor, anchor: Anchor, rows_R: Tensor) -> _Pull:
    """With p the model's and q the start's probabilities: KL(q || p) has the slope p - q, KL(p || q) has p (log p/q - KL)."""
    head = anchor.head
    start_RV = F.linear(anchor.hidden_ND[rows_R].to(head.weight.dtype), head.weight, head.bias).to(log_p_RV.dtype)
    start_RV, _ = _shaped(start_RV, scale=head.scale, softcap=head.softcap)
    log_q_RV = torch.log_softmax(start_RV, -1)
    weights_R1 = anchor.weights_N[rows_R].to(log_p_RV.dtype)[:, None]
    p_RV = log_p_RV.exp()
    if anchor.direction == "forward":
        q_RV = log_q_RV.exp()
        kl_R1 = (q_RV * (log_q_RV - log_p_RV)).sum(-1, keepdim=True)
        slopes_RV = p_RV.sub_(q_RV)
    else:
        gap_RV = log_p_RV - log_q_RV
        kl_R1 = (p_RV * gap_RV).sum(-1, keepdim=True)
        slopes_RV = gap_RV.sub_(kl_R1).mul_(p_RV)
    is_on_R1 = weights_R1 > 0
    kl_R1 = kl_R1.where(is_on_R1, 0)
    slopes_RV = slopes_RV.mul_(weights_R1).masked_fill_(~is_on_R1, 0)
    return _Pull((weights_R1 * kl_R1).sum(), kl_R1.squeeze(1), slopes_RV)
