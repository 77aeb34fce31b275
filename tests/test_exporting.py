"""`tutelage export`: a recipe to rows for another trainer, on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from small_recipe import write_small

ENV = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


def export(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tutelage", "export", "small.yaml", *arguments]
    return subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exporting")
    write_small(folder)
    return folder


@pytest.fixture(scope="module")
def exported(place: Path) -> dict[str, object]:
    """What --json says of an export for TRL into `rows`."""
    done = export(place, "rows", "--json", "-q")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_the_json_counts_what_lies_in_the_folder(place: Path, exported: dict[str, object]) -> None:
    """Kills facts that are not those of the rows, and rows beside the plan's."""
    rows = [row for path in (place / "rows").glob("*.arrow") for row in pa.ipc.open_stream(path).read_all().to_pylist()]
    assert exported["num_rows"] == len(rows)
    assert exported["num_tokens"] == sum(sum(row["seq_lengths"]) for row in rows)
    assert exported["num_trained"] == sum(label != -100 for row in rows for label in row["labels"])
    planned = subprocess.run(
        [sys.executable, "-m", "tutelage", "plan", "small.yaml", "--json", "-q"],
        cwd=place,
        env=ENV,
        capture_output=True,
        check=True,
    )
    assert exported["num_steps"] == json.loads(planned.stdout)["steps"]["num_steps"]


def test_the_readme_names_recipe_model_loss_and_plan(place: Path, exported: dict[str, object]) -> None:
    """Kills a folder of which nobody knows in a month where it came from."""
    text = (place / "rows" / "README.md").read_text()
    (manifest,) = (place / ".tutelage" / "plan").glob("*/manifest.json")
    for words in ("small (small.yaml)", str(place / "model"), '"kind":"response"', manifest.parent.name, "seq_lengths"):
        assert words in text
    assert str(exported["how_to_train"]).strip() in text


def test_what_is_printed_can_be_copied(place: Path) -> None:
    """Kills an export that ends in silence, or prints arguments for another trainer or format."""
    done = export(place, "axolotl", "--to", "axolotl", "--format", "parquet")
    assert done.returncode == 0, done.stderr
    assert "base_model: " in done.stdout and "ds_type: parquet" in done.stdout and "axolotl/README.md" in done.stdout


def test_fractions_are_refused_by_record_id_with_exit_2(place: Path, exported: dict[str, object]) -> None:
    """Kills a refusal that does not say which record, and a folder left behind."""
    fraction = ("--set", "loss={kind: prompt_weight, prompt_weight: 0.1}")
    done = export(place, "fractions", *fraction, "-q")
    assert done.returncode == 2
    for words in ("has loss weight 0.1", ".jsonl:", '"kind":"prompt_weight"', "--to weights"):
        assert words in done.stderr
    assert not (place / "fractions").exists()
    assert export(place, "fractions", *fraction, "-q", "--to", "weights").returncode == 0


def test_other_mistakes_exit_with_2_before_anything_runs(place: Path, exported: dict[str, object], tmp_path: Path) -> None:
    """Kills minutes of preparation that end at a folder that exists."""
    write_small(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    for arguments, words in ((("taken",), "no export of ours"), (("new", "--to", "tlr"), "did you mean `trl`")):
        done = export(tmp_path, *arguments)
        assert done.returncode == 2
        assert words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / ".tutelage").exists()
    again = export(place, "rows")
    assert again.returncode == 2 and "replace it with --overwrite" in again.stderr
    assert export(place, "rows", "--overwrite", "-q").returncode == 0


def test_a_mixture_that_training_decides_is_refused(place: Path) -> None:
    """Kills an export of the starting shares under the name of an online mixture."""
    path = place / "online.yaml"
    text = (place / "small.yaml").read_text().replace("rates: {kind: temperature, temperature: 2}", "schedule: {kind: online}")
    path.write_text(text.replace("batch: {slots_per_step: 1024}", "batch: {examples_per_step: 4, pack: none}"))
    command = [sys.executable, "-m", "tutelage", "export", "online.yaml", "online", "-q"]
    done = subprocess.run(command, cwd=place, env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no run to export" in done.stderr and "`interpolate`" in done.stderr
    assert not (place / "online").exists()
