"""How the learning rate moves over a run: linear warmup, then down to a floor, level, or level and then down."""

from __future__ import annotations

import math

from tutelage.errors import TrainError
from tutelage.train.spec import Constant, Cosine, Linear, Schedule, WarmupStableDecay


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

    A fall over the last `decay_share` of the steps (here 4 of 8) leaves the peak after step 3 and ends on the floor:

    >>> late = WarmupStableDecay(warmup_steps=1, decay_share=0.5, floor_ratio=0.0)
    >>> [round(learning_rate_at(step, num_steps=8, peak=1.0, schedule=late), 3) for step in range(8)]
    [0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]

    Raises `TrainError` when warmup, or warmup and decay, do not fit into the run.
    """
    assert 0 <= step < num_steps, f"step {step} of {num_steps}"
    num_warmup = check_schedule(schedule, num_steps)
    if step < num_warmup:
        return peak * ((step + 1) / (num_warmup + 1))
    match schedule:
        case Constant():
            return peak
        case Cosine():
            height = _wave(_fallen_share(step, num_warmup, num_steps))
        case Linear():
            height = 1.0 - _fallen_share(step, num_warmup, num_steps)
        case WarmupStableDecay():
            last_high = max(num_warmup, num_steps - 1 - _num_decay_steps(schedule, num_steps))
            height = _late_height(_fallen_share(max(step, last_high), last_high, num_steps), schedule)
    # Both ends of this sum are exact; `floor + (peak - floor) * height` is not at height 1.
    return peak * height + peak * schedule.floor_ratio * (1.0 - height)


def check_schedule(schedule: Schedule, num_steps: int) -> int:
    """The number of warmup steps. Raises `TrainError` when the schedule does not fit into so many steps.

    >>> check_schedule(Cosine(warmup_steps=4), 5)
    4
    """
    if schedule.warmup_steps is None:
        return num_warmup_steps(num_steps, schedule.warmup_share)
    longest = num_steps - 1
    falling = ""
    if isinstance(schedule, WarmupStableDecay):
        longest -= _num_decay_steps(schedule, num_steps)
        falling = f", the last {num_steps - 1 - longest} of them falling"
    if schedule.warmup_steps > max(longest, 0):
        raise TrainError(
            f"train.schedule.warmup_steps: {schedule.warmup_steps} steps of warmup, but the run has {num_steps}{falling}; at "
            f"most {max(longest, 0)}, or state `warmup_share`"
        )
    return schedule.warmup_steps


def num_warmup_steps(num_steps: int, warmup_share: float) -> int:
    """Steps before the one with the peak rate: the share rounded up, and never the whole run.

    >>> num_warmup_steps(100, 0.07), num_warmup_steps(20, 0.03), num_warmup_steps(1, 0.5)
    (7, 1, 0)
    """
    return min(_share_of(num_steps, warmup_share), num_steps - 1)


def _num_decay_steps(schedule: WarmupStableDecay, num_steps: int) -> int:
    """Steps below the peak at the end: the share rounded up, and never the step of the peak itself."""
    return min(_share_of(num_steps, schedule.decay_share), num_steps - 1)


def _share_of(num_steps: int, share: float) -> int:
    return math.ceil(round(share * num_steps, 9))


def _fallen_share(step: int, num_warmup: int, num_steps: int) -> float:
    """How much of the way from the peak (0) to the last step (1) is behind; 0 when the peak is the last step."""
    way = num_steps - 1 - num_warmup
    return (step - num_warmup) / way if way else 0.0


def _wave(fallen: float) -> float:
    """Half a cosine, from 1 down to 0."""
    return 0.5 * (1.0 + math.cos(math.pi * fallen))


def _late_height(fallen: float, schedule: WarmupStableDecay) -> float:
    """The height over the floor, 1 to 0, of a fall in the recipe's shape."""
    match schedule.decay:
        case "linear":
            return 1.0 - fallen
        case "cosine":
            return _wave(fallen)
        case "sqrt":
            return 1.0 - math.sqrt(fallen)
