"""Faults of published mixing code, each rebuilt beside ours on the same data. docs/faults.md tells the story of each."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np

from tutelage import Batches, compute_rates, make_plan
from tutelage.plan.spec import BatchSpec, Equal, Explicit, MixSpec
from tutelage.records import Kind, Rendered

SIZES = {"qa": 120, "summaries": 80, "code": 15, "maths": 8, "creative": 25, "translation": 40, "classes": 60}
TASKS = [task for task, size in SIZES.items() for _ in range(size)]
LENGTHS = [5 + i % 11 for i in range(len(TASKS))]


def _planned(mix: MixSpec) -> dict[str, int]:
    """How often examples of each task are seen, counted in the placements of the plan."""
    plan = make_plan(TASKS, LENGTHS, mix=mix, batch=BatchSpec(slots_per_step=64, capacity=32))
    return dict(Counter(TASKS[example] for example in plan.placements.example))


def test_lesson_the_remainder_of_int_total_times_weight_is_lost() -> None:
    """Kills `int(total * weight)`: the counts do not add up to the total, and nobody is told."""
    total = 1000
    wrong = {task: int(total * share) for task, share in compute_rates(SIZES).items()}
    assert sum(wrong.values()) == total - 5
    planned = _planned(MixSpec(total_examples=total))
    assert sum(planned.values()) == total
    assert all(0 <= planned[task] - wrong[task] <= 1 for task in SIZES)


def test_lesson_the_same_cut_turns_29_percent_into_28() -> None:
    """Kills `int(100 * 0.29)`, which is 28: decimals count as they are written."""
    assert int(100 * 0.29) == 28
    weights = {"qa": 0.29, "summaries": 0.71}
    assert _planned(MixSpec(rates=Explicit(weights=weights), total_examples=100)) == {"qa": 29, "summaries": 71}


def test_lesson_sampling_with_replacement_repeats_unevenly() -> None:
    """Kills drawing with replacement: some records come many times while others never come."""
    mix = MixSpec(rates=Equal(), total_examples=1400)
    plan = make_plan(TASKS, LENGTHS, mix=mix, batch=BatchSpec(slots_per_step=64, capacity=32))
    draw = random.Random(0)
    for task, size in SIZES.items():
        wrong = Counter(draw.choices(range(size), k=200))
        ours = plan.num_visits[np.array(TASKS) == task]
        assert ours.sum() == 200 and ours.max() - ours.min() <= 1
        assert max(wrong.values()) - min(wrong[i] for i in range(size)) > 3


def test_lesson_even_visits_reach_the_batches() -> None:
    """Kills an even plan that the batches do not follow: every record lies in them as often as was planned."""
    rendered = [_example(i, length) for i, length in enumerate(LENGTHS)]
    plan = make_plan(TASKS, LENGTHS, mix=MixSpec(epochs=2.0), batch=BatchSpec(slots_per_step=64, capacity=32))
    seen = Counter(int(i) for batch in Batches.of(plan, rendered) for i in batch.inputs[batch.segments > 0])
    assert seen == {i: 2 * length for i, length in enumerate(LENGTHS)}


def _example(name: int, length: int) -> Rendered:
    """An example that says its own number in every token."""
    kinds = np.full(length, Kind.ASSISTANT, np.uint8)
    return Rendered(np.full(length, name, np.int32), kinds, np.zeros(length, np.int16), np.ones(1, np.float32))
