"""Trackers are a convenience; steps.parquet is the truth."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from tiny_training import Look, run_tiny
from tutelage.errors import MissingExtra
from tutelage.records import Score, StepReport, Tally
from tutelage.train.log import held_out_scalars, scalars
from tutelage.train.trackers import open_trackers


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_tracker_whose_package_is_missing_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    """Kills an ImportError from deep inside after the model was loaded."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"`{name}` is not installed; .*tutelage\[trackers\]"):
        open_trackers((name,), tmp_path, run="r")


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is an extra")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_every_step(tmp_path: Path) -> None:
    """Kills a tracker that is opened and never written to."""
    run_tiny(tmp_path, 2, trackers=("tensorboard",))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "trackers" / "tensorboard")).Reload()
    assert {"loss", "task/maths", "kind/assistant", "learning_rate"} <= set(found.Tags()["scalars"])
    assert [event.step for event in found.Scalars("loss")] == [0, 1]


def test_what_trackers_draw_are_means() -> None:
    """Kills curves of sums, which grow with the batch."""
    report = StepReport(0, Tally(6.0, 3.0, 4), by_task={"maths": Tally(2.0, 4.0, 1)}, seconds=2.0, real_tokens=10, memory_bytes=7)
    assert scalars(report) == {
        "loss": 2.0, "grad_norm": 0.0, "learning_rate": 0.0, "tokens_per_second": 5.0, "memory_bytes": 7.0, "task/maths": 0.5
    }  # fmt: skip


def test_held_out_curves_are_the_aggregates_by_task() -> None:
    """Kills a curve per held-out record."""
    scores = (
        Score("", 3, "maths", "a:1", "nll", 20.0, 10.0),
        Score("", 3, "maths", "", "nll", 2.0, 10.0),
        Score("", 3, "", "", "nll", 2.5, 10.0),
        Score("", 3, "maths", "", "ended", 1.0, 2.0),
    )
    beside = (
        Score("", 4, "maths", "", "train_nll", 1.0),
        Score("", 4, "", "", "train_nll", 1.5),
        Score("", 4, "", "x", "nll", 9.0),
    )
    found = held_out_scalars(Look(2.5, (*scores, *beside)))
    assert found == {"held_out_loss": 2.5, "held_out/maths": 2.0, "train_nll": 1.5}
