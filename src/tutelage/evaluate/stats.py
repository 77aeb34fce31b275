"""Intervals: how far a mean, or a change of it, could lie from what was measured on these records.

A record is one draw: its tokens stand or fall together (its topic, its length, its author), so whole records are
resampled, never tokens. Pure: arrays and `Score`s in, `Score`s out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from tutelage.errors import DataError
from tutelage.records import Float64, Score

NUM_RESAMPLES = 10_000
LEVEL = 0.95
MAX_DRAWS = 4_000_000
"""Record numbers drawn at once: bounds the memory of a bootstrap at about 64 MB."""

Sums = dict[str, tuple[float, float]]
"""Item to (sum of nll in nats, number of targets)."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its interval over `num_records` records. `low` and `high` are nan with fewer than two records."""

    mean: float
    low: float
    high: float
    num_records: int


@dataclass(frozen=True, slots=True)
class Change:
    """What may be said of a change, as data: held-out loss `direction` by `amount` `unit` (`level` interval `low` to `high`).

    >>> Change.of(Interval(-0.25, -0.31, -0.19, 40))
    Change(direction='fell', amount=0.25, low=-0.31, high=-0.19, unit='nats/token', level=0.95, num_records=40)
    >>> Change.of(Interval(-0.25, -0.61, 0.11, 40)).direction                 # 0 is inside: cannot be told from no change
    'unclear'
    """

    direction: Literal["fell", "rose", "unclear"]
    amount: float
    low: float
    high: float
    unit: str = "nats/token"
    level: float = LEVEL
    num_records: int = 0

    @classmethod
    def of(cls, change: Interval) -> Change:
        """The change that a paired interval (after - before) supports; `unclear` without an interval."""
        direction: Literal["fell", "rose", "unclear"] = "unclear"
        if change.high < 0:
            direction = "fell"
        elif change.low > 0:
            direction = "rose"
        return cls(direction, abs(change.mean), change.low, change.high, num_records=change.num_records)


def mean_interval(
    sums: Float64, weights: Float64, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES, level: float = LEVEL
) -> Interval:
    """The weighted mean sum(sums) / sum(weights) over n records with its `level` interval.

    `sums[i]` is the sum of nll over record i's targets, `weights[i]` > 0 their number. The mean is a ratio of two sums that
    both depend on which records were drawn, so numerator and denominator are resampled together: each of `num_resamples`
    times n records are drawn with replacement, and the ratio is taken anew (Efron and Tibshirani 1993, 25.2).

    The bounds are expanded percentiles (Hesterberg 2015, arXiv 1411.5279, 5.2): plain ones are too narrow on few records,
    by the factor sqrt((n - 1) / n) and by the normal quantile in the place of Student's. With n = 8 the 2.5 % quantile
    becomes the 0.57 % one. Records are drawn across tasks, so that a total also carries the luck of which tasks its
    records came from: a little wide, never narrow, and defined where a task has a single record.

    One record has a mean and no interval (nan); records that all have the same mean have an interval of width 0.

    >>> mean_interval(np.array([20.0, 90.0]), np.array([10.0, 90.0])).mean      # not 1.5, the mean of the means
    1.1
    """
    assert sums.shape == weights.shape and bool((weights > 0).all()), "one sum and one weight above 0 per record"
    n = len(sums)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(sums.sum() / weights.sum())
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    # Around the mean rather than from the sums: equal records then give exactly 0 and not the rounding of large sums.
    residuals = sums - mean * weights
    shifts = np.concatenate(list(_resampled_ratios(residuals, weights, num_resamples, np.random.default_rng(seed))))
    tail = _expanded_tail(n, level)
    low, high = np.quantile(shifts, [tail, 1.0 - tail])
    return Interval(mean, mean + float(low), mean + float(high), n)


def paired_interval(
    before: Float64, after: Float64, weights: Float64, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES, level: float = LEVEL
) -> Interval:
    """The change of the weighted mean, after - before, with its `level` interval: negative where the loss fell.

    The same records are measured twice, and most of the spread between records (some are hard for every model) is in both
    measurements. Taking the difference within each record removes it: sum(after - before) / sum(weights) is resampled as
    in `mean_interval`, one draw deciding for both sides. Two separate intervals would overlap long after this one is clear of 0.

    >>> before, after = np.array([100.0, 10.0, 40.0]), np.array([90.0, 9.0, 36.0])
    >>> paired_interval(before, after, np.array([10.0, 1.0, 4.0]))              # every record fell by 1 nat per token
    Interval(mean=-1.0, low=-1.0, high=-1.0, num_records=3)
    """
    assert before.shape == after.shape, "the same records, in the same order"
    return mean_interval(after - before, weights, seed=seed, num_resamples=num_resamples, level=level)


def _resampled_ratios(sums: Float64, weights: Float64, count: int, rng: np.random.Generator) -> Iterator[Float64]:
    """`count` ratios of resampled sums, some at a time."""
    n = len(sums)
    rows = max(1, MAX_DRAWS // n)
    for done in range(0, count, rows):
        drawn = rng.integers(0, n, size=(min(rows, count - done), n), dtype=np.int32)
        yield sums[drawn].sum(axis=1) / weights[drawn].sum(axis=1)


def _expanded_tail(n: int, level: float) -> float:
    """The lower quantile that gives a percentile interval of n draws the coverage `level`.

    >>> round(_expanded_tail(8, 0.95), 4), round(_expanded_tail(1000, 0.95), 4)
    (0.0057, 0.0248)
    """
    normal = NormalDist()
    student: float = _student_quantile(normal.inv_cdf((1.0 + level) / 2.0), n - 1)
    return float(normal.cdf(-math.sqrt(n / (n - 1)) * student))


def _student_quantile(z: float, df: int) -> float:
    """Student's quantile with `df` degrees of freedom where the normal one is `z` (Abramowitz and Stegun 26.7.5).

    Within 1 % from df = 3; below that the bounds are the extremes of the resamples in any case.

    >>> [round(_student_quantile(1.959964, df), 2) for df in (4, 7, 30)]       # exact: 2.776, 2.365, 2.042
    [2.78, 2.36, 2.04]
    """
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(df) ** power for power, term in enumerate(terms, 1))


def aggregates(scores: Sequence[Score], *, seed: int) -> list[Score]:
    """One `nll` score per task, then one over all (task ""), with item "": mean nats per target, interval, number of targets.

    `scores` are those of records (`nll` with an item, value = sum of nats, weight = number of targets); others are ignored.
    """
    records = _sums_by_task(scores)
    return [
        _aggregate(scores[0], "nll", task, mean_interval(*_columns(sums), seed=_seed(seed, task)), sums)
        for task, sums in _with_total(records)
    ]


def changes(before: Sequence[Score], after: Sequence[Score], *, seed: int) -> list[Score]:
    """One `nll_change` score per task, then one over all (task ""), with item "": after - before in nats per target, paired.

    Raises `DataError` unless both sides measured the same targets of the same records: losses over different tokens must
    not be compared.
    """
    old, new = _sums_by_task(before), _sums_by_task(after)
    _require_same_targets(old, new)
    out = []
    for (task, was), (_, now) in zip(_with_total(old), _with_total(new), strict=True):
        sums, weights = _columns(was)
        interval = paired_interval(sums, _columns(now)[0], weights, seed=_seed(seed, task))
        out.append(_aggregate(after[0], "nll_change", task, interval, now))
    return out


def total_change(scores: Sequence[Score]) -> Change | None:
    """The `Change` of the loss over all tasks that a list of scores holds, None where it holds none."""
    records = {s.item for s in scores if s.metric == "nll" and s.item}
    for score in scores:
        if score.metric == "nll_change" and not score.item and not score.task:
            return Change.of(Interval(score.value, score.low, score.high, len(records)))
    return None


def _aggregate(like: Score, metric: str, task: str, interval: Interval, sums: Sums) -> Score:
    weight = sum(weight for _, weight in sums.values())
    return Score(like.run, like.step, task, "", metric, interval.mean, weight, interval.low, interval.high)


def _sums_by_task(scores: Sequence[Score]) -> dict[str, Sums]:
    """Task to item to sums over the item's examples; both sorted, so that the order of the scores does not matter."""
    by_task: dict[str, Sums] = {}
    for score in sorted(scores, key=lambda s: (s.task, s.item)):
        if score.metric == "nll" and score.item:
            sums = by_task.setdefault(score.task, {})
            value, weight = sums.get(score.item, (0.0, 0.0))
            sums[score.item] = (value + score.value, weight + score.weight)
    return by_task


def _with_total(by_task: Mapping[str, Sums]) -> Iterator[tuple[str, Sums]]:
    """Each task's sums, then those of all records under the name ""; nothing when there are no records."""
    yield from by_task.items()
    if by_task:
        yield "", {f"{task}\0{item}": pair for task, sums in by_task.items() for item, pair in sums.items()}


def _columns(sums: Sums) -> tuple[Float64, Float64]:
    """(sums, weights) of the records that have targets."""
    pairs = np.array([pair for pair in sums.values() if pair[1] > 0], dtype=np.float64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _require_same_targets(before: Mapping[str, Sums], after: Mapping[str, Sums]) -> None:
    """Nothing; raises `DataError` unless tasks, items and numbers of targets agree."""
    old = {(task, item): weight for task, sums in before.items() for item, (_, weight) in sums.items()}
    new = {(task, item): weight for task, sums in after.items() for item, (_, weight) in sums.items()}
    if old != new:
        where = min(set(old.items()) ^ set(new.items()))[0]
        raise DataError(
            f"held-out losses cannot be compared: {where[1]} ({where[0]}) has {old.get(where, 0):g} targets before and "
            f"{new.get(where, 0):g} after; measure both on the same held-out set"
        )


def _seed(seed: int, task: str) -> int:
    """A seed for one task's resamples: adding a task leaves the intervals of the others as they are."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{task}".encode(), digest_size=8).digest(), "big")
