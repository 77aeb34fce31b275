"""A checkpoint is whole or it is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.errors import TrainError
from tutelage.store import Silent
from tutelage.train.state import Checkpoints, Position, Snapshot, damage, random_state, set_random_state

FILES = ["weights.safetensors", "optimizer.safetensors", "random.safetensors", "position.json", "manifest.json"]


class Notes(Silent):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def snapshot(step: int, best_step: int | None = None) -> Snapshot:
    weights = {"a": torch.full((2, 3), float(step)), "b": torch.arange(4.0)}
    memory = {"step/a": torch.tensor(float(step)), "exp_avg/a": torch.ones(2, 3)}
    return Snapshot(Position(step, best_step=best_step, best_loss=0.1), weights, memory, random_state(torch.device("cpu")))


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    """Kills floats that lose digits in JSON and tensors that change dtype."""
    saved = snapshot(40, best_step=40)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.save(saved).name == "step-000040"
    loaded = Checkpoints(tmp_path).latest()
    assert loaded is not None and loaded.position == saved.position
    for part in ("weights", "optimizer", "random"):
        mine, theirs = getattr(saved, part), getattr(loaded, part)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 4), st.lists(st.booleans(), min_size=1, max_size=9))
def test_the_last_few_and_the_best_are_kept(tmp_path_factory: pytest.TempPathFactory, keep: int, is_best: list[bool]) -> None:
    """Kills a best checkpoint that is pruned when it grows old, and a folder that grows for ever."""
    checkpoints = Checkpoints(tmp_path_factory.mktemp("run"), keep=keep)
    best = None
    for step, better in enumerate(is_best, 1):
        best = step if better else best
        checkpoints.save(snapshot(step, best))
    last = set(range(1, len(is_best) + 1)[-keep:])
    assert set(checkpoints.steps()) == last | ({best} if best else set())
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [f"step-{s:06d}" for s in checkpoints.steps()]


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_byte_sends_the_run_to_the_checkpoint_before_with_a_message(tmp_path: Path, file: str) -> None:
    """Kills a resume that loads whatever parses."""
    notes = Notes()
    checkpoints = Checkpoints(tmp_path, progress=notes)
    for step in (10, 20):
        checkpoints.save(snapshot(step))
    path = checkpoints.path(20) / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x20
    path.write_bytes(data)
    found = checkpoints.latest()
    assert found is not None and found.position.step == 10
    (line,) = notes.lines
    assert line.startswith("checkpoint step-000020 is not used: ") and line.endswith("; going back to the one before it")


@given(file=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_no_byte_can_change_unseen(tmp_path_factory: pytest.TempPathFactory, file: str, place: float, mask: int) -> None:
    """Kills a file that no digest covers, and a manifest whose own damage is read as fewer files."""
    folder = Checkpoints(tmp_path_factory.mktemp("run")).save(snapshot(10))
    assert damage(folder) is None
    data = bytearray((folder / file).read_bytes())
    data[int(place * len(data))] ^= mask
    (folder / file).write_bytes(data)
    assert damage(folder) is not None


@pytest.mark.parametrize("file", ["weights.safetensors", "manifest.json"])
def test_a_missing_file_is_damage_too(tmp_path: Path, file: str) -> None:
    """Kills a check that looks only at the files that are there."""
    checkpoints = Checkpoints(tmp_path)
    folder = checkpoints.save(snapshot(10))
    (folder / file).unlink()
    assert damage(folder) in ("weights.safetensors is missing", "its manifest is missing")
    with pytest.raises(TrainError, match="is missing; run again"):
        checkpoints.load(10)
    assert checkpoints.latest() is None


def test_a_checkpoint_is_of_no_use_without_the_best_it_refers_to(tmp_path: Path) -> None:
    """Kills a run that trains to its end and only then finds that the best weights are gone."""
    notes = Notes()
    checkpoints = Checkpoints(tmp_path, progress=notes)
    checkpoints.save(snapshot(10))
    checkpoints.save(snapshot(20, best_step=20))
    checkpoints.save(snapshot(30, best_step=20))
    path = checkpoints.path(20) / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    found = checkpoints.latest()
    assert found is not None and found.position.step == 10
    assert "the best so far, step-000020: weights.safetensors is not what was written" in notes.lines[0]


def test_leftovers_of_a_killed_writer_are_removed_and_never_read(tmp_path: Path) -> None:
    """Kills a resume from a folder that was being written."""
    Checkpoints(tmp_path).save(snapshot(10))
    half = tmp_path / ".new-000020-77"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [10] and not half.exists()


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    """Kills a rename onto a folder that is not empty."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(snapshot(10))
    checkpoints.save(snapshot(10, best_step=10))
    assert checkpoints.load(10).position.best_step == 10


def test_random_states_come_back() -> None:
    """Kills dropout that differs after a resume."""
    device = torch.device("cpu")
    states = random_state(device)
    first = torch.rand(5)
    set_random_state(states, device)
    assert torch.equal(torch.rand(5), first)
