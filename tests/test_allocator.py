"""When Python looks for garbage."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

import tutelage
from tutelage import pipeline
from tutelage.allocator import COLLECT_AFTER, collecting_as_usual, collecting_rarely

RECIPE = Path(__file__).parents[1] / "recipes" / "first.yaml"


def test_garbage_is_looked_for_rarely_inside_and_as_before_afterwards() -> None:
    """Kills thresholds that stay with the caller's program, after an error too, and a host's own that are forgotten."""
    usual = gc.get_threshold()
    try:
        gc.set_threshold(321, 7, 5)
        with collecting_as_usual():
            assert gc.get_threshold() == (321, 7, 5)
        with pytest.raises(KeyError), collecting_rarely():
            assert gc.get_threshold() == (COLLECT_AFTER, 7, 5)
            with collecting_rarely(), collecting_as_usual():
                assert gc.get_threshold() == (321, 7, 5)
            assert gc.get_threshold() == (COLLECT_AFTER, 7, 5)
            raise KeyError
        assert gc.get_threshold() == (321, 7, 5)
    finally:
        gc.set_threshold(*usual)


def test_a_run_leaves_the_thresholds_and_builds_models_under_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kills a run that holds tensors in cycles for fifty thousand objects, and one that looks through torch while it reads."""
    usual, seen = gc.get_threshold(), dict[str, int]()
    right = pipeline.produce_together

    def spied(store: Any, stages: Any, label: str, *more: Any) -> Any:
        seen[stages[label].name] = gc.get_threshold()[0]
        return right(store, stages, label, *more)

    monkeypatch.setattr(pipeline, "produce_together", spied)
    tutelage.run(tutelage.load_recipe(RECIPE), until="render", store=tmp_path / "store", runs=tmp_path / "runs")
    assert seen["model"] == usual[0] and seen["read"] == seen["render"] == COLLECT_AFTER
    assert gc.get_threshold() == usual
