"""The sample behind a preview: who is drawn, what stands for what, and whether the stated error is the real one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.plan.sample import Chosen, add_totals, choose, estimate_totals, t_quantile

LENGTHS = st.lists(st.integers(0, 400), min_size=1, max_size=80)


@given(lengths=LENGTHS, num=st.integers(2, 90), seed=st.integers(0, 5))
def test_every_record_is_stood_for_once(lengths, num, seed):
    """Kills: records lost or doubled when a sample is made up to the whole; a record drawn twice; more drawn than asked for."""
    chosen = choose(lengths, num=num, seed=seed, name="t")
    assert len(set(chosen.index.tolist())) == len(chosen) <= max(num, 2)
    assert chosen.stands_for.sum() == len(lengths) == chosen.size.sum()
    assert sorted(chosen.members.tolist()) == list(range(len(lengths)))
    assert len(chosen.donors) == len(lengths)
    if num >= len(lengths):
        assert chosen.index[chosen.donors].tolist() == chosen.members.tolist(), "drawn whole, each stands for itself"


@given(lengths=LENGTHS, num=st.integers(2, 40))
def test_who_stands_for_a_record_is_of_its_block_of_lengths(lengths, num):
    """Kills: blocks of unsorted records, which make the error that of no stratification at all."""
    chosen = choose(lengths, num=num, seed=1, name="t")
    sizes = np.asarray(lengths)
    blocks = np.repeat(np.arange(len(chosen.size)), chosen.size)
    for block in range(len(chosen.size)):
        members = sizes[chosen.members[blocks == block]]
        drawn = sizes[chosen.index[chosen.block == block]]
        assert members.min() <= drawn.min() and drawn.max() <= members.max()
    ends = [sizes[chosen.members[blocks == block]] for block in range(len(chosen.size))]
    assert len(lengths) <= max(num, 2) or all(a.max() <= b.min() for a, b in itertools.pairwise(ends))


def test_another_seed_or_name_draws_others_and_the_same_draws_the_same():
    """Kills: the first N taken for a sample; a clock or a process in the lots."""
    lengths = np.arange(1000)
    one = choose(lengths, num=50, seed=0, name="t").index.tolist()
    assert one == choose(lengths, num=50, seed=0, name="t").index.tolist()
    assert (
        one
        != choose(lengths, num=50, seed=1, name="t").index.tolist()
        != choose(lengths, num=50, seed=0, name="u").index.tolist()
    )
    assert max(one) > 900 and len(set(one)) == 50


@given(values=st.lists(st.integers(-50, 50), min_size=2, max_size=9))
def test_the_stated_variance_is_the_real_one_on_average(values):
    """Kills: a missing finite-population factor, s^2 of a mean for that of a total. All pairs that one block can give are
    enumerated: their totals scatter exactly as much as they state on average, and centre on the truth.
    """
    size = len(values)
    totals, stated = [], []
    for pair in itertools.permutations(range(size), 2):
        halves = np.array([(size + 1) // 2, size // 2])
        chosen = Chosen(np.array(pair), halves, np.zeros(2, np.int64), np.array([size]), np.arange(size))
        found = estimate_totals(chosen, np.array([[values[i]] for i in pair], float))
        mean = size * (values[pair[0]] + values[pair[1]]) / 2
        totals.append(mean)
        stated.append(found.covariance[0, 0])
        if size % 2 == 0:
            assert found.values[0] == pytest.approx(mean)
    assert np.mean(totals) == pytest.approx(sum(values))
    assert np.mean(stated) == pytest.approx(np.var(totals), abs=1e-6)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Kills: an interval of one standard error, degrees of freedom of all records, drops that widen nothing. Texts of 40,000
    records, tokens a fifth of the letters give or take, the longest dropped: 300 samples of 200.
    """
    draws = np.random.default_rng(0)
    lengths = draws.lognormal(6.0, 0.8, 40_000).astype(int) + 10
    tokens = lengths / 5 * draws.lognormal(0.0, 0.15, len(lengths))
    tokens[tokens > 800] = 0.0
    held = errors = 0
    for seed in range(300):
        chosen = choose(lengths, num=200, seed=seed, name="t")
        found = estimate_totals(chosen, tokens[chosen.index][:, None]).estimate(0)
        held += found.low <= tokens.sum() <= found.high
        errors += found.relative_error
    assert 0.92 <= held / 300 <= 0.985
    assert errors / 300 < 0.03, "length explains most of it: a plain sample of 200 would be off by 10 %"


def test_a_sample_of_everything_has_no_error():
    """Kills: an interval around what was counted."""
    chosen = choose([5, 3, 9], num=10, seed=0, name="t")
    found = estimate_totals(chosen, np.array([[1.0, 5.0], [1.0, 3.0], [1.0, 9.0]]))
    assert found.values.tolist() == [3.0, 17.0] and not found.covariance.any() and math.isinf(found.freedom[0])
    assert found.estimate(1).low == found.estimate(1).high == 17.0


def test_strata_add_up_with_their_errors():
    """Kills: errors added like lengths, one stratum's degrees of freedom taken for all."""
    rows = np.arange(40)
    parts = [estimate_totals(c, (rows**2.0)[c.index][:, None]) for c in (choose(rows, num=8, seed=s, name="t") for s in (0, 1))]
    both = add_totals(parts)
    assert both.covariance[0, 0] == pytest.approx(sum(part.covariance[0, 0] for part in parts))
    assert max(part.freedom[0] for part in parts) < both.freedom[0] <= sum(part.freedom[0] for part in parts)


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.706), (2, 4.303), (5, 2.571), (9, 2.262), (10, 2.228), (12, 2.179), (20, 2.086), (60, 2.000), (120, 1.980)],
)
def test_quantiles_are_those_of_the_table(freedom, expected):
    """Kills: the normal quantile for a handful of blocks. Values as printed in any table of Student's t."""
    assert round(t_quantile(freedom), 3) == expected
