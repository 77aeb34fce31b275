"""Float32 weights rounded to bfloat16: none of a small update is lost, and the same numbers come out everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tiny_training import make_batch, make_docs
from toy import tiny_llama
from tutelage.train.optimizer import Optimizer
from tutelage.train.rounding import BLOCK, WORTH_COMPILING, round_flat, round_into
from tutelage.train.spec import TrainSpec
from tutelage.train.step import step_gradients

STEP = 2.0**-7
"""From 1.0 to the next number in bfloat16."""


def rounded(wide: torch.Tensor, *, name: str = "layer.weight", start: int = 0) -> torch.Tensor:
    narrow = torch.empty(wide.shape, dtype=torch.bfloat16)
    round_into(narrow, wide, name=name, start=start)
    return narrow


def in_torch(wide: torch.Tensor, *, name: str = "layer.weight", start: int = 0) -> torch.Tensor:
    narrow = torch.empty(len(wide), dtype=torch.bfloat16)
    round_flat(narrow, wide, name=name, start=start)
    return narrow


@pytest.mark.parametrize("upwards", [0.0, 0.01, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_as_large_a_share_goes_up_as_a_number_is_far_up(upwards: float, sign: float) -> None:
    """Kills the nearest: everything below a half would stay where it is, however many weights move."""
    count = WORTH_COMPILING
    found = rounded(torch.full((count,), sign * (1 + upwards * STEP))).float()
    assert set(found.tolist()) <= {sign, sign * (1 + STEP)}
    assert float((found != sign).float().mean()) == pytest.approx(upwards, abs=5 * (0.25 / count) ** 0.5)


def test_places_and_weights_draw_apart() -> None:
    """Kills one draw for all blocks or all weights: errors that add up where they should cancel."""
    half = torch.full((2 * BLOCK,), 1 + STEP / 2)
    ups = [(rounded(half, name=name).float() > 1).double() for name in ("a", "b")]
    pairs = [(ups[0], ups[1]), (ups[0][:BLOCK], ups[0][BLOCK:]), (ups[0][:-1], ups[0][1:])]
    for one, other in pairs:
        assert abs(float(np.corrcoef(one.numpy(), other.numpy())[0, 1])) < 5 / len(one) ** 0.5


def test_the_loop_is_the_torch_it_stands_for_and_pieces_are_the_whole() -> None:
    """Kills draws counted from where a piece begins, and numbers that are not finite turned into others."""
    wide = torch.randn(WORTH_COMPILING + 12_345, generator=torch.Generator().manual_seed(1)) * 1e-3
    odd = [0.0, -0.0, 1e-40, -3.39e38, float("inf"), -float("inf"), float("nan")]
    payloads = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)  # NaNs too
    wide[: len(odd)], wide[len(odd) : len(odd) + 3] = torch.tensor(odd), payloads
    whole = rounded(wide)
    assert torch.equal(torch.nan_to_num(whole), torch.nan_to_num(in_torch(wide)))
    assert torch.equal(whole.isnan(), wide.isnan()) and torch.equal(whole.isinf(), wide.isinf())
    assert whole[:2].view(torch.int16).tolist() == [0, -0x8000]
    for start, end in [(0, 10), (BLOCK - 1, BLOCK + 1), (5, len(wide)), (40_000, 40_000 + WORTH_COMPILING)]:
        piece = rounded(wide[start:end].clone(), start=start)
        assert torch.equal(torch.nan_to_num(piece), torch.nan_to_num(whole[start:end])), (start, end)


def test_what_bfloat16_can_hold_is_left_alone() -> None:
    """Kills noise on the weights that a run starts from."""
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert torch.equal(rounded(exact.float()), exact)


def test_wide_pieces_hold_the_same_numbers() -> None:
    """Kills pieces cut by FSDP2 that are rounded a second time, to the nearest, when they are put together."""
    wide = torch.randn(50, 40, generator=torch.Generator().manual_seed(3))
    kept = torch.empty_like(wide)
    round_into(kept, wide, name="layer.weight")
    assert torch.equal(kept.bfloat16(), rounded(wide)) and torch.equal(kept.bfloat16().float(), kept)


def losses(dtype: torch.dtype, *, rate: float, num_steps: int = 12) -> np.ndarray:
    """The loss of one batch at each step of training on it, from weights that bfloat16 can hold."""
    model = tiny_llama(dtype=torch.bfloat16).to(dtype)
    batch = make_batch([make_docs(6, seed=4)], capacity=256)
    optimizer = Optimizer(model, TrainSpec(weight_decay=0.0))
    found = []
    for _ in range(num_steps):
        optimizer.zero()
        flat, nll_N = step_gradients(model, batch)
        found.append(float((flat.weights * nll_N).sum() / batch.total_weight))
        optimizer.clip()
        optimizer.step(rate)
    return np.array(found)


def test_a_small_rate_learns_in_bfloat16_what_it_learns_in_float32() -> None:
    """Kills rounded copies that wait for an update of half their step: they learn nothing for many steps."""
    wide, narrow = losses(torch.float32, rate=1e-5), losses(torch.bfloat16, rate=1e-5)
    learnt = wide[0] - wide[-1]
    assert learnt > 0
    assert narrow[0] - narrow[-1] == pytest.approx(learnt, rel=0.15)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_rounds_as_a_cpu_does() -> None:
    """Kills draws of the device's own: a run that goes on elsewhere, or is cut over other ranks, would see other weights."""
    wide = torch.randn(3 * BLOCK + 5, generator=torch.Generator().manual_seed(5))
    narrow = torch.empty(len(wide), dtype=torch.bfloat16, device="cuda")
    round_into(narrow, wide.cuda(), name="layer.weight")
    assert torch.equal(narrow.cpu(), rounded(wide))
