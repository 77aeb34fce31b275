"""A finished run that is trained further: by the store's keys, through a kill, and said as what it is."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from small_recipe import write_small
from tutelage import load_recipe, run
from tutelage.errors import PlanError, RecipeError, TrainError, TutelageError
from tutelage.extending import extend, extended, extension, open_run
from tutelage.pipeline import Run
from tutelage.planning import preview
from tutelage.tables import PLACEMENTS, PLANNED, read_table

MORE = [
    "evaluate.samples=2",
    "evaluate.max_new_tokens=12",
    "mix.max_visits=null",
    "mix.rates=proportional",
    "audit.enabled=false",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe with its finished run."""
    folder = tmp_path_factory.mktemp("finished")
    write_small(folder, num_records=30)
    run(load_recipe(folder / "small.yaml", overrides=MORE), until="train", store=folder / "store", runs=folder / "runs")
    return folder


def longer(folder: Path, part: dict[str, Any], **more: Any) -> Run:
    file = load_recipe(folder / "small.yaml", overrides=MORE)
    return extend(file, extension(**part), store=folder / "store", runs=folder / "runs", **more)


@pytest.fixture(scope="module")
def once_more(finished: Path) -> Run:
    """The finished run by one epoch more."""
    return longer(finished, {"epochs": 1.0})


def visits(done: Run, label: str) -> dict[tuple[str, int], list[int]]:
    """The visits of each record in a plan."""
    plan = done.artefacts[label].path
    planned = read_table(plan / "planned.parquet", PLANNED).to_pylist()
    out: dict[tuple[str, int], list[int]] = {}
    for line in read_table(plan / "placements.parquet", PLACEMENTS).to_pylist():
        where = planned[line["example"]]
        out.setdefault((where["source"], where["row"]), []).append(line["visit"])
    return out


def weights_digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_an_extension_trains_the_next_visits_and_nothing_of_the_run_again(finished: Path, once_more: Run) -> None:
    """Kills an extension that trains the run anew, from the untouched model, or on visits that were made already."""
    assert once_more.folder == finished / "runs" / "small-extended"
    assert once_more.artefacts["train part 1"].is_hit and not once_more.artefacts["train"].is_hit
    first, second = visits(once_more, "plan part 1"), visits(once_more, "plan")
    assert set(map(tuple, map(sorted, first.values()))) == {(0, 1)} and set(map(tuple, second.values())) == {(2,)}
    assert first.keys() == second.keys()
    before, after = (once_more.artefacts[label].facts for label in ("train part 1", "train"))
    assert after["extends"] == {
        "run": once_more.artefacts["train part 1"].key,
        "step": before["final_step"],
        "optimizer": "kept",
        "steps_before": before["final_step"],
    }
    facts = once_more.artefacts["plan"].facts
    notes = facts["extends"]
    assert facts["notes"][0].startswith(f"extends a run of {before['final_step']} steps: ")
    assert notes["num_steps"] == before["final_step"] and notes["most_visits"] == 2


def test_the_page_and_the_recipe_say_that_it_is_an_extension(once_more: Run) -> None:
    """Kills a report that shows an extension as a run of its own."""
    page = (once_more.folder / "report.html").read_text()
    key = once_more.artefacts["train part 1"].key
    assert f"This run extends run {key[:12]} by" in page
    resolved = load_recipe(once_more.folder / "recipe.yaml").recipe
    assert resolved.name == "small-extended" and resolved.extend[0].epochs == 1.0


@pytest.mark.slow
def test_a_killed_extension_goes_on_to_the_bit(finished: Path, once_more: Run, tmp_path: Path) -> None:
    """Kills an extension that, resumed, begins from the earlier run again."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "runs" / "small-extended")
    for name in ("train", "measure"):
        shutil.rmtree(folder / "store" / name / once_more.artefacts[name if name == "train" else "measure after"].key)
    command = [
        sys.executable,
        "-m",
        "tutelage",
        "extend",
        "small.yaml",
        "--epochs",
        "1",
        "--store",
        "store",
        "--runs",
        "runs",
        "-q",
    ]
    command += [part for text in MORE for part in ("--set", text)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TUTELAGE_KILL_AT": "checkpoint:done"}
    killed = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = longer(folder, {"epochs": 1.0})
    events = (again.artefacts["train"].path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in events].count("resume") == 1
    assert weights_digest(again.folder) == weights_digest(once_more.folder)


def test_an_extension_can_be_extended(finished: Path, once_more: Run) -> None:
    """Kills a second extension that forgets what the first one drew."""
    file = open_run(once_more.folder)  # which knows what was set for it
    twice = extend(
        file, extension(steps=2, optimizer="fresh", learning_rate=1e-3), store=finished / "store", runs=finished / "runs"
    )
    assert twice.folder.name == "small-extended-2" and twice.artefacts["train part 2"].is_hit
    third = visits(twice, "plan")
    assert {visit for each in third.values() for visit in each} == {3}
    facts = twice.artefacts["train"].facts
    parts = [twice.artefacts[f"train part {i}"].facts["final_step"] for i in (1, 2)]
    assert facts["extends"]["steps_before"] == sum(parts) and facts["num_steps"] == 2 and facts["learning_rate"] == 1e-3


def test_only_a_finished_run_is_extended(tmp_path: Path) -> None:
    """Kills an extension that silently trains the run first."""
    write_small(tmp_path)
    with pytest.raises(TrainError, match=r"no finished run of this recipe .*run it first: tutelage run"):
        longer(tmp_path, {"epochs": 1.0})


@pytest.mark.parametrize(
    ("part", "overrides", "message"),
    [
        ({}, [], "one of `epochs` and `steps`"),
        ({"epochs": 1.0, "steps": 3}, [], "one of `epochs` and `steps`"),
        ({"epochs": -1.0}, [], "greater than 0"),
        ({"epochs": 1.0, "optimizer": "new"}, [], "'kept' or 'fresh'"),
        (
            {"epochs": 1.0},
            ["mix={schedule: {two_stage: {first: [sums], replay: 0.1}}}"],
            r"extend\.0\.rates .*is over when the run is",
        ),
        ({"epochs": 1.0}, ["mix={rates: {counts: {sums: 9, words: 9}}}"], r"extend\.0\.rates .*say the whole of a run"),
        ({"steps": 4}, ["mix.refill=none"], r"extend\.0\.steps .*leaves room"),
    ],
)
def test_what_cannot_be_extended_is_said(tmp_path: Path, part: dict[str, Any], overrides: list[str], message: str) -> None:
    """Kills an extension by no amount, or by rates that nobody stated."""
    write_small(tmp_path)
    with pytest.raises(RecipeError, match=message):
        extended(load_recipe(tmp_path / "small.yaml", overrides=overrides), extension(**part))


def test_a_recipe_states_its_extension_and_a_mistake_in_it_has_a_line(tmp_path: Path) -> None:
    """Kills an `extend` that only the command line knows, and one whose mistakes show when training is over."""
    path = write_small(tmp_path)
    path.write_text(path.read_text() + "extend: [{steps: 3, rates: equal, schedule: linear}]\n")
    recipe = load_recipe(path).recipe
    assert recipe.extend[0].rates is not None and recipe.extend[0].rates.kind == "equal"
    path.write_text(path.read_text().replace("epochs: 2, max", "epochs: 2, refill: none, max"))
    with pytest.raises(RecipeError, match=r"small\.yaml:16 .*extend\.0\.steps"):
        load_recipe(path)


def test_an_extension_is_not_previewed(tmp_path: Path) -> None:
    """Kills a preview that shows the run itself under the extension's name."""
    path = write_small(tmp_path)
    path.write_text(path.read_text() + "extend: [{epochs: 1}]\n")
    with pytest.raises(TutelageError, match="plan it without --preview"):
        preview(load_recipe(path), store=tmp_path / "store")


def test_caps_hold_over_both_parts(tmp_path: Path, finished: Path) -> None:
    """Kills an extension that is planned although every record has had all its visits."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    file = load_recipe(folder / "small.yaml", overrides=[*MORE, "mix.max_visits=2"])
    run(file, until="train", store=folder / "store", runs=folder / "runs")
    with pytest.raises(PlanError, match=r"mix\.epochs 1 cannot be met"):
        extend(file, extension(epochs=1.0), store=folder / "store", runs=folder / "runs")
