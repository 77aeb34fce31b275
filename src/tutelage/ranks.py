"""Ranks: the rows of a step shared out, so that all ranks run equally many micro-batches and finish together.

Packed rows are equally full but not equally dear: attention is quadratic in the length of a document. What a document of L
tokens costs a transformer of width h is in proportion to L * (1 + L / 6h), attention being the second term (Narayanan et al.
2021, arXiv 2104.04473, the formula of section 5.1 without its vocabulary term). In whole numbers: 6 h L + L^2.

    rows, dearest first --each to the cheapest micro-batch with room--> micro-batches of like cost
                        --the next dearest of them, one per rank, dearest to the rank with the least so far--> ranks
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tutelage.errors import PlanError
from tutelage.records import Int64

HIDDEN_SIZE = 2048
"""Width of the model when none is given: that of models of about a billion parameters. The narrower, the more lengths matter."""
PADDING_ROW = -1
"""Stands where a micro-batch has no row of the step: a row of padding alone, whose weights are 0."""


@dataclass(frozen=True)
class RankRows:
    """The rows of a step by rank: `rows` i64 (num_ranks, num_micro_batches, rows_per_micro_batch), and what they cost.

    `costs` i64 (num_ranks, num_micro_batches), in units that only compare.
    """

    rows: Int64
    costs: Int64

    @property
    def imbalance(self) -> float:
        """Cost of the dearest rank over the mean, 1 at best: what waits when ranks meet once per step."""
        return _over_mean(self.costs.sum(1).max(), self.costs.sum(1))

    @property
    def lockstep_imbalance(self) -> float:
        """The dearest of each micro-batch added up, over the mean: what waits when ranks meet in every micro-batch (FSDP)."""
        return _over_mean(self.costs.max(0).sum(), self.costs.sum(1))


def _over_mean(largest: np.integer, totals: Int64) -> float:
    return float(largest / totals.mean()) if totals.any() else 1.0


def document_cost(lengths: Sequence[int] | np.ndarray, *, hidden_size: int = HIDDEN_SIZE) -> Int64:
    """What documents cost, in units that only compare: 6 h L + L^2. At L = 6 h half of it is attention.

    >>> document_cost([1, 10, 60], hidden_size=10).tolist()
    [61, 700, 7200]
    """
    sizes = np.asarray(lengths, np.int64)
    return sizes * (6 * hidden_size + sizes)


def share_rows(
    row: Sequence[int] | np.ndarray,
    lengths: Sequence[int] | np.ndarray,
    *,
    num_rows: int,
    num_ranks: int,
    micro_batch_rows: int = 1,
    hidden_size: int = HIDDEN_SIZE,
) -> RankRows:
    """The rows of a step by rank and micro-batch; document i, of `lengths[i]` tokens, lies in row `row[i]`.

    >>> shared = share_rows([0, 1, 1, 2, 2, 3], [8, 4, 4, 6, 2, 8], num_rows=4, num_ranks=2, hidden_size=1)
    >>> shared.rows[:, :, 0].tolist()                          # costs: 112, 80, 88, 112
    [[0, 2], [3, 1]]
    >>> shared.costs.sum(1).tolist(), round(shared.imbalance, 3)
    ([200, 192], 1.02)

    Each row stands exactly once, the places left over hold `PADDING_ROW`, and all ranks have equally many micro-batches.
    The ranks' totals differ by no more than what the micro-batches run at one time do. A pure function: rows of equal cost
    go by their number. PlanError for fewer than one rank or row per micro-batch.
    """
    if num_ranks < 1 or micro_batch_rows < 1:
        raise PlanError(f"{num_ranks} ranks with micro-batches of {micro_batch_rows} rows; give at least 1 of each")
    cost = np.zeros(num_rows, np.int64)
    np.add.at(cost, np.asarray(row, np.int64), document_cost(lengths, hidden_size=hidden_size))
    num_micro_batches = -(-num_rows // (num_ranks * micro_batch_rows))
    batches = _micro_batches(cost, num=num_micro_batches * num_ranks, size=micro_batch_rows)
    totals = np.append(cost, 0)[batches].sum(1)
    dearest_first = np.argsort(-totals, kind="stable")
    rows = np.empty((num_ranks, num_micro_batches, micro_batch_rows), np.int64)
    costs = np.zeros((num_ranks, num_micro_batches), np.int64)
    for i, turn in enumerate(dearest_first.reshape(num_micro_batches, num_ranks)):
        least_so_far = np.argsort(costs.sum(1), kind="stable")
        rows[least_so_far, i], costs[least_so_far, i] = batches[turn], totals[turn]
    return RankRows(rows, costs)


def _micro_batches(cost: Int64, *, num: int, size: int) -> Int64:
    """`num` micro-batches of `size` rows (num, size), dearest rows first, each to the cheapest that has room."""
    members: list[list[int]] = [[] for _ in range(num)]
    heap = [(0, i) for i in range(num)]
    for row in np.argsort(-cost, kind="stable").tolist():
        total, i = heapq.heappop(heap)
        members[i].append(row)
        if len(members[i]) < size:
            heapq.heappush(heap, (total + int(cost[row]), i))
    padded = [sorted(rows) + [PADDING_ROW] * (size - len(rows)) for rows in members]
    return np.array(padded, np.int64).reshape(num, size)
