"""Steps: how many examples fill exactly the optimizer steps that a recipe asks for."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

from tutelage.errors import PlanError

_NUM_NEAR = 8
_MOST_EXAMPLES = 1 << 30


def examples_filling(
    num_steps: int, filled: Callable[[int], float], *, guess: int, least: int = 1, most: int | None = None
) -> int:
    """The number of examples, `least` to `most`, that takes exactly `num_steps` steps, all of them full.

    `filled(n)` is the number of steps that n examples fill, the last one in part. It need not rise evenly: what n examples are
    is up to the mixture, and one more of them may pack better. Searched by proportion and halving in turn, from `guess`; of the
    numbers beside the last that stays within, one that fills the steps to the brim is taken before one that all but does.

    >>> examples_filling(3, lambda n: n * 7 / 16, guess=10)                # 6 x 7 / 16 = 2.6; a seventh would open a fourth
    6
    >>> examples_filling(7, lambda n: n * 7 / 16, guess=10)                # 16 x 7 / 16 = 7 to the brim
    16

    PlanError, with the nearest number of steps that can be met, when `most` examples fill fewer or `least` examples take more.
    """
    measure = cache(filled)
    limit = _MOST_EXAMPLES if most is None else most
    low, high = _bracket(num_steps, measure, guess=guess, least=least, limit=limit)
    if low == limit and measure(limit) < num_steps:
        near = math.floor(measure(limit))
        remedy = f"ask for {near:,}, or raise the caps" if near else "raise the caps, or make the steps smaller"
        raise PlanError(f"mix.total_steps {num_steps:,} cannot be met: all that the caps allow fills {near:,} steps; {remedy}")
    if high == least:
        near = math.ceil(measure(least))
        raise PlanError(
            f"mix.total_steps {num_steps:,} is too little: {least:,} examples at least take {near:,} steps; ask for that"
        )
    beside = [num for near in range(_NUM_NEAR) for num in (low - near, high + near) if least <= num <= limit]
    to_the_brim = (num for num in beside if measure(num) == num_steps)
    all_but = (num for num in beside if math.ceil(measure(num)) == num_steps)
    found = next(to_the_brim, None) or next(all_but, None)
    if found is not None:
        return found
    nearest = min((math.ceil(measure(num)) for num in beside), key=lambda steps: abs(steps - num_steps))
    raise PlanError(
        f"mix.total_steps {num_steps:,}: no number of examples takes just so many; {nearest:,} can be met, ask for that"
    )


def _bracket(num_steps: int, measure: Callable[[int], float], *, guess: int, least: int, limit: int) -> tuple[int, int]:
    """Two neighbours, the first within the steps and the second beyond: the first has the fullest rows."""
    low, high, num = least - 1, limit + 1, min(max(guess, least), limit)
    stride, is_by_share = 1, True
    while high - low > 1:
        now = measure(num)
        low, high = (num, high) if now <= num_steps else (low, num)
        by_share = math.floor(num * num_steps / now)
        if high > limit:
            num, stride = max(by_share, low + stride), stride * 2
        else:
            num, is_by_share = by_share if is_by_share else (low + high) // 2, not is_by_share
        num = min(max(num, low + 1), high - 1)
    return low, high
