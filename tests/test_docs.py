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
