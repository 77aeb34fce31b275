"""Causal attention of many short documents on a CPU, as a few large products.

Flash attention works block by block; on a CPU its backward pass spends most of its time on the overhead of tiny
products when documents are short. Here all documents of a group are one batch of products, and the softmax is one pass
over scores that stay small because the documents do: G * H * L * L numbers.

Shapes: G documents, H query heads, K key-value heads, R = H / K, L tokens, D head size, B = G * K.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

SHORTEST_FOR_FLASH = 257
"""From this length on the flash kernel is faster, forward and backward together (measured in bfloat16)."""


def short_attention(
    query_GHLD: Tensor, key_GKLD: Tensor, value_GKLD: Tensor, *, scale: float | None = None, window: int | None = None
) -> Tensor:
    """[G, H, L, D]: causal attention inside each of G documents; key-value head k serves query heads k*R to k*R + R - 1.

    Scores and softmax are float32 (float64 for float64), shares and sums in the dtype given, as flash kernels do. `scale`
    defaults to 1/sqrt(D); with `window` a token sees itself and the window - 1 before it. Memory kept for the backward
    pass: the shares, G * H * L * L numbers.

    >>> one = torch.ones(1, 1, 2, 1)
    >>> short_attention(one, one, torch.tensor([[[[2.0], [4.0]]]])).flatten().tolist()      # the mean of what is seen
    [2.0, 3.0]
    """
    out: Tensor = _Short.apply(query_GHLD, key_GKLD, value_GKLD, scale or 1 / math.sqrt(query_GHLD.shape[-1]), window)  # type: ignore[no-untyped-call]
    return out


class _Short(torch.autograd.Function):
    """Query heads that share a key head are stacked: [B, R * L, D] queries meet [B, L, D] keys, which nobody repeats."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        count, heads, length, size = query.shape
        num_keys = key.shape[1]
        q_BMD = query.reshape(count * num_keys, -1, size)
        k_BLD, v_BLD = key.reshape(-1, length, size), value.reshape(-1, length, size)
        wide = torch.promote_types(query.dtype, torch.float32)
        hidden_ML = _hidden(length, heads // num_keys, window, wide)
        scores_BML = torch.baddbmm(hidden_ML, q_BMD.to(wide), k_BLD.to(wide).transpose(1, 2), alpha=scale)
        shares_BML = scores_BML.softmax(-1).to(query.dtype)
        ctx.save_for_backward(q_BMD, k_BLD, v_BLD, shares_BML)
        ctx.scale, ctx.num_keys = scale, num_keys
        return torch.bmm(shares_BML, v_BLD).view(query.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_BMD, k_BLD, v_BLD, shares_BML = ctx.saved_tensors
        out_BMD = grads[0].reshape(q_BMD.shape)
        by_share_BML = torch.bmm(out_BMD, v_BLD.transpose(1, 2))
        # The derivative of softmax, share * (g - sum(g * share)), in one pass.
        by_score_BML = torch._softmax_backward_data(by_share_BML, shares_BML, -1, shares_BML.dtype)
        query = torch.bmm(by_score_BML, k_BLD).mul_(ctx.scale).view(grads[0].shape)
        key = torch.bmm(by_score_BML.transpose(1, 2), q_BMD).mul_(ctx.scale)
        value = torch.bmm(shares_BML.transpose(1, 2), out_BMD)
        shape = (-1, ctx.num_keys, *k_BLD.shape[1:])
        return query, key.view(shape), value.view(shape), None, None


@lru_cache(maxsize=256)
def _hidden(length: int, repeats: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[1, R * L, L]: what is added to scores, 0 where a query may look and hardly less than infinity where it may not.

    Finite: minus infinity would cost the exponential its fast path.

    >>> (_hidden(3, 1, 2, torch.float32)[0] == 0).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    seen_LL = torch.ones(length, length, dtype=torch.bool).tril_()
    if window is not None:
        seen_LL = seen_LL.triu_(1 - window)
    lowest = torch.finfo(dtype).min / 4
    return torch.zeros(length, length, dtype=dtype).masked_fill_(~seen_LL, lowest).repeat(repeats, 1)[None]
