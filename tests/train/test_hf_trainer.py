"""transformers' Trainer over our batches: the loop's numbers, everybody's callbacks, and a resume that goes on exactly."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from small_recipe import write_small
from tiny_training import SOURCES, TASKS, make_batches, measure_with, run_tiny, trained_weights
from toy import tiny_llama
from tutelage import tables
from tutelage.errors import MissingExtra, TrainError
from tutelage.pipeline import run
from tutelage.recipe import load_recipe
from tutelage.store import Silent
from tutelage.train.loop import Task, train
from tutelage.train.micro import Names
from tutelage.train.spec import TrainSpec
from tutelage.train.stopping import Stopped

NUM_STEPS = 6


class Heard(TrainerCallback):
    """Writes down what it is told; stops, or asks for more, at the steps in its class attributes."""

    calls: ClassVar[list[tuple[str, int]]] = []
    logs: ClassVar[list[dict[str, float]]] = []
    stop_at: int | None = None
    evaluate_at: int | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.calls.append(("begin", state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.calls.append(("end", state.global_step))
        control.should_training_stop = state.global_step == self.stop_at or control.should_training_stop
        control.should_evaluate = state.global_step == self.evaluate_at

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.calls.append(("evaluate", state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


class Counting(TrainerCallback, ExportableState):
    """Counts steps over a kill; the last instance is kept."""

    last: Counting

    def __init__(self, count: int = 0) -> None:
        self.count = count
        type(self).last = self

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.count += 1

    def state(self) -> dict[str, Any]:
        return {"args": {"count": self.count}, "attributes": {}}


class Needy(TrainerCallback):
    def __init__(self, what: str) -> None:
        self.what = what


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    Heard.calls, Heard.logs, Heard.stop_at, Heard.evaluate_at = [], [], None, None
    yield


class DiesAfter(Silent):
    """Ends the world after so many steps."""

    def __init__(self, num_steps: int) -> None:
        self.left = num_steps

    def advance(self, amount: int = 1, text: str = "") -> None:
        self.left -= bool(text)
        if self.left == 0:
            raise KeyboardInterrupt


def steps_of(folder: Path) -> list[dict[str, Any]]:
    left_out = ("seconds", "memory_bytes")
    rows = tables.read_table(folder / "steps.parquet", tables.STEPS).to_pylist()
    return [{name: value for name, value in row.items() if name not in left_out} for row in rows]


def both(folder: Path, **changes: Any) -> list[tuple[Any, Any]]:
    """(result, model) of the loop and of the Trainer, in folders of their own."""
    return [run_tiny(folder / engine, NUM_STEPS, engine=engine, **changes) for engine in ("loop", "hf_trainer")]


def full(folder: Path, engine: str, dtype: torch.dtype, **changes: Any) -> Any:
    """A full run of a tiny model; returns the model."""
    model = tiny_llama(dtype=dtype)
    spec = TrainSpec(engine=engine, micro_batch_rows=1, **changes)
    train(model, make_batches(NUM_STEPS), Task(spec, 1e-2, Names(TASKS, SOURCES)), folder=folder)
    return model


@pytest.mark.parametrize("micro_batch_rows", [1, 2, None], ids=["3x1", "2x2", "1x3"])
def test_the_trainer_does_what_the_loop_does(tmp_path: Path, micro_batch_rows: int | None) -> None:
    """Kills a division by accumulation steps or items, a schedule one step late, and dropout drawn from another state."""
    changes = {"micro_batch_rows": micro_batch_rows, "measure": measure_with(lambda step: 3.0 - step / 10), "every_steps": 3}
    (_, by_loop), (result, by_trainer) = both(tmp_path, **changes)
    for name, value in trained_weights(by_loop).items():
        torch.testing.assert_close(trained_weights(by_trainer)[name], value, rtol=0, atol=1e-12, msg=name)
    ours, theirs = steps_of(tmp_path / "loop"), steps_of(tmp_path / "hf_trainer")
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == {k: pytest.approx(v, abs=1e-12) if isinstance(v, float) else v for k, v in other.items()}
    assert result.position.best_step == NUM_STEPS
    looks = [[(s.step, s.value) for s in tables.read_scores(tmp_path / e / "evals.parquet")] for e in ("loop", "hf_trainer")]
    assert looks[0] == looks[1] and len(looks[0]) == 3


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (torch.float64, {"max_grad_norm": 0.05}),
        (torch.float64, {"max_grad_norm": None, "schedule": {"kind": "linear", "warmup_share": 0.5}}),
        (torch.bfloat16, {}),
    ],
    ids=["clipped", "unclipped", "bfloat16"],
)
def test_full_tuning_ends_at_the_same_weights(tmp_path: Path, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    """Kills clipping done twice or on the wrong gradients, and bfloat16 weights updated without their masters."""
    ours = full(tmp_path / "loop", "loop", dtype, **changes)
    theirs = full(tmp_path / "hf_trainer", "hf_trainer", dtype, **changes)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(other, mine, rtol=0, atol=1e-12, msg=name)
    norms = [[row["grad_norm"] for row in steps_of(tmp_path / e) if row["part"] == "all"] for e in ("loop", "hf_trainer")]
    assert norms[0] == pytest.approx(norms[1], abs=1e-12)
    assert "use_cache" in theirs.config.to_dict() and theirs.config.use_cache == ours.config.use_cache


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """Kills a resume that skips batches, draws dropout anew, restarts the schedule, or forgets what callbacks kept."""
    changes = {"engine": "hf_trainer", "callbacks": ("test_hf_trainer:Counting",), "every_steps": 2}
    measure = measure_with(lambda step: abs(step - 4.0))
    _, calm = run_tiny(tmp_path / "calm", NUM_STEPS, measure=measure, **changes)
    assert Counting.last.count == NUM_STEPS
    for left in (3, 2):
        with pytest.raises(KeyboardInterrupt):
            run_tiny(tmp_path / "rough", NUM_STEPS, measure=measure, progress=DiesAfter(left), **changes)
    result, rough = run_tiny(tmp_path / "rough", NUM_STEPS, measure=measure, **changes)
    assert Counting.last.count == NUM_STEPS
    assert result.final_step == 4 and all(torch.equal(trained_weights(rough)[n], v) for n, v in trained_weights(calm).items())
    assert steps_of(tmp_path / "rough") == steps_of(tmp_path / "calm")
    assert not list((tmp_path / "rough").rglob("*.pt")) and not list((tmp_path / "rough").rglob("*.bin")), "no pickles"
    folders = {p.name for p in (tmp_path / "rough" / "trainer").glob("step-*")}
    assert folders <= {p.name for p in (tmp_path / "rough" / "checkpoints").iterdir()}


class SignalsAfter(DiesAfter):
    """Asks the process to stop after so many steps, as a scheduler does."""

    def advance(self, amount: int = 1, text: str = "") -> None:
        self.left -= bool(text)
        if self.left == 0 and text:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_asked_to_stop_keeps_everything_and_goes_on(tmp_path: Path) -> None:
    """Kills an engine that swallows the stop, or goes on without the steps it had taken."""
    _, calm = run_tiny(tmp_path / "calm", NUM_STEPS, engine="hf_trainer")
    with pytest.raises(Stopped, match="stopped after step 3 of 6"):
        run_tiny(tmp_path / "asked", NUM_STEPS, engine="hf_trainer", progress=SignalsAfter(3))
    _, again = run_tiny(tmp_path / "asked", NUM_STEPS, engine="hf_trainer")
    assert all(torch.equal(trained_weights(again)[n], v) for n, v in trained_weights(calm).items())


def test_callbacks_hear_every_step_and_every_measurement(tmp_path: Path) -> None:
    """Kills callbacks that are made and never called, and logs without loss."""
    Heard.evaluate_at = 5
    changes = {"engine": "hf_trainer", "callbacks": ("test_hf_trainer:Heard",), "every_steps": 3}
    run_tiny(tmp_path, NUM_STEPS, measure=measure_with(lambda step: 1.0), **changes)
    ends = [step for what, step in Heard.calls if what == "end"]
    assert ends == [1, 2, 3, 4, 5, 6] and [s for w, s in Heard.calls if w == "begin"] == [0, 1, 2, 3, 4, 5]
    assert [step for what, step in Heard.calls if what == "evaluate"] == [3, 5, 6]
    losses = [row["loss_sum"] / row["weight"] for row in steps_of(tmp_path) if row["part"] == "all"]
    assert [log["loss"] for log in Heard.logs if "loss" in log] == pytest.approx(losses, rel=1e-6), "it adds up in float32"
    assert [log["eval_loss"] for log in Heard.logs if "eval_loss" in log] == [1.0, 1.0, 1.0]
    assert [s.step for s in tables.read_scores(tmp_path / "evals.parquet")] == [0, 3, 5, 6]


def test_a_callback_that_stops_the_run_leaves_a_finished_one(tmp_path: Path) -> None:
    """Kills a stop that throws the last steps away, and one that the next start goes past."""
    Heard.stop_at = 4
    changes = {"engine": "hf_trainer", "callbacks": ("test_hf_trainer:Heard",), "every_steps": 6}
    measure = measure_with(lambda step: 3.0 - step / 10)
    result, model = run_tiny(tmp_path, NUM_STEPS, measure=measure, **changes)
    assert result.position.is_stopped and (result.position.step, result.final_step) == (4, 4)
    again, same = run_tiny(tmp_path, NUM_STEPS, measure=measure, **changes)
    assert again.position.step == 4
    assert all(torch.equal(trained_weights(same)[n], v) for n, v in trained_weights(model).items())
    events = [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert events.count("callback_stop") == 1


def test_the_callers_random_states_are_left_alone(tmp_path: Path) -> None:
    """Kills the Trainer's seeding of every generator of the process."""
    import random

    import numpy as np

    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    run_tiny(tmp_path, 1, engine="hf_trainer")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:Heard", r"train\.callbacks: `no_such_module:Heard` cannot be imported"),
        ("test_hf_trainer:Herd", r"is no `transformers.TrainerCallback`; did you mean `Heard`"),
        ("test_hf_trainer:Path", r"is no `transformers.TrainerCallback`"),
        ("test_hf_trainer:Needy", r"cannot be made without arguments.*derive a class"),
    ],
)
def test_what_is_no_callback_is_said(tmp_path: Path, name: str, message: str) -> None:
    """Kills a misspelt callback that is never heard of again."""
    with pytest.raises(TrainError, match=message):
        run_tiny(tmp_path, 1, engine="hf_trainer", callbacks=(name,))


def test_without_accelerate_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills a traceback from inside transformers."""
    import sys

    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtra, match=r"tutelage\[hf\]"):
        run_tiny(tmp_path, 1, engine="hf_trainer")


def test_callbacks_are_refused_for_the_loop() -> None:
    """Kills callbacks that a recipe names and nobody calls."""
    with pytest.raises(ValueError, match="engine: hf_trainer"):
        TrainSpec(callbacks=("a:B",))


def test_watch_still_stops_early(tmp_path: Path) -> None:
    """Kills an engine that never asks whether the run is over."""
    result, _ = run_tiny(tmp_path, NUM_STEPS, engine="hf_trainer", measure=measure_with(float), every_steps=1, stop_after=2)
    assert result.position.is_stopped and result.position.step == 2 and result.final_step == 0


def test_a_recipe_gives_the_same_folder_through_either_engine(tmp_path: Path) -> None:
    """Kills an engine that the pipeline, the logs or the export do not know."""
    small = ["mix.epochs=1", "evaluate.samples=1", "evaluate.max_new_tokens=2", "evaluate.every_steps=2"]
    path = write_small(tmp_path, num_records=16)
    found = {}
    for engine in ("loop", "hf_trainer"):
        recipe = load_recipe(path, overrides=[*small, f"train.engine={engine}"])
        found[engine] = run(recipe, store=tmp_path / "store", runs=tmp_path / engine, until="train")
    folders = [done.folder for done in found.values()]
    assert steps_of(folders[0]) == steps_of(folders[1]) and found["loop"].artefacts["train"].key != (
        found["hf_trainer"].artefacts["train"].key
    )
    files = [{p.relative_to(folder).as_posix() for p in folder.rglob("*")} for folder in folders]
    assert files[0] == files[1] and "model/adapter_model.safetensors" in files[0]
    weights = [(folder / "model" / "adapter_model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
