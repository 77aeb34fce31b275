"""The compiled loop against torch in float64."""

from __future__ import annotations

import math

import pytest
import torch

from tutelage.model import chunks, slopes
from tutelage.model.loss import LossOptions, plain_weighted_loss, weighted_loss
from tutelage.model.slopes import RowRule, loss_and_slopes

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 1e-5}
"""What one rounding to the dtype may do, relative; float32: exp of a difference of 20 is good to 20 roundings."""


def reference(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, rule: RowRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """nll and w * d nll / d logits in float64, by autograd."""
    wide = logits.double().requires_grad_()
    log_p = (wide * rule.scale).log_softmax(-1)
    nll = -log_p.gather(1, targets[:, None]).squeeze(1)
    share = torch.exp(-nll.detach()) if rule.is_dft else torch.ones_like(nll)
    (slope,) = torch.autograd.grad((weights.double() * share * nll).sum(), wide)
    return nll.detach(), slope


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rule", [RowRule(), RowRule(scale=0.25), RowRule(is_dft=True), RowRule(scale=3.0, is_dft=True)])
def test_the_loop_is_softmax_and_its_gradient(dtype: torch.dtype, rule: RowRule) -> None:
    """Kills a wrong exponential, a slope without weight, scale or the target's -1, and DFT's share left out or used twice."""
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(37, 523, generator=generator) * 6).to(dtype)
    targets = torch.randint(0, 523, (37,), generator=generator)
    weights = torch.rand(37, generator=generator) * 2
    nll, slope = reference(logits, targets, weights, rule)
    made = logits.clone()
    torch.testing.assert_close(loss_and_slopes(made, targets, weights, rule=rule).double(), nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.double(), slope, rtol=ROUNDING[dtype], atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    """Kills rows that share their scratch, and a row left out between two pieces."""
    logits = torch.randn(13, 211, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        made = logits.clone()
        found.append((loss_and_slopes(made, torch.arange(13), torch.ones(13), rule=RowRule()), made))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_far_apart_and_equal_logits_are_exact() -> None:
    """Kills an exponential that overflows, wraps around, or is not 1 at 0."""
    logits = torch.tensor([[0.0, 500.0, -500.0, 3e4], [-3e4, -3e4, -3e4, -3e4], [1.0, 1.0, 1.0, 1.0]])
    nll = loss_and_slopes(logits, torch.tensor([3, 0, 2]), torch.ones(3), rule=RowRule())
    assert nll.tolist() == pytest.approx([0.0, math.log(4), math.log(4)])
    assert logits[0].tolist() == pytest.approx([0.0, 0.0, 0.0, 0.0], abs=1e-30)
    assert logits[2].tolist() == [0.25, 0.25, -0.75, 0.25]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_a_number_that_is_none_is_heard_of(dtype: torch.dtype, bad: float) -> None:
    """Kills arithmetic that assumes finite numbers: the run would go on with weights of garbage."""
    logits = torch.zeros(2, 40, dtype=dtype)
    logits[1, 7] = bad
    nll = loss_and_slopes(logits, torch.zeros(2).long(), torch.ones(2), rule=RowRule())
    assert math.isfinite(nll[0]) and not math.isfinite(nll[1])
    assert logits[0].isfinite().all() and not logits[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("objective", ["nll", "dft"])
@pytest.mark.parametrize("chunk_rows", [None, 7])
def test_the_loss_by_the_loop_is_the_loss_by_tensors(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, objective: str, chunk_rows: int | None
) -> None:
    """Kills slopes of one chunk read as another's, and a bias or head gradient that the loop's precision spoils."""
    generator = torch.Generator().manual_seed(5)
    hidden, head, bias = (
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in [(30, 16), (97, 16), (97,)]
    )
    targets = torch.randint(0, 97, (30,), generator=generator)
    weights = torch.rand(30, generator=generator) * (torch.rand(30, generator=generator) < 0.7)
    options = LossOptions(chunk_rows=chunk_rows, bias=bias, scale=0.5, objective=objective)
    given = {"targets_N": targets, "weights_N": weights, "options": options}

    def found(function) -> list[torch.Tensor]:
        loss = function(hidden, head, **given)
        return [loss.loss_sum, loss.nll_N, *torch.autograd.grad(loss.loss_sum * 0.3, [hidden, head, bias])]

    calls = []
    real = loss_and_slopes
    monkeypatch.setattr(chunks, "loss_and_slopes", lambda *args, **more: calls.append(1) or real(*args, **more))
    monkeypatch.setattr(slopes, "WORTH_COMPILING", 0)
    by_loop = found(weighted_loss)
    assert calls
    want = found(plain_weighted_loss)
    for mine, reference_ in zip(by_loop, want, strict=True):
        error = (mine.double() - reference_.double()).norm() / reference_.double().norm()
        assert error < (1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_evaluation_leaves_the_logits_alone() -> None:
    """Kills an evaluation that pays for slopes it throws away."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    before = logits.clone()
    loss_and_slopes(logits, torch.arange(3), torch.ones(3), rule=RowRule(wants_slopes=False))
    assert torch.equal(logits, before)
