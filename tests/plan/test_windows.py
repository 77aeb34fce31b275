"""Windows: steps of the promised size, nothing lost, nothing waiting for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.errors import PlanError
from tutelage.plan import windows
from tutelage.plan.spec import BatchSpec
from tutelage.plan.windows import Cuts, Layout, StepShape, cut_windows, step_shape

SHAPES = [
    StepShape(16, slots=32, examples=None, is_packed=True),
    StepShape(16, slots=48, examples=None, is_packed=False),
    StepShape(16, slots=None, examples=5, is_packed=True),
    StepShape(16, slots=None, examples=5, is_packed=False),
    StepShape(16, slots=32, examples=None, is_packed=True, max_documents=2),
]
lengths_lists = st.lists(st.integers(1, 16), min_size=1, max_size=120)


@pytest.fixture(autouse=True)
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of four steps, so that small inputs cross several."""
    monkeypatch.setattr(windows, "WINDOW_STEPS", 4)


def step_of_draw(layout: Layout) -> np.ndarray:
    return np.repeat(np.arange(len(layout.slots)), layout.num_rows)[layout.row]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_draw_has_its_own_slots_inside_a_row_of_its_step(shape: StepShape) -> None:
    """Kills draws lost or doubled between windows, and rows wider than their step."""

    @given(lengths_lists, st.integers(0, 3))
    def check(lengths: list[int], seed: int) -> None:
        layout = cut_windows(np.array(lengths, np.int32), shape=shape, seed=seed)
        width = (layout.slots // layout.num_rows)[step_of_draw(layout)]
        assert (layout.start + np.array(lengths) <= width).all()
        slots = {(r, s + i) for r, s, n in zip(layout.row, layout.start, lengths, strict=True) for i in range(n)}
        assert len(slots) == sum(lengths)
        assert layout.first_row.tolist() == [0, *np.cumsum(layout.num_rows)[:-1]]

    check()


@given(lengths_lists)
def test_packed_steps_have_equal_slots_and_only_the_last_is_padded(lengths: list[int]) -> None:
    """Kills steps of changing size, and empty rows in the middle of a run."""
    layout = cut_windows(np.array(lengths, np.int32), shape=SHAPES[0])
    assert set(layout.slots.tolist()) == {32}
    assert layout.window.tolist() == [step // 4 for step in range(len(layout.slots))]
    filled = np.bincount(step_of_draw(layout), minlength=len(layout.slots))
    assert (filled > 0).all()
    rows_used = sorted(set(layout.row.tolist()))
    assert rows_used == list(range(len(rows_used)))


@given(lengths_lists)
def test_padded_steps_stay_within_their_slots_and_pad_to_eights(lengths: list[int]) -> None:
    """Kills a step that counts real tokens instead of slots."""
    layout = cut_windows(np.array(lengths, np.int32), shape=SHAPES[1])
    assert layout.slots.max() <= 48
    assert ((layout.slots // layout.num_rows) % 8 == 0).all()
    longest = np.zeros(len(layout.slots), np.int64)
    np.maximum.at(longest, step_of_draw(layout), lengths)
    assert (layout.slots == layout.num_rows * -(-longest // 8) * 8).all()


@given(lengths_lists, st.sampled_from(SHAPES[2:4]))
def test_steps_stated_in_examples_hold_exactly_that_many(lengths: list[int], shape: StepShape) -> None:
    """Kills a step count that follows the slots; only the last step may be short."""
    layout = cut_windows(np.array(lengths, np.int32), shape=shape)
    held = np.bincount(step_of_draw(layout), minlength=len(layout.slots)).tolist()
    assert held[:-1] == [5] * (len(held) - 1)
    assert 1 <= held[-1] <= 5
    if shape.is_packed:
        assert step_of_draw(layout).tolist() == [i // 5 for i in range(len(lengths))]


def test_padded_windows_group_by_length() -> None:
    """Kills padding that throws half the slots away."""
    lengths = np.tile([1, 16], 40).astype(np.int32)
    layout = cut_windows(lengths, shape=SHAPES[3])
    assert layout.slots.sum() < 1.2 * sum(-(-n // 8) * 8 for n in lengths.tolist())


MOST_WINDOWS_LATE = {SHAPES[0]: 1, SHAPES[4]: 2, SHAPES[1]: 2, SHAPES[2]: 0, SHAPES[3]: 0}
"""By shape, from the proofs in `windows`. Padded to slots: 6 documents of one piece wait, and 4 pieces are kept for them."""


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_document_comes_many_windows_after_a_younger_one(shape: StepShape) -> None:
    """Kills documents that wait for ever, and packing or sorting by length over the whole run, which undoes the order."""

    @given(lengths_lists | st.lists(st.sampled_from([1, 9, 16]), min_size=100, max_size=200))
    def check(lengths: list[int]) -> None:
        layout = cut_windows(np.array(lengths, np.int32), shape=shape)
        window = layout.window[step_of_draw(layout)]
        earliest_younger = np.minimum.accumulate(window[::-1])[::-1]
        assert (window - earliest_younger).max() <= MOST_WINDOWS_LATE[shape]

    check()


@given(lengths_lists, st.integers(1, 4))
def test_no_row_takes_more_documents_than_the_limit(lengths: list[int], limit: int) -> None:
    """Kills a limit that rows forget while they wait, or that only one kind of step knows."""
    for slots, examples in ((32, None), (None, 5)):
        shape = StepShape(16, slots=slots, examples=examples, is_packed=True, max_documents=limit)
        layout = cut_windows(np.array(lengths, np.int32), shape=shape)
        assert np.bincount(layout.row).max() <= limit


def test_rows_that_wait_are_filled_up() -> None:
    """Kills rows sent on half empty: four rows of one 10 wait for the second window, and the 6s that come there fit."""
    lengths = np.array([10] * 12 + [6] * 14, np.int32)
    layout = cut_windows(lengths, shape=SHAPES[0])
    window = layout.window[step_of_draw(layout)]
    assert window[:12].tolist().count(1) == 4
    used = np.bincount(layout.row, weights=lengths)
    assert used[layout.row[:12]][window[:12] == 1].tolist() == [16] * 4


def test_full_windows_waste_little_even_when_they_are_small() -> None:
    """Kills a rest that every window leaves, a hundred times a run: eight rows each, and more than 97 % real tokens."""
    lengths = np.random.default_rng(0).geometric(0.3, 4000).clip(1, 16).astype(np.int32)
    layout = cut_windows(lengths, shape=SHAPES[0])
    filled = np.bincount(step_of_draw(layout), weights=lengths)[:-8]
    assert filled.sum() / (32 * len(filled)) > 0.97


def test_an_awkward_document_does_not_wait_for_ever() -> None:
    """Kills carrying the emptiest row again and again: beside rows of 12, one of 9 never is among the fullest."""
    lengths = np.full(600, 12, np.int32)
    lengths[0] = 9
    layout = cut_windows(lengths, shape=SHAPES[0])
    assert layout.window[step_of_draw(layout)[0]] <= 1


def test_long_documents_are_spread_over_the_steps_of_a_window() -> None:
    """Kills rows left in packing order, longest documents first."""
    lengths = np.array([16] * 4 + [4] * 16, np.int32)
    step = step_of_draw(cut_windows(lengths, shape=SHAPES[0], seed=1))
    assert len(set(step[:4].tolist())) > 2


@given(lengths_lists, st.sampled_from(SHAPES))
def test_the_layout_is_a_function_of_its_inputs(lengths: list[int], shape: StepShape) -> None:
    """Kills hidden state and sets iterated in hash order."""
    first, second = (cut_windows(np.array(lengths, np.int32), shape=shape, seed=3) for _ in range(2))
    assert all((getattr(first, name) == getattr(second, name)).all() for name in vars(first))


def test_a_step_that_is_not_whole_rows_names_the_nearest_that_are() -> None:
    """Kills rounding the batch behind the user's back."""
    with pytest.raises(PlanError, match=r"5,000 .* 4,096 \(2 rows\) or 6,144 \(3 rows\)"):
        step_shape(BatchSpec(slots_per_step=5000), max_tokens=2048)
    with pytest.raises(PlanError, match=r"1,000 .* 2,048 \(1 row\)"):
        step_shape(BatchSpec(slots_per_step=1000), max_tokens=2048)
    with pytest.raises(PlanError, match="2,048 \\(1 row\\)"):
        step_shape(BatchSpec(slots_per_step=1000, pack="none"), max_tokens=2048)


def test_a_row_too_small_for_the_longest_example_names_both_numbers() -> None:
    """Kills examples that fit in no row and disappear."""
    with pytest.raises(PlanError, match=r"batch.capacity 1,024 .* render.max_tokens 2,048"):
        step_shape(BatchSpec(capacity=1024), max_tokens=2048)


def test_the_default_is_eight_rows() -> None:
    """Kills a silent default."""
    assert step_shape(BatchSpec(), max_tokens=2048) == StepShape(2048, 16_384, None, True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stages_follow_one_another_to_the_step(shape: StepShape) -> None:
    """Kills windows that shuffle two stages of a schedule into one another: less than a step's documents go over an end."""

    @given(lengths_lists, st.data())
    def check(lengths: list[int], data: st.DataObject) -> None:
        ends = tuple(sorted(data.draw(st.sets(st.integers(1, max(len(lengths) - 1, 1)), max_size=3)) - {len(lengths)}))
        cuts = Cuts(data.draw(st.integers(1, 5)), ends)
        layout = cut_windows(np.array(lengths, np.int32), shape=shape, cuts=cuts)
        step = step_of_draw(layout)
        slots = {(r, s + i) for r, s, n in zip(layout.row, layout.start, lengths, strict=True) for i in range(n)}
        assert len(slots) == sum(lengths)
        if len(step):
            assert np.bincount(layout.window).max() <= cuts.steps
        for end in ends:
            first = step[end:].min()
            late = np.flatnonzero(step[:end] >= first)
            if shape.examples is not None:
                assert (step[late] // cuts.steps <= first // cuts.steps + 1).all()
                assert len(late) < shape.examples
            elif shape.is_packed:
                assert len(set(layout.row[late].tolist())) < shape.rows
            else:
                assert len(set(step[late].tolist())) <= len(ends) + 1

    check()
