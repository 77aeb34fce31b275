"""What the optimizer holds is float32, whatever the model runs in."""

from __future__ import annotations

import pytest
import torch

from tiny_training import make_batch, make_docs
from toy import tiny_llama
from tutelage.errors import TrainError
from tutelage.train.optimizer import CHUNK, Optimizer
from tutelage.train.spec import TrainSpec
from tutelage.train.step import step_gradients


class Linear(torch.nn.Module):
    """Two weights and a norm, for arithmetic by hand."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.full((1, 2), 1.0, dtype=dtype))
        self.norm = torch.nn.Parameter(torch.full((2,), 1.0, dtype=dtype))


def stepped(dtype: torch.dtype, *, num_steps: int = 1, learning_rate: float = 0.1, **changes: object) -> Linear:
    model = Linear(dtype)
    optimizer = Optimizer(model, TrainSpec(**changes))
    for _ in range(num_steps):
        optimizer.zero()
        (model.matrix.sum() + model.norm.sum()).backward()
        optimizer.clip()
        optimizer.step(learning_rate)
    return model


def test_first_step_of_adamw_by_hand_and_no_decay_on_norms() -> None:
    """Kills weight decay on norms and biases. AdamW's first step moves by the rate, after decay by rate * decay."""
    model = stepped(torch.float64, weight_decay=0.5)
    assert model.matrix.detach().flatten().tolist() == pytest.approx([1.0 * (1 - 0.1 * 0.5) - 0.1] * 2, abs=1e-6)
    assert model.norm.detach().tolist() == pytest.approx([0.9] * 2, abs=1e-6)


def test_small_updates_of_bfloat16_weights_are_not_rounded_away() -> None:
    """Kills AdamW on bfloat16 weights: 1 - 0.001 rounds back to 1 for ever."""
    model = stepped(torch.bfloat16, num_steps=100, learning_rate=1e-3, weight_decay=0.0)
    assert model.matrix.dtype == torch.bfloat16
    assert model.matrix.detach().float().flatten().tolist() == pytest.approx([0.9, 0.9], abs=4e-3)


def test_clipping_scales_the_whole_gradient_and_reports_its_norm() -> None:
    """Kills clipping per tensor, and a norm reported after the fact."""
    model = Linear(torch.float64)
    optimizer = Optimizer(model, TrainSpec(max_grad_norm=1.0))
    (3 * model.matrix.sum() + 4 * model.norm.sum()).backward()
    assert optimizer.clip() == pytest.approx(50**0.5)
    assert model.matrix.grad is not None and model.norm.grad is not None
    assert model.matrix.grad.flatten().tolist() == pytest.approx([3 / 50**0.5] * 2, rel=1e-5)
    assert model.norm.grad.tolist() == pytest.approx([4 / 50**0.5] * 2, rel=1e-5)


def test_null_leaves_gradients_as_they_are() -> None:
    """Kills a bound of None read as 1."""
    model = Linear(torch.float64)
    optimizer = Optimizer(model, TrainSpec(max_grad_norm=None))
    (30 * model.matrix.sum()).backward()
    optimizer.clip()
    assert model.matrix.grad is not None and model.matrix.grad.flatten().tolist() == [30.0, 30.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restoring_goes_on_as_if_nothing_had_happened(dtype: torch.dtype) -> None:
    """Kills checkpoints of the rounded copy, and an AdamW that forgets its moments or its step count."""
    batch = make_batch([make_docs(2, seed=1)])

    def advance(model: torch.nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
        optimizer.zero()
        step_gradients(model, batch)
        optimizer.step(1e-3)
        return {name: weight.detach().clone() for name, weight in optimizer.weights.items()}

    model = tiny_llama(dtype=dtype)
    optimizer = Optimizer(model, TrainSpec())
    advance(model, optimizer)
    kept = {name: weight.detach().clone() for name, weight in optimizer.weights.items()}
    memory = {name: value.clone() for name, value in optimizer.memory().items()}
    expected = advance(model, optimizer)

    other = tiny_llama(dtype=dtype, seed=9)
    fresh = Optimizer(other, TrainSpec())
    fresh.restore(kept, memory)
    found = advance(other, fresh)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(torch.equal(p, mine) for p, mine in zip(other.parameters(), model.parameters(), strict=True))


def test_a_checkpoint_of_another_model_is_refused_by_name() -> None:
    """Kills a resume that loads what fits and leaves the rest at random."""
    optimizer = Optimizer(Linear(torch.float32), TrainSpec())
    with pytest.raises(TrainError, match=r"1 weights differ, `matrix` first \(here \(1, 2\), there \(3, 2\)\)"):
        optimizer.restore({"matrix": torch.zeros(3, 2), "norm": torch.zeros(2)})


def test_a_frozen_model_is_refused() -> None:
    """Kills a run that takes minutes to train nothing."""
    with pytest.raises(TrainError, match="no trainable weight"):
        Optimizer(Linear(torch.float32).requires_grad_(False), TrainSpec())


def test_closing_gives_the_model_its_gradients_back() -> None:
    """Kills hooks that outlive the run and swallow the next trainer's gradients."""
    model = Linear(torch.bfloat16)
    Optimizer(model, TrainSpec()).close()
    model.matrix.sum().backward()
    assert model.matrix.grad is not None


def test_gradients_of_narrow_weights_add_up_in_float32_over_passes_and_steps() -> None:
    """Kills chunks that leave a tail out, sums in bfloat16, and kept memory that brings the last step's gradient along."""
    model = torch.nn.Linear(CHUNK + 3, 2, bias=False, dtype=torch.bfloat16)
    optimizer = Optimizer(model, TrainSpec())
    master = optimizer.weights["weight"]
    for _ in range(2):
        optimizer.zero()
        assert master.grad is None and model.weight.grad is None
        for scale in (1.0, 2.0**-12, 2.0**-12):
            (scale * model.weight.sum()).backward()
        assert master.grad is not None and torch.equal(master.grad, torch.full_like(master, 1.0 + 2.0**-11))
    optimizer.zero()
    (model.weight.t()[:, :1].sum() * 1.0).backward()
    assert master.grad is not None and master.grad.sum().item() == CHUNK + 3


def test_a_weight_without_a_gradient_is_left_alone() -> None:
    """Kills kept gradients of zero, under which AdamW still decays and drifts."""
    model = Linear(torch.bfloat16)
    optimizer = Optimizer(model, TrainSpec(weight_decay=0.5))
    for used in ("both", "matrix"):
        optimizer.zero()
        (model.matrix.sum() + (model.norm.sum() if used == "both" else 0.0)).backward()
        kept = optimizer.weights["norm"].detach().clone()
        optimizer.step(0.1)
    assert torch.equal(optimizer.weights["norm"], kept)
