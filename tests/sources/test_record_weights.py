"""Weights that records state for themselves: read whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sources_stage import FORMATS, dropped, found, lines, read

from tutelage.errors import DataError
from tutelage.sources import gather
from tutelage.store import Artefact
from tutelage.tables import RECORD_WEIGHTS, read_table


def weights_of(artefact: Artefact) -> list[float]:
    return list(read_table(artefact.file("weights.parquet"), RECORD_WEIGHTS)["weight"].to_pylist())


def row(i: int, **more: Any) -> dict[str, Any]:
    return {"question": f"What is {i}+1?", "answer": f"{i + 1}", **more}


@pytest.mark.parametrize("ending", FORMATS)
def test_weights_stand_beside_their_records_in_every_format(tmp_path: Path, ending: str) -> None:
    """Kills weights of csv, which knows only texts, taken for no weights."""
    rows = [row(i, quality=i / 4) for i in range(70)]
    (tmp_path / f"data.{ending}").write_bytes(FORMATS[ending](rows))
    artefact = read(tmp_path, f"data.{ending}", weight_field="quality")
    assert weights_of(artefact) == [i / 4 for i in range(70)]


def test_nothing_is_read_unless_it_is_asked_for(tmp_path: Path) -> None:
    """Kills a field named `weight` that quietly changes what old data means, and the cache of recipes that do not use it."""
    (tmp_path / "data.jsonl").write_bytes(lines([row(1, weight="heavy"), row(2, weight=-1)]))
    artefact = read(tmp_path)
    assert len(found(artefact)) == 2
    assert not (artefact.path / "weights.parquet").exists()
    assert "weight_field" not in artefact.manifest["ingredients"]["spec"]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "`q` is absent"),
        ("good", "`q` is 'good'"),
        (-0.5, "`q` is -0.5"),
        (True, "`q` is True"),
        ([1.0], "`q` is [1.0]"),
        (1e300, "`q` is 1e+300"),
        ("nan", "`q` is nan"),
    ],
)
def test_what_is_no_weight_sets_its_record_aside_by_name(tmp_path: Path, value: Any, told: str) -> None:
    """Kills a weight of 1 for what is not a number, an infinite one, and a neighbour's weight."""
    (tmp_path / "data.jsonl").write_bytes(lines([row(1, q=0.5), row(2, q=value), row(3, q=0), row(4, q="2.5")]))
    artefact = read(tmp_path, weight_field="q")
    assert weights_of(artefact) == [0.5, 0.0, 2.5]
    assert [(d.line, d.reason) for d in dropped(artefact)] == [(2, "bad_weight")]
    assert dropped(artefact)[0].detail.startswith(told)
    assert artefact.facts["files"]["data.jsonl"]["bad"] == 1


def test_a_field_that_no_record_has_is_an_error(tmp_path: Path) -> None:
    """Kills a whole source set aside for a misspelt name."""
    (tmp_path / "data.jsonl").write_bytes(lines([row(1, quality=0.5)]))
    with pytest.raises(DataError, match=r"no column `qualty`.*did you mean `quality`"):
        read(tmp_path, weight_field="qualty")


def test_a_sample_keeps_the_weights_of_the_records_it_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills weights of the first records given to the sampled ones."""
    monkeypatch.setattr(gather, "ROWS_PER_GROUP", 70)
    (tmp_path / "data.jsonl").write_bytes(lines([row(i, quality=i + 1) for i in range(300)]))
    artefact = read(tmp_path, max_records=50, weight_field="quality")
    assert weights_of(artefact) == [c.where.line for c in found(artefact)]


def test_instances_share_the_weight_of_their_line(tmp_path: Path) -> None:
    """Kills weights that fall behind where a line holds several records or one that cannot be read."""
    tasks = [
        {"Definition": ["Add."], "Instances": [{"input": "1", "output": ["2"]}, {"input": "2", "output": ["3"]}], "w": 0.5},
        {"Definition": ["Add."], "Instances": [{"input": "", "output": [""]}, {"input": "5", "output": ["6"]}], "w": 3},
    ]
    (tmp_path / "data.jsonl").write_bytes(lines(tasks))
    artefact = read(tmp_path, weight_field="w")
    assert [c.turns[-1].content for c in found(artefact)] == ["2", "3", "6"]
    assert weights_of(artefact) == [0.5, 0.5, 3.0]


records = st.one_of(
    st.builds(row, st.integers(0, 99), w=st.sampled_from([0, 1, 0.25, 7, "0.5"])),
    st.builds(row, st.integers(0, 99), w=st.sampled_from([None, -1, "x", True])),
    st.just({"question": "", "answer": "1", "w": 1}),
    st.just({"messages": [{"role": "user", "content": "a"}], "w": 1}),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(records, min_size=1, max_size=60), st.sampled_from([(1, 1), (4, 2), (512, 32)]))
def test_many_at_once_or_one_by_one_the_weights_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], sizes: tuple[int, int]
) -> None:
    """Kills a quick way that keeps a record the slow one sets aside, or loses the place of a weight."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "data.jsonl").write_bytes(lines([row(0, w=1), *rows]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "MANY", sizes[0])
        patch.setattr(gather, "FEW", sizes[1])
        artefact = read(folder, weight_field="w", shape="prompt_completion")
    usable = (0, 1, 0.25, 7, "0.5")
    kept = [(i, each) for i, each in enumerate([row(0, w=1), *rows], 1) if each.get("question") and each["w"] in usable]
    kept = [(i, each) for i, each in kept if each["w"] is not True]
    assert [c.where.line for c in found(artefact)] == [i for i, _ in kept]
    assert weights_of(artefact) == [float(each["w"]) for _, each in kept]
