"""A run killed thirty times, a step dropped half done, a measurement cut short: it ends as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from killed_training import IN_CHECKPOINTS, NUM_KILLS
from tiny_training import Look, measure_with, run_tiny, trained_weights
from tutelage import tables
from tutelage.train.state import Checkpoints
from tutelage.train.stopping import INTERRUPTED, Abandoned, Stopped, StopRequest, listening

NUM_STEPS = 60


@pytest.mark.slow
def test_sixty_steps_killed_thirty_times_are_the_steps_of_one_run(tmp_path: Path) -> None:
    """Kills a resume that skips or repeats a batch, restarts optimizer or dropout, or reads a half-written checkpoint.

    Every try is a process of its own, really killed: five inside checkpoint writing, the others from outside, anywhere in a step.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "killed_training", str(tmp_path), str(NUM_STEPS)]
    done = subprocess.run(command, env=environment, timeout=300, check=True, capture_output=True, text=True)
    told = json.loads(done.stdout)
    assert len(IN_CHECKPOINTS) == 5
    assert told["codes"] == [0, *[-signal.SIGKILL] * NUM_KILLS, 0]
    expected = dict(told["expected"])
    assert list(expected) == list(range(NUM_STEPS)) and len(set(expected.values())) == NUM_STEPS
    for trained in told["tries"]:
        steps = [step for step, _ in trained]
        assert steps == list(range(steps[0], steps[0] + len(steps)))
        assert all(key == expected[step] for step, key in trained), "a batch was not the one of its step"
    assert sum(map(len, told["tries"])) > NUM_STEPS, "what was lost was trained again"
    calm, rough = told["digests"]
    assert rough == calm
    lines = [
        tables.read_table(tmp_path / name / "steps.parquet", tables.STEPS).drop(["seconds", "memory_bytes"])
        for name in ("calm", "rough")
    ]
    assert lines[0].equals(lines[1])


def run(folder: Path, *, measure: Any = None, num_steps: int = 4, **changes: Any) -> dict[str, torch.Tensor]:
    measure = measure or measure_with(lambda step: 3.0 - step / 10)
    _, model = run_tiny(folder, num_steps, measure=measure, **({"every_steps": 2} | changes))
    return trained_weights(model)


def is_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], value) for name, value in right.items())


def ask_in_pass(monkeypatch: pytest.MonkeyPatch, number: int, *, signal_number: int = signal.SIGTERM) -> list[int]:
    """The passes that were begun; the signal comes at the end of pass `number`."""
    from tutelage.train import step

    right, begun = step._pass_gradients, list[int]()

    def wrong(*args: Any, **more: Any) -> Any:
        begun.append(len(begun))
        out = right(*args, **more)
        if len(begun) == number + 1:
            os.kill(os.getpid(), signal_number)
        return out

    monkeypatch.setattr(step, "_pass_gradients", wrong)
    return begun


@pytest.mark.parametrize(("within", "kept_steps", "passes"), [(1e-6, 2, 7), (600.0, 3, 9)], ids=["dropped", "finished"])
def test_a_step_that_does_not_fit_into_the_deadline_is_dropped_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, within: float, kept_steps: int, passes: int
) -> None:
    """Kills a deadline that is slept through, a step whose half gradient or dropout draws are kept, and one always dropped."""
    expected = run(tmp_path / "calm", micro_batch_rows=1)
    with monkeypatch.context() as patch:
        begun = ask_in_pass(patch, 6)  # three passes a step: in the first of step 2
        with pytest.raises(Stopped, match=f"stopped after step {kept_steps} of 4") as caught:
            run(tmp_path / "rough", micro_batch_rows=1, stop_within_seconds=within)
    assert (len(begun), caught.value.exit_code) == (passes, 143)
    assert Checkpoints(tmp_path / "rough" / "checkpoints").steps()[-1] == kept_steps
    assert is_same(run(tmp_path / "rough", micro_batch_rows=1), expected)


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_measurement_is_cut_short_and_made_up_for(tmp_path: Path, at: int) -> None:
    """Kills a SIGTERM that waits for a long measurement, one that counts it as made, and one that only the last step misses."""
    expected = run(tmp_path / "calm")
    calls = []

    def measure(model: Any, step: int) -> Look:
        calls.append(step)
        if step == at and calls.count(at) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the measurement went on")
        torch.rand(3)
        return measure_with(lambda step: 3.0 - step / 10)(model, step)

    with pytest.raises(Stopped) as caught:
        run(tmp_path / "rough", measure=measure, requeue_exit_code=75)
    assert (caught.value.exit_code, caught.value.signal_number) == (75, signal.SIGTERM)
    assert is_same(run(tmp_path / "rough", measure=measure), expected)
    assert [score.step for score in tables.read_scores(tmp_path / "rough" / "evals.parquet")] == [0, 2, 4]


def test_ctrl_c_has_an_exit_code_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills a scheduler that requeues what a person has stopped."""
    ask_in_pass(monkeypatch, 0, signal_number=signal.SIGINT)
    with pytest.raises(Stopped) as caught:
        run(tmp_path, requeue_exit_code=75)
    assert caught.value.exit_code == INTERRUPTED == 130


def test_a_resume_with_other_micro_batches_gives_the_same_weights(tmp_path: Path) -> None:
    """Kills a position counted in micro-batches, and a gradient that depends on how a step is cut."""
    calm = run(tmp_path / "calm", micro_batch_rows=1, dropout=0.0)
    with pytest.MonkeyPatch.context() as patch:
        ask_in_pass(patch, 3)
        with pytest.raises(Stopped, match="after step 2"):
            run(tmp_path / "rough", micro_batch_rows=1, dropout=0.0)
    rough = run(tmp_path / "rough", micro_batch_rows=3, dropout=0.0)
    assert all(torch.allclose(rough[name], value, rtol=0, atol=1e-12) for name, value in calm.items())
    keys = [
        [e["batch_key"] for e in map(json.loads, (tmp_path / name / "events.jsonl").read_text().splitlines()) if "batch_key" in e]
        for name in ("calm", "rough")
    ]
    assert keys[0] == keys[1] and len(keys[0]) == 4


class Clock:
    """Stands where it is put."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@example(asked_after=0, num_passes=5, seconds=1.0, within=5.0, save=2.0)  # fits but for the checkpoint
@given(
    asked_after=st.integers(0, 11),
    num_passes=st.integers(1, 12),
    seconds=st.floats(0.1, 5.0),
    within=st.floats(1.0, 60.0),
    save=st.floats(0.0, 5.0),
)
def test_the_deadline_is_kept_wherever_one_pass_and_a_checkpoint_fit(
    asked_after: int, num_passes: int, seconds: float, within: float, save: float
) -> None:
    """Kills an estimate that forgets the checkpoint, the passes still to come, or the time since the signal."""
    clock = Clock()
    asked = StopRequest(within, clock=clock)
    asked.took(save=save)
    done = 0
    try:
        for _ in asked.in_time(range(num_passes)):
            if done == asked_after:
                asked.ask(signal.SIGTERM)
            clock.now += seconds
            done += 1
    except Abandoned:
        pass
    waited = within - asked.seconds_left if asked.number() else 0.0
    assert waited <= max(within - save, seconds) + 1e-9
    fits = (num_passes - asked_after) * seconds + 2 * save <= within
    if not asked.number() or fits:
        assert done == num_passes, "a step that fits is finished"


def test_ranks_stop_together_or_not_at_all() -> None:
    """Kills one rank that drops its step while the others wait for its gradient."""
    asked = StopRequest(1e-9, agree=lambda number: max(number, signal.SIGINT))
    assert asked.number() == signal.SIGINT
    asked.ask(signal.SIGTERM)
    assert list(asked.in_time(range(3))) == [0, 1, 2]
    with asked.cut_short():
        asked.ask(signal.SIGTERM)
    assert asked.number() == signal.SIGTERM


def test_a_second_signal_is_not_held_back() -> None:
    """Kills a process that cannot be ended by asking twice."""
    asked = StopRequest(9.0)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), listening(asked):
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.number() == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
