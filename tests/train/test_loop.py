"""A run that is interrupted anywhere ends as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
import torch

from tiny_training import measure_with, run_tiny, trained_weights
from toy import tiny_llama
from tutelage import tables
from tutelage.errors import TrainError
from tutelage.store import Silent
from tutelage.train.loop import Watch
from tutelage.train.state import Checkpoints
from tutelage.train.stopping import Stopped

NUM_STEPS = 7
CHECKPOINT_FILES = ["weights.safetensors", "optimizer.safetensors", "random.safetensors", "position.json", "manifest.json"]


class Killed(Exception):
    """Stands for a process that is gone."""


class Listener(Silent):
    """Keeps what was said, and ends the world after so many steps of this process."""

    def __init__(self, die_after: int | None = None, interrupt_after: int | None = None) -> None:
        self.lines: list[str] = []
        self.texts: list[str] = []
        self.die_after, self.interrupt_after = die_after, interrupt_after

    def advance(self, amount: int = 1, text: str = "") -> None:
        if text:
            self.texts.append(text)
            if len(self.texts) == self.interrupt_after:
                os.kill(os.getpid(), signal.SIGINT)
            if len(self.texts) == self.die_after:
                raise Killed

    def note(self, text: str) -> None:
        self.lines.append(text)


def falling(step: int) -> float:
    return 3.0 - step / 10


def run(folder: Path, *, num_steps: int = NUM_STEPS, measure: Any = None, **changes: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    measure = measure or measure_with(falling)
    result, model = run_tiny(folder, num_steps, measure=measure, **({"every_steps": 3} | changes))
    return result, trained_weights(model)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run(folder)[1]


def step_lines(folder: Path) -> list[dict[str, Any]]:
    """steps.parquet without the clock and the memory."""
    return tables.read_table(folder / "steps.parquet", tables.STEPS).drop(["seconds", "memory_bytes"]).to_pylist()


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def assert_as(undisturbed: tuple[Path, dict[str, torch.Tensor]], folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """The same weights to the bit, and logs without a line lost or doubled."""
    assert weights.keys() == undisturbed[1].keys()
    assert all(torch.equal(weights[name], value) for name, value in undisturbed[1].items())
    assert step_lines(folder) == step_lines(undisturbed[0])
    mine, theirs = ([e for e in events(f) if e["event"] != "resume"] for f in (folder, undisturbed[0]))
    assert [e | {"time": 0} for e in mine] == [e | {"time": 0} for e in theirs]
    for read, name in ((tables.read_scores, "evals.parquet"), (tables.read_samples, "samples.parquet")):
        assert [(s.step, s.item) for s in read(folder / name)] == [(s.step, s.item) for s in read(undisturbed[0] / name)]


@pytest.mark.parametrize("die_after", range(1, NUM_STEPS + 1))
def test_a_run_killed_after_any_step_ends_to_the_bit_as_if_it_had_not_been(
    undisturbed: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, die_after: int
) -> None:
    """Kills a resume that restarts, that forgets dropout's random state, AdamW's moments or the rate, or writes lines twice."""
    with pytest.raises(Killed):
        run(tmp_path, progress=Listener(die_after=die_after))
    result, weights = run(tmp_path)
    assert result.position.step == result.final_step == NUM_STEPS
    assert_as(undisturbed, tmp_path, weights)


def test_a_run_killed_again_and_again_ends_the_same(undisturbed: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    """Kills state that survives one resume and not two."""
    for die_after in (3, 3, 2, 1):
        with pytest.raises(Killed):
            run(tmp_path, progress=Listener(die_after=die_after))
    assert_as(undisturbed, tmp_path, run(tmp_path)[1])


def test_a_finished_run_is_not_trained_again(undisturbed: tuple[Path, dict[str, torch.Tensor]]) -> None:
    """Kills a restart between the last step and the export that trains or measures once more."""
    listener = Listener()
    result, weights = run(undisturbed[0], progress=listener)
    assert listener.texts == [] and result.position.step == NUM_STEPS
    assert_as(undisturbed, undisturbed[0], weights)


@pytest.mark.parametrize("point", ["checkpoint:write", "checkpoint:rename", "checkpoint:done"])
def test_a_checkpoint_cut_off_at_any_point_leaves_one_that_can_be_gone_on_from(
    undisturbed: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Kills checkpoints written in place, and folders that look whole before they are."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")

    def fall(name: str) -> None:
        if name == point and checkpoints.steps() not in ([], [0]):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("tutelage.train.state.fault_point", fall)
        with pytest.raises(Killed):
            run(tmp_path)
    assert bool(list((tmp_path / "checkpoints").glob(".*"))) == (point != "checkpoint:done")
    assert_as(undisturbed, tmp_path, run(tmp_path)[1])


def test_sigkill_while_a_checkpoint_is_written_goes_back_to_the_one_before(
    undisturbed: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Kills state that only looks safe inside one process: this is a real one, and really killed."""
    with pytest.raises(Killed):
        run(tmp_path, progress=Listener(die_after=3))
    assert _process(tmp_path, "checkpoint:manifest") == -signal.SIGKILL
    (half,) = (tmp_path / "checkpoints").glob(".new-*")
    assert (half / "weights.safetensors").exists() and not (half / "manifest.json").exists()
    assert_as(undisturbed, tmp_path, run(tmp_path)[1])


def _process(folder: Path, kill_at: str) -> int:
    """The exit code of the same run as a process of its own that kills itself at a named point."""
    environment = os.environ | {"TUTELAGE_KILL_AT": kill_at, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tiny_training", str(folder), str(NUM_STEPS)]
    return subprocess.run(command, env=environment, timeout=120, check=False).returncode


@pytest.mark.parametrize("file", CHECKPOINT_FILES)
def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(
    undisturbed: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, file: str
) -> None:
    """Kills a run that stops for good, or goes on from damaged weights."""
    with pytest.raises(Killed):
        run(tmp_path, progress=Listener(die_after=5))
    path = tmp_path / "checkpoints" / "step-000004" / file
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    listener = Listener()
    _, weights = run(tmp_path, progress=listener)
    assert "checkpoint step-000004 is not used: " in listener.lines[0] and "going back to the one before it" in listener.lines[0]
    assert len(listener.texts) == NUM_STEPS - 3
    assert_as(undisturbed, tmp_path, weights)


def test_ctrl_c_finishes_the_step_and_leaves_a_state_to_go_on_from(
    undisturbed: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Kills a Ctrl-C that loses the steps since the last checkpoint, or tears a step apart."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match=r"stopped after step 3 of 7; everything so far is kept.*same command goes on") as caught:
        run(tmp_path, progress=Listener(interrupt_after=3))
    assert isinstance(caught.value, KeyboardInterrupt) and caught.value.signal_number == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == 3
    result, weights = run(tmp_path)
    assert weights.keys() and all(torch.equal(weights[n], v) for n, v in undisturbed[1].items())
    assert step_lines(tmp_path) == step_lines(undisturbed[0])
    assert [s.step for s in tables.read_scores(tmp_path / "evals.parquet")] == [0, 3, 6, 7], "the due measurement was made up for"
    assert result.position.best_step == NUM_STEPS


def test_measuring_changes_nothing_about_training(undisturbed: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    """Kills a measurement that moves dropout's random state or leaves the model in eval mode."""
    _, weights = run(tmp_path, every_steps=100, measure=lambda model, step: None)
    assert all(torch.equal(weights[name], value) for name, value in undisturbed[1].items())


def test_a_run_leaves_the_callers_random_state_alone(tmp_path: Path) -> None:
    """Kills a library that reseeds the whole program."""
    tiny_llama()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    run(tmp_path, num_steps=1)
    assert torch.equal(torch.rand(3), expected)


def test_the_best_weights_are_the_result(tmp_path: Path) -> None:
    """Kills a run that returns its last weights when the held-out loss was lower before."""
    result, weights = run(tmp_path / "best", measure=measure_with(lambda step: abs(step - 3) + 1.0))
    assert (result.final_step, result.position.best_step, result.position.best_loss) == (3, 3, 1.0)
    expected = Checkpoints(tmp_path / "best" / "checkpoints").load(3).weights
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    result, last = run(tmp_path / "last", measure=measure_with(lambda step: abs(step - 3) + 1.0), keep_best=False)
    assert result.final_step == NUM_STEPS
    assert any(not torch.equal(last[name], value) for name, value in weights.items())


def test_when_nothing_was_gained_the_starting_model_is_kept_and_that_is_said(tmp_path: Path) -> None:
    """Kills a best that is picked among the trained ones only, all worse than the start."""
    listener = Listener()
    result, weights = run(tmp_path, measure=measure_with(lambda step: 1.0 + step), progress=listener)
    assert result.final_step == 0
    assert "never fell below that of the starting model" in listener.lines[-1]
    assert all((value == 0).all() for name, value in weights.items() if "lora_B" in name)


def test_early_stopping_ends_the_run_after_so_many_measurements_without_a_gain(tmp_path: Path) -> None:
    """Kills patience counted in steps, and a gain of a hair that counts as one."""
    losses = {0: 3.0, 1: 2.0, 2: 1.95, 3: 1.5, 4: 1.45, 5: 1.41}
    patience: dict[str, Any] = {"every_steps": 1, "stop_after": 2, "min_gain": 0.1}
    listener = Listener()
    result, weights = run(tmp_path, measure=measure_with(lambda step: losses.get(step, 0.0)), progress=listener, **patience)
    assert result.position.is_stopped
    assert (result.position.step, result.position.best_step, result.final_step) == (5, 3, 3)
    assert listener.lines[-1] == "stopping after step 5 of 7: 2 measurements without a better one"
    again, same = run(tmp_path, measure=measure_with(lambda step: 0.0), **patience)
    assert again == result and all(torch.equal(same[name], value) for name, value in weights.items())


def test_a_held_out_loss_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    """Kills `nan < best`, and a first measurement of nan that nothing can beat."""
    result, _ = run(tmp_path, measure=measure_with(lambda step: float("nan") if step in (0, 7) else 2.0))
    assert result.position.best_step == 3


def test_without_measuring_the_last_weights_are_the_result(tmp_path: Path) -> None:
    """Kills a loop that needs evaluation to work."""
    result, _ = run_tiny(tmp_path, 2)
    assert (result.final_step, result.position.best_step) == (2, None)
    assert tables.read_scores(tmp_path / "evals.parquet") == []


def test_every_step_is_written_down_in_full(undisturbed: tuple[Path, dict[str, torch.Tensor]]) -> None:
    """Kills logs of every tenth step, and parts that do not add up to the whole."""
    table = tables.read_table(undisturbed[0] / "steps.parquet", tables.STEPS)
    whole = table.filter(pc.equal(table["part"], "all")).to_pylist()
    assert [line["step"] for line in whole] == list(range(NUM_STEPS))
    for line in whole:
        parts = [p for p in table.filter(pc.equal(table["step"], line["step"])).to_pylist() if p["part"] != "all"]
        for group in ("task", "source", "kind"):
            mine = [p for p in parts if p["part"].startswith(f"{group} ")]
            assert sum(p["loss_sum"] for p in mine) == pytest.approx(line["loss_sum"], rel=1e-12)
            assert sum(p["weight"] for p in mine) == pytest.approx(line["weight"], rel=1e-12)
            assert sum(p["tokens"] for p in mine) == line["tokens"]
    assert all(line["slots"] == 96 and 0 < line["real_tokens"] <= 84 and line["grad_norm"] > 0 for line in whole)


def test_the_bar_tells_loss_speed_and_time_left(tmp_path: Path) -> None:
    """Kills a bar that only counts."""
    listener = Listener()
    run(tmp_path, num_steps=2, progress=listener)
    assert [text.split(", ")[1].split()[1] for text in listener.texts] == ["tokens/s", "tokens/s"]
    assert all(text.startswith("loss ") and text.endswith(" left") for text in listener.texts)


def test_a_step_that_goes_wrong_stops_the_run_and_is_not_kept(tmp_path: Path) -> None:
    """Kills a run that checkpoints NaN weights: they would be gone on from."""

    def poison(model: Any, step: int) -> None:
        if step == 3:
            # behind attention: some kernels make a row of NaN scores a row of zeros
            next(p for n, p in model.named_parameters() if "down_proj.lora_A" in n).fill_(float("nan"))

    with pytest.raises(TrainError, match="step 3: the loss is not finite in 6 documents: example 18, "):
        run(tmp_path, measure=poison)
    assert Checkpoints(tmp_path / "checkpoints").steps() == [2]


def test_folders_of_another_run_are_refused(tmp_path: Path) -> None:
    """Kills a resume into a model of other shape."""
    run(tmp_path, num_steps=2)
    from tiny_training import SOURCES, TASKS, make_batches
    from tutelage.train.loop import Task, train
    from tutelage.train.micro import Names
    from tutelage.train.spec import TrainSpec

    with pytest.raises(TrainError, match="the checkpoint does not fit this model"):
        train(tiny_llama(), make_batches(2), Task(TrainSpec(), 1e-3, Names(TASKS, SOURCES)), folder=tmp_path)


def test_the_watch_takes_its_part_of_the_recipes_section() -> None:
    """Kills a key of the section that is renamed and silently falls back to its default."""
    from tutelage.evaluate.spec import EvaluateSpec

    section = EvaluateSpec(every_steps=5, stop_after=2, min_gain=0.5, keep_best=False).canonical()
    assert Watch.of(section) == Watch(5, 2, 0.5, False)
