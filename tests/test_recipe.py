"""Recipes: strict reading, all mistakes at once, overrides, bases, origins."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.errors import RecipeError
from tutelage.recipe import Recipe, RecipeFile, json_schema, load_recipe, resolved_text

GOOD = """\
name: good
sources:
  maths: {path: data.jsonl, task: maths, licence: MIT}
mix: {rates: {kind: temperature, temperature: 3}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "r.yaml").write_text(GOOD)
    return tmp_path


def problems(path: Path, *overrides: str) -> list[tuple[str, str, str]]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides=overrides)
    return [(p.where.rpartition("/")[2], p.path, p.message) for p in caught.value.problems]


def test_eight_mistakes_give_eight_lines_each_with_its_place_and_remedy(folder: Path) -> None:
    """Kills a reader that stops at the first mistake, or checks across sections only when all else is right."""
    (folder / "bad.yaml").write_text(
        "name: bad\n"
        "modle: {}\n"
        "sources:\n"
        "  maths: {path: data.jsonl, taks: maths}\n"
        "  chat: {path: missing.jsonl, licence: MIT, licence: X}\n"
        "split: {held_out_share: 1.5}\n"
        "mix: {rates: {kind: temprature}, epochs: '3'}\n"
        "batch: {slots_per_step: 5000, capacity: 2048}\n"
    )
    found = problems(folder / "bad.yaml")
    assert [(where, path) for where, path, _ in found] == [
        ("bad.yaml:2", "modle"),
        ("bad.yaml:4", "sources.maths.taks"),
        ("bad.yaml:5", "sources.chat.licence"),
        ("bad.yaml:5", "sources.chat.path"),
        ("bad.yaml:6", "split.held_out_share"),
        ("bad.yaml:7", "mix.rates"),
        ("bad.yaml:7", "mix.epochs"),
        ("bad.yaml:8", "batch.slots_per_step"),
    ]
    remedies = ["`model`", "`task`", "keep one", "start at the recipe's folder", "1", "temperature", "number", "4096 or 6144"]
    for (_, _, message), remedy in zip(found, remedies, strict=True):
        assert remedy in message


def test_an_unknown_key_deep_in_a_union_names_the_nearest_key_of_its_kind(folder: Path) -> None:
    """Kills an error formatter that shows pydantic's union tags, or the keys of another kind."""
    (folder / "r.yaml").write_text(GOOD + "curate: {rules: [{length: {max_words: 3}}]}\n")
    ((where, path, message),) = problems(folder / "r.yaml")
    assert (where, path) == ("r.yaml:5", "curate.rules.0.length.max_words")
    assert "`max_response_words`" in message


def test_numbers_in_quotes_are_refused(folder: Path) -> None:
    """Kills lax validation, where "3" silently becomes 3."""
    (folder / "r.yaml").write_text(GOOD + 'train: {learning_rate: "1e-4"}\n')
    assert problems(folder / "r.yaml")[0][1] == "train.learning_rate"


@pytest.mark.parametrize("text", ["equal", "{equal: null}", "{kind: equal}"])
def test_a_kind_can_be_written_in_three_ways(folder: Path, text: str) -> None:
    """Kills a shorthand that only one room understands."""
    (folder / "r.yaml").write_text(GOOD.replace("{kind: temperature, temperature: 3}", text))
    assert load_recipe(folder / "r.yaml").recipe.mix.rates.kind == "equal"


def test_overrides_come_last_and_may_name_another_kind(folder: Path) -> None:
    """Kills an override that is applied before the file, or that leaves the old kind's keys behind."""
    file = load_recipe(folder / "r.yaml", overrides=["mix.rates.temperature=5", "train.schedule.warmup_share=0.5"])
    assert file.recipe.mix.rates.temperature == 5.0
    assert file.recipe.train.schedule.kind == "cosine"
    assert file.recipe.train.schedule.warmup_share == 0.5
    assert load_recipe(folder / "r.yaml", overrides=["mix.rates=equal"]).recipe.mix.rates.kind == "equal"
    assert load_recipe(folder / "r.yaml", overrides=["mix={}", "mix.rates.temperature=2"]).recipe.mix.rates.temperature == 2.0


@pytest.mark.parametrize("override", ["mix.ratse=equal", "mix.rates", "=3", "name.x=3", "sources.maths.weight=[1"])
def test_a_wrong_override_is_a_problem_that_names_it(folder: Path, override: str) -> None:
    """Kills an override that is silently ignored."""
    assert problems(folder / "r.yaml", override)[0][0].startswith("--set")


def test_a_base_recipe_gives_what_the_child_does_not_say(folder: Path) -> None:
    """Kills a merge that replaces whole sections, or that mixes the keys of two kinds."""
    (folder / "child.yaml").write_text("from: r.yaml\nname: child\nmix: {rates: equal, max_visits: 2}\n")
    file = load_recipe(folder / "child.yaml")
    assert (file.recipe.name, file.recipe.mix.rates.kind, file.recipe.mix.max_visits) == ("child", "equal", 2)
    assert list(file.recipe.sources) == ["maths"]
    text = resolved_text(file)
    assert "name: child  # child.yaml:2" in text
    assert "task: maths  # r.yaml:3" in text
    assert "seed: 0  # default" in text


def test_a_base_of_a_base_is_refused(folder: Path) -> None:
    """Kills unbounded inheritance, in which nobody finds where a value comes from."""
    (folder / "b.yaml").write_text("from: r.yaml\nname: b\n")
    (folder / "c.yaml").write_text("from: b.yaml\nname: c\n")
    assert problems(folder / "c.yaml")[0][:2] == ("b.yaml:1", "from")


def test_a_missing_recipe_says_how_to_get_one(tmp_path: Path) -> None:
    """Kills a bare FileNotFoundError."""
    assert "new --demo" in problems(tmp_path / "none.yaml")[0][2]


def test_tasks_that_no_source_has_are_mistakes(folder: Path) -> None:
    """Kills a recipe whose mixture names a task nobody has, and trains without it."""
    (folder / "r.yaml").write_text(GOOD + "split: {unseen_tasks: [math]}\n")
    ((_, path, message),) = problems(folder / "r.yaml")
    assert path == "split.unseen_tasks.0"
    assert "`maths`" in message


@pytest.mark.parametrize(
    ("mix", "path", "message"),
    [
        ("rates: {counts: {math: 5}}", "mix.rates.counts.math", "did you mean `maths`"),
        ("max_visits: {default: 3, math: 5}", "mix.max_visits.math", "did you mean `maths`"),
        ("min_examples: {math: 5}", "mix.min_examples.math", "did you mean `maths`"),
        ("over: sources, rates: {kind: explicit, weights: {adding: 1}}", "mix.rates.weights.adding", "no such source"),
        ("rates: {kind: groups, rest: drop, groups: {one: {members: [math]}}}", "mix.rates.groups.one.members.0", "did you mean"),
        ("rates: {kind: groups, groups: {one: {members: [maths]}}}", "mix.rates.groups", "in no group: adding"),
        ("rates: {groups: {one: {members: [maths], rates: {counts: {maths: 3}}}}}", "mix.rates.groups.one.rates", "not one of"),
        ("max_visits: 0", "mix.max_visits", "at least 1 is wanted"),
        ("rates: unimax, refill: none", "mix", "`unimax` refills by definition"),
        ("rates: {counts: {maths: 3}}, epochs: 2", "mix", "one budget only, found `rates` of kind `counts` and `epochs`"),
    ],
)
def test_mistakes_in_a_mixture_are_told_before_anything_runs(folder: Path, mix: str, path: str, message: str) -> None:
    """Kills names that are first looked up after an hour of rendering, and a message without its place."""
    (folder / "r.yaml").write_text(GOOD.replace("mix: {rates: {kind: temperature, temperature: 3}}", f"mix: {{{mix}}}"))
    sums = "  sums: {path: data.jsonl, task: adding, licence: MIT}\n"
    (folder / "r.yaml").write_text((folder / "r.yaml").read_text().replace("sources:\n", f"sources:\n{sums}"))
    found = problems(folder / "r.yaml")
    assert found[0][:2] == ("r.yaml:5", path)
    assert message in found[0][2]


def test_groups_are_written_short(folder: Path) -> None:
    """Kills a short form that takes the names of groups for fields."""
    (folder / "r.yaml").write_text(GOOD)
    groups = "{groups: {one: {weight: 1.5, members: [maths]}}}"
    rates = load_recipe(folder / "r.yaml", overrides=[f"mix.rates={groups}"]).recipe.mix.rates
    assert (rates.kind, rates.groups["one"].weight, rates.groups["one"].members) == ("groups", 1.5, ("maths",))


def test_the_demonstration_recipe_resolves_to_an_equal_recipe(tmp_path: Path) -> None:
    """Kills a resolved recipe that loses or changes a value on its way through text."""
    demo = Path(__file__).parents[1] / "recipes" / "first.yaml"
    file = load_recipe(demo, overrides=["mix.rates.temperature=.inf", "render.date='1999-12-31'"])
    out = tmp_path / "resolved.yaml"
    out.write_text(resolved_text(file, relative_to=tmp_path))
    again = load_recipe(out)
    assert again.recipe.model_dump(exclude={"sources"}) == file.recipe.model_dump(exclude={"sources"})
    assert (out.parent / again.recipe.sources["maths"].path).samefile(demo.parent / "data/maths.jsonl")


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,8}", fullmatch=True)


@settings(max_examples=40, deadline=None)
@given(name=names, weight=st.floats(0, 10), licence=st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=12))
def test_any_recipe_survives_being_resolved(
    tmp_path_factory: pytest.TempPathFactory, name: str, weight: float, licence: str
) -> None:
    """Kills a writer that does not quote what would be read as something else (`no`, `1e5`, `# ...`)."""
    folder = tmp_path_factory.mktemp("r")
    (folder / "d.jsonl").write_text("{}\n")
    source = {"path": "d.jsonl", "weight": weight, "licence": licence}
    recipe = Recipe.model_validate({"name": name, "sources": {name: source}})
    (folder / "out.yaml").write_text(resolved_text(RecipeFile(recipe, folder / "r.yaml", {})), encoding="utf-8")
    assert load_recipe(folder / "out.yaml").recipe == recipe


def test_the_json_schema_admits_shorthand_and_refuses_unknown_keys() -> None:
    """Kills a schema that editors would underline on a valid recipe."""
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert "temperature" in str(schema["$defs"]["MixSpec"]["properties"]["rates"])
    assert {"enum"} <= set(schema["$defs"]["MixSpec"]["properties"]["rates"]["anyOf"][0])
