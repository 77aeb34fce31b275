"""YAML as recipes mean it."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tutelage.strict_yaml import parse, parse_value, scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E3", 1000.0),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("~", None),
        ("010", 10),
        ("0o10", 8),
        (".inf", math.inf),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2025-01-01", "2025-01-01"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    """Kills a YAML 1.1 reader: there `1e-5` is text, `no` is false, 12:30 is 750 and dates are objects."""
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_quoted_scalars_stay_text() -> None:
    """Kills a reader that resolves the text of quoted scalars."""
    assert parse_value('"1"') == "1"
    assert parse_value("'true'") == "true"


def test_a_key_given_twice_names_both_lines() -> None:
    """Kills a reader where the last of two equal keys silently wins."""
    document = parse("a: 1\nb: {c: 1}\na: 2\n", file="r.yaml")
    (problem,) = document.problems
    assert (problem.where, problem.path) == ("r.yaml:3", "a")
    assert "line 1" in problem.message


@pytest.mark.parametrize(
    "text",
    ["a: !!python/object/apply:os.system [echo]", "a: &x [1]\nb: *x", "a: {<<: {b: 1}}", "? [1, 2]\n: 3", "a: !!binary aGk="],
)
def test_code_aliases_merge_keys_and_odd_keys_are_refused(text: str) -> None:
    """Kills an unsafe loader, and one that a few lines of aliases can blow up to gigabytes."""
    assert parse(text, file="r.yaml").problems


def test_lines_of_nested_values_are_known() -> None:
    """Kills a loader that knows only the line of the document."""
    document = parse("a:\n  b:\n    - 1\n    - c: 2\n", file="r.yaml")
    assert document.lines["a", "b", 1, "c"] == 4
    assert document.lines["a", "b"] == 2


def test_broken_yaml_names_its_line() -> None:
    """Kills a loader that lets the parser's exception through."""
    document = parse("a: 1\nb: [1, 2\nc: 3\n", file="r.yaml")
    assert document.problems[0].where.startswith("r.yaml:")


def test_a_control_character_is_a_problem_not_a_crash() -> None:
    """Kills a loader that handles only errors with a mark."""
    assert parse("a: \x01", file="r.yaml").problems


def test_deep_nesting_is_refused() -> None:
    """Kills a recursive builder without a bound."""
    assert parse("[" * 80 + "]" * 80, file="r.yaml").problems


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12))
def test_quoted_text_stays_text(value: str) -> None:
    """Kills a resolver that looks at the text of quoted scalars."""
    assert parse_value(yaml.safe_dump(value, default_style='"', allow_unicode=True)) == value


@given(st.text(max_size=20))
def test_any_text_gives_a_document_and_never_an_exception(text: str) -> None:
    """Kills a parser that lets an exception of the YAML library through."""
    document = parse(text, file="r.yaml")
    assert all(problem.where.startswith("r.yaml:") for problem in document.problems)


@given(st.integers())
def test_integers_are_read_back(number: int) -> None:
    """Kills a number pattern that misses signs or length."""
    assert scalar(str(number)) == number
