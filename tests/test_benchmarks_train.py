"""The pure parts of benchmarks/train.py: bars that can fail, and the promise that every side trains on the same tokens."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny_training import Doc, make_batch
from tutelage.train.micro import flatten

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks, and forgets it afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def runs(**useful: list[float]) -> list[dict[str, Any]]:
    """Runs of sides by their useful tokens a second; memory falls as speed rises."""
    return [
        {"side": side.replace("_", "-"), "round": number, "useful_per_second": value, "peak_bytes": 1000 / value}
        for side, values in useful.items()
        for number, value in enumerate(values)
    ]


def test_speed_is_judged_beside_packed_and_beside_the_best_setting(load: Any) -> None:
    """Kills a bar against the slowest setting, and one that is met whatever was measured."""
    bars = load("train_bars").speed_bars
    found = bars(runs(tutelage=[10.0], trl_packed=[2.0], trl_grouped=[6.0], trl_padded=[1.0]))
    assert [(bar.value, bar.is_met) for bar in found if "tokens" in bar.what] == [(5.0, True), (10 / 6, False)]
    assert "trl-grouped" in found[2].what
    found = bars(runs(tutelage=[2.0], trl_packed=[4.0]))
    assert not any(bar.is_met for bar in found)


def test_ratios_are_of_the_same_round(load: Any) -> None:
    """Kills a ratio of medians, which a machine that slows down between rounds would spoil."""
    ratios = load("train_bars").ratios
    assert ratios(runs(tutelage=[8.0, 4.0], plain=[4.0, 2.0]), "tutelage", "plain") == [2.0, 2.0]


def test_a_curve_off_by_more_than_the_bar_is_missed(load: Any) -> None:
    """Kills a comparison of the last step alone, and one that lets NaN pass."""
    bar = load("train_bars").curve_bar
    assert bar({"float32": [2.0, 1.0], "bfloat16": [2.0, 1.005]})[0].is_met
    assert not bar({"float32": [2.0, 1.0], "bfloat16": [2.1, 1.0]})[0].is_met
    assert not bar({"float32": [2.0, 1.0], "bfloat16": [2.0, float("nan")]})[0].is_met
    assert bar({}) == []


def test_the_documents_given_to_peers_are_the_targets_of_the_plan(load: Any) -> None:
    """Kills labels off by one: a peer shifts them itself, and would train other tokens than the plan."""
    side, ours = load("train_side"), load("peer_train_tutelage")
    batch = make_batch([[Doc((5, 6, 7), (0, 1)), Doc((8, 9), (1,))], [Doc((3, 4, 2), (0.5, 0))]])
    documents = [document for row in ours.documents_of(batch) for document in row]
    assert documents == [([5, 6, 7], [-100, -100, 7]), ([8, 9], [-100, 9]), ([3, 4, 2], [-100, 4, -100])]
    assert side.num_supervised(documents) == int((batch.weights > 0).sum())
    assert side.digest(documents) == side.digest(documents[::-1])
    changed = [*documents[:-1], (documents[-1][0], [-100, 4, 2])]
    assert side.digest(documents) != side.digest(changed)


def test_rows_the_other_way_round_are_the_same_step(load: Any) -> None:
    """Kills a permuted run, the measure of noise, that trains on other tokens or under other weights."""
    turned = load("peer_train_tutelage").turned
    batch = make_batch([[Doc((5, 6, 7), (0, 1)), Doc((8, 9), (1,))], [Doc((3, 4, 2), (0.5, 0))]])
    there, back = flatten(turned(batch)), flatten(turned(turned(batch)))
    assert there.inputs.tolist() == [3, 4, 2, 5, 6, 7, 8, 9]
    assert there.lengths.tolist() == [3, 3, 2]
    assert np.array_equal(back.inputs, flatten(batch).inputs)
    assert turned(batch).total_weight == batch.total_weight
