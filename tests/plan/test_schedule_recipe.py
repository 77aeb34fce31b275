"""Schedules as a recipe writes them: read, refused, written out again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tutelage.errors import RecipeError
from tutelage.plan.schedule_spec import Interpolate, Stages, TwoStage
from tutelage.recipe import load_recipe, resolved_text

HEAD = """\
name: good
sources:
  maths: {path: data.jsonl, task: maths, licence: MIT}
  chat: {path: data.jsonl, task: chat, licence: MIT}
mix:
"""
FADE = "  schedule: {kind: interpolate, from: equal, to: {temperature: 3}, shape: cosine, end: 0.8}\n"
STAGES = "  schedule: {stages: [{share: 0.6, rates: equal}, {share: 0.4, rates: {explicit: {weights: {chat: 1}}}}]}\n"
TWO = "  schedule: {two_stage: {first: [maths], replay: 0.0039}}\n"


def recipe(folder: Path, mix: str) -> Path:
    (folder / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    path = folder / "r.yaml"
    path.write_text(HEAD + mix)
    return path


@pytest.mark.parametrize(("text", "kind"), [(FADE, Interpolate), (STAGES, Stages), (TWO, TwoStage)])
def test_a_schedule_is_read_and_what_is_written_out_reads_the_same(tmp_path: Path, text: str, kind: type) -> None:
    """Kills resolved recipes that state rates beside a schedule, which is an error, or `first` where `from` is read."""
    file = load_recipe(recipe(tmp_path, text))
    assert isinstance(file.recipe.mix.schedule, kind)
    again = tmp_path / "again.yaml"
    again.write_text(resolved_text(file))
    assert load_recipe(again).recipe == file.recipe
    assert "rates" not in file.recipe.mix.canonical()


def test_a_schedule_can_be_changed_from_the_command_line(tmp_path: Path) -> None:
    """Kills overrides that cannot reach into a section that is not there by default."""
    file = load_recipe(recipe(tmp_path, FADE), overrides=["mix.schedule.to.temperature=5", "mix.schedule.start=0.1"])
    schedule = file.recipe.mix.schedule
    assert isinstance(schedule, Interpolate) and schedule.start == 0.1
    assert schedule.last.canonical() == {"kind": "temperature", "temperature": 5.0}
    fresh = load_recipe(recipe(tmp_path, "  epochs: 2\n"), overrides=["mix.schedule={two_stage: {first: [maths], replay: 0.5}}"])
    assert isinstance(fresh.recipe.mix.schedule, TwoStage)


def test_a_schedule_takes_the_place_of_a_base_recipes_rates(tmp_path: Path) -> None:
    """Kills arms of a study that cannot schedule a mixture because their base states rates."""
    recipe(tmp_path, "  rates: equal\n").rename(tmp_path / "base.yaml")
    (tmp_path / "arm.yaml").write_text("from: base.yaml\nmix:\n  rates: null\n" + TWO)
    assert isinstance(load_recipe(tmp_path / "arm.yaml").recipe.mix.schedule, TwoStage)
    overrides = ["mix.rates=null", "mix.schedule={two_stage: {first: [maths], replay: 0.5}}"]
    assert isinstance(load_recipe(tmp_path / "base.yaml", overrides=overrides).recipe.mix.schedule, TwoStage)
    with pytest.raises(RecipeError, match="takes back those of a base recipe"):
        load_recipe(tmp_path / "base.yaml", overrides=overrides[1:])


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        (FADE + "  rates: equal\n", "mix", "`mix.rates` and `mix.schedule` both say the rates; keep one"),
        (FADE.replace("from:", "form:"), "mix.schedule.form", "unknown key; did you mean `from`?"),
        (FADE.replace("end: 0.8", "start: 0.9, end: 0.8"), "mix.schedule", "`start` 0.9 is not before `end` 0.8"),
        (FADE.replace("equal", "{counts: {maths: 3}}"), "mix.schedule.from", "fix the budget of the whole run"),
        (FADE.replace("equal", "unimax"), "mix.schedule.from", "write `explicit` weights"),
        (FADE.replace("equal", "{explicit: {weights: {mats: 3}}}"), "mix.schedule.from.weights.mats", "did you mean `maths`"),
        (STAGES.replace("0.4", "0.3"), "mix.schedule.stages", "sum to 0.9, not to 1; with 0.4 for the last they do"),
        (STAGES.replace("chat: 1", "chap: 1"), "mix.schedule.stages.1.rates.weights.chap", "did you mean `chat`"),
        (TWO.replace("[maths]", "[math]"), "mix.schedule.first.0", "did you mean `maths`"),
        (TWO.replace("0.0039", "39"), "mix.schedule.two_stage.replay", "less than or equal to 1"),
    ],
)
def test_a_mistake_is_said_of_its_place_with_the_remedy(tmp_path: Path, text: str, path: str, message: str) -> None:
    """Kills schedules that are read loosely, and complaints that point at another place."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(tmp_path, text))
    found = [(problem.path, problem.message) for problem in caught.value.problems]
    assert any(place.startswith(path) and message in said for place, said in found), found
