"""Looking at a run's examples: which are found, in which order, and the page of them."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from small_recipe import write_small
from tutelage import load_recipe, looking
from tutelage.errors import DataError, TutelageError
from tutelage.pipeline import Run, run
from tutelage.recipe import RecipeFile

Looked = tuple[RecipeFile, Run]


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> Looked:
    """A planned run: a source that counts half, a turn that counts less, a rewritten record, a copy and a broken line."""
    folder = tmp_path_factory.mktemp("looking")
    path = write_small(folder)
    with (folder / "sums.jsonl").open("a") as file:
        file.write('{"question": "Add 1 to 1, please", "answer": "It is 2"}\n' * 2 + '{"question": \n')
    turns = [("user", "One"), ("assistant", "uno"), ("user", "Two"), ("assistant", "dos")]
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in turns]
    messages[1]["weight"] = 0.3
    with (folder / "words.jsonl").open("a") as file:
        file.write(json.dumps({"messages": messages}) + "\n")
    overrides = ["sources.sums.weight=0.5", "mix.rates=proportional", "mix.epochs=1", "split.held_out_share=0.1"]
    recipe = load_recipe(path, overrides=[*overrides, "curate.near_duplicates=null", "intake.max_bad_share=0.5"])
    return recipe, run(recipe, until="plan", store=folder / "store", runs=folder / "runs")


def found(looked: Looked, **wanted: Any) -> list[Any]:
    return looking.find_examples(*looked, looking.Wanted(**({"number": 10_000} | wanted)))


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    (block,) = re.findall(r'<script id="data" type="text/plain">([A-Za-z0-9+/=]*)</script>', path.read_text())
    raw = zlib.decompress(base64.b64decode(block))
    length = int.from_bytes(raw[:4], "little")
    return json.loads(raw[4 : 4 + length]), raw[4 + length :]


def test_examples_are_spread_over_the_plan_and_filtered(looked: Looked) -> None:
    """Kills: the first few of the first source shown as if they were the plan; a filter that is not asked."""
    everything = [example.row_id for example in found(looked)]
    few = [example.row_id for example in found(looked, number=3)]
    assert few[0] == everything[0] and few[-1] == everything[-1] and len(few) == 3
    assert {example.source for example in found(looked, source="words")} == {"words"}
    assert {example.task for example in found(looked, task="sums")} == {"sums"}
    with pytest.raises(DataError, match="--task sum: no planned example has it; did you mean `sums`"):
        found(looked, task="sum")


def test_the_worst_are_those_with_the_smallest_supervised_share(looked: Looked) -> None:
    """Kills: the fewest supervised tokens instead of the smallest share, the largest first, ties in another order than the plan's."""
    plan = found(looked)
    share = {example.row_id: example.num_supervised / example.num_tokens for example in plan}
    worst = [example.row_id for example in found(looked, worst=True)]
    assert worst == sorted((example.row_id for example in plan), key=share.__getitem__)
    assert [example.row_id for example in found(looked, worst=True, number=2)] == worst[:2]
    assert len(set(share.values())) > 3, "shares differ, or the test could not fail"


def test_text_is_searched_as_the_model_sees_it(looked: Looked) -> None:
    """Kills: a search of the text as read, which a rule rewrote; one that minds the case; one that goes on after enough."""
    assert "uno" in "".join(run.text for example in found(looked, search="UNO") for run in example.runs)
    assert all("backwards" in "".join(run.text for run in e.runs).lower() for e in found(looked, search="Backwards?"))
    assert len(found(looked, search="Backwards?", number=2)) == 2
    with pytest.raises(DataError, match="no planned example fits"):
        found(looked, search="Sure!")


def test_a_row_is_found_by_its_id_or_the_end_of_it(looked: Looked) -> None:
    """Kills: another record of the same line number, an id that only its full form finds."""
    (wanted,) = found(looked, search="Say the", number=1)
    assert [example.row_id for example in found(looked, row_id=wanted.row_id)] == [wanted.row_id]
    assert [example.row_id for example in found(looked, row_id=wanted.row_id.removeprefix("words/"))] == [wanted.row_id]


def test_a_row_that_is_not_planned_is_explained(looked: Looked) -> None:
    """Kills: "no planned example fits" for a record whose fate is known."""
    with pytest.raises(DataError, match=r"--row sums.jsonl:62: .*:62 is not in the plan: exact_duplicate, said by `copies`"):
        found(looked, row_id="sums.jsonl:62")
    with pytest.raises(DataError, match=r"sums.jsonl:63 was set aside by `read sums`: \w+"):
        found(looked, row_id="sums.jsonl:63")
    with pytest.raises(DataError, match="held_out, said by `plan` \\(kept for measuring"):
        found(looked, row_id="hidden.jsonl:1")


def test_the_page_holds_the_examples_in_plan_order_with_all_that_a_policy_needs(looked: Looked, tmp_path: Path) -> None:
    """Kills: turn weights or multipliers left behind, examples in the order they were found, a page of other examples."""
    path = tmp_path / "look.html"
    facts = looking.write_page(*looked, looking.Wanted(worst=True, number=500), path)
    assert facts == {"html": str(path), "num_examples": len(found(looked)), "size_bytes": path.stat().st_size}
    head, _ = header(path)
    columns = head["examples"]
    assert columns["name"] == [example.row_id for example in found(looked)]
    assert columns["place"] == sorted(columns["place"]) and head["sort"] == "worst"
    assert set(zip(columns["source"], columns["multiplier"], strict=True)) == {("sums", 0.5), ("words", 1.0)}
    assert [1, float(np.float32(0.3)), 1, 1] in columns["turn_weights"]
    assert head["vocabulary"]["special"] and head["num_planned"] == len(columns["name"])


def test_the_page_needs_a_folder_to_lie_in(looked: Looked, tmp_path: Path) -> None:
    """Kills: a traceback, or a folder made because of a slip of the pen."""
    with pytest.raises(TutelageError, match="does not exist; make it"):
        looking.write_page(*looked, looking.Wanted(), tmp_path / "nowhere" / "look.html")
    assert not (tmp_path / "nowhere").exists()


def test_every_policy_says_itself_as_a_recipe_does(looked: Looked) -> None:
    """Kills: a line that a recipe would refuse, or that means another loss than the page shows; a rule offered twice."""
    file, _ = looked
    assert looking.policies(file.recipe.loss)[0].name == "response"
    for policy in looking.policies(looking.STANDARD_RULES[1]):
        rule = load_recipe(file.path, overrides=[policy.line.replace("loss: ", "loss=", 1)]).recipe.loss
        assert looking.policies(rule)[0] == policy
    names = [policy.name for policy in looking.policies(looking.STANDARD_RULES[1])]
    assert names == ["instruction modelling", "response", "full", "last response", "prompt weight"]


def test_what_the_terminal_shows_is_what_training_weighs(looked: Looked) -> None:
    """Kills: weights shown without the source's weight or the turn's."""
    (shown,) = found(looked, search="uno")
    weights = [run.weight for run in shown.runs if run.kind == "assistant"]
    assert weights == pytest.approx([0.3, 1.0])
    assert {run.weight for run in found(looked, source="sums", number=1)[0].runs} == {0.0, 0.5}
