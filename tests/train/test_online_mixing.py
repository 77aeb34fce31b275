"""Online mixing end to end: the loop asks for the next window, and a run that was killed goes on to the same batches."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from small_recipe import write_small
from tiny_training import Look, trained_weights
from toy import tiny_llama
from tutelage import tables
from tutelage.errors import PlanError, RecipeError, TrainError
from tutelage.evaluate.stage import open_shards
from tutelage.model import add_adapter
from tutelage.model.spec import Lora
from tutelage.pipeline import Run, run
from tutelage.plan.batch import Batches
from tutelage.plan.online_batches import OnlineBatches
from tutelage.recipe import load_recipe
from tutelage.records import Score
from tutelage.store import Silent
from tutelage.train.loop import Task, Watch, train
from tutelage.train.micro import Names
from tutelage.train.spec import TrainSpec

EVERY, PER_STEP = 3, 8
MIX = f"mix={{schedule: {{kind: online, every_steps: {EVERY}, floor: 0.05, step_size: 2.0}}, total_examples: 92, max_visits: 1}}"
BATCH = f"batch={{examples_per_step: {PER_STEP}, capacity: 256}}"
NUM_STEPS = 12


class Killed(Exception):
    """Stands for a process that is gone."""


class DiesAfter(Silent):
    """Ends the world after so many steps of this process."""

    def __init__(self, num_steps: int) -> None:
        self.left = num_steps

    def advance(self, amount: int = 1, text: str = "") -> None:
        self.left -= bool(text)
        if self.left == 0:
            raise Killed


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("online")
    file = load_recipe(write_small(folder), overrides=[MIX, BATCH])
    return run(file, until="plan", store=folder / "store", runs=folder / "runs")


def opened(planned: Run) -> OnlineBatches:
    return OnlineBatches(planned.artefacts["plan"].path, open_shards(planned.artefacts))


def sums_lag(step: int) -> dict[str, float]:
    """`words` is learned, `sums` is not."""
    return {"sums": 3.0, "words": 3.0 - step / 6}


def measure_with(losses: Callable[[int], dict[str, float]]) -> Any:
    def measure(model: Any, step: int) -> Look:
        scores = tuple(Score("", step, task, "", "nll", loss, 10.0) for task, loss in losses(step).items())
        return Look(sum(losses(step).values()) / 2, scores)

    return measure


def go(batches: Any, folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """The trained weights of a run over `batches`; nothing but the mixture asks for a measurement between start and end."""
    model = add_adapter(tiny_llama(), Lora(rank=4, alpha=8.0, dropout=0.1), seed=5)
    spec = TrainSpec(checkpoint_every_steps=2, seed=5)
    task = Task(
        spec, 1e-2, Names(("hidden", "sums", "words"), ("hidden", "sums", "words")), watch=Watch(every_steps=100, keep_best=False)
    )
    train(model, batches, task, folder=folder, **({"measure": measure_with(sums_lag)} | changes))
    return trained_weights(model)


def seen(batches: Any) -> list[list[tuple[int, int]]]:
    return [[(d.example, d.visit) for d in batch.documents] for batch in batches[:]]


@pytest.fixture(scope="module")
def whole(planned: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], list[Any]]:
    folder, batches = tmp_path_factory.mktemp("whole"), opened(planned)
    weights = go(batches, folder)
    return folder, weights, seen(batches)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "mixture.jsonl").read_text().splitlines()]


def test_the_plan_holds_every_candidate_and_the_run_at_the_starting_shares(planned: Run) -> None:
    """Kills a plan whose first window training does not follow, and records that online mixing can never come to."""
    plan = planned.artefacts["plan"]
    batches, ahead = opened(planned), Batches(plan.path, open_shards(planned.artefacts))
    assert len(batches) == len(ahead) == plan.facts["num_steps"] == NUM_STEPS
    for step in range(EVERY):
        assert np.array_equal(batches[step].inputs, ahead[step].inputs) and batches[step].step == step
    mixture = {line["task"]: line for line in plan.facts["mixture"]}
    table = tables.read_table(plan.file("planned.parquet"), tables.PLANNED)
    assert table.num_rows == sum(line["available_examples"] for line in mixture.values()) > 92
    assert any("mix.schedule is online" in note for note in plan.facts["notes"])
    with pytest.raises(PlanError, match="step 3 is in window 1 of an online mixture, which is not decided yet"):
        batches[EVERY]


def test_shares_follow_the_losses_and_total_and_caps_are_exact(planned: Run, whole: tuple[Path, Any, list[Any]]) -> None:
    """Kills shares that are logged and not drawn, a cap per window, and a total that drifts."""
    folder, _, documents = whole
    table = tables.read_table(planned.artefacts["plan"].file("planned.parquet"), tables.PLANNED)
    task = table["task"].to_pylist()
    told = lines(folder)
    assert [line["first_step"] for line in told] == [0, 3, 6, 9]
    for line in told:
        window = documents[line["first_step"] : line["first_step"] + EVERY]
        assert Counter(task[example] for step in window for example, _ in step) == Counter(line["counts"])
    shares = [line["shares"]["sums"] for line in told]
    assert shares == sorted(shares) and shares[-1] > shares[0] + 0.2
    visits = Counter(example for step in documents for example, _ in step)
    assert sum(visits.values()) == 92 and set(visits.values()) == {1}
    assert [len(step) for step in documents] == [PER_STEP] * 11 + [4]


@pytest.mark.parametrize("die_after", [1, 2, 3, 4, 6, 9, 11])
def test_a_killed_run_ends_as_if_it_had_not_been(
    planned: Run, whole: tuple[Path, dict[str, torch.Tensor], list[Any]], tmp_path: Path, die_after: int
) -> None:
    """Kills mixer state that a checkpoint leaves out, windows decided twice, and a log with a line lost or doubled."""
    with pytest.raises(Killed):
        go(opened(planned), tmp_path, progress=DiesAfter(die_after))
    batches = opened(planned)
    weights = go(batches, tmp_path)
    assert all(torch.equal(weights[name], value) for name, value in whole[1].items())
    assert seen(batches) == whole[2]
    for name in ("mixture.jsonl", "placements.parquet", "plan_steps.parquet"):
        assert (tmp_path / name).read_bytes() == (whole[0] / name).read_bytes()


def test_what_is_left_behind_is_the_plan_as_it_became(whole: tuple[Path, Any, list[Any]]) -> None:
    """Kills a report that shows the mixture of a plan which was not followed."""
    folder, _, documents = whole
    placements = tables.read_table(folder / "placements.parquet", tables.PLACEMENTS).to_pylist()
    steps = tables.read_table(folder / "plan_steps.parquet", tables.PLAN_STEPS).to_pylist()
    assert [step["step"] for step in steps] == list(range(NUM_STEPS))
    for step, expected in zip(steps, documents, strict=True):
        rows = range(step["first_row"], step["first_row"] + step["num_rows"])
        assert sorted((p["example"], p["visit"]) for p in placements if p["row"] in rows) == sorted(expected)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "mixture"] == [3, 6, 9]
    assert [e["step"] for e in events if e["event"] == "measure"] == [0, 3, 6, 9, 12]


def test_nothing_to_follow_is_an_error(planned: Run, tmp_path: Path) -> None:
    """Kills an online mixture that silently stays where it began."""
    with pytest.raises(TrainError, match="follows held-out losses, and nothing is measured"):
        go(opened(planned), tmp_path, measure=None)


def test_the_whole_pipeline_trains_and_reports_it(tmp_path: Path) -> None:
    """Kills stages that read the plan where the run has gone another way: every account must add up."""
    file = load_recipe(
        write_small(tmp_path), overrides=[MIX, BATCH, "evaluate.every_steps=100", "train.checkpoint_every_steps=5"]
    )
    done = run(file, store=tmp_path / "store", runs=tmp_path / "runs")
    trained = done.artefacts["train"]
    counts = trained.manifest["counts"]
    assert counts["in"] == counts["out"] + sum(counts["dropped"].values()) and set(counts["dropped"]) == {"not_drawn"}
    assert counts["out"] == 92
    assert (done.folder / "mixture.jsonl").exists() and (done.folder / "report.html").exists()
    assert [line["first_step"] for line in lines(done.folder)] == [0, 3, 6, 9]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([MIX], "needs batch.examples_per_step"),
        ([MIX.replace("max_visits: 1", "refill: none"), BATCH], "cannot keep `refill: none`"),
        ([MIX.replace("max_visits: 1", "min_examples: 3"), BATCH], "cannot keep `min_examples`"),
        ([MIX, BATCH, "loss={kind: response, normalise: task}"], "needs the visits of the whole run"),
        ([MIX, BATCH, "split.held_out_share=0.0"], "hold something out"),
    ],
)
def test_what_an_online_mixture_cannot_keep_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    """Kills recipes that promise what a mixture which is not known ahead cannot hold."""
    with pytest.raises(RecipeError, match=message):
        load_recipe(write_small(tmp_path), overrides=overrides)
