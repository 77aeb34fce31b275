"""`tutelage plan`: a preview beside the exact plan, what it leaves behind, and the page. Tiny recipes, a toy tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from small_recipe import write_small
from toy import save_tiny
from tutelage import planning
from tutelage.errors import TutelageError
from tutelage.pipeline import explain, run
from tutelage.recipe import RecipeFile, load_recipe
from tutelage.report.plan_tables import plan_json
from tutelage.report.plan_view import PlanView
from tutelage.store import Store

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[RecipeFile, PlanView, Path]:
    """The small recipe, its exact plan, and the store that it lies in."""
    folder = tmp_path_factory.mktemp("small")
    file = load_recipe(write_small(folder, num_records=150))
    done = run(file, until="plan", store=folder / "store", runs=folder / "runs")
    return file, planning.exact_view(file, done), folder / "store"


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> tuple[RecipeFile, PlanView, int]:
    """The recipe of five real sources with a toy tokenizer, its exact plan, and how many records are too long."""
    folder = tmp_path_factory.mktemp("mixture")
    save_tiny(folder / "model")
    overrides = [f"model.name={folder / 'model'}", "render.max_tokens=1000", "batch.slots_per_step=8000"]
    file = load_recipe(RECIPES / "mixture.yaml", overrides=overrides)
    done = run(file, until="plan", store=folder / "store", runs=folder / "runs")
    return file, planning.exact_view(file, done), done.artefacts["plan"].manifest["counts"]["dropped"]["overlong"]


def keys(store: Path, label: str) -> set[str]:
    """The artefacts of a stage in a store."""
    return {path.name for path in (store / label).glob("*")}


def test_a_preview_of_everything_is_the_plan(small: tuple[RecipeFile, PlanView, Path], tmp_path: Path) -> None:
    """Kills: records lost or doubled between sample and plan, rewrites forgotten, held-out or dropped records let in, tallies or
    tasks of the neighbour: with every record drawn, not one fact of the plan may differ, nor any number of its page.
    """
    file, exact, _ = small
    seen = planning.preview(file, num=10_000, store=tmp_path / "store")
    assert json.loads(json.dumps(dict(seen.facts))) == json.loads(json.dumps(dict(exact.facts)))
    assert (seen.lengths, seen.placed, seen.progress, seen.pictures) == (
        exact.lengths,
        exact.placed,
        exact.progress,
        exact.pictures,
    )
    assert seen.estimate["num_sampled"] == seen.estimate["num_records"] == exact.facts["total"]["available_examples"]
    assert seen.estimate["relative_error"] == 0.0
    assert all(m["low"] == m["value"] == m["high"] for measures in seen.estimate["tasks"].values() for m in measures.values())


def test_a_preview_renders_nothing_for_good_and_changes_no_later_plan(
    small: tuple[RecipeFile, PlanView, Path], tmp_path: Path
) -> None:
    """Kills: a sample's rendering or plan that is later taken for the whole one."""
    file, exact, store = small
    planning.preview(file, num=20, store=tmp_path / "store")
    left = {status.label: status.is_hit for status in explain(file, store=tmp_path / "store")}
    assert left["read sums"] and left["copies"] and left["tokenizer"]
    assert not any(left[label] for label in ("render sums", "rerender sums", "tally sums", "plan"))
    done = run(file, until="plan", store=tmp_path / "store", runs=tmp_path / "runs")
    assert keys(tmp_path / "store", "plan") == keys(store, "plan")
    assert dict(planning.exact_view(file, done).facts) == dict(exact.facts)


def test_what_is_rendered_already_counts_exactly(small: tuple[RecipeFile, PlanView, Path]) -> None:
    """Kills: a sample drawn from a source that the store knows whole; an error stated where there is none."""
    file, exact, store = small
    seen = planning.preview(file, num=20, store=store)
    assert seen.estimate["num_sampled"] == 0 and seen.estimate["relative_error"] == 0.0
    assert dict(seen.facts) == dict(exact.facts)


def test_one_source_may_be_exact_and_another_sampled(small: tuple[RecipeFile, PlanView, Path], tmp_path: Path) -> None:
    """Kills: all sources sampled, or none, as soon as one is rendered."""
    file, exact, _ = small
    store = Store(tmp_path / "store")
    pipeline = planning.build_pipeline(file, store=store)
    wanted = [
        label for label in pipeline.needed("plan") if pipeline.stages[label].slot == "sums" or label in ("model", "tokenizer")
    ]
    dict(planning.produced(pipeline, wanted, planning.Silent()))
    seen = planning.preview(file, num=40, store=store)
    assert set(seen.estimate["sources"]) == {"words", "hidden"}
    of = {line["task"]: line for line in exact.facts["mixture"]}
    sums = seen.estimate["tasks"]["sums"]
    assert [sums[unit]["value"] for unit in sums] == [of["sums"][f"available_{unit}"] for unit in sums]
    assert all(measure["low"] == measure["high"] for measure in sums.values())
    words = seen.estimate["tasks"]["words"]["tokens"]
    assert words["low"] < words["high"] and words["low"] <= of["words"]["available_tokens"] <= words["high"]


@pytest.mark.parametrize("num", [150, 400])
def test_the_interval_covers_the_exact_plan_of_five_real_sources(
    demonstration: tuple[RecipeFile, PlanView, int], tmp_path: Path, num: int
) -> None:
    """Kills: an estimate of another population (held-out records in it, drops left out), an interval without the drops,
    drops counted in the sample instead of in the whole. The limit of 1,000 toy tokens sets aside a good part of `chat` and
    some of the others.
    """
    file, exact, num_overlong = demonstration
    seen = planning.preview(file, num=num, store=tmp_path / "store")
    told = seen.estimate
    assert told["num_sampled"] < 0.8 * told["num_records"]
    for line in exact.facts["mixture"]:
        for unit, found in told["tasks"][line["task"]].items():
            assert found["low"] <= line[f"available_{unit}"] <= found["high"], (line["task"], unit, found)
    assert told["steps"]["low"] <= exact.facts["num_steps"] <= told["steps"]["high"]
    for unit, found in told["planned"].items():
        assert found["low"] <= exact.facts["total"][f"planned_{unit}"] <= found["high"], unit
    assert 0 < told["relative_error"] < 0.06
    assert 0 < told["dropped"]["overlong"]["low"] <= num_overlong <= told["dropped"]["overlong"]["high"]


def test_realised_shares_match_the_promise_within_rounding(demonstration: tuple[RecipeFile, PlanView, int]) -> None:
    """Kills: a mixture that drops, truncation or packing bent. In the rows every task has as many examples as its count says, and
    its tokens and learned tokens lie within the spread of what one part pass may draw.
    """
    _, exact, _ = demonstration
    for line, place in zip(exact.facts["mixture"], exact.placed, strict=True):
        assert place.examples == line["planned_examples"] and place.tokens == line["planned_tokens"]
        for unit in ("tokens", "supervised"):
            expected = line["planned_examples"] * line[f"available_{unit}"] / line["available_examples"]
            assert line[f"planned_{unit}"] == pytest.approx(expected, rel=0.04), (line["task"], unit)


def test_the_page_is_written_with_the_plans_numbers(small: tuple[RecipeFile, PlanView, Path], tmp_path: Path) -> None:
    """Kills: a page of another plan; a folder that is made up; a page that says less than --json."""
    file, exact, _ = small
    facts = planning.write_page(exact, file, tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text()
    assert facts["size_bytes"] == len(text.encode()) and f"{exact.facts['num_steps']:,} steps" in text
    assert plan_json(exact)["placed"][0]["examples"] == exact.facts["mixture"][0]["planned_examples"]
    with pytest.raises(TutelageError, match="does not exist; make it"):
        planning.write_page(exact, file, tmp_path / "none" / "plan.html")


def test_a_sample_too_small_for_an_error_is_refused(small: tuple[RecipeFile, PlanView, Path], tmp_path: Path) -> None:
    """Kills: an interval from one record."""
    with pytest.raises(TutelageError, match="2 records up"):
        planning.preview(small[0], num=1, store=tmp_path)
