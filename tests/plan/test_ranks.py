"""Ranks: every row on one rank, equally many micro-batches, and costs that agree."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_reference import chat

from tutelage.errors import PlanError
from tutelage.plan.assemble import make_plan
from tutelage.plan.batch import Batches, InMemory
from tutelage.plan.spec import BatchSpec, ResponseLoss
from tutelage.plan.weights import weigh_examples
from tutelage.ranks import PADDING_ROW, RankRows, document_cost, share_rows

steps = st.lists(st.lists(st.integers(1, 64), max_size=5), min_size=1, max_size=30)
"""Rows of document lengths; a row of padding alone has none."""


def shared(step: list[list[int]], *, num_ranks: int, micro_batch_rows: int = 1, hidden_size: int = 4) -> RankRows:
    rows = np.repeat(np.arange(len(step)), [len(row) for row in step])
    size = {"micro_batch_rows": micro_batch_rows, "hidden_size": hidden_size}
    return share_rows(rows, [n for row in step for n in row], num_rows=len(step), num_ranks=num_ranks, **size)


@given(steps, st.integers(1, 5), st.integers(1, 4))
def test_each_row_is_on_one_rank_and_all_run_equally_often(step: list[list[int]], num_ranks: int, size: int) -> None:
    """Kills rows lost or run twice, a rank with fewer passes than the others wait for, and costs that do not add up."""
    found = shared(step, num_ranks=num_ranks, micro_batch_rows=size)
    num_passes = -(-len(step) // (num_ranks * size))
    assert found.rows.shape == (num_ranks, num_passes, size)
    assert sorted(found.rows[found.rows != PADDING_ROW].tolist()) == list(range(len(step)))
    cost = [sum(n * (24 + n) for n in row) for row in step] + [0]
    assert found.costs.tolist() == [[sum(cost[row] for row in rows) for rows in rank] for rank in found.rows.tolist()]


@given(steps, st.integers(1, 5), st.integers(1, 4))
def test_ranks_differ_by_no_more_than_what_runs_at_one_time(step: list[list[int]], num_ranks: int, size: int) -> None:
    """Kills rows dealt out in order, or the dearest micro-batch to the same rank every time."""
    found = shared(step, num_ranks=num_ranks, micro_batch_rows=size)
    totals, at_one_time = found.costs.sum(1), found.costs
    assert totals.max() - totals.min() <= (at_one_time.max(0) - at_one_time.min(0)).max()


def test_rows_of_long_documents_are_spread_though_all_rows_are_full() -> None:
    """Kills balancing by tokens: every row has 64, but one document of 64 costs more than sixteen of 4."""
    step = [[64]] * 4 + [[4] * 16] * 4
    found = shared(step, num_ranks=4, micro_batch_rows=2)
    assert found.imbalance == found.lockstep_imbalance == 1.0
    assert [sorted(len(step[row]) for row in rank.ravel()) for rank in found.rows] == [[1, 16]] * 4


def test_micro_batches_that_run_together_cost_alike() -> None:
    """Kills balance over the step alone: where ranks meet in every pass, the dearest of each is what they wait for."""
    step = [[n] for n in (64, 1, 63, 2, 62, 3, 61, 4)]
    found = shared(step, num_ranks=2)
    lengths = [sorted(sum(step[row]) for row in rows.ravel()) for rows in found.rows.transpose(1, 0, 2)]
    assert sorted(lengths) == [[1, 2], [3, 4], [61, 62], [63, 64]]
    assert found.lockstep_imbalance < 1.02


@given(steps, st.integers(1, 4))
def test_one_rank_takes_every_row(step: list[list[int]], size: int) -> None:
    """Kills a split that only works for several ranks."""
    found = shared(step, num_ranks=1, micro_batch_rows=size)
    assert sorted(found.rows[found.rows != PADDING_ROW].tolist()) == list(range(len(step)))
    assert found.imbalance == 1.0


def test_attention_is_half_of_the_cost_at_six_widths() -> None:
    """Kills a ratio that is off by the number of heads or by two."""
    assert document_cost([6 * 2048], hidden_size=2048).tolist() == [2 * 6 * 2048 * 6 * 2048]
    assert document_cost([100_000]).tolist() == [100_000 * (6 * 2048 + 100_000)]


def test_a_step_without_documents_is_balanced() -> None:
    """Kills a division by nothing."""
    assert shared([[], []], num_ranks=2).imbalance == 1.0


def test_no_ranks_are_refused() -> None:
    """Kills a division by zero ranks."""
    with pytest.raises(PlanError, match="0 ranks with micro-batches of 1 rows"):
        shared([[1]], num_ranks=0)
    with pytest.raises(PlanError, match="at least 1"):
        shared([[1]], num_ranks=1, micro_batch_rows=0)


def test_batches_share_the_rows_that_they_hold() -> None:
    """Kills rows numbered through the run instead of through the step, and another step's documents."""
    rendered = [chat(2, n) for n in (3, 9, 4, 8, 5, 7, 6, 6, 2, 10, 3, 9)]
    lengths = [len(each.ids) for each in rendered]
    weights, _ = weigh_examples(InMemory(rendered), loss=ResponseLoss())
    plan = make_plan(["a"] * len(rendered), lengths, weights=weights, batch=BatchSpec(slots_per_step=64, capacity=16))
    batches = Batches.of(plan, rendered)
    assert len(batches) > 1
    for step, batch in enumerate(batches):
        found = batches.share_rows(step, num_ranks=2, micro_batch_rows=2, hidden_size=4)
        by_row = [[d.length for d in batch.documents if d.row - batch.documents[0].row == row] for row in range(4)]
        assert found.rows.tolist() == shared(by_row, num_ranks=2, micro_batch_rows=2).rows.tolist()
    last, first_from_end = batches.share_rows(len(batches) - 1, num_ranks=2), batches.share_rows(-1, num_ranks=2)
    assert last.costs.tolist() == first_from_end.costs.tolist()
