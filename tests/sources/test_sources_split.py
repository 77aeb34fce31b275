"""The one split: by the first request alone, and unmoved by what else is there."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.sources.split import count_sides, held_out_flags, notes_on

COMMON = settings(max_examples=60, deadline=None)
KEYS = st.lists(st.binary(min_size=16, max_size=16), max_size=30)
SHARE = st.floats(0, 1)


def flags(keys: list[bytes], share: float = 0.3, **more: object) -> list[bool]:
    tasks = [f"task{i % 3}" for i in range(len(keys))]
    return held_out_flags(keys, tasks, share=share, **more).tolist()  # type: ignore[arg-type]


@COMMON
@given(KEYS, KEYS, SHARE, st.integers(-5, 5))
def test_adding_records_moves_none(old: list[bytes], new: list[bytes], share: float, seed: int) -> None:
    """Kills a split by position, by shuffling, or by rank of the hash."""
    assert flags(old + new, share, seed=seed)[: len(old)] == flags(old, share, seed=seed)
    assert flags(new + old, share, seed=seed)[len(new) :] == flags(old, share, seed=seed)


@COMMON
@given(KEYS, SHARE, SHARE)
def test_a_larger_share_only_adds_to_the_held_out_records(keys: list[bytes], one: float, two: float) -> None:
    """Kills a hash that depends on the share."""
    small, large = sorted([one, two])
    assert all(b or not a for a, b in zip(flags(keys, small), flags(keys, large), strict=True))
    assert not any(flags(keys, 0.0))
    assert all(flags(keys, 1.0))


@COMMON
@given(KEYS, SHARE)
def test_one_request_is_on_one_side_whatever_its_task(keys: list[bytes], share: float) -> None:
    """Kills a hash of the task or the source together with the request."""
    one = held_out_flags(keys, ["a"] * len(keys), share=share)
    two = held_out_flags(keys, ["b"] * len(keys), share=share)
    assert (one == two).all()


@COMMON
@given(KEYS, SHARE)
def test_unseen_tasks_are_held_out_whole_and_others_do_not_move(keys: list[bytes], share: float) -> None:
    """Kills an unseen task of which some records are trained on."""
    plain, unseen = flags(keys, share), flags(keys, share, unseen_tasks=["task1"])
    assert all(flag for i, flag in enumerate(unseen) if i % 3 == 1)
    assert [f for i, f in enumerate(unseen) if i % 3 != 1] == [f for i, f in enumerate(plain) if i % 3 != 1]


def test_the_share_is_met_in_every_task_and_the_seed_draws_anew() -> None:
    """Kills a biased hash, and a seed that is not used."""
    keys = [i.to_bytes(16, "little") for i in range(6_000)]
    tasks = [f"task{i % 3}" for i in range(len(keys))]
    one, two = (held_out_flags(keys, tasks, share=0.05, seed=seed) for seed in (0, 1))
    for side in count_sides(tasks, one).values():
        assert 60 <= side["held_out"] <= 140  # 100 expected, standard deviation 9.7
    assert 0 < (one & two).sum() < 40  # 15 expected: independent draws


def test_a_task_with_nothing_on_one_side_is_noted() -> None:
    """Kills a silent absence of a held-out loss."""
    sides = count_sides(["a", "a", "b", "c"], np.array([False, False, True, True]))
    notes = notes_on(sides, share=0.05, unseen_tasks=["c"])
    assert [note.split(" ", 2)[1] for note in notes] == ["a", "b"]
