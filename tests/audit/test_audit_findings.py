"""From what was measured to errors, warnings and notes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tutelage.audit.findings import CATALOGUE, judge, refusal
from tutelage.audit.spec import AuditSpec
from tutelage.errors import RecipeError
from tutelage.recipe import load_recipe

RULE = {"asks_scaffold": False, "leaves_stop_out": False, "has_own_template": False}


def part(num: int, of: int, **more: object) -> dict[str, object]:
    return {"num": num, "of": of, "records": [f"s/f:{i}" for i in range(num)], "details": ["turn 1"] * num, **more}


def facts(name: str, *parts: dict[str, object], **rule: bool) -> dict[str, object]:
    return {"rule": RULE | rule, "findings": {name: {f"s{i}": each for i, each in enumerate(parts)}}}


@pytest.mark.parametrize(
    ("finding", "field"), [(name, meaning.threshold) for name, meaning in CATALOGUE.items() if meaning.threshold]
)
def test_a_threshold_is_held_by_each_source_and_crossed_by_more(finding: str, field: str) -> None:
    """Kills a threshold compared with a count, with the share over all sources, or that its own value already crosses."""
    measured = facts(finding, part(1, 4, num_left=3), part(3, 4, num_left=1))
    (found,) = judge(measured, AuditSpec(**{field: 0.25}))
    meaning = CATALOGUE[finding]
    assert [each.severity for each in found.sources] == [meaning.below, meaning.above]
    assert found.severity == meaning.above and found.num == 4


def test_the_defaults_stop_what_makes_training_wrong() -> None:
    """Kills a gate that lets the gravest faults through."""
    for name in ("zero_weight", "no_stop", "cut_answer", "forged_turn", "stop_untrained", "trained_scaffold", "split_markers"):
        (found,) = judge(facts(name, part(1, 10_000)), AuditSpec())
        assert found.severity == "error", name
    for name in ("duplicate", "unfinished_answer", "hidden_system", "forged_text"):
        (found,) = judge(facts(name, part(9, 10)), AuditSpec())
        assert found.severity == "warning", name


def test_what_the_recipe_asks_for_in_so_many_words_is_a_note() -> None:
    """Kills a gate that argues with the recipe's own loss, or with the model's own template."""
    cases = (("trained_scaffold", "asks_scaffold", "note"), ("stop_untrained", "leaves_stop_out", "note"))
    for name, rule, severity in (*cases, ("split_markers", "has_own_template", "warning")):
        (found,) = judge(facts(name, part(1, 1), **{rule: True}), AuditSpec())
        assert found.severity == severity, name


def test_a_source_that_loses_every_record_stops_whatever_the_threshold() -> None:
    """Kills a threshold of 1 that lets a whole source vanish."""
    (found,) = judge(facts("render_losses", part(4, 4, num_left=0), part(3, 4, num_left=1)), AuditSpec(max_render_loss_share=1.0))
    assert [each.severity for each in found.sources] == ["error", "note"]


def test_stops_that_never_end_an_answer_are_an_error_and_some_a_warning() -> None:
    """Kills one severity for a wrong template and for an odd record."""
    (found,) = judge(facts("wrong_stop", part(2, 9, num_right=7), part(9, 9, num_right=0)), AuditSpec())
    assert [each.severity for each in found.sources] == ["warning", "error"]


def test_shares_that_are_as_they_should_be_are_no_finding() -> None:
    """Kills a measure reported as a fault."""
    assert judge(facts("low_supervision", part(30, 100)), AuditSpec()) == ()
    assert judge(facts("mixed_system", part(1, 100)), AuditSpec()) == ()
    assert [f.severity for f in judge(facts("low_supervision", part(30, 100)), AuditSpec(min_supervised_share=0.31))] == [
        "warning"
    ]
    assert [f.severity for f in judge(facts("mixed_system", part(3, 100)), AuditSpec())] == ["warning"]


def test_the_refusal_names_counts_ids_and_remedy_of_errors_alone() -> None:
    """Kills a gate that says no and not why."""
    measured = facts("no_stop", part(7, 9), part(0, 9))
    measured["findings"] |= facts("duplicate", part(1, 9))["findings"]
    told = refusal(judge(measured, AuditSpec(num_shown=2)), table="findings.parquet")
    assert "s0: 7 of 9 examples: s/f:0 (turn 1), s/f:1 (turn 1), ..." in told
    assert CATALOGUE["no_stop"].remedy in told and "findings.parquet" in told
    assert "s1" not in told and "duplicate" not in told


def test_ignored_findings_neither_stop_nor_show_and_a_slip_of_the_pen_is_told(tmp_path: Path) -> None:
    """Kills an ignore list that is read loosely: a misspelt entry would leave the gate shut, or worse, open."""
    assert judge(facts("no_stop", part(1, 1)), AuditSpec(ignore=("no_stop",))) == ()
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\nsources: {d: {path: d.jsonl}}\naudit: {ignore: [duplicate, no_stops]}\n")
    with pytest.raises(RecipeError, match=r"audit\.ignore\.1.*did you mean `no_stop`"):
        load_recipe(recipe)
