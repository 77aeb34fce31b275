"""NEFTune's noise, drawn by counting: the number at a place depends on the document, the position and the dimension alone.

Whole-number arithmetic, so a CPU and a GPU draw the same. Shapes: N tokens of packed documents, D embedding size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_GAMMA, _FIRST, _SECOND = (n - (1 << 64) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def embedding_noise(keys_N: Tensor, positions_N: Tensor, *, lengths: Sequence[int], size: int, alpha: float) -> Tensor:
    """[N, D = `size`] float32, uniform in +-alpha / sqrt(L * D) with L the length of the token's own document.

    NEFTune (arXiv 2310.05914, algorithm 1) with L the document's length, not the row's: packing changes nothing. With alpha 5,
    100 tokens and 64 dimensions the bound is 5 / 80 = 0.0625. `keys_N` and `positions_N` are int64, as `document_key`
    makes them and counting from 0 in each document.

    >>> noise = embedding_noise(torch.tensor([7, 7, 9]), torch.tensor([0, 1, 0]), lengths=[2, 1], size=4, alpha=2.0)
    >>> alone = embedding_noise(torch.tensor([9]), torch.tensor([0]), lengths=[1], size=4, alpha=2.0)
    >>> noise.shape, torch.equal(noise[2:], alone), bool((alone.abs() <= 1.0).all())
    (torch.Size([3, 4]), True, True)
    """
    counts_ND = positions_N[:, None] * size + torch.arange(1, size + 1, device=keys_N.device)
    return uniform(counts_ND.mul_(_GAMMA).add_(keys_N[:, None])) * _bounds(lengths, size, alpha).to(
        keys_N.device, non_blocking=True
    )


def _bounds(lengths: Sequence[int], size: int, alpha: float) -> Tensor:
    """[N, 1] float32: the largest noise of each token."""
    each = np.array([alpha / math.sqrt(length * size) for length in lengths], np.float32)
    return torch.from_numpy(np.repeat(each, lengths))[:, None]


def uniform(states: Tensor) -> Tensor:
    """float32 in (-1, 1) of int64 counters: SplitMix64's finaliser, its top 23 bits as an odd multiple of 2^-23 around 0."""
    mixed = (states ^ _shifted(states, 30)) * _FIRST
    mixed = (mixed ^ _shifted(mixed, 27)) * _SECOND
    mixed ^= _shifted(mixed, 31)
    return (2 * _shifted(mixed, 41) + 1 - (1 << 23)).float() / (1 << 23)


def _shifted(states: Tensor, bits: int) -> Tensor:
    """The 64 bits moved right, zeros coming in: torch's own shift of int64 repeats the sign."""
    return (states >> bits) & ((1 << (64 - bits)) - 1)
