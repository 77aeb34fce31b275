"""Learning rates are exact where people check them: at the start, at the peak, at the end."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.errors import TrainError
from tutelage.train.schedule import check_schedule, learning_rate_at, num_warmup_steps
from tutelage.train.spec import Constant, Cosine, Linear, WarmupStableDecay

SHAPES = st.sampled_from([Cosine, Linear])
DECAYS = st.sampled_from(["linear", "cosine", "sqrt"])
SHARES = st.floats(0.0, 1.0)


def rates(schedule: Any, num_steps: int, peak: float = 2e-4) -> list[float]:
    return [learning_rate_at(s, num_steps=num_steps, peak=peak, schedule=schedule) for s in range(num_steps)]


def test_cosine_has_its_golden_values() -> None:
    """Kills a cosine that ends at 0, or one that counts warmup into the fall. Values by hand from the formula."""
    found = rates(Cosine(warmup_share=0.25, floor_ratio=0.1), 9, peak=1.0)  # 3 warmup steps, then 5 steps of fall
    falls = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 5)) for k in range(6)]
    assert found == pytest.approx([0.25, 0.5, 0.75, *falls], abs=1e-15)
    assert found[3] == 1.0 and found[-1] == 0.1


def test_linear_has_its_golden_values() -> None:
    """Kills a fall that reaches the floor one step after the last."""
    found = rates(Linear(warmup_share=0.0, floor_ratio=0.0), 5, peak=8.0)
    assert found == [8.0, 6.0, 4.0, 2.0, 0.0]


def test_constant_warms_up_and_stays() -> None:
    """Kills a warmup that starts at 0 and wastes the first step."""
    assert rates(Constant(warmup_share=0.5), 4, peak=3.0) == [1.0, 2.0, 3.0, 3.0]


@settings(max_examples=60, deadline=None)
@given(SHAPES, SHARES, SHARES, st.integers(1, 200), st.floats(1e-6, 1.0))
def test_the_peak_and_the_floor_are_reached_to_the_bit(
    shape: Any, warmup_share: float, floor_ratio: float, num_steps: int, peak: float
) -> None:
    """Kills rounding that leaves the last rate beside the floor, and rates that rise again after the peak."""
    found = rates(shape(warmup_share=warmup_share, floor_ratio=floor_ratio), num_steps, peak)
    top = num_warmup_steps(num_steps, warmup_share)
    assert found[top] == peak
    if top < num_steps - 1:
        assert found[-1] == peak * floor_ratio
    assert all(a < b for a, b in pairwise(found[: top + 1]))
    assert all(a >= b - 1e-15 for a, b in pairwise(found[top:]))
    assert found[0] > 0 or (top == 0 and num_steps == 1)


@pytest.mark.parametrize(
    ("share", "num_steps", "expected"), [(0.03, 100, 3), (0.07, 100, 7), (0.03, 10, 1), (1.0, 5, 4), (0.5, 1, 0)]
)
def test_warmup_steps_are_the_share_rounded_up(share: float, num_steps: int, expected: int) -> None:
    """Kills `ceil(0.07 * 100) = 8`, which is what floats say."""
    assert num_warmup_steps(num_steps, share) == expected


@pytest.mark.parametrize(
    ("decay", "falls"),
    [
        ("linear", [0.775, 0.55, 0.325, 0.1]),
        ("cosine", [0.1 + 0.45 * (1 + math.cos(math.pi * k / 4)) for k in (1, 2, 3, 4)]),
        ("sqrt", [0.55, 0.1 + 0.9 * (1 - math.sqrt(0.5)), 0.1 + 0.9 * (1 - math.sqrt(0.75)), 0.1]),
    ],
)
def test_warmup_stable_decay_has_its_golden_values(decay: Any, falls: list[float]) -> None:
    """Kills a fall that takes one step more or less than its share, and one of another shape. Ten steps, 4 of them falling."""
    schedule = WarmupStableDecay(warmup_steps=2, decay_share=0.4, decay=decay, floor_ratio=0.1)
    found = rates(schedule, 10, peak=3.0)
    assert found == pytest.approx([1.0, 2.0, 3.0, 3.0, 3.0, 3.0, *(3.0 * fall for fall in falls)], abs=1e-15)


@settings(max_examples=80, deadline=None)
@given(DECAYS, st.floats(0.01, 0.6), st.floats(0.0, 0.4), SHARES, st.integers(1, 200), st.floats(1e-6, 1.0))
def test_a_late_fall_stands_at_the_peak_between_and_ends_on_the_floor(
    decay: Any, decay_share: float, warmup_share: float, floor_ratio: float, num_steps: int, peak: float
) -> None:
    """Kills a peak that is passed over, a rate above it, and a last step beside the floor."""
    schedule = WarmupStableDecay(warmup_share=warmup_share, decay_share=decay_share, decay=decay, floor_ratio=floor_ratio)
    found = rates(schedule, num_steps, peak)
    top = num_warmup_steps(num_steps, warmup_share)
    assert found[top] == peak and max(found) == peak
    assert all(a < b for a, b in pairwise(found[: top + 1]))
    assert all(a >= b - 1e-15 for a, b in pairwise(found[top:]))
    num_falling = min(math.ceil(round(decay_share * num_steps, 9)), num_steps - 1 - top)
    assert sum(rate == peak for rate in found[top:]) == num_steps - top - (num_falling if floor_ratio < 1 else 0)
    if num_falling > 0:
        assert found[-1] == peak * floor_ratio


def test_warmup_in_steps_is_as_stated_and_no_longer_than_the_run() -> None:
    """Kills steps read as a share, and a run that never reaches its peak."""
    assert rates(Linear(warmup_steps=3), 4, peak=4.0) == [1.0, 2.0, 3.0, 4.0]
    assert rates(Constant(warmup_steps=0), 2, peak=4.0) == [4.0, 4.0]
    with pytest.raises(TrainError, match=r"train\.schedule\.warmup_steps: 4 steps of warmup, but the run has 4; at most 3"):
        rates(Cosine(warmup_steps=4), 4)
    with pytest.raises(TrainError, match="the run has 10, the last 5 of them falling; at most 4"):
        check_schedule(WarmupStableDecay(warmup_steps=5, decay_share=0.5), 10)


def test_share_and_steps_exclude_each_other_and_what_is_written_can_be_read() -> None:
    """Kills two warmups of which one is ignored, and a resolved recipe that its own reader refuses."""
    with pytest.raises(ValueError, match="one of `warmup_share` and `warmup_steps`"):
        Cosine(warmup_share=0.1, warmup_steps=5)
    with pytest.raises(ValueError, match=r"the longest decay is 0\.4"):
        WarmupStableDecay(warmup_share=0.6, decay_share=0.5)
    for schedule in (Cosine(warmup_steps=5), Cosine(), WarmupStableDecay(decay="sqrt")):
        assert type(schedule).model_validate(schedule.canonical()) == schedule
