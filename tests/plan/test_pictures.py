"""The numbers behind the book's five pictures, checked against the book and against hand-worked tables."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.plan.pictures import boosts, minority_tasks, picture_data, shares_by_temperature, visits_needed
from tutelage.plan.rates import Supply, plan_counts
from tutelage.plan.spec import Equal, MixSpec, Temperature

BOOK = {
    "QA": 120_000,
    "Summarization": 80_000,
    "Code": 15_000,
    "Math": 8_000,
    "Creative": 25_000,
    "Translation": 40_000,
    "Classification": 60_000,
}
"""Sizes of *Instruction Tuning Training: Data Mixing & Loss Masking*."""
PROPORTIONAL = {
    "QA": 34.5,
    "Summarization": 23.0,
    "Code": 4.3,
    "Math": 2.3,
    "Creative": 7.2,
    "Translation": 11.5,
    "Classification": 17.2,
}
ROOTS = {  # square roots of the sizes, by hand: what T = 2 goes by
    "QA": 346.410,
    "Summarization": 282.843,
    "Code": 122.474,
    "Math": 89.443,
    "Creative": 158.114,
    "Translation": 200.0,
    "Classification": 244.949,
}


def strata(sizes, mix):
    """The plan's lines of these sizes, every example one token."""
    found = plan_counts({name: Supply(size, size, size) for name, size in sizes.items()}, mix)
    lines = []
    for share in found.tasks:
        line = {"name": share.task, "promised_share": share.promised_share, "promised_examples": share.num_promised}
        line |= {f"available_{unit}": share.supply.num_examples for unit in ("examples", "tokens", "supervised")}
        line |= {f"planned_{unit}": share.num_planned for unit in ("examples", "tokens", "supervised")}
        line |= {"visits_per_record": share.num_planned / share.supply.num_examples, "is_capped": share.is_capped}
        lines.append(line)
    return lines


def test_shares_are_those_of_the_book():
    """Kills: T in place of 1/T, shares of the largest, a temperature that is not the one on the label."""
    found = shares_by_temperature(BOOK)
    assert {name: round(100 * share, 1) for name, share in found[1.0].items()} == PROPORTIONAL
    total = sum(ROOTS.values())
    assert {n: round(s, 5) for n, s in found[2.0].items()} == {n: round(r / total, 5) for n, r in ROOTS.items()}
    assert all(share == pytest.approx(1 / 7) for share in found[math.inf].values())
    fifth = {name: size**0.2 for name, size in BOOK.items()}
    assert found[5.0] == pytest.approx({name: value / sum(fifth.values()) for name, value in fifth.items()})


def test_boosts_are_over_the_proportional_share():
    """Kills: a boost over the equal share, or turned round. Math has 8 of 348 thousand: a seventh is 6.21 times that."""
    found = boosts(shares_by_temperature(BOOK)[math.inf], BOOK)
    assert round(found["Math"], 2) == 6.21 and round(found["QA"], 2) == 0.41
    assert boosts(shares_by_temperature(BOOK)[1.0], BOOK) == pytest.approx(dict.fromkeys(BOOK, 1.0))


def test_minority_tasks_are_the_smaller_half():
    """Kills: the larger half, or all tasks in the picture of the small ones."""
    assert minority_tasks(BOOK) == ("Math", "Code", "Creative")
    assert minority_tasks({"only": 3}) == ()


def test_visits_needed_are_those_before_caps():
    """Kills: visits as planned in place of those needed. The book's second example: equal, 15,000 in all, cap 3: Math would
    need 5,000 of its 500 records, 10 visits each, and gets 3.
    """
    mix = MixSpec(rates=Equal(), total_examples=15_000, max_visits=3)
    lines = strata({"QA": 10_000, "Math": 500, "Code": 2_000}, mix)
    assert visits_needed(lines) == {"Code": 2.5, "Math": 10.0, "QA": 0.5}
    visits = {row["task"]: row for row in picture_data(lines, mix)["visits"]}
    assert visits["Math"] == {"task": "Math", "needed": 10.0, "planned": 3.0, "cap": 3}
    assert visits["QA"]["planned"] == 0.75 and visits["Code"]["planned"] == 3.0


def test_caps_by_name_are_shown_by_name():
    """Kills: one cap drawn for all tasks."""
    mix = MixSpec(rates=Equal(), total_examples=1_000, max_visits={"Math": 5})
    visits = {row["task"]: row["cap"] for row in picture_data(strata({"QA": 10_000, "Math": 500}, mix), mix)["visits"]}
    assert visits == {"QA": None, "Math": 5}


def test_the_recipes_own_rule_stands_beside_the_temperatures():
    """Kills: a recipe's tick at another rule's share; a T that is only known for temperature rates."""
    mix = MixSpec(rates=Temperature(temperature=3.0), total_examples=5_000)
    data = picture_data(strata(BOOK, mix), mix)
    own = {row["task"]: row["share"] for row in data["shares"] if row["rule"] == "recipe"}
    assert own == pytest.approx(shares_by_temperature(BOOK, [3.0])[3.0])
    assert data["temperature"] == "3" and {row["rule"] for row in data["shares"]} == {"1", "2", "5", "inf", "recipe"}
    assert 3.0 in {row["temperature"] for row in data["minority"]}
    equal = MixSpec(rates=Equal(), total_examples=5_000)
    assert picture_data(strata(BOOK, equal), equal)["temperature"] is None


@given(st.dictionaries(st.sampled_from("abcdefghij"), st.integers(1, 10**7), min_size=2), st.sampled_from([0.5, 1.0, 2.0, 8.0]))
def test_composition_and_shares_sum_to_one(sizes, temperature):
    """Kills: a task lost from a stacked bar; an overflow of cold temperatures."""
    mix = MixSpec(rates=Temperature(temperature=temperature), total_examples=10_000)
    data = picture_data(strata(sizes, mix), mix)
    sums: dict[tuple[str, str], float] = {}
    for row in data["composition"]:
        sums[row["unit"], row["part"]] = sums.get((row["unit"], row["part"]), 0.0) + row["share"]
    assert all(total == pytest.approx(1.0) for total in sums.values()) and len(sums) == 6
    for rule in ("1", "2", "5", "inf", "recipe"):
        assert sum(row["share"] for row in data["shares"] if row["rule"] == rule) == pytest.approx(1.0)
