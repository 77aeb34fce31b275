"""Sample: a few records that stand for all, chosen by length, and what their totals are worth. Pure.

    records sorted by length --> blocks --> two drawn from each, which stand for the whole block

Length is known before anything is rendered, so what it explains of tokens (nearly all) costs no error: only the spread
inside a block does. The two of a block differ by as much as any two of it, so the error is measured, not assumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tutelage.plan.order import pass_keys
from tutelage.records import Float64, Int64

_Z95 = 1.959963984540054
_T_TABLE = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)  # one to nine degrees of freedom


@dataclass(frozen=True)
class Chosen:
    """The records drawn, in blocks: `index` (n,) positions, `stands_for` (n,) how many records each is, `block` (n,).

    `size` (B,) counts the records of each block; a block that was drawn whole has no error. `members` (N,) are the positions
    of all records, block by block.
    """

    index: Int64
    stands_for: Int64
    block: Int64
    size: Int64
    members: Int64

    def __len__(self) -> int:
        return len(self.index)

    @property
    def donors(self) -> Int64:
        """Which of the drawn (0 to n - 1) stands for each of `members`."""
        return np.repeat(np.arange(len(self.index)), self.stands_for)


@dataclass(frozen=True)
class Estimate:
    """A total with its 95 % interval; `low == high == value` when everything was counted."""

    value: float
    low: float
    high: float

    @property
    def relative_error(self) -> float:
        """Half the interval over the value; 0 for a value of 0."""
        return (self.high - self.low) / 2 / self.value if self.value else 0.0


def choose(lengths: Sequence[int] | np.ndarray, *, num: int, seed: int, name: str) -> Chosen:
    """At most `num` (and two) of the records of these lengths, a pure function of (seed, name).

    Sorted by length (ties by position) they are cut into `num / 2` blocks, and two are drawn from each without replacement, or
    the one that it holds. One stands for the larger half of the block, the other for the rest, by lot. Blocks hold equal parts
    of a measure, half number of records and half length: long records vary most and may be dropped, so they are drawn more
    often, as Neyman's allocation would have it.

    >>> chosen = choose([9, 2, 3, 8, 7, 1, 4], num=4, seed=0, name="maths")
    >>> sorted(zip(chosen.block.tolist(), np.array([9, 2, 3, 8, 7, 1, 4])[chosen.index].tolist(), chosen.stands_for.tolist()))
    [(0, 2, 2), (0, 3, 2), (1, 7, 2), (1, 8, 1)]
    >>> choose([5, 6], num=9, seed=0, name="maths").stands_for.tolist()           # fewer than asked for: all of them
    [1, 1]
    """
    sizes = np.asarray(lengths, np.int64)
    total = len(sizes)
    if total <= max(num, 2):
        every = np.arange(total, dtype=np.int64)
        return Chosen(every, np.ones(total, np.int64), every, np.ones(total, np.int64), every)
    by_length = np.argsort(sizes, kind="stable")
    block, size = _blocks(sizes[by_length], max(num // 2, 1))
    lots = pass_keys(seed, f"{name}\0sample", by_length)
    shuffled = by_length[np.lexsort((lots, block))]
    drawn = np.minimum(size, 2)
    of = np.repeat(np.arange(len(size)), drawn)
    is_second = np.arange(len(of)) - (np.cumsum(drawn) - drawn)[of]
    index = shuffled[(np.cumsum(size) - size)[of] + is_second]
    stands_for = np.where(is_second == 0, (size[of] + 1) // 2, size[of] // 2)
    return Chosen(index, stands_for, of, size, by_length)


def _blocks(sizes: Int64, num: int) -> tuple[Int64, Int64]:
    """The block of each of these records, shortest first, and the records of each block; none is empty."""
    measure = sizes + max(float(sizes.mean()), 1.0)
    middle = np.cumsum(measure) - measure / 2
    _, block, size = np.unique((middle / measure.sum() * num).astype(np.int64), return_inverse=True, return_counts=True)
    return block, size


@dataclass(frozen=True)
class Totals:
    """Estimated totals of K measures over a set of records: `values` (K,), their covariance (K, K), degrees of freedom (K,)."""

    values: Float64
    covariance: Float64
    freedom: Float64

    def estimate(self, k: int) -> Estimate:
        """One measure with its 95 % interval, by Student's t; no total is below 0."""
        value, deviation = float(self.values[k]), math.sqrt(max(float(self.covariance[k, k]), 0.0))
        half = t_quantile(float(self.freedom[k])) * deviation
        return Estimate(value, max(value - half, 0.0), value + half)


def estimate_totals(chosen: Chosen, measures: np.ndarray) -> Totals:
    """The totals of `measures` (n, K), one line per drawn record, over all records.

    A block of B records, two of them drawn, adds B^2 (1 - 2/B) d d' / 4 to the covariance, d being the difference of the
    two (stratified sampling, two per stratum: Cochran, Sampling Techniques, section 5A.11); degrees of freedom are
    Satterthwaite's, (sum v)^2 / sum v^2 over the blocks' v.

    >>> chosen = choose([1, 2, 3, 4], num=2, seed=0, name="maths")                # one block of four, two drawn
    >>> totals = estimate_totals(chosen, np.array([[10.0], [14.0]]))              # 16 * (1 - 1/2) * 16 / 4 = 32
    >>> totals.values.tolist(), totals.covariance.tolist(), totals.freedom.tolist()
    ([48.0], [[32.0]], [1.0])
    """
    measures = np.asarray(measures, np.float64)
    values: Float64 = chosen.stands_for.astype(np.float64) @ measures
    num = measures.shape[1]
    paired = np.flatnonzero(np.diff(chosen.block) == 0)
    size = chosen.size[chosen.block[paired]].astype(np.float64)
    apart = measures[paired] - measures[paired + 1]
    factor = size * np.maximum(size - 2, 0.0) / 4
    covariance: Float64 = np.einsum("b,bi,bj->ij", factor, apart, apart)
    variances = factor[:, None] * apart**2
    squares = (variances**2).sum(axis=0)
    freedom = np.divide(variances.sum(axis=0) ** 2, squares, out=np.full(num, np.inf), where=squares > 0)
    return Totals(values, covariance, freedom)


def add_totals(parts: Sequence[Totals]) -> Totals:
    """The totals of several sets of records that were sampled apart; degrees of freedom by Satterthwaite again.

    >>> one = Totals(np.array([10.0]), np.array([[4.0]]), np.array([8.0]))
    >>> both = add_totals([one, one])
    >>> both.values.tolist(), both.covariance.tolist(), both.freedom.tolist()
    ([20.0], [[8.0]], [16.0])
    """
    values = np.sum([part.values for part in parts], axis=0)
    covariance = np.sum([part.covariance for part in parts], axis=0)
    variances = np.array([np.diag(part.covariance) for part in parts])
    each = np.array([part.freedom for part in parts])
    squares = (variances**2 / each).sum(axis=0)
    freedom = np.divide(variances.sum(axis=0) ** 2, squares, out=np.full(len(values), np.inf), where=squares > 0)
    return Totals(values, covariance, freedom)


def t_quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's t, of so many whole degrees of freedom (a fraction is left off, which widens it).

    >>> [round(t_quantile(n), 3) for n in (1, 4.7, 10, 30, math.inf)]
    [12.706, 2.776, 2.228, 2.042, 1.96]

    From a table to nine, then Fisher's expansion (Abramowitz and Stegun, 26.7.5), which is right to the third decimal there.
    """
    if freedom < len(_T_TABLE) + 1:
        return _T_TABLE[max(int(freedom), 1) - 1]
    if math.isinf(freedom):
        return _Z95
    z, n = _Z95, math.floor(freedom)
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return float(sum(term / n**power for power, term in enumerate(terms)))
