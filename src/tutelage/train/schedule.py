"""How the learning rate moves over a run: linear warmup, then down to a floor, or level."""

from __future__ import annotations

import math

from tutelage.train.spec import Constant, Cosine, Linear, Schedule


def learning_rate_at(step: int, *, num_steps: int, peak: float, schedule: Schedule) -> float:
    """The learning rate of step `step` (from 0) of `num_steps`.

    Warmup of k steps rises evenly, peak/(k+1), 2*peak/(k+1), ...; step k has the peak itself and the last step the floor
    itself, to the bit. No step is wasted on a rate of 0 at the start.

    >>> line = Linear(warmup_share=0.4, floor_ratio=0.5)
    >>> [round(learning_rate_at(step, num_steps=5, peak=0.9, schedule=line), 3) for step in range(5)]
    [0.3, 0.6, 0.9, 0.675, 0.45]
    >>> wave = Cosine(warmup_share=0.0, floor_ratio=0.1)
    >>> [round(learning_rate_at(step, num_steps=5, peak=1.0, schedule=wave), 3) for step in range(5)]
    [1.0, 0.868, 0.55, 0.232, 0.1]
    """
    assert 0 <= step < num_steps, f"step {step} of {num_steps}"
    num_warmup = num_warmup_steps(num_steps, schedule.warmup_share)
    if step < num_warmup:
        return peak * ((step + 1) / (num_warmup + 1))
    match schedule:
        case Constant():
            return peak
        case Cosine():
            height = 0.5 * (1.0 + math.cos(math.pi * _fallen_share(step, num_warmup, num_steps)))
        case Linear():
            height = 1.0 - _fallen_share(step, num_warmup, num_steps)
    # Both ends of this sum are exact; `floor + (peak - floor) * height` is not at height 1.
    return peak * height + peak * schedule.floor_ratio * (1.0 - height)


def num_warmup_steps(num_steps: int, warmup_share: float) -> int:
    """Steps before the one with the peak rate: the share rounded up, and never the whole run.

    >>> num_warmup_steps(100, 0.07), num_warmup_steps(20, 0.03), num_warmup_steps(1, 0.5)
    (7, 1, 0)
    """
    return min(math.ceil(round(warmup_share * num_steps, 9)), num_steps - 1)


def _fallen_share(step: int, num_warmup: int, num_steps: int) -> float:
    """How much of the way from the peak (0) to the last step (1) is behind; 0 when the peak is the last step."""
    way = num_steps - 1 - num_warmup
    return (step - num_warmup) / way if way else 0.0
