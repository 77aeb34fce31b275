"""A source made up from its sample, and how far a plan of it may be off: without a store, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.plan.preview import (
    MIN_PER_TASK,
    Hidden,
    Measured,
    SampledSource,
    draw_source,
    estimate_drops,
    hidden,
    plan_intervals,
    task_intervals,
)
from tutelage.plan.sample import Totals
from tutelage.plan.spec import Equal, MixSpec

LINE = {"available_examples": 100, "available_tokens": 5_000, "available_supervised": 2_000}


def stratum_line(name, planned, **more):
    """A line of the plan's facts."""
    sizes = {f"planned_{unit}": planned * LINE[f"available_{unit}"] // 100 for unit in ("examples", "tokens", "supervised")}
    return {"name": name, "task": name, **LINE, **sizes, **more}


def totals(error):
    """100 examples whose tokens are known to this standard deviation, the learned ones to half of it."""
    values = np.array([LINE[f"available_{unit}"] for unit in ("examples", "tokens", "supervised")], float)
    spread = np.array([0.0, error, error / 2])
    return Totals(values, np.outer(spread, spread), np.full(3, np.inf))


@given(sizes=st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 200), min_size=1), num=st.integers(2, 400))
def test_every_task_gives_its_part_and_no_record_is_drawn_twice(sizes, num):
    """Kills: a small task without a sample, a sample larger than its task, rows of the neighbour, an order of the files."""
    tasks = np.repeat(np.array(list(sizes), object), list(sizes.values()))
    rows = 3 * np.arange(len(tasks)) + 1
    sampled = draw_source("s", rows=rows, tasks=tasks, lengths=np.arange(len(tasks)) % 37, num=num, seed=0)
    assert sampled.num_records == len(tasks) and len(np.unique(sampled.rows)) == len(sampled.rows)
    assert set(sampled.rows.tolist()) <= set(rows.tolist())
    of = dict(zip(rows.tolist(), tasks.tolist(), strict=True))
    for stratum in sampled.strata:
        assert {of[row] for row in stratum.rows.tolist()} == {stratum.task}
        assert sampled.rows[sampled.lines(stratum)].tolist() == stratum.rows[stratum.chosen.index].tolist()
        assert len(stratum.chosen) >= min(2, sizes[stratum.task])
    assert len(sampled.rows) <= max(num, MIN_PER_TASK * len(sizes), 2 * len(sizes))


def test_records_without_a_task_of_their_own_are_no_source():
    """Kills: a concatenation of nothing."""
    empty = draw_source("s", rows=np.zeros(0, np.int64), tasks=np.zeros(0, object), lengths=np.zeros(0, np.int64), num=9, seed=0)
    assert empty.num_records == 0 and len(empty.rows) == 0 and empty.strata == ()


def fifty(refused=()):
    """A source of 500 records, fifty drawn, of which these lines were refused."""
    source = draw_source("s", rows=np.arange(500), tasks=np.full(500, "t", object), lengths=np.arange(500), num=50, seed=0)
    why = np.full(len(source.rows), "", object)
    why[list(refused)] = "overlong"
    return source, Measured(np.ones((len(why), 3)), why)


def test_drops_are_made_up_to_the_whole():
    """Kills: drops of the sample told as those of the source; a record of a source already rendered counted twice or not at all."""
    source, measured = fifty(refused=[0])
    found = estimate_drops({"s": (source, measured)}, {"overlong": 7, "template_refuses": 1})
    chosen = source.strata[0].chosen
    whole = int(chosen.stands_for[source.lines(source.strata[0]) == 0].sum())
    assert found["overlong"]["value"] == whole + 7 and found["overlong"]["low"] >= 7 and found["overlong"]["high"] > whole + 7
    assert found["template_refuses"] == {"value": 1, "low": 1, "high": 1} and "not_met_in_the_sample" not in found


def test_what_no_drawn_record_met_may_hide():
    """Kills: a bound of 0 from a sample of fifty. Of 450 records not seen, three in fifty may be refused: 27."""
    source, measured = fifty()
    drawn = len(source.rows)
    [(task, found)] = hidden(source, measured)
    assert task == "t" and found.fewer == pytest.approx(3 * (500 - drawn) / drawn) and not found.more.any()
    assert estimate_drops({"s": (source, measured)}, {})["not_met_in_the_sample"]["high"] == -(-3 * (500 - drawn) // drawn)
    interval = task_intervals([{"task": "t", **LINE}], {}, {"t": Hidden(27.0, np.array([1.5, 99.5, 7.0]))})["t"]
    assert interval["examples"] == {"value": 100, "low": 73, "high": 102} and interval["tokens"] == {
        "value": 5_000,
        "low": 5_000,
        "high": 5_100,
    }


def test_what_was_refused_with_its_whole_block_may_hide_kept_ones():
    """Kills: no error at all where both drawn of the longest block were refused and no other: the rest of it may be shorter."""
    source, _ = fifty()
    chosen = source.strata[0].chosen
    last = np.flatnonzero(chosen.block == chosen.block.max())
    _, measured = fifty(refused=source.lines(source.strata[0])[last])
    rest, num_rest, num_drawn = int(chosen.size[-1]) - len(last), 500 - int(chosen.size[-1]), len(source.rows) - len(last)
    measured.measures[0] = 1, 80, 60  # the most of the stratum is what a long one may come to
    [(task, found)] = hidden(source, measured)
    assert task == "t" and rest > 0
    assert found.fewer == pytest.approx(3 * (num_rest - num_drawn) / num_drawn)
    assert found.more.tolist() == [min(3 * rest / len(last), rest) * most for most in (1, 80, 60)]
    _, mixed = fifty(refused=source.lines(source.strata[0])[last[:1]])
    [(_, found)] = hidden(source, mixed)
    assert found.fewer == 0 and not found.more.any(), "its spread shows it"


def test_a_plan_in_examples_is_off_in_tokens_by_the_error_of_the_tokens():
    """Kills: errors of sizes that do not reach the run. 200 visits of 50 +- 1 tokens: 10,000 give or take 196."""
    found = plan_intervals(
        [stratum_line("t", 200)],
        {"t": totals(50.0)},
        mix=MixSpec(total_examples=200),
        num_steps=10,
        spread={"t": np.zeros(3)},
        seed=0,
    )
    assert found["examples"] == {"low": 200, "high": 200}
    assert 9_770 < found["tokens"]["low"] < 9_850 and 10_150 < found["tokens"]["high"] < 10_230
    assert found["steps"] == {"low": 9, "high": 11}


def test_a_plan_in_tokens_is_off_in_examples_instead():
    """Kills: an interval of the tokens that a budget fixes."""
    mix = MixSpec(total_tokens=10_000)
    found = plan_intervals(
        [stratum_line("t", 200)], {"t": totals(50.0)}, mix=mix, num_steps=10, spread={"t": np.zeros(3)}, seed=0
    )
    assert found["examples"]["low"] < 200 < found["examples"]["high"]
    assert found["tokens"]["low"] > 9_940 and found["tokens"]["high"] < 10_060, "to the nearest example"
    assert found["steps"]["high"] - found["steps"]["low"] <= 2


def test_a_budget_in_steps_has_that_many_steps():
    """Kills: a crash on a budget that only packing turns into examples."""
    mix = MixSpec(total_steps=10)
    found = plan_intervals(
        [stratum_line("t", 200)], {"t": totals(50.0)}, mix=mix, num_steps=10, spread={"t": np.zeros(3)}, seed=0
    )
    assert found["steps"] == {"low": 10, "high": 10} and found["examples"]["low"] < 200


def test_sizes_that_no_mixture_fits_are_left_out():
    """Kills: a preview that fails because one of its draws does. Two visits of all that there is: less than that cannot be met."""
    mix = MixSpec(rates=Equal(), total_tokens=10_000, max_visits=2)
    found = plan_intervals(
        [stratum_line("t", 200)], {"t": totals(50.0)}, mix=mix, num_steps=10, spread={"t": np.zeros(3)}, seed=0
    )
    assert found["tokens"]["low"] <= 10_000 <= found["tokens"]["high"]


def test_what_is_known_exactly_has_no_interval():
    """Kills: a spread where no record was sampled."""
    exact = totals(0.0)
    found = plan_intervals(
        [stratum_line("t", 250)],
        {"t": exact},
        mix=MixSpec(total_examples=250),
        num_steps=10,
        spread={"t": np.full(3, 9.0)},
        seed=0,
    )
    assert all(ends["low"] == ends["high"] for ends in found.values())


def test_a_source_knows_its_records():
    """Kills: drawn records counted for all."""
    source, _ = fifty()
    assert isinstance(source, SampledSource) and source.num_records == 500
