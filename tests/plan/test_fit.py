"""Fit: every document in one row, no row too full, and as few rows as the textbook algorithm."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_reference import best_fit_decreasing

from tutelage.compiled import kernel
from tutelage.errors import PlanError
from tutelage.plan import fit
from tutelage.plan.fit import Begun, Packing, pack_lengths, pack_onto

capacities = st.sampled_from([8, 31, 32, 33, 100])


limits = st.none() | st.integers(1, 5)


def slots_taken(packing: Packing, lengths: list[int]) -> Counter[tuple[int, int]]:
    placed = zip(packing.rows, packing.starts, lengths, strict=True)
    return Counter((int(row), int(start) + i) for row, start, n in placed for i in range(n))


@given(st.data())
def test_every_document_lies_whole_in_one_row_and_none_overlap(data: st.DataObject) -> None:
    """Kills lost, doubled, split and overlapping documents, rows over capacity, and rows over the limit of documents."""
    capacity, limit = data.draw(capacities), data.draw(limits)
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    packing = pack_lengths(lengths, capacity=capacity, max_documents=limit)
    slots = slots_taken(packing, lengths)
    assert all(count == 1 for count in slots.values())
    assert all(slot < capacity for _, slot in slots)
    assert len(slots) == sum(lengths)
    assert sorted(set(packing.rows.tolist())) == list(range(packing.num_rows))
    assert np.bincount(packing.rows, minlength=1).max() <= (limit or len(lengths) or 1)


@given(st.data())
def test_rows_that_were_begun_are_filled_up_where_they_end(data: st.DataObject) -> None:
    """Kills further documents laid over those that a row has, a limit that forgets them, and new rows opened too soon."""
    capacity, limit = data.draw(capacities), data.draw(limits)
    documents = st.lists(st.integers(1, capacity), max_size=40)
    first, second = data.draw(documents), data.draw(documents)
    begun = pack_lengths(first, capacity=capacity, max_documents=limit)
    packing = pack_onto(begun, second, capacity=capacity, max_documents=limit)
    slots = slots_taken(begun, first) + slots_taken(packing, second)
    assert all(count == 1 for count in slots.values())
    assert len(slots) == sum(first) + sum(second)
    rows = np.concatenate([begun.rows, packing.rows])
    used = np.bincount(rows, weights=first + second, minlength=packing.num_rows).astype(int)
    assert (capacity - used).tolist() == packing.free.tolist()
    assert np.bincount(rows, minlength=packing.num_rows).tolist() == packing.held.tolist()
    assert packing.held.max(initial=0) <= (limit or capacity)
    still_open = np.sort(used[packing.held < (limit or capacity)])
    assert len(still_open) < 2 or still_open[:2].sum() > capacity


@given(st.data())
def test_as_many_rows_as_textbook_best_fit_decreasing(data: st.DataObject) -> None:
    """Kills first-fit, next-fit, and a search that overlooks a row; the fill of the rows is the same too."""
    capacity = data.draw(capacities)
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    packing = pack_lengths(lengths, capacity=capacity)
    fills = np.bincount(packing.rows, weights=lengths, minlength=packing.num_rows)
    expected = [sum(lengths[i] for i in row) for row in best_fit_decreasing(lengths, capacity)]
    assert sorted(fills.tolist()) == sorted(expected)


@given(st.data())
def test_the_compiled_loop_does_what_the_plain_one_does(data: st.DataObject) -> None:
    """Kills integer types that wrap in compiled code, beyond sixteen bits too."""
    capacity, limit = data.draw(st.sampled_from([64, 70_000])), data.draw(st.integers(1, 70_000))
    lengths = np.array(sorted(data.draw(st.lists(st.integers(1, capacity), max_size=50)), reverse=True), np.int32)
    free = np.array(data.draw(st.lists(st.integers(0, capacity), max_size=9)), np.int32)
    given = lengths, capacity, limit, free, np.ones(len(free), np.int32)
    plain, compiled = fit._best_fit(*given), kernel(fit._best_fit)(*given)
    assert [part.tolist() for part in plain] == [part.tolist() for part in compiled]
    packing = pack_onto(Begun(*given[3:]), lengths, capacity=capacity, max_documents=limit)
    assert packing.num_rows == len(plain[2])


def test_documents_that_fit_in_no_row_are_refused_by_number() -> None:
    """Kills truncation, and an endless search."""
    with pytest.raises(PlanError, match="document 1 has 9 tokens; a row takes 1 to 8"):
        pack_lengths([3, 9], capacity=8)
    with pytest.raises(PlanError, match="document 0 has 0 tokens"):
        pack_lengths([0], capacity=8)


def test_nothing_packs_into_nothing() -> None:
    """Kills a first row that is made before it is needed."""
    assert pack_lengths([], capacity=8).num_rows == 0


def test_a_lognormal_set_fills_more_than_99_percent() -> None:
    """Kills a packer that is right but wasteful."""
    lengths = np.clip(np.random.default_rng(0).lognormal(5.2, 0.9, 20_000), 8, 2048).astype(np.int32)
    packing = pack_lengths(lengths, capacity=2048)
    assert lengths.sum() / (packing.num_rows * 2048) > 0.99
