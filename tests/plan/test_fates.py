"""Fates: numbers that stand for reasons say what a list of reasons would say."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from tutelage.plan.fates import OPEN, Fates

NAMES = st.sampled_from(["", "too_long", "held_out", "length", "refusal"])


@given(st.lists(st.lists(st.tuples(st.integers(0, 7), NAMES), max_size=6, unique_by=lambda pair: pair[0]), max_size=5))
def test_the_last_fate_that_was_given_stands(rounds: list[list[tuple[int, str]]]) -> None:
    """Kills numbers of one table read with the names of another, a first fate that stays, and labels in the order of numbers."""
    fates, plain = Fates(8), [OPEN] * 8
    for number, given_now in enumerate(rounds):
        for row, name in given_now:
            plain[row] = name
        rows, names = np.array([row for row, _ in given_now], np.int64), [name for _, name in given_now]
        if number % 2:
            fates.put_each(rows, pa.chunked_array([pa.array(names, pa.string()).dictionary_encode()]))
        else:
            for row, name in given_now:
                fates.put(np.array([row]), name)
    assert [name for i in range(8) for name in ["too_long"] if fates.are(name)[i]] == [n for n in plain if n == "too_long"]
    assert fates.counts() == Counter(plain)
    rows = np.arange(1, 8)
    labels = fates.labels(rows)
    assert labels.to_pylist() == plain[1:]
    assert labels.dictionary.to_pylist() == list(dict.fromkeys(plain[1:]))
    assert fates.counts(np.arange(8) > 4) == Counter(plain[5:])


def test_a_copy_is_changed_alone() -> None:
    """Kills the account of a plan that changes what the join found."""
    first = Fates(2)
    second = first.copy()
    second.put(np.array([0]), "not_drawn")
    assert first.counts() == {OPEN: 2} and second.counts() == {OPEN: 1, "not_drawn": 1}
