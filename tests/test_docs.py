"""The pages' examples are run."""

from __future__ import annotations

import doctest
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_numbers_of_the_walk_are_true() -> None:
    """Kills a walk whose numbers were typed by hand, or are of an older version."""
    found = doctest.testfile(str(DOCS / "walk.md"), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 25
    assert found.failed == 0


def test_a_loop_of_ones_own_on_plain_lists_works_as_its_page_says() -> None:
    """Kills a public function that needs a store, or an example that was never run."""
    found = doctest.testfile(str(DOCS / "export.md"), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 15
    assert found.failed == 0


def test_the_numbers_of_the_plan_page_are_true() -> None:
    """Kills notes and refusals that are quoted as they once were."""
    found = doctest.testfile(str(DOCS / "plan.md"), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 7
    assert found.failed == 0
