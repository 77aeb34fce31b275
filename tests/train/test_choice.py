"""Other optimizers than AdamW, rates by group, and what both remember."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_training import make_batch, make_docs, run_tiny, trained_weights
from toy import tiny_llama
from tutelage.errors import TrainError
from tutelage.train.choice import rehearse
from tutelage.train.optimizer import Optimizer
from tutelage.train.spec import OtherOptimizer, TrainSpec
from tutelage.train.step import step_gradients

HERE = __name__


class SignedMomentum(torch.optim.Optimizer):
    """Shaped like Lion, and careless about where it remembers: a tensor and a number by weight, and one of the group."""

    def __init__(self, params: Any, lr: float = 1e-3, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "scale": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["scale"] *= 0.9
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                state.setdefault("mean", torch.zeros_like(weight))
                state["count"] = state.get("count", 0) + 1
                state["is_warm"] = state["count"] > 2
                state["mean"].lerp_(weight.grad, 1 - group["beta"])
                move = state["mean"].sign() if state["is_warm"] else weight.grad
                weight.add_(move, alpha=-group["lr"] * group["scale"] / state["count"])


class Hoarder(torch.optim.SGD):
    """Remembers what no checkpoint can hold."""

    def step(self, closure: Any = None) -> Any:
        self.state[self.param_groups[0]["params"][0]]["past"] = ["a"]
        return super().step(closure)


class TwoFaced(torch.optim.SGD):
    """Shaped like a schedule-free optimizer."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


class RateFree(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})


def spec(module: str, **args: Any) -> TrainSpec:
    return TrainSpec(optimizer=OtherOptimizer(module=module, args=args))


OTHERS = {
    "sgd with momentum": ("torch.optim:SGD", {"momentum": 0.9, "nesterov": True}),
    "adafactor": ("torch.optim:Adafactor", {}),
    "of a user": (f"{HERE}:SignedMomentum", {"beta": 0.8}),
}


@pytest.mark.parametrize(("module", "args"), OTHERS.values(), ids=OTHERS)
def test_any_optimizer_goes_on_from_what_was_kept_to_the_bit(module: str, args: dict[str, Any]) -> None:
    """Kills checkpoints that know AdamW's moments only: numbers by weight and by group are forgotten."""
    batch = make_batch([make_docs(2, seed=1)])
    rehearse(spec(module, **args))

    def advance(model: torch.nn.Module, optimizer: Optimizer, num_steps: int) -> dict[str, torch.Tensor]:
        for _ in range(num_steps):
            optimizer.zero()
            step_gradients(model, batch)
            optimizer.step(1e-3)
        return {name: weight.detach().clone() for name, weight in optimizer.weights.items()}

    model = tiny_llama()
    optimizer = Optimizer(model, spec(module, **args))
    kept = advance(model, optimizer, 2)
    memory = {name: value.clone() for name, value in optimizer.memory().items()}
    expected = advance(model, optimizer, 3)

    other = tiny_llama(seed=9)
    fresh = Optimizer(other, spec(module, **args))
    fresh.restore(kept, memory)
    found = advance(other, fresh, 3)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    forgetful = Optimizer(other, spec(module, **args))
    forgetful.restore(kept, {})
    found = advance(other, forgetful, 3)
    assert not all(torch.equal(found[name], expected[name]) for name in expected), "this optimizer remembers nothing"


def test_a_run_with_another_optimizer_is_resumed_from_its_files_to_the_bit(tmp_path: Path) -> None:
    """Kills memory that does not survive safetensors: its names, its empty shapes, its kinds of numbers."""
    choice = OtherOptimizer(module=f"{HERE}:SignedMomentum")
    _, whole = run_tiny(tmp_path / "a", 6, optimizer=choice)
    run_tiny(tmp_path / "b", 6, optimizer=choice)
    folder = tmp_path / "b" / "checkpoints"
    newest = sorted(folder.glob("step-*"))[-1]
    newest.rename(tmp_path / "gone")
    _, resumed = run_tiny(tmp_path / "b", 6, optimizer=choice)
    expected = trained_weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in trained_weights(resumed).items())


@pytest.mark.parametrize(
    ("module", "args", "message"),
    [
        ("torch.optm:SGD", {}, r"train\.optimizer: cannot import 'torch\.optm'"),
        ("torch.optim:SGDD", {}, "no 'SGDD'; did you mean `SGD`"),
        ("torch.nn:Linear", {}, "is no torch.optim.Optimizer"),
        ("torch.optim:SGD", {"momentun": 0.9}, r"train\.optimizer\.args\.momentun: .*did you mean `momentum`"),
        ("torch.optim:SGD", {"momentum": -1}, "refuses its arguments: Invalid momentum"),
        ("torch.optim:LBFGS", {}, "closure"),
        (f"{HERE}:Hoarder", {}, "remembers `past` as a list"),
        (f"{HERE}:TwoFaced", {}, "other weights for training"),
        (f"{HERE}:RateFree", {}, "takes no `lr`"),
    ],
)
def test_an_optimizer_of_no_use_is_refused_before_anything_is_loaded(module: str, args: dict[str, Any], message: str) -> None:
    """Kills a run that ends at its first checkpoint, or one whose schedule moves nothing."""
    with pytest.raises(TrainError, match=message):
        rehearse(spec(module, **args))


def test_what_only_adamw_reads_is_refused_beside_another() -> None:
    """Kills a `weight_decay` in the recipe that nothing reads."""
    with pytest.raises(ValueError, match=r"`weight_decay` are AdamW's; say them in `optimizer.args`"):
        TrainSpec(optimizer=OtherOptimizer(module="torch.optim:SGD"), weight_decay=0.1)
    with pytest.raises(ValueError, match=r"`args\.lr` is what"):
        OtherOptimizer(module="torch.optim:SGD", args={"lr": 0.1})


class Three(torch.nn.Module):
    """Three weights with gradients of one."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("low", "high", "rest"):
            setattr(self, name, torch.nn.Linear(1, 1, bias=False, dtype=torch.float64))
        torch.nn.init.ones_(self.low.weight)
        torch.nn.init.ones_(self.high.weight)
        torch.nn.init.ones_(self.rest.weight)

    def weights(self) -> list[float]:
        return [float(p.detach()) for p in self.parameters()]


def moved(groups: list[dict[str, Any]], *, rates: tuple[float, ...], make: Callable[[], Three] = Three, **more: Any) -> Three:
    model = make()
    given = {"optimizer": OtherOptimizer(module="torch.optim:SGD")} | more
    optimizer = Optimizer(model, TrainSpec(groups=groups, **given), peak=0.1)
    for rate in rates:
        optimizer.zero()
        sum(p.sum() for p in model.parameters()).backward()
        optimizer.step(rate)
    return model


def test_each_group_follows_the_schedule_from_its_own_peak() -> None:
    """Kills groups whose rate is ignored, or stays at its peak while the schedule falls. By hand: SGD moves by its rate."""
    groups = [{"match": "high", "learning_rate": 0.4}, {"match": "low", "learning_rate": 0.01}]
    found = moved(groups, rates=(0.1, 0.05)).weights()
    assert found == pytest.approx([1 - 0.01 - 0.005, 1 - 0.4 - 0.2, 1 - 0.1 - 0.05], abs=1e-15)


def test_the_first_group_that_matches_has_the_weight_and_decay_is_its_own() -> None:
    """Kills a last match that wins, and a group's decay that falls back to the run's."""
    groups = [{"match": "h*", "weight_decay": 0.5}, {"match": "*.weight", "learning_rate": 0.2}]
    found = moved(groups, rates=(0.1,), optimizer={"kind": "adamw"}, weight_decay=0.25).weights()
    # AdamW: decay by rate * decay, then a first step of the rate itself.
    assert found == pytest.approx([1 - 0.2 * 0.25 - 0.2, 1 - 0.1 * 0.5 - 0.1, 1 - 0.2 * 0.25 - 0.2], abs=1e-6)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"match": "hihg", "learning_rate": 0.1}], r"train\.groups\.0\.match: 'hihg' matches no weight.*`high`"),
        (
            [{"match": "*", "learning_rate": 0.1}, {"match": "low", "learning_rate": 0.2}],
            r"train\.groups\.1\.match: every weight",
        ),
    ],
)
def test_a_group_without_weights_is_refused(groups: list[dict[str, Any]], message: str) -> None:
    """Kills a misspelt pattern that leaves everything at the common rate."""
    with pytest.raises(TrainError, match=message):
        moved(groups, rates=())


def test_decay_for_a_class_that_has_none_is_refused() -> None:
    """Kills a torch optimizer's habit of taking any key in a group and reading none of it."""
    with pytest.raises(TrainError, match="knows no `weight_decay`"):
        moved([{"match": "low", "weight_decay": 0.1}], rates=(), optimizer=OtherOptimizer(module=f"{HERE}:SignedMomentum"))
