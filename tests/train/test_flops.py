"""Operations are counted from what a model executes: a formula against torch's own counter, and the cases that differ."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tiny_training import TASKS, make_batch, make_batches, make_docs
from toy import tiny_llama, tiny_model
from tutelage.errors import TrainError
from tutelage.model import Learner, add_adapter
from tutelage.model.spec import Lora
from tutelage.train.flops import ModelWork, executed, num_pairs, step_flops
from tutelage.train.loop import Task
from tutelage.train.micro import Names, flatten
from tutelage.train.profile import PARTS, matmul_ceiling, profile_steps, split_marks
from tutelage.train.spec import TrainSpec
from tutelage.train.step import step_gradients
from tutelage.train.work import work_of


def counted(model: Any) -> tuple[int, int]:
    """(ours, torch's counter) of the linear and head products of one step; attention is counted by pairs here, not there."""
    batch = make_batch([make_docs(2, seed=1)])
    lengths, num_targets = executed(flatten(batch), 1)
    ours = step_flops(work_of(model), lengths, num_targets=num_targets)
    with FlopCounterMode(display=False) as counter:
        step_gradients(Learner(model.train()), batch)
    products = {str(op): value for op, value in counter.get_flop_counts()["Global"].items()}
    return ours.linear + ours.head, sum(products.get(f"aten.{name}", 0) for name in ("mm", "addmm"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
def test_a_fully_trained_model_is_counted_to_the_last_product(kind: str, tied: bool) -> None:
    """Kills counting parameters in place of products, a head that meets every token, and a missing weight gradient."""
    ours, torchs = counted(tiny_model(kind, tied=tied))
    assert ours == torchs


def test_adapters_are_never_counted_for_more_than_they_do() -> None:
    """Kills the weight gradient of a frozen layer and the backward pass below the lowest adapter, which nobody makes."""
    ours, torchs = counted(add_adapter(tiny_llama(), Lora(rank=4)))
    assert 0.8 * torchs < ours <= torchs
    whole, _ = counted(tiny_llama())
    assert ours < 0.9 * whole
    upper, torchs = counted(add_adapter(tiny_llama(), Lora(rank=4, top_layers=1)))
    assert 0.6 * torchs < upper <= torchs
    assert upper < ours


def test_a_window_and_frozen_layers_change_the_attention() -> None:
    """Kills a window that is ignored, and attention of frozen layers counted with a backward pass."""
    work = work_of(tiny_model("mistral"))
    assert [attention.window for attention in work.attention] == [4, 4]
    assert num_pairs([10], 4) == sum(min(i + 1, 4) for i in range(10)) < num_pairs([10])
    lora = work_of(add_adapter(tiny_llama(), Lora(rank=4, top_layers=1)))
    assert [attention.needs_gradient for attention in lora.attention] == [False, False]
    assert [attention.needs_gradient for attention in work_of(tiny_llama()).attention] == [True, True]


def test_a_pass_in_which_nothing_is_learned_is_not_counted() -> None:
    """Kills counting rows that never met the model."""
    learned, silent = make_docs(2, seed=3)
    silent = type(silent)(silent.ids, (0.0,) * len(silent.weights))
    flat = flatten(make_batch([[learned], [silent]]))
    lengths, num_targets = executed(flat, 1)
    assert lengths == [len(learned.ids)]
    assert num_targets == sum(w > 0 for w in learned.weights)
    assert executed(flat, 2)[0] == [len(learned.ids), len(silent.ids)]


@pytest.fixture
def quick_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ceiling is measured with a small product, where its worth is not looked at."""
    monkeypatch.setattr("tutelage.train.profile.CEILING_SECONDS", 0.01)


def make_task(**changes: Any) -> Task:
    return Task(TrainSpec(**({"micro_batch_rows": 1} | changes)), 1e-2, Names(TASKS, ("left", "right")))


@pytest.mark.usefixtures("quick_ceiling")
def test_a_profile_leaves_no_trace_and_its_parts_add_up() -> None:
    """Kills a profile that leaves hooks or gradients behind, draws from the caller's generator, or loses time."""
    model = tiny_llama()
    state = torch.get_rng_state()
    profile = profile_steps(model, make_batches(2), make_task(), num_steps=2)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert not model.base_model._forward_hooks and not model.base_model._forward_pre_hooks
    assert set(profile.seconds) == set(PARTS)
    assert sum(profile.seconds.values()) == pytest.approx(profile.step_seconds)
    assert all(profile.seconds[part] > 0 for part in ("forward", "loss", "backward", "optimizer", "logging"))
    assert profile.real_tokens == sum(batch.real_tokens for batch in (make_batches(2)[1], make_batches(2)[0]))
    told = profile.as_json()
    assert told["ceiling_share"] == pytest.approx(
        told["flops"]["total"] / told["step_seconds"] / told["ceiling_flops_per_second"]
    )


def test_forward_loss_and_backward_are_told_apart_over_several_passes() -> None:
    """Kills charging the backward pass of an earlier micro-batch to the forward of the next."""
    marks: list[tuple[str, float]] = [("begin gradients", 0.0)]
    for first in (1.0, 11.0):  # a decoder of 2, a loss of 3, then a backward of 5
        marks += [("begin learner", first), ("begin decoder", first), ("end decoder", first + 2), ("end learner", first + 5)]
    parts = split_marks([*marks, ("end gradients", 21.0)])
    assert parts == {"data": 1.0, "forward": 4.0, "loss": 6.0, "backward": 10.0}


def test_what_cannot_be_timed_is_refused() -> None:
    """Kills a division by nothing, and a profile of our loop under the name of another engine."""
    with pytest.raises(TrainError, match="no step to profile"):
        profile_steps(tiny_llama(), [], make_task())
    with pytest.raises(TrainError, match=r"train\.engine"):
        profile_steps(tiny_llama(), make_batches(1), make_task(engine="hf_trainer"))


@pytest.mark.usefixtures("quick_ceiling")
def test_a_profile_is_the_loop_itself() -> None:
    """Kills a profile of steps of its own making: the weights it ends with must be those of a run over the same steps."""
    from tutelage.train.loop import train

    profiled, trained, task = tiny_llama(), tiny_llama(), make_task(trackers=("tensorboard",))
    profile_steps(profiled, make_batches(3), task, num_steps=2)
    quiet = dataclasses.replace(task, spec=task.spec.model_copy(update={"trackers": ()}))
    with tempfile.TemporaryDirectory() as folder:
        train(trained, make_batches(3), quiet, folder=Path(folder))
    for (name, ours), theirs in zip(profiled.named_parameters(), trained.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_ceiling_grows_only_while_products_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills minutes spent on a machine without bfloat16 instructions, and a rate of another size than was timed."""
    import tutelage.train.profile as module

    sizes: list[int] = []

    def slow(size: int, *_: Any) -> float:
        sizes.append(size)
        return 10.0 * (size / 4096) ** 3

    monkeypatch.setattr(module, "_product_seconds", slow)
    assert matmul_ceiling(torch.float32, "cpu") == pytest.approx(2 * 4096**3 / 10.0)
    assert max(sizes) == 2048
    monkeypatch.setattr(module, "_product_seconds", lambda size, *_: 1e-4 * (size / 4096) ** 3)
    assert matmul_ceiling(torch.float32, "cpu") == pytest.approx(2 * 4096**3 / 1e-4)


def test_work_without_attention_layers_still_counts() -> None:
    """Kills a sum over nothing."""
    work = ModelWork((), (), work_of(tiny_llama()).head)
    assert step_flops(work, [3], num_targets=0).total == 0
