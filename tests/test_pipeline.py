"""Whole runs on a tiny model: accounting, reuse, crashes, what a run leaves."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from small_recipe import BAD_CHATS, BAD_LINES, write_small
from tutelage import explain, load_recipe, run
from tutelage.errors import DataError
from tutelage.pipeline import Run
from tutelage.tables import read_dropped, read_scores, read_table

THREADS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A finished run: the folder with recipe, store and runs, and the run."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_small(folder)
    return folder, run(load_recipe(recipe), store=folder / "store", runs=folder / "runs")


def copy_of(whole: Path, target: Path) -> Path:
    shutil.copytree(whole, target, dirs_exist_ok=True)
    return target


def missed(folder: Path, *overrides: str) -> set[str]:
    file = load_recipe(folder / "small.yaml", overrides=overrides)
    return {status.label for status in explain(file, store=folder / "store") if not status.is_hit}


def weights_digest(model: Path) -> str:
    return hashlib.sha256((model / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_every_stage_accounts_for_every_record(whole: tuple[Path, Run]) -> None:
    """Kills a stage that loses records, or whose drops cannot be opened."""
    folder, done = whole
    for status in explain(load_recipe(folder / "small.yaml"), store=folder / "store"):
        line = status.as_json()
        assert line["status"] == "hit"
        assert line["in"] == line["out"] + sum(line["dropped"].values()), line
        path = done.artefacts[status.label].path / "dropped.parquet"
        if sum(line["dropped"].values()) and status.stage not in ("split",):
            assert len(read_dropped(path)) == sum(line["dropped"].values()), status.label


def test_running_again_builds_nothing(whole: tuple[Path, Run]) -> None:
    """Kills a key that depends on the clock, on order of dictionaries or on where the process runs."""
    folder, first = whole
    assert first.num_built > 0
    again = run(load_recipe(folder / "small.yaml"), store=folder / "store", runs=folder / "runs")
    assert again.num_built == 0


@pytest.mark.parametrize(
    "override",
    [
        "mix.rates.temperature=5",
        "loss=instruction_modelling",
        "curate.rules.1.length.max_response_words=20",
        "split.seed=3",
        "mix.max_visits=1",
    ],
)
def test_mixture_loss_threshold_and_split_render_nothing_again(whole: tuple[Path, Run], override: str) -> None:
    """Kills a rendering whose key holds policy: peers tokenise again for each of these."""
    folder, _ = whole
    again = missed(folder, override)
    assert "plan" in again
    assert not {label for label in again if label.startswith(("read", "rewrite", "render", "rerender", "tokenizer", "model"))}


def test_a_rewriting_rule_renders_only_the_rows_it_rewrote(whole: tuple[Path, Run]) -> None:
    """Kills a rewrite that re-renders its whole source."""
    folder, done = whole
    again = missed(folder, "curate.rules.0.strip_boilerplate.closings=false")
    assert {"rerender sums", "rewrite sums", "plan"} <= again
    assert not {label for label in again if label.startswith("render ")}
    facts = done.artefacts["rerender sums"].facts
    assert 0 < facts["num_examples"] < done.artefacts["render sums"].facts["num_examples"]


def test_one_changed_byte_re_does_only_its_source_and_what_joins_sources(whole: tuple[Path, Run], tmp_path: Path) -> None:
    """Kills a key by modification time (too much), and one by size (too little)."""
    folder = copy_of(whole[0], tmp_path / "copy")
    data = folder / "sums.jsonl"
    data.write_bytes(data.read_bytes().replace(b"Add ", b"add ", 1))
    again = missed(folder)
    assert again == {
        "read sums", "rewrite sums", "screen sums", "render sums", "rerender sums", "tally sums", "retally sums",
        "split", "copies", "plan", "audit", "held_out", "measure before", "train", "measure after", "report",
    }  # fmt: skip


def test_planted_malformed_records_are_all_listed_and_the_rest_trains(tmp_path: Path) -> None:
    """Kills a reader that stops at, skips in silence, or misplaces a malformed record."""
    recipe = write_small(tmp_path)
    planted = plant(tmp_path)
    assert len(planted) == 37
    file = load_recipe(recipe, overrides=["intake.max_bad_share=0.5", "evaluate.samples=0", "mix.epochs=1"])
    done = run(file, store=tmp_path / "store", runs=tmp_path / "runs")
    found = {
        (d.file, d.line)
        for label in ("read sums", "read words")
        for d in read_dropped(done.artefacts[label].file("dropped.parquet"))
    }
    assert found == planted
    reasons = {
        d.reason for label in ("read sums", "read words") for d in read_dropped(done.artefacts[label].file("dropped.parquet"))
    }
    assert len(reasons) >= 12
    assert done.artefacts["train"].facts["steps_done"] > 0


def plant(folder: Path) -> set[tuple[str, int]]:
    """Puts 37 malformed records of 14 kinds between good ones; their (file, line)."""
    draw = random.Random(1)
    planted = set()
    bad_chats = [json.dumps({"messages": turns}).encode() for turns, _ in BAD_CHATS]
    for name, bad in (("sums.jsonl", [line for line, _ in BAD_LINES]), ("words.jsonl", bad_chats)):
        lines = (folder / name).read_bytes().removesuffix(b"\n").split(b"\n")
        num = 25 if name == "sums.jsonl" else 12
        out = [(line, True) for line in lines]
        for i in range(num):
            out.insert(draw.randrange(5, len(out)), (bad[i % len(bad)], False))
        planted |= {(name, number) for number, (_, is_good) in enumerate(out, 1) if not is_good}
        (folder / name).write_bytes(b"\n".join(line for line, _ in out) + b"\n")
    return planted


def test_too_many_malformed_records_stop_the_run_before_training_and_name_the_file(tmp_path: Path) -> None:
    """Kills a bound that is checked after training, or not at all."""
    recipe = write_small(tmp_path)
    plant(tmp_path)
    with pytest.raises(DataError, match=r"sums\.jsonl"):
        run(load_recipe(recipe), store=tmp_path / "store", runs=tmp_path / "runs")
    assert not (tmp_path / "store" / "train").exists()


def test_a_finished_run_leaves_what_people_open(whole: tuple[Path, Run]) -> None:
    """Kills a run folder without its resolved recipe, model, logs or report, or one that points into the store."""
    folder, _ = whole
    left = folder / "runs" / "small"
    for name in ("recipe.yaml", "run.json", "report.html", "steps.parquet", "events.jsonl", "model/adapter_config.json"):
        assert (left / name).is_file(), name
        assert not (left / name).is_symlink()
    assert '<section id="audit"' in (left / "report.html").read_text()
    assert load_recipe(left / "recipe.yaml").recipe.mix == load_recipe(folder / "small.yaml").recipe.mix
    assert "epochs: 2.0  # small.yaml:" in (left / "recipe.yaml").read_text()


def test_planning_again_leaves_the_folder_of_a_finished_run_alone(whole: tuple[Path, Run]) -> None:
    """Kills a run folder with the recipe of one run and the model of another."""
    folder, _ = whole
    left = folder / "runs" / "small"
    before = {path.name: path.read_bytes() for path in left.iterdir() if path.is_file()}
    file = load_recipe(folder / "small.yaml", overrides=["mix.rates=equal"])
    run(file, until="plan", store=folder / "store", runs=folder / "runs")
    assert {path.name: path.read_bytes() for path in left.iterdir() if path.is_file()} == before


def test_held_out_loss_is_measured_before_and_after_on_the_same_records(whole: tuple[Path, Run]) -> None:
    """Kills a comparison of two different subsets."""
    _, done = whole
    items = {}
    for label in ("measure before", "measure after"):
        scores = read_scores(done.artefacts[label].file("scores.parquet"))
        items[label] = {(s.task, s.item) for s in scores if s.metric == "nll" and s.item}
    assert items["measure before"] == items["measure after"]
    assert {task for task, _ in items["measure before"]} == {"sums", "words", "hidden"}


def command(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    arguments = [
        sys.executable,
        "-m",
        "tutelage",
        "run",
        "small.yaml",
        "--quiet",
        "--json",
        "--store",
        "store2",
        "--runs",
        "runs2",
    ]
    return subprocess.run(arguments, cwd=folder, env=os.environ | THREADS | env, capture_output=True, text=True, check=False)


POINTS = (
    "build:read",
    "commit:read:manifest",
    "build:rewrite",
    "build:screen",
    "build:split",
    "build:copies",
    "build:model",
    "build:tokenizer",
    "build:render",
    "commit:render:start",
    "build:rerender",
    "build:plan",
    "commit:plan:renamed",
    "build:audit",
    "build:held_out",
    "build:measure",
    "build:train",
    "checkpoint:write",
    "commit:train:manifest",
    "build:report",
)
"""In the order that a run reaches them: a kill in every stage, five of them inside commits."""


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_bit_identical(whole: tuple[Path, Run], tmp_path: Path) -> None:
    """Kills a resume that trains other rows, forgets optimizer state, or opens half an artefact."""
    folder = copy_of(whole[0], tmp_path / "copy")
    for point in POINTS:
        killed = command(folder, TUTELAGE_KILL_AT=point)
        assert killed.returncode == -signal.SIGKILL, (point, killed.stderr)
    ended = command(folder)
    assert ended.returncode == 0, ended.stderr
    assert weights_digest(folder / "runs2/small/model") == weights_digest(whole[0] / "runs/small/model")
    left, right = (plan_of(folder, "2"), plan_of(whole[0], ""))
    assert left.name == right.name
    assert read_table(left / "placements.parquet").equals(read_table(right / "placements.parquet"))


def plan_of(folder: Path, suffix: str) -> Path:
    record = json.loads((folder / f"runs{suffix}" / "small" / "run.json").read_text())
    (key,) = [key for key, label in record["artefacts"].items() if label == "plan"]
    return folder / f"store{suffix}" / key
