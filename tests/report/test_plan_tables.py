"""Promised against realised in three units: hand-made numbers, and what keeps the two apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_fakes import CAPPED, fake_view

from tutelage.plan.spec import MixSpec, Temperature
from tutelage.report import plan_tables
from tutelage.report.plan_summary import PlanSummary


def line(task, *, share, available, planned, is_capped=False):
    """A task with (examples, tokens, supervised) available and planned."""
    units = ("examples", "tokens", "supervised")
    out = {"task": task, "promised_share": share, "is_capped": is_capped}
    out |= {f"available_{unit}": n for unit, n in zip(units, available, strict=True)}
    return out | {f"planned_{unit}": n for unit, n in zip(units, planned, strict=True)}


HALVES = [
    line("long", share=0.5, available=(10, 200, 100), planned=(5, 100, 50)),
    line("short", share=0.5, available=(10, 50, 10), planned=(20, 100, 20)),
]


def test_a_share_of_tokens_is_carried_into_the_other_units_by_mean_lengths():
    """Kills: one promise for all units, means of the wrong task, shares that do not sum to 1. Half of the tokens each: 20 and 5
    tokens an example make 1 : 4 in examples, 10 and 1 learned ones make 10 : 4 in those.
    """
    found = {(p["task"], p["unit"]): p for p in plan_tables.promises({"count": "tokens", "mixture": HALVES})}
    assert found["long", "examples"]["promised"] == pytest.approx(1 / 5)
    assert found["long", "tokens"]["promised"] == pytest.approx(1 / 2)
    assert found["long", "supervised"]["promised"] == pytest.approx(10 / 14)
    assert all(p["promised"] == pytest.approx(p["realised"]) == pytest.approx(p["counted"]) for p in found.values())


@pytest.mark.parametrize(
    ("long", "short", "because"),
    [
        (((5, 100, 50), False), ((20, 100, 20), False), ["nothing", "nothing"]),
        (((5, 240, 50), False), ((20, 100, 20), False), ["lengths drawn", "lengths drawn of others"]),
        (((5, 100, 50), False), ((4, 20, 4), True), ["freed by caps", "its cap"]),
        (((50, 1000, 500), False), ((20, 100, 20), False), ["the budget's limits", "the budget's limits"]),
        (((5, 100, 50), False), ((21, 105, 21), False), ["rounding", "rounding"]),
    ],
)
def test_what_keeps_promise_and_rows_apart_is_named(long, short, because):
    """Kills: every difference called rounding; a cap blamed for a task below it; drawn lengths blamed for a full pass."""
    mixture = [
        line("long", share=0.5, available=(10, 200, 100), planned=long[0], is_capped=long[1]),
        line("short", share=0.5, available=(10, 50, 10), planned=short[0], is_capped=short[1]),
    ]
    table = plan_tables.promise_table({"count": "tokens", "mixture": mixture})
    assert [row[-1] for row in table.rows] == because


@given(epochs=st.sampled_from([1.0, 2.0, 3.0]), count=st.sampled_from(["examples", "tokens", "supervised_tokens"]))
def test_whole_passes_realise_their_promise_in_every_unit(epochs, count):
    """Kills: a realised share counted before packing, a unit taken for another. Proportional whole passes leave no rounding."""
    view = fake_view({"qa": 40, "maths": 10, "code": 25}, MixSpec(count=count, epochs=epochs))
    for promise in plan_tables.promises(view.facts):
        assert promise["realised"] == pytest.approx(promise["promised"], abs=1e-12)
        assert promise["realised"] == pytest.approx(promise["counted"], abs=1e-12)


def test_rows_match_the_counts_within_rounding_on_the_books_tasks():
    """Kills: counts that drift from the rates. In the unit that rates count no task is off by an example where no cap binds."""
    view = fake_view(mix=MixSpec(rates=Temperature(temperature=2.0), epochs=2.0))
    total = view.facts["total"]["planned_examples"]
    promised = [p for p in plan_tables.promises(view.facts) if p["unit"] == "examples"]
    assert len(promised) == 7 and all(abs(p["realised"] - p["promised"]) * total < 1 for p in promised)


def test_json_holds_everything_that_is_printed():
    """Kills: a --json without pictures, promises, coverage or warnings."""
    told = PlanSummary(fake_view(mix=CAPPED)).as_json()
    assert {"mixture", "steps", "facts", "promised_and_realised", "pictures", "deciles", "coverage", "warnings"} <= told.keys()
    assert [row["task"] for row in told["promised_and_realised"]] == [line["task"] for line in told["facts"]["mixture"]]


def test_the_summary_prints_shares_lengths_and_coverage():
    """Kills: a text output that leaves out what only the page shows."""
    summary = PlanSummary(fake_view(mix=CAPPED))
    captions = " ".join(table.caption for table in summary.tables())
    assert "Promised and realised" in captions and "What is learned of each task" in captions and "Steps" in captions
    text = "\n".join(summary.lines())
    assert "coverage: 7 tasks of 10 wanted" in text and "advice, task classification: outputs are short." in text
