"""Float32 weights rounded to bfloat16 so that none of a small update is lost: up or down in proportion, not to the nearest.

Between two neighbours in bfloat16 a weight is rounded up with the probability of how far up it is. To the nearest, an update
below half their distance (1/512 of the weight) changes nothing that the model sees; in proportion, it moves as large a share
of the weights as it is long. Chance is drawn once for each place in each weight, not at each step, so the rounded weight is a
function of the float32 one alone: a run that goes on, extends another or is cut over any number of ranks sees the same, and
what is saved is what was measured. (The idea is stochastic rounding, as in torchao's optimizers, with frozen draws: dither.)
"""

from __future__ import annotations

import hashlib
import math
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from tutelage.compiled import kernel

BLOCK = 32_768
"""Numbers that share two draws, and are rounded at a time on a CPU: all on the way stays in the cache."""
ON_A_GPU = 1024
"""Blocks rounded at a time on a GPU: 128 MB for each tensor on the way."""
WORTH_COMPILING = 1 << 18
"""Numbers of a weight from which the compiled loop is worth being read from disk."""


@torch.no_grad()
def round_into(narrow: Tensor, wide: Tensor, *, name: str, start: int | None = None) -> None:
    """Nothing; `narrow` holds the weight `name`, `wide` (float32), rounded to bfloat16; both whole, or cut alike by FSDP2.

    `narrow` may be float32 and holds the same numbers then. A number that is not finite stays what it is. Into float16, whose
    steps near zero are not a float's, numbers are rounded to the nearest. `start` is where in the flat weight a piece begins;
    DTensors know it.
    """
    start = _first_number(wide) if start is None else start
    narrow, wide = _local(narrow), _local(wide)
    if narrow.dtype is torch.float16:
        narrow.copy_(wide)
    elif narrow.dtype is not torch.bfloat16 or not narrow.is_contiguous():
        rounded = torch.empty(wide.shape, dtype=torch.bfloat16, device=wide.device)
        round_into(rounded, wide, name=name, start=start)
        narrow.copy_(rounded)
    elif wide.device.type == "cpu" and wide.numel() >= WORTH_COMPILING:
        words, bits = wide.reshape(-1).view(torch.uint32).numpy(), narrow.view(-1).view(torch.uint16).numpy()
        factors, terms = (draw.view(torch.uint32).numpy() for draw in draws_of(name, start + wide.numel(), wide.device))
        kernel(walk_blocks)(words, bits, base(wide.device).view(torch.uint32).numpy(), factors, terms, start)
    else:
        round_flat(narrow.view(-1), wide.reshape(-1), name=name, start=start)


def round_flat(narrow_N: Tensor, wide_N: Tensor, *, name: str, start: int = 0) -> None:
    """`round_into` for the numbers of a flat weight from `start` on, in torch: on any device, and what the loop is tested by."""
    end = start + len(wide_N)
    at_once = BLOCK if wide_N.device.type == "cpu" else BLOCK * ON_A_GPU
    factors_B, terms_B = draws_of(name, end, wide_N.device)
    for first in range(start // BLOCK * BLOCK, end, at_once):
        a, b = max(first, start), min(first + at_once, end)
        blocks = slice(first // BLOCK, math.ceil(b / BLOCK))
        draws = (base(wide_N.device) * factors_B[blocks, None]).add_(terms_B[blocks, None])
        draws = draws.bitwise_right_shift_(16).bitwise_and_(0xFFFF).view(-1)[a - first : b - first]
        part = wide_N[a - start : b - start]
        rounded = draws.add_(part.view(torch.int32)).bitwise_and_(-0x10000).view(torch.float32)
        narrow_N[a - start : b - start] = torch.where(part.isfinite(), rounded, part)


def walk_blocks(
    words_N: np.ndarray, bits_N: np.ndarray, base_S: np.ndarray, factors_B: np.ndarray, terms_B: np.ndarray, start: int
) -> None:
    """Plain loops, for numba: `round_flat` on the bits of float32 (uint32) and bfloat16 (uint16), all wrapping in 32 bits."""
    size, end = len(base_S), start + len(words_N)
    for block in range(start // size, (end + size - 1) // size):
        first, last = max(block * size, start), min((block + 1) * size, end)
        factor, term = factors_B[block], terms_B[block]
        words, bits = words_N[first - start : last - start], bits_N[first - start : last - start]
        base_s = base_S[first - block * size : last - block * size]
        for i in range(len(words)):
            word = words[i]
            draw = np.uint32(np.uint32(base_s[i] * factor + term) >> np.uint32(16))
            if word & np.uint32(0x7F800000) != np.uint32(0x7F800000):
                bits[i] = np.uint16(np.uint32(word + draw) >> np.uint32(16))
            else:  # a NaN keeps a bit that says so
                is_nan = np.uint32(0x40) if word & np.uint32(0x7FFFFF) else np.uint32(0)
                bits[i] = np.uint16((word >> np.uint32(16)) | is_nan)


@cache
def base(device: torch.device) -> Tensor:
    """(BLOCK,) int32 of random bits, one for each place in a block, the same in every run."""
    return _bits("", BLOCK).to(device)


@cache
def draws_of(name: str, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each block of a weight's first `end` numbers what the base is multiplied with, odd, and what is added: (B,) int32."""
    factors_B, terms_B = _bits(name, 2 * math.ceil(end / BLOCK)).view(-1, 2).unbind(1)
    return (factors_B | 1).to(device), terms_B.contiguous().to(device)


def _bits(name: str, count: int) -> Tensor:
    """(count,) int32 of random bits that the name decides; a longer one begins with a shorter one."""
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")
    raw = np.random.Philox(key=key).random_raw(math.ceil(count / 2))
    return torch.from_numpy(raw.view(np.int32)[:count].copy())


def _local(weight: Tensor) -> Tensor:
    """This rank's piece."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _first_number(weight: Tensor) -> int:
    """Where in the flat weight this rank's piece begins."""
    if not isinstance(weight, DTensor):
        return 0
    placements, mesh = weight.placements, weight.device_mesh
    if placements != (Shard(0),):
        raise NotImplementedError(f"weights in bfloat16 are cut by rows over one group of ranks, not as {placements}")
    rows = math.ceil(weight.shape[0] / mesh.size())
    return min(rows * mesh.get_local_rank(), weight.shape[0]) * math.prod(weight.shape[1:])
