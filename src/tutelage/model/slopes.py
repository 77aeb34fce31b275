"""The losses of rows of logits and their slopes in one walk over each row, on a CPU: a compiled loop for the torch of `chunks`.

Written with tensors, softmax, loss and gradient are ten passes over a float32 matrix of rows x vocabulary, which take longer
than the products around them. Here a row is read once, worked on in float32 in the cache, and its slopes written over
its logits in their own precision. Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tutelage.compiled import kernel
from tutelage.records import Float32, Int64

WORTH_COMPILING = 1 << 18
"""Logits from which the loop is worth being compiled, or read from disk."""

FAST = frozenset({"reassoc", "nsz", "contract"})
"""Sums may be taken in lanes; nothing may assume that numbers are finite: a NaN must come out as one."""

_BITS = {torch.bfloat16: torch.uint16, torch.float32: torch.float32}


@dataclass(frozen=True)
class RowRule:
    """What the loop is told beside its arrays: logits times `scale`; `is_dft`: slopes times the target's probability."""

    scale: float = 1.0
    is_dft: bool = False
    wants_slopes: bool = True


def fits_loop(head_VD: Tensor, num_rows: int) -> bool:
    """Whether the loop knows this device and precision, and there is enough to do."""
    is_known = head_VD.device.type == "cpu" and head_VD.dtype in _BITS
    return is_known and num_rows * head_VD.shape[0] >= WORTH_COMPILING


def loss_and_slopes(logits_RV: Tensor, targets_R: Tensor, weights_R: Tensor, *, rule: RowRule) -> Tensor:
    """nll_R in float32; `logits_RV` (bfloat16 or float32, contiguous) then holds w * d nll / d logits, where it was asked for.

    Rows do not depend on each other, so the numbers are the same on any number of threads.

    >>> logits = torch.zeros(1, 4)
    >>> loss_and_slopes(logits, torch.tensor([2]), torch.tensor([2.0]), rule=RowRule()), logits
    (tensor([1.3863]), tensor([[ 0.5000,  0.5000, -1.5000,  0.5000]]))
    """
    assert logits_RV.is_contiguous()
    nll_R = np.empty(len(targets_R), np.float32)
    bits_RV = logits_RV.detach().view(_BITS[logits_RV.dtype]).numpy()
    targets, weights = targets_R.numpy(), weights_R.detach().float().numpy()
    loop = kernel(walk_rows, FAST)

    def piece(first: int, last: int) -> None:
        here = slice(first, last)
        loop(bits_RV[here], targets[here], weights[here], nll_R[here], np.float32(rule.scale), rule.is_dft, rule.wants_slopes)

    num_pieces = min(torch.get_num_threads(), len(targets_R))
    if num_pieces < 2:
        piece(0, len(targets_R))
    else:
        edges = np.linspace(0, len(targets_R), num_pieces + 1).astype(int).tolist()
        with ThreadPoolExecutor(num_pieces, "slopes") as pool:
            list(pool.map(lambda edge: piece(*edge), pairwise(edges)))
    return torch.from_numpy(nll_R)


def walk_rows(  # noqa: C901 - a kernel takes arrays, not objects
    bits_RV: np.ndarray, targets_R: Int64, weights_R: Float32, nll_R: Float32, scale: np.float32, is_dft: bool, writes: bool
) -> None:
    """`loss_and_slopes` on float32 logits, or on the bits of bfloat16 ones as uint16.

    e^x = 2^n * e^f with n = round(x / ln 2) and f in +-ln 2 / 2 by a polynomial of degree 7 (Cephes, `expf`): relative error
    below 2e-7. The largest logit is found by comparing bits as whole numbers, whose order is that of the floats, NaN last.
    """
    row = np.empty(bits_RV.shape[1], np.float32)
    words, ints = row.view(np.uint32), row.view(np.int32)
    for r in range(len(targets_R)):
        target = targets_R[r]
        if bits_RV.itemsize == 2:
            for j in range(len(row)):
                words[j] = np.uint32(np.uint32(bits_RV[r, j]) << np.uint32(16))
        else:
            for j in range(len(row)):
                row[j] = bits_RV[r, j]
        if scale != np.float32(1.0):
            for j in range(len(row)):
                row[j] *= scale
        top = np.int32(-2147483648)
        for j in range(len(row)):
            order = np.int32(ints[j] ^ ((ints[j] >> np.int32(31)) & np.int32(0x7FFFFFFF)))
            top = max(top, order)
        high = np.int32(top ^ ((top >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)
        own = row[target]
        total = np.float32(0.0)
        for j in range(len(row)):
            x = row[j] - high
            x = np.float32(-80.0) if x < np.float32(-80.0) else x  # NaN is not below and stays
            shifted = np.float32(x * np.float32(1.4426950408889634) + np.float32(12582912.0))  # its low bits are n
            n = np.int32(shifted.view(np.int32) - np.int32(0x4B400000))
            f = x - np.float32(n) * np.float32(0.693359375) + np.float32(n) * np.float32(2.12194440e-4)
            e = np.float32(1.9875691500e-4) * f + np.float32(1.3981999507e-3)
            e = e * f + np.float32(8.3334519073e-3)
            e = e * f + np.float32(4.1665795894e-2)
            e = e * f + np.float32(1.6666665459e-1)
            e = e * f + np.float32(5.0000001201e-1)
            e = e * f * f + f + np.float32(1.0)
            e = e * np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)
            row[j] = e
            total += e
        nll_R[r] = np.log(total) + high - own
        if not writes:
            continue
        factor = weights_R[r] * scale / total
        if is_dft:
            factor *= row[target] / total
        row[target] -= total
        for j in range(len(row)):
            row[j] *= factor
        if bits_RV.itemsize == 2:
            for j in range(len(row)):
                odd = (words[j] >> np.uint32(16)) & np.uint32(1)  # rounded to the nearest, ties to even
                bits_RV[r, j] = np.uint16((words[j] + np.uint32(0x7FFF) + odd) >> np.uint32(16))
        else:
            for j in range(len(row)):
                bits_RV[r, j] = row[j]
