"""An extension goes on where the run before it stopped: passes, caps, and what was dropped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.errors import PlanError
from tutelage.plan.assemble import Candidates, Plan, plan_candidates
from tutelage.plan.onward import draws_behind
from tutelage.plan.spec import BatchSpec, Equal, MixSpec, Temperature, UniMax

BATCH = BatchSpec(slots_per_step=64, capacity=32)


def candidates(sizes: Sequence[int], **more: object) -> Candidates:
    tasks = tuple(f"t{i}" for i in range(len(sizes)))
    task = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    lengths = (4 + (np.arange(len(task)) * 7) % 20).astype(np.int32)
    return Candidates(tasks, task, lengths, lengths.astype(np.int64) - 1, lengths - 1.0, **more)  # type: ignore[arg-type]


def plan_of(sizes: Sequence[int], mix: MixSpec, **more: object) -> Plan:
    return plan_candidates(candidates(sizes, **more), mix=mix, batch=BATCH, max_tokens=32)


def drawn(plan: Plan, steps: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(candidate, visit) of the draws in the first steps."""
    rows = plan.steps.first_row + plan.steps.num_rows
    end = rows[-1] if steps is None else (rows[steps - 1] if steps else 0)
    here = plan.placements.row < end
    return plan.placements.example[here].astype(np.int64), plan.placements.visit[here].astype(np.int64)


SIZES = st.lists(st.integers(1, 25), min_size=1, max_size=4)


@given(sizes=SIZES, epochs=st.sampled_from([0.3, 1.0, 1.7, 2.0]), more=st.sampled_from([0.5, 1.0, 2.3]), seed=st.integers(0, 3))
def test_two_parts_draw_what_one_order_would(sizes: list[int], epochs: float, more: float, seed: int) -> None:
    """Kills an extension whose passes begin anew: some records seen a third time before others were seen twice."""
    mix = MixSpec(rates=Temperature(temperature=2.0), epochs=epochs, seed=seed)
    try:
        first = plan_of(sizes, mix)
    except PlanError:  # so few records that the budget comes to none
        return
    behind = draws_behind(candidates(sizes), *drawn(first), seed=seed)
    second = plan_of(sizes, mix.model_copy(update={"epochs": more}), behind=behind)
    assert all(not len(b.missed) for b in behind.values()), "a whole run leaves no holes"
    seen = np.bincount(np.concatenate([drawn(first)[0], drawn(second)[0]]), minlength=sum(sizes))
    pairs = np.stack([np.concatenate(columns) for columns in zip(drawn(first), drawn(second), strict=True)])
    assert len(np.unique(pairs, axis=1).T) == pairs.shape[1], "no visit is made twice"
    task = candidates(sizes).task
    for i in range(len(sizes)):
        mine = seen[task == i]
        assert mine.max() - mine.min() <= 1
    # and in the same order as one order of both would have: the visits of a record come one after another
    for example in range(sum(sizes)):
        assert sorted(pairs[1][pairs[0] == example].tolist()) == list(range(seen[example]))


@given(sizes=st.lists(st.integers(2, 20), min_size=2, max_size=4), kept=st.floats(0, 1), seed=st.integers(0, 3))
def test_the_draws_of_dropped_steps_come_first(sizes: list[int], kept: float, seed: int) -> None:
    """Kills an extension of the best checkpoint that counts the steps after it as trained on."""
    mix = MixSpec(epochs=2.0, seed=seed)
    first = plan_of(sizes, mix)
    steps = int(kept * len(first.steps))
    behind = draws_behind(candidates(sizes), *drawn(first, steps), seed=seed)
    done = set(zip(*(column.tolist() for column in drawn(first, steps)), strict=True))
    assert sum(b.num_drawn for b in behind.values()) == len(done)
    second = plan_of(sizes, MixSpec(epochs=2.0, seed=seed), behind=behind)
    again = set(zip(*(column.tolist() for column in drawn(second)), strict=True))
    assert not done & again
    planned = set(zip(*(column.tolist() for column in drawn(first)), strict=True))
    assert planned <= done | again, "twice all holds whatever was dropped"


@given(sizes=st.lists(st.integers(2, 20), min_size=2, max_size=4), first=st.sampled_from([0.5, 1.0, 1.5]), seed=st.integers(0, 3))
def test_caps_count_the_visits_of_both_parts(sizes: list[int], first: float, seed: int) -> None:
    """Kills an extension that sees a record max_visits times more."""
    mix = MixSpec(rates=Equal(), epochs=first, max_visits=2, seed=seed)
    one = plan_of(sizes, mix)
    behind = draws_behind(candidates(sizes), *drawn(one), seed=seed)
    room = 2 * sum(sizes) - sum(b.num_drawn for b in behind.values())
    if room <= 0:
        return
    two = plan_of(sizes, MixSpec(rates=Equal(), total_examples=room, max_visits=2, seed=seed), behind=behind)
    assert (one.num_visits + two.num_visits == 2).all()
    with pytest.raises(PlanError, match=f"reach at most {room:,}"):
        plan_of(sizes, MixSpec(rates=Equal(), total_examples=room + 1, max_visits=2, seed=seed), behind=behind)


def test_unimax_and_minima_are_of_the_whole_run() -> None:
    """Kills a cap of passes, or a least number of examples, that counts from the extension on."""
    one = plan_of([4, 40], MixSpec(rates=UniMax(max_epochs=2.0), total_examples=16))
    behind = draws_behind(candidates([4, 40]), *drawn(one), seed=0)
    two = plan_of([4, 40], MixSpec(rates=UniMax(max_epochs=2.0), total_examples=16), behind=behind)
    assert one.mixture.counts == {"t0": 8, "t1": 8} and two.mixture.counts == {"t0": 0, "t1": 16}
    one = plan_of([4, 40], MixSpec(total_examples=11, min_examples=5))
    behind = draws_behind(candidates([4, 40]), *drawn(one), seed=0)
    assert plan_of([4, 40], MixSpec(total_examples=11, min_examples=5), behind=behind).mixture.counts == {"t0": 1, "t1": 10}
