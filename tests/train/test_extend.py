"""Where an extension begins: with what belongs together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_training import SOURCES, TASKS, make_batches, measure_with, trained_weights
from toy import tiny_llama
from tutelage.errors import TrainError
from tutelage.model import add_adapter
from tutelage.model.spec import Lora
from tutelage.train.extend import Beginning, KeptOrFresh
from tutelage.train.loop import Result, Task, Watch, train
from tutelage.train.micro import Names
from tutelage.train.spec import Constant, TrainSpec

SPEC = TrainSpec(checkpoint_every_steps=2, micro_batch_rows=2, seed=5, schedule=Constant())


def run(folder: Path, batches: Any, *, after: Beginning | None = None, measure: Any = None) -> tuple[Result, Any]:
    model = add_adapter(tiny_llama(), Lora(rank=4, alpha=8.0, dropout=0.1), seed=5)
    task = Task(SPEC, 1e-2, Names(TASKS, SOURCES), watch=Watch(every_steps=2), beginning=after)
    return train(model, batches, task, folder=folder, measure=measure), trained_weights(model)


def is_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], value) for name, value in right.items())


@pytest.mark.parametrize(("optimizer", "is_one_run"), [("kept", True), ("fresh", False)])
def test_two_parts_at_a_constant_rate_are_one_run_to_the_bit(tmp_path: Path, optimizer: KeptOrFresh, is_one_run: bool) -> None:
    """Kills an extension that forgets AdamW's moments or their count, or dropout's random state, and a `fresh` that keeps them."""
    batches = make_batches(6)
    _, whole = run(tmp_path / "whole", batches)
    first, _ = run(tmp_path / "first", batches[:4])
    after = Beginning(tmp_path / "first", first.final_step, optimizer)
    _, both = run(tmp_path / "second", batches[4:], after=after)
    assert is_same(both, whole) == is_one_run


def test_an_extension_begins_with_the_weights_that_the_run_handed_out(tmp_path: Path) -> None:
    """Kills an extension of the last weights where the run kept its best, and moments of one step beside weights of another."""
    batches = make_batches(6)
    first, best = run(tmp_path / "first", batches[:4], measure=measure_with(lambda step: abs(step - 2.0)))
    assert first.final_step == 2
    _, shorter = run(tmp_path / "shorter", [*batches[:2], *batches[4:]])
    _, onward = run(tmp_path / "second", batches[4:], after=Beginning(tmp_path / "first", first.final_step, "kept"))
    assert is_same(onward, shorter) and not is_same(onward, best)


def test_a_damaged_beginning_is_refused(tmp_path: Path) -> None:
    """Kills an extension of whatever parses."""
    batches = make_batches(2)
    first, _ = run(tmp_path / "first", batches)
    path = tmp_path / "first" / "checkpoints" / f"step-{first.final_step:06d}" / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(TrainError, match=r"optimizer\.safetensors is not what was written"):
        run(tmp_path / "second", batches, after=Beginning(tmp_path / "first", first.final_step, "kept"))
