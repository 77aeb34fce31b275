"""A recipe run, and checked, by two processes that torchrun started, from raw data to the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from several import in_ranks
from small_recipe import write_small
from tutelage.cluster import ClusterReport, Finding, check_cluster
from tutelage.errors import TrainError
from tutelage.pipeline import build_pipeline, run
from tutelage.recipe import load_recipe
from tutelage.store import Store
from tutelage.together import odd_stage, require_same_keys, upstream_of
from tutelage.world import current


def torchrun(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Two processes, each running the script in a shell, with RANK set."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TUTELAGE_RANK_TIMEOUT": "120"}
    return subprocess.run(
        [*command, "bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )


def losses(store: Path) -> list[list[float]]:
    """Loss of each step of every run in a store."""
    rows = [pq.read_table(folder / "steps.parquet").to_pylist() for folder in store.glob("train/*")]
    return [[row["loss_sum"] / row["weight"] for row in steps if row["part"] == "all"] for steps in rows]


@pytest.mark.slow
def test_two_processes_run_a_recipe_to_its_report_and_check_each_other(tmp_path: Path) -> None:
    """Kills: two reports or none, held-out loss of half the records, ranks left waiting, a check that compares nothing."""
    write_small(tmp_path)
    tutelage = f"{sys.executable} -m tutelage"
    run(load_recipe(tmp_path / "small.yaml"), until="train", store=tmp_path / "one", runs=tmp_path / "runs")
    script = (
        f"{tutelage} run small.yaml --store two --runs both -q --json && "
        f"[ $RANK = 1 ] && more='--store other --set train.seed=4' || more='--store two'; "
        f"{tutelage} check small.yaml --cluster --json $more; [ $? = 1 ]"
    )
    done = torchrun(script, tmp_path)
    assert done.returncode == 0, done.stderr
    again = torchrun(f"{tutelage} train small.yaml --store two --runs trainer -q --set train.engine=hf_trainer", tmp_path)
    assert again.returncode == 0, again.stderr
    by_loop, by_trainer = losses(tmp_path / "two")
    assert by_loop == pytest.approx(losses(tmp_path / "one")[0], rel=1e-4) and by_trainer == pytest.approx(by_loop, rel=1e-6)
    assert {path.name for path in (tmp_path / "one" / "train").iterdir()} < {
        path.name for path in (tmp_path / "two" / "train").iterdir()
    }
    assert (tmp_path / "both" / "small" / "report.html").exists()
    measured = [pq.read_table(next((tmp_path / store).glob("train/*")) / "evals.parquet").num_rows for store in ("one", "two")]
    assert measured[0] == measured[1]
    told, at = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index("{") :])
    checked = json.loads(done.stdout[done.stdout.index("{") + at :])
    assert told["stages"] and not checked["passes"]
    wrong = {finding["check"] for finding in checked["findings"] if finding["problem"]}
    assert wrong == {"recipe", "data and plan", "checkpoint folder", "prepared data"}


def keys_differ(path: str) -> list[str]:
    """What ranks with other settings hear of each other."""
    settings = ["train.seed=1"] if current().rank else []
    stages = build_pipeline(load_recipe(path, overrides=settings), store=Store(Path(path).parent / "store")).stages
    said = [odd_stage(current(), upstream_of(stages, "plan"))]
    try:
        require_same_keys(current(), stages, "train")
    except TrainError as error:
        said.append(str(error))
    return said


def test_ranks_name_the_first_stage_they_do_not_agree_on(tmp_path: Path) -> None:
    """Kills: a comparison of the last key alone, which tells nobody what to look for."""
    path = write_small(tmp_path)
    for data, training in in_ranks(2, keys_differ, str(path)):
        assert data == ""
        assert training.startswith("`train` is not the same on all ranks: train is") and "on rank 1" in training


def test_a_check_of_one_process_says_how_to_start_several(tmp_path: Path) -> None:
    """Kills: a check that compares a process with itself and finds all well."""
    file = load_recipe(write_small(tmp_path))
    with pytest.raises(TrainError, match="there is one; start it as the run will be: torchrun --nproc-per-node"):
        check_cluster(file, store=tmp_path / "store")


def test_clocks_and_packages_are_told_by_rank() -> None:
    """Kills: a report that says that something is wrong and not where."""
    findings = (Finding("clocks", "fine"), Finding("packages", "", "torch is '2.12' on rank 3; install the same"))
    report = ClusterReport(findings, ("a", "a", "b", "b"))
    assert not report.passes and report.as_json()["hosts"] == ["a", "a", "b", "b"]
    assert report.lines() == [
        "ok    clocks: fine",
        "WRONG packages: torch is '2.12' on rank 3; install the same",
        "4 ranks on 2 machine(s): 1 thing(s) wrong; nothing was trained",
    ]
