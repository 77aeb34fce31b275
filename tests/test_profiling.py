"""`tutelage train --profile`: a recipe's own steps, timed, and nothing of its run touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from small_recipe import write_small
from tutelage.cli import app
from tutelage.profiling import profile_recipe, profile_table
from tutelage.recipe import load_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("profile")).parent


@pytest.fixture(autouse=True)
def quick_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ceiling is measured with a small product, as its worth is not looked at here."""
    monkeypatch.setattr("tutelage.train.profile.CEILING_SECONDS", 0.01)


def test_a_profile_is_printed_and_no_run_is_changed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills a profile that writes a run folder, a checkpoint or a train artefact, and shares that are not of the whole."""
    monkeypatch.chdir(place)
    done = CliRunner().invoke(app, ["train", "small.yaml", "--profile", "--steps", "1", "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert sum(told["shares"].values()) == pytest.approx(1.0)
    assert told["num_steps"] == 1 and told["slots"] == 1024 and told["device"] == "cpu" and told["dtype"] == "float32"
    assert 0 < told["supervised_tokens"] < told["real_tokens"] <= told["slots"]
    assert told["flops"]["total"] == sum(told["flops"][name] for name in ("linear", "attention", "head"))
    assert not (place / "runs").exists()
    assert not (place / ".tutelage" / "train").exists()
    assert (place / ".tutelage" / "plan").exists()


def test_the_table_has_a_line_for_each_part_and_the_threads_are_given_back(place: Path) -> None:
    """Kills a profile under another number of threads than the recipe's, or one that keeps it."""
    before = torch.get_num_threads()
    file = load_recipe(place / "small.yaml", overrides=["train.num_threads=1"])
    profile = profile_recipe(file, num_steps=1, store=place / ".tutelage")
    assert torch.get_num_threads() == before
    assert profile.num_threads == 1
    table = profile_table(profile)
    assert [row[0] for row in table.rows] == [*profile.seconds, ""]
    assert "1 step of 1,024 slots on cpu in float32, 1 thread:" in profile.lines()[0]


def test_steps_without_a_profile_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills `--steps` taken for the length of a run and ignored."""
    monkeypatch.chdir(place)
    done = CliRunner().invoke(app, ["train", "small.yaml", "--steps", "1"])
    assert done.exit_code == 2
    assert "--profile" in done.stderr
    assert not (place / "runs").exists()
