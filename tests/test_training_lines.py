"""What `check` and `plan` say of training before anything is trained, and what they refuse of a step that does not divide."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from small_recipe import write_small
from tutelage import load_recipe
from tutelage.errors import RecipeError


def check(recipe: Path, *overrides: str, devices: int = 1) -> subprocess.CompletedProcess[str]:
    words = [word for override in overrides for word in ("--set", override)]
    environment = {**os.environ, "WORLD_SIZE": str(devices)}
    command = [sys.executable, "-m", "tutelage", "check", str(recipe), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_check_prints_the_arithmetic_of_a_step_and_an_unusual_rate(tmp_path: Path) -> None:
    """Kills devices that are left out of the product, and a notice that reaches nobody before training."""
    done = check(write_small(tmp_path), "batch.slots_per_step=16384", "train.micro_batch_rows=4", devices=8)
    assert done.stderr == "" and done.stdout.splitlines()[1:] == [
        "batch: 4 x 2 x 8 = 64 rows per step (per device x accumulation x devices), 256 slots each",
        "train.learning_rate 0.01 is 33.3 times the top of what is usual for lora, 0.0001 to 0.0003; watch the held-out loss",
    ]


def test_a_step_that_does_not_divide_by_the_devices_is_refused_with_what_does(tmp_path: Path) -> None:
    """Kills a run on three devices that waits for one of them in every step, and never says so."""
    done = check(write_small(tmp_path), devices=3)
    assert done.returncode == 2
    assert (
        "batch.slots_per_step  4 rows per step do not divide by 3 devices; these do: 3 or 6 rows, 2 or 4 devices" in done.stderr
    )


def test_rows_that_vary_are_shared_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills a refusal of steps whose rows nobody knows ahead."""
    recipe = write_small(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "3")
    file = load_recipe(recipe, overrides=["batch.slots_per_step=null", "batch.examples_per_step=10"])
    assert file.training_lines()[0] == "batch: 10 examples per step; its rows vary, and those of a step are shared by 3 devices"


@pytest.mark.parametrize(
    ("rows", "says"), [("auto", "`auto` may take more"), ("null", "4 x 1 x 1 = 4 rows"), ("2", "2 x 2 x 1 = 4")]
)
def test_rows_per_pass_are_as_stated_or_as_many_as_2048_slots_hold(tmp_path: Path, rows: str, says: str) -> None:
    """Kills `auto` printed as if it were known, and a pass larger than its step."""
    file = load_recipe(write_small(tmp_path), overrides=[f"train.micro_batch_rows={rows}"])
    assert says in file.training_lines()[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.micro_batch_rows=3",
            "4 rows per step do not divide by 3 rows per pass; these do: 3 or 6 rows, 2 or 4 rows per pass",
        ),
        ("train.micro_batch_rows=0", "train.micro_batch_rows  a whole number from 1 up or `auto` is wanted; found 0"),
        ("train.optimizer.kind=sgd", "is not one of: adamw, other"),
        ('train.optimizer={"module":"SGD"}', "train.optimizer.module  'SGD' is no `module:Class`"),
        ('train.optimizer={"module":"a:B","arg":{}}', "train.optimizer.arg  unknown key; did you mean `args`?"),
        ('train.schedule={"wsd": {"decay": "exp"}}', "linear"),
        ('train.groups=[{"match": "a"}]', "a group states"),
        ('model.freeze=["norm"]', "leave it out"),
        ("model.adapter.kind=qlra", "qlora"),
    ],
)
def test_a_mistake_in_training_is_named_with_what_is_allowed(tmp_path: Path, override: str, message: str) -> None:
    """Kills a key that is read by nobody, and an error without its place."""
    with pytest.raises(RecipeError, match="1 problem") as caught:
        load_recipe(write_small(tmp_path), overrides=[override])
    assert message in str(caught.value)


def test_the_schema_knows_every_way_to_name_an_optimizer() -> None:
    """Kills an editor that underlines what the program accepts."""
    from tutelage.recipe import json_schema

    ways = json_schema()["$defs"]["TrainSpec"]["properties"]["optimizer"]["anyOf"]
    assert {"type": "string", "pattern": ":"} in ways and any("module" in way.get("required", ()) for way in ways)
    assert json.dumps(ways)
