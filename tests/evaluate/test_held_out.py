"""The choice of what is measured."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from chats import chat
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.errors import PlanError
from tutelage.evaluate.held_out import Candidate, choose_subset, is_learned, next_targets, num_targets
from tutelage.records import LEARNED_KINDS, NO_TARGET, Kind, Rendered

RECORDS = st.lists(st.tuples(st.sampled_from(["chat", "code", "maths"]), st.integers(1, 40)), min_size=1, max_size=30).map(
    lambda rows: [Candidate(f"s/f:{i}", task, size) for i, (task, size) in enumerate(rows)]
)


def taken(records: list[Candidate], subset: list[int], task: str) -> int:
    return sum(records[i].num_tokens for i in subset if records[i].task == task)


@settings(max_examples=200, deadline=None)
@given(RECORDS, st.integers(1, 400), st.integers(0, 3))
def test_the_budget_is_never_passed_and_no_task_goes_missing(records: list[Candidate], budget: int, seed: int) -> None:
    """Kills: rounding shares up; giving each task its first record whatever it costs; dropping tasks whose share is small."""
    least = sum(min(r.num_tokens for r in records if r.task == task) for task in {r.task for r in records})
    if least > budget:
        with pytest.raises(PlanError, match=rf"{budget} tokens cannot hold .* is {least}$"):
            choose_subset(records, max_tokens=budget, seed=seed)
        return
    subset = choose_subset(records, max_tokens=budget, seed=seed)
    assert subset == sorted(set(subset))
    assert sum(records[i].num_tokens for i in subset) <= budget
    assert {records[i].task for i in subset} == {r.task for r in records}


@settings(max_examples=100, deadline=None)
@given(RECORDS, st.integers(120, 400), st.randoms(use_true_random=False))
def test_the_order_of_the_records_changes_nothing(records: list[Candidate], budget: int, random) -> None:  # type: ignore[no-untyped-def]
    """Kills: taking the first records of a file; a shuffle of positions instead of names."""
    shuffled = list(records)
    random.shuffle(shuffled)
    before = {records[i].item for i in choose_subset(records, max_tokens=budget, seed=1)}
    after = {shuffled[i].item for i in choose_subset(shuffled, max_tokens=budget, seed=1)}
    assert before == after


@settings(max_examples=100, deadline=None)
@given(RECORDS, st.integers(120, 400))
def test_no_task_is_ahead_of_another_that_still_has_records_by_more_than_one(records: list[Candidate], budget: int) -> None:
    """Kills: handing all left-over budget to the task that comes first; shares by size, under which a small task gets one record."""
    if sum(r.num_tokens for r in records) <= budget:
        return
    subset = choose_subset(records, max_tokens=budget, seed=0)
    tasks = {r.task for r in records}
    longest = max(r.num_tokens for r in records)
    has_more = {task for task in tasks if {i for i, r in enumerate(records) if r.task == task} - set(subset)}
    for task in tasks:
        for behind in has_more:
            assert taken(records, subset, task) <= taken(records, subset, behind) + 2 * longest


def test_unequal_tasks_get_equal_parts_and_a_small_one_leaves_its_rest() -> None:
    """Kills: parts by size; a part that a small task cannot use and nobody gets."""
    records = [Candidate(f"{task}{i}", task, 5) for task, n in (("a", 300), ("b", 100), ("c", 2)) for i in range(n)]
    subset = choose_subset(records, max_tokens=200, seed=0)
    assert [taken(records, subset, task) for task in "abc"] == [95, 95, 10]


def test_without_a_budget_or_below_it_everything_is_measured() -> None:
    """Kills: a subset that stops one short of an exact budget."""
    records = [Candidate(str(i), "t", 10) for i in range(4)]
    assert choose_subset(records, max_tokens=None, seed=0) == choose_subset(records, max_tokens=40, seed=0) == [0, 1, 2, 3]
    assert choose_subset([], max_tokens=10, seed=0) == []


def test_the_same_seed_gives_the_same_records_and_another_seed_others() -> None:
    """Kills: an unseeded choice; a seed that is read and not used."""
    records = [Candidate(f"r{i}", "t", 10) for i in range(100)]
    first, again, other = (choose_subset(records, max_tokens=300, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert first != list(range(30))


def test_a_new_record_displaces_at_most_what_it_needs() -> None:
    """Kills: a permutation drawn over all records, which reshuffles the set whenever one line is added."""
    records = [Candidate(f"r{i}", "t", 10) for i in range(200)]
    more = [*records, Candidate("new", "t", 10)]
    before = {records[i].item for i in choose_subset(records, max_tokens=500, seed=0)}
    after = {more[i].item for i in choose_subset(more, max_tokens=500, seed=0)}
    assert len(before - after) <= 1


def test_a_budget_too_small_for_the_first_records_takes_the_shortest_of_as_few_tasks_as_will_do() -> None:
    """Kills: refusing a budget that can be met; swapping every task's record when one swap is enough."""
    records = [Candidate("a-long", "a", 90), Candidate("a-short", "a", 10), *(Candidate(f"b{i}", "b", 20) for i in range(5))]
    for seed in range(6):
        subset = [records[i] for i in choose_subset(records, max_tokens=40, seed=seed)]
        assert {r.item for r in subset if r.task == "a"} == {"a-short"}
        assert sum(r.num_tokens for r in subset) <= 40


def test_targets_are_the_next_tokens_of_answers_and_their_stops() -> None:
    """Kills: the shift the other way; counting the answer's opening; a stop that is not measured."""
    example = chat("q", "42")
    targets, counts = next_targets(example)
    assert "".join(chr(t) if t < 128 else "." for t in targets[counts]) == "42."
    assert targets[-1] == NO_TARGET
    assert np.array_equal(targets[:-1], example.ids[1:])


def test_turns_that_the_data_excludes_are_not_measured() -> None:
    """Kills: ignoring learn weights; multiplying by them instead of counting."""
    example = chat("q", "wrong", "q", "right", weights=[1.0, 0.0, 1.0, 2.5])
    targets, counts = next_targets(example)
    assert "".join(map(chr, targets[counts][:-1])) == "right"
    assert num_targets(example) == 6


def test_a_first_token_is_never_a_target() -> None:
    """Kills: counting learned tokens instead of targets."""
    example = Rendered(
        np.array([1, 2], np.int32), np.array([Kind.ASSISTANT, Kind.STOP], np.uint8), np.zeros(2, np.int16), np.ones(1, np.float32)
    )
    assert is_learned(example).tolist() == [True, True]
    assert num_targets(example) == 1


@pytest.mark.parametrize("kind", list(Kind))
def test_what_counts_is_what_the_model_must_write(kind: Kind) -> None:
    """Kills: forgetting reasoning, tool calls or the marks around them; measuring tool results, user text or the template."""
    kinds = np.array([Kind.USER, kind], np.uint8)
    example = Rendered(np.array([1, 2], np.int32), kinds, np.array([0, 1], np.int16), np.ones(2, np.float32))
    is_mark = kind == Kind.SCAFFOLD
    assert num_targets(example) == (1 if kind in LEARNED_KINDS or is_mark else 0)
    if is_mark:
        assert num_targets(dataclasses.replace(example, turns=np.array([0, -1], np.int16))) == 0


def test_tokens_of_no_turn_do_not_borrow_the_last_turns_weight() -> None:
    """Kills: turn -1 read as the last turn."""
    kinds = np.array([Kind.USER, Kind.ASSISTANT], np.uint8)
    example = Rendered(np.array([1, 2], np.int32), kinds, np.array([0, -1], np.int16), np.array([1.0, 0.0], np.float32))
    assert num_targets(example) == 1
