"""The suite rejects wrong programs: see `mutants.py`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import mutants

# All of them run while the first is set up: a minute and a half on two quick cores.
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def failing() -> dict[str, list[str]]:
    """Mutant name to the tests that failed with it; "" is the program as it is."""
    done = subprocess.run([sys.executable, mutants.__file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_the_named_tests_pass_without_a_mutant(failing: dict[str, list[str]]) -> None:
    """Kills a table whose tests fail anyway, which would reject everything."""
    assert failing[""] == []


@pytest.mark.parametrize("name", [mutant.name for mutant in mutants.MUTANTS])
def test_the_suite_rejects(name: str, failing: dict[str, list[str]]) -> None:
    """Kills tests that cannot fail."""
    assert failing[name], f"every test still passes with {name!r} in place"


def test_names_are_unique() -> None:
    """Kills an entry that hides another of the same name."""
    names = [mutant.name for mutant in mutants.MUTANTS]
    assert len(set(names)) == len(names)
