"""The arithmetic of a step is checked against counting."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.errors import TrainError
from tutelage.train.batching import divisors, fit_rows, num_devices, solve

FEW = st.integers(1, 24)


@given(st.integers(1, 400), FEW, FEW)
def test_passes_hold_every_row_and_one_pass_less_would_not(num_rows: int, rows_per_pass: int, devices: int) -> None:
    """Kills rounding down (rows lost) and up where it divides (an idle pass)."""
    shape = solve(num_rows, rows_per_pass=rows_per_pass, num_devices=devices)
    assert shape.room >= num_rows > shape.room - rows_per_pass * devices
    assert shape.idle_share == pytest.approx((shape.room - num_rows) / shape.room)


@given(st.integers(1, 400), FEW, FEW)
def test_what_does_not_divide_is_refused_with_sizes_that_do(num_rows: int, rows_per_pass: int, devices: int) -> None:
    """Kills advice that is itself refused, and advice that is not the nearest."""
    if num_rows % (rows_per_pass * devices) == 0:
        shape = solve(num_rows, rows_per_pass=rows_per_pass, num_devices=devices, exact=True)
        assert (shape.room, shape.idle_share) == (num_rows, 0.0)
        return
    with pytest.raises(TrainError) as caught:
        solve(num_rows, rows_per_pass=rows_per_pass, num_devices=devices, exact=True)
    advice = str(caught.value).partition("these do: ")[2]
    rows = [int(n) for n in re.findall(r"\d+", advice.partition(" rows")[0])]
    assert rows and all(n % (rows_per_pass * devices) == 0 and abs(n - num_rows) < rows_per_pass * devices for n in rows)
    by_pass = re.search(r"([\d or]+) rows per pass", advice)
    by_device = re.search(r"([\d or]+) devices", advice)
    for n in re.findall(r"\d+", by_pass[1]) if by_pass else ():
        assert num_rows % (int(n) * devices) == 0
    for n in re.findall(r"\d+", by_device[1]) if by_device else ():
        assert num_rows % (rows_per_pass * int(n)) == 0
    assert bool(by_pass) == (num_rows % devices == 0) and bool(by_device) == (num_rows % rows_per_pass == 0 and devices > 1)


@given(st.integers(1, 400), st.integers(1, 500))
def test_rows_that_fit_make_the_fewest_passes_and_never_more_than_fits(num_rows: int, fits: int) -> None:
    """Kills a choice over the limit, and a last pass of one row beside full ones."""
    chosen = fit_rows(num_rows, fits)
    assert 1 <= chosen <= fits
    passes = -(-num_rows // chosen)
    assert passes == -(-num_rows // min(fits, num_rows))
    assert chosen == 1 or -(-num_rows // (chosen - 1)) > passes


@given(st.integers(1, 2000))
def test_divisors_are_all_and_only_those(number: int) -> None:
    """Kills a square root that is counted twice or forgotten."""
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


@pytest.mark.parametrize("said", ["0", "-1", "two", ""])
def test_a_number_of_devices_that_is_none_is_refused(said: str) -> None:
    """Kills a typo in the environment that trains on one device."""
    with pytest.raises(TrainError, match="WORLD_SIZE"):
        num_devices({"WORLD_SIZE": said})
