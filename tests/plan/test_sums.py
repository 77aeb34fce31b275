"""Sums: the compiled passes give what NumPy gives, and nobody's number goes to a neighbour."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tutelage.plan.sums import most_by_label, sum_by_label, sum_by_part, sum_cells, sum_targets
from tutelage.plan.tally import NUM_CELLS, Tally
from tutelage.plan.weights import Weighed

WEIGHTS = st.sampled_from([0.0, 0.1, 1 / 3, 1.0, 7.7])


@st.composite
def tallies(draw: st.DrawFn) -> Tally:
    """Up to six examples of up to twenty entries, in any order."""
    num, size = draw(st.integers(1, 6)), draw(st.integers(0, 20))

    def column(values: st.SearchStrategy[float], dtype: type, length: int = size) -> np.ndarray:
        return np.array(draw(st.lists(values, min_size=length, max_size=length)), dtype)

    return Tally(
        example=column(st.integers(0, num - 1), np.int32),
        cell=column(st.integers(0, NUM_CELLS - 1), np.uint8),
        turn_weight=column(WEIGHTS | st.just(1.0), np.float32),
        count=column(st.integers(0, 9), np.int32),
        num_requests=column(st.integers(0, 3), np.int32, num),
    )


@given(tallies(), st.data())
def test_targets_are_summed_as_by_numpy(tally: Tally, data: st.DataObject) -> None:
    """Kills products that are not rounded to float32, a factor of another example, and targets of weight 0 counted."""
    num = len(tally)
    some = st.lists(WEIGHTS, min_size=1, max_size=1) | st.lists(WEIGHTS, min_size=num, max_size=num)
    factors = np.array(data.draw(some), np.float32)
    table = np.array(data.draw(st.lists(WEIGHTS, min_size=NUM_CELLS, max_size=NUM_CELLS)), np.float32)
    totals, supervised = sum_targets(tally, table=table, factors=factors)
    weighed = Weighed(tally.example, table[tally.cell] * tally.turn_weight, tally.count, num)
    factor = factors[0] if len(factors) == 1 else factors
    assert totals.tolist() == weighed.totals(factor).tolist()
    assert supervised.tolist() == weighed.supervised(factor).tolist()


@given(tallies(), st.data())
def test_cells_are_summed_over_visits(tally: Tally, data: st.DataObject) -> None:
    """Kills targets of records that are not visited, visits counted once, one request taken for several, and turn weights unseen."""
    num = len(tally)
    visits = np.array(data.draw(st.lists(st.integers(0, 4), min_size=num, max_size=num)), np.int32)
    task = np.array(data.draw(st.lists(st.integers(0, 2), min_size=num, max_size=num)), np.int32)
    targets, several, is_plain = sum_cells(tally, num_visits=visits, task=task, num_tasks=3)
    wanted, multi = np.zeros((3, NUM_CELLS), int), [0, 0, 0]
    for example, cell, count in zip(tally.example, tally.cell, tally.count, strict=True):
        wanted[task[example], cell] += visits[example] * count
    for i in range(num):
        multi[task[i]] += visits[i] * (tally.num_requests[i] > 1)
    assert targets.tolist() == wanted.tolist()
    assert several.tolist() == multi
    assert is_plain == all(weight == 1 for weight in tally.turn_weight)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1 << 40), st.integers(0, 3)), max_size=30))
def test_labels_are_summed_as_by_numpy(lines: list[tuple[int, int, int]]) -> None:
    """Kills sums in 32 bits, sums without `times`, and a label that takes what belongs to the next."""
    label, value, times = (np.array([line[i] for line in lines], dtype) for i, dtype in enumerate((np.int32, np.int64, np.int32)))
    plain, weighted = [0] * 5, [0] * 5
    for at, amount, num in lines:
        plain[at] += amount
        weighted[at] += amount * num
    assert sum_by_label(label, [value, times], num_labels=5)[0].tolist() == plain
    assert sum_by_label(label, [value], num_labels=5, times=times).tolist() == [weighted]
    assert most_by_label(label, times, num_labels=5).tolist() == [
        max((n for at, _, n in lines if at == i), default=0) for i in range(5)
    ]


@given(st.lists(st.integers(0, 4), max_size=30), st.lists(st.integers(0, 30), max_size=4))
def test_a_part_has_the_draws_between_its_edges(draws: list[int], cuts: list[int]) -> None:
    """Kills a draw at an edge that falls into both parts, or into none."""
    edges = [0, *sorted(min(cut, len(draws)) for cut in cuts), len(draws)]
    label, size = np.array([0, 1, 0, 1, 1], np.int32), np.array([1, 10, 100, 1000, 10000])
    found = sum_by_part(np.array(edges), np.array(draws, np.int32), label, size, num_labels=2)
    parts = [draws[a:b] for a, b in pairwise(edges)]
    assert found.tolist() == [[sum(int(size[i]) for i in part if label[i] == which) for which in (0, 1)] for part in parts]
