"""Attention that keeps packed documents apart, with no mask in memory.

A packed micro-batch is one row of T tokens: documents one after another, positions restarting at 0 in each.
Shapes: T tokens, H query heads, K key-value heads, D head size, G documents in a group, L a group's padded length,
P = sum of G * L over the groups (T plus padding).

How it travels: `packed_documents(lengths)` is open while the model's forward runs. The model asks the mask interface
of transformers for a mask; ours answers with a `Documents` object in the mask's place, which every layer hands to its
attention function. It is an argument like any other, so it is still there when gradient checkpointing runs a layer
again during backward, when the context is closed long since. With no context open both functions behave as plain SDPA.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tutelage.errors import ModelError
from tutelage.model.short_attention import SHORTEST_FOR_FLASH, short_attention

ATTENTION_NAME = "tutelage_documents"
GROUP_RATIO = 0.8
"""A document joins a group when it is at least this long beside the group's longest: at most 20 % of a group is padding."""

_open_documents: ContextVar[Documents | None] = ContextVar("tutelage_documents", default=None)


@dataclass(frozen=True, eq=False)
class Documents:
    """Where the documents of one packed row lie, and how they are regrouped to be attended together.

    `index_P[p]` is the token that padded place p shows (padding repeats its document's last token, so that
    numbers that are not finite stay in their document); `places_T[t]` is the padded place
    of token t. `shapes` are the (G, L) of the groups, in the order in which they lie in P. `starts_S` (int32, one more
    than documents) is where each document starts, closed by T. `window` is the number of keys seen back, None for all.

    >>> documents = make_documents([2, 3], device="cpu")
    >>> documents.shapes, documents.index_P.tolist(), documents.places_T.tolist()
    (((1, 3), (1, 2)), [2, 3, 4, 0, 1], [3, 4, 0, 1, 2])
    """

    lengths: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    index_P: Tensor
    places_T: Tensor
    starts_S: Tensor
    window: int | None = None


def make_documents(lengths: Sequence[int], *, device: torch.device | str) -> Documents:
    """The layout of documents of `lengths` tokens, index tensors (int64) on `device`. Raises `ModelError` on a length < 1."""
    if not lengths or min(lengths) < 1:
        raise ModelError(f"document lengths must be 1 or more, found {list(lengths)[:8]}; leave empty documents out")
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    index: list[int] = []
    places, shapes = [0] * starts[-1], []
    for group in _group(lengths):
        longest = lengths[group[0]]
        shapes.append((len(group), longest))
        for document in group:
            start, length = starts[document], lengths[document]
            places[start : start + length] = range(len(index), len(index) + length)
            index.extend([*range(start, start + length), *[start + length - 1] * (longest - length)])

    def there(numbers: list[int], dtype: torch.dtype) -> Tensor:
        # Made here and sent without waiting: a tensor made on a GPU from a list waits for all work before it.
        return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)

    return Documents(
        lengths=tuple(lengths),
        shapes=tuple(shapes),
        index_P=there(index, torch.int64),
        places_T=there(places, torch.int64),
        starts_S=there(starts, torch.int32),
    )


def _group(lengths: Sequence[int]) -> list[list[int]]:
    """Document numbers, longest first, cut where a document falls under `GROUP_RATIO` of its group's longest.

    >>> _group([10, 3, 9, 2])
    [[0, 2], [1], [3]]
    """
    groups: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[document] >= GROUP_RATIO * lengths[groups[-1][0]]:
            groups[-1].append(document)
        else:
            groups.append([document])
    return groups


@contextmanager
def packed_documents(lengths: Sequence[int], *, device: torch.device | str = "cpu") -> Iterator[None]:
    """Nothing; while it is open, a model loaded with our attention takes its one row of tokens as these documents.

    Open it around the forward only. Raises `ModelError` where the row is not one row of sum(lengths) tokens.
    """
    token = _open_documents.set(make_documents(lengths, device=device))
    try:
        yield
    finally:
        _open_documents.reset(token)


def install_attention() -> None:
    """Nothing; registers attention and mask under `ATTENTION_NAME` with transformers (harmless when repeated)."""
    AttentionInterface.register(ATTENTION_NAME, documents_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, documents_mask)


def documents_mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> Documents | Tensor | None:
    """What layers get as `attention_mask`: the open `Documents` (with this layer type's window), else the SDPA mask.

    Raises `ModelError` when the row does not hold the documents, a cache is on, a 2-D attention mask was passed, or the
    architecture shapes its attention by more than causality and a window (chunks, prefixes): none of it may be ignored.
    """
    documents = _open_documents.get()
    if documents is None:
        mask: Tensor | None = sdpa_mask(batch_size=batch_size, q_length=q_length, kv_length=kv_length, **kwargs)
        return mask
    tokens = sum(documents.lengths)
    if (batch_size, q_length, kv_length) != (1, tokens, tokens) or kwargs.get("attention_mask") is not None:
        raise ModelError(
            f"packed documents of {tokens} tokens need one row of as many, no cache and no attention mask; found "
            f"{batch_size} x {q_length} queries and {kv_length} keys. Call the model with use_cache=False, attention_mask=None"
        )
    if kwargs.get("use_vmap") or getattr(kwargs.get("config"), "attention_chunk_size", None):
        raise ModelError("this architecture attends by more than order and a window; set `batch.pack: none` for it")
    return replace(documents, window=kwargs.get("local_size"))


def documents_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Documents | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """([1, T, H, D] attended values, None); the signature is the one transformers calls.

    query [1, H, T, D]; key and value [1, K, T, D] with H a multiple of K. Raises `ModelError` for additive biases and
    attention sinks, which this path would have to leave out.
    """
    if not isinstance(attention_mask, Documents):
        return _plain(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    for name in ("position_bias", "s_aux"):
        if kwargs.get(name) is not None:
            raise ModelError(f"packed documents do not support `{name}` in attention; set `batch.pack: none` for this model")
    rule = AttentionRule(dropout=dropout, scale=scaling, softcap=kwargs.get("softcap"), window=attention_mask.window)
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]
    kernel = _varlen if _fits_varlen(query, rule) else _grouped
    return kernel(*rows, documents=attention_mask, rule=rule).unsqueeze(0), None


@dataclass(frozen=True)
class AttentionRule:
    """How scores become weights: dropout share, scale (None = 1/sqrt(D)), tanh cap (Gemma 2), keys seen back (None = all)."""

    dropout: float
    scale: float | None
    softcap: float | None
    window: int | None


def _grouped(query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, *, documents: Documents, rule: AttentionRule) -> Tensor:
    """[T, H, D]: each group of like-long documents attended as one right-padded batch.

    Padding needs no mask: it comes after every real token of its row, so causality already hides it.
    """
    sizes = [count * length for count, length in documents.shapes]
    # Split, not sliced: the gradient of a slice is a whole array of zeros, made and added once per group.
    padded = [torch.split(_spread(x, documents), sizes) for x in (query_THD, key_TKD, value_TKD)]
    outputs = []
    for shape, *parts in zip(documents.shapes, *padded, strict=True):
        group = [x.view(*shape, *x.shape[1:]).transpose(1, 2) for x in parts]
        outputs.append(_attend(*group, rule=rule).transpose(1, 2).flatten(0, 1))
    return _collect(torch.cat(outputs), documents)


def _attend(query_GHLD: Tensor, key_GKLD: Tensor, value_GKLD: Tensor, *, rule: AttentionRule) -> Tensor:
    """[G, H, L, D]: causal attention inside each row, exact for a window and a soft cap."""
    length = query_GHLD.shape[2]
    if is_short(query_GHLD, rule):
        return short_attention(query_GHLD, key_GKLD, value_GKLD, scale=rule.scale, window=rule.window)
    band_LL = _band(length, rule.window, device=query_GHLD.device)
    if rule.softcap is not None:
        return _softcapped(query_GHLD, key_GKLD, value_GKLD, band_LL, rule=rule)
    return F.scaled_dot_product_attention(
        query_GHLD,
        key_GKLD,
        value_GKLD,
        attn_mask=band_LL,
        is_causal=band_LL is None,
        dropout_p=rule.dropout,
        scale=rule.scale,
        enable_gqa=query_GHLD.shape[1] != key_GKLD.shape[1],
    )


def is_short(query_GHLD: Tensor, rule: AttentionRule) -> bool:
    """Whether written-out attention is the faster one: on a CPU, for documents of up to a few hundred tokens."""
    on_cpu = query_GHLD.device.type == "cpu"
    return on_cpu and query_GHLD.shape[2] < SHORTEST_FOR_FLASH and rule.dropout == 0 and rule.softcap is None


def _band(length: int, window: int | None, *, device: torch.device) -> Tensor | None:
    """Bool [L, L], True where query i may see key j (i - window < j <= i); None where plain causality says the same.

    >>> _band(3, 2, device=torch.device("cpu")).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    if window is None or length <= window:
        return None
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril().triu(1 - window)


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, *, rule: AttentionRule, is_causal: bool = True
) -> Tensor:
    """[G, H, L, D] by the written-out formula, softmax in float32: no SDPA kernel knows cap * tanh(score / cap).

    `seen` is bool, broadcastable to [G, H, L, keys]; None means causal, or everything where `is_causal` is False.
    """
    assert rule.softcap is not None
    repeats = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
    scores = query @ key.transpose(2, 3) * (rule.scale if rule.scale is not None else 1 / math.sqrt(query.shape[3]))
    scores = torch.tanh(scores / rule.softcap) * rule.softcap
    if seen is None and is_causal:
        seen = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    shares = F.dropout(scores.softmax(-1, dtype=dtype).to(query.dtype), rule.dropout)
    return shares @ value


def _plain(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' SDPA does it, with the soft cap that it refuses."""
    if kwargs.get("softcap") is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return plain
    rule = AttentionRule(dropout=kwargs["dropout"], scale=kwargs["scaling"], softcap=kwargs["softcap"], window=None)
    output = _softcapped(query, key, value, attention_mask, rule=rule, is_causal=query.shape[2] > 1)
    return output.transpose(1, 2).contiguous(), None


def _spread(x_T: Tensor, documents: Documents) -> Tensor:
    """x_P, with a gradient."""
    x_P: Tensor = _Spread.apply(x_T, documents.index_P, documents.places_T)  # type: ignore[no-untyped-call]
    return x_P


def _collect(x_P: Tensor, documents: Documents) -> Tensor:
    """x_T, with a gradient."""
    x_T: Tensor = _Collect.apply(x_P, documents.places_T)  # type: ignore[no-untyped-call]
    return x_T


class _Spread(torch.autograd.Function):
    """x_P = x_T[index_P]. Backward is a gather too, because no gradient ever reaches padding: summing the repeats
    with `index_add` would cost more than the attention itself on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x_T: Tensor, index_P: Tensor, places_T: Tensor) -> Tensor:
        ctx.save_for_backward(places_T)
        return x_T.index_select(0, index_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (places_T,) = ctx.saved_tensors
        return grads[0].index_select(0, places_T), None, None


class _Collect(torch.autograd.Function):
    """x_T = x_P[places_T]. Backward leaves exact zeros at padding, which `_Spread` relies on."""

    @staticmethod
    def forward(ctx: Any, x_P: Tensor, places_T: Tensor) -> Tensor:
        ctx.save_for_backward(places_T)
        ctx.num_places = x_P.shape[0]
        return x_P.index_select(0, places_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (places_T,) = ctx.saved_tensors
        padded = grads[0].new_zeros(ctx.num_places, *grads[0].shape[1:])
        return padded.index_copy_(0, places_T, grads[0].contiguous()), None


@cache
def _varlen_kernel() -> Any:
    """Torch's variable-length attention, or None where this torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _fits_varlen(query: Tensor, rule: AttentionRule) -> bool:
    """Whether the flash kernel computes exactly this rule: CUDA (not ROCm), half precision, no dropout and no cap."""
    is_half = query.is_cuda and torch.version.hip is None and query.dtype in (torch.float16, torch.bfloat16)
    return is_half and rule.dropout == 0 and rule.softcap is None and query.shape[3] <= 256 and _varlen_kernel() is not None


def _varlen(query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, *, documents: Documents, rule: AttentionRule) -> Tensor:
    """[T, H, D] by torch's variable-length flash attention: no padding, no regrouping."""
    longest = max(documents.lengths)
    back = -1 if rule.window is None or rule.window >= longest else rule.window - 1
    output_THD: Tensor = _varlen_kernel()(
        query_THD.contiguous(),
        key_TKD.contiguous(),
        value_TKD.contiguous(),
        documents.starts_S,
        documents.starts_S,
        longest,
        longest,
        scale=rule.scale,
        window_size=(back, 0),
        enable_gqa=query_THD.shape[1] != key_TKD.shape[1],
    )
    return output_THD
