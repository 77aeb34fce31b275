"""Windows: the ordered examples cut into steps, a hundred at a time.

    draws in order --take until the window's slots are full--> best-fit rows --shuffle rows--> 100 steps
                            ^--------- documents of the rows beyond the 100th step come first next time

Packing moves an example only within its window, so it cannot undo the mixture; whole rows are shuffled, so that the long
documents, which are packed first, do not all stand in the first step. A carried document goes before all younger ones, so
none waits for ever.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tutelage.errors import PlanError
from tutelage.plan.fit import pack_lengths
from tutelage.plan.order import pass_keys, permute
from tutelage.plan.spec import BatchSpec
from tutelage.records import Int32, Int64

WINDOW_STEPS = 100
DEFAULT_ROWS = 8
_PAD_TO = 8


@dataclass(frozen=True)
class StepShape:
    """The size of a step: `slots` per step, or `examples` per step; `capacity` slots per row; packed or one document a row."""

    capacity: int
    slots: int | None
    examples: int | None
    is_packed: bool

    @property
    def rows(self) -> int:
        """Rows of a packed step stated in slots."""
        assert self.slots is not None
        return self.slots // self.capacity


@dataclass(frozen=True)
class Layout:
    """Where each draw lies (`row`, `start`), and the steps: `window`, `first_row`, `num_rows`, `slots` of each."""

    row: Int64
    start: Int32
    window: Int64
    first_row: Int64
    num_rows: Int64
    slots: Int64


@dataclass(frozen=True)
class _Stretch:
    """Finished steps of one window: which draws, their row (from 0 here) and start, and rows and slots of each step."""

    items: Int64
    rows: Int64
    starts: Int32
    step_rows: list[int]
    step_slots: list[int]


def step_shape(batch: BatchSpec, *, max_tokens: int) -> StepShape:
    """The size of a step; 8 rows when the recipe states none.

    >>> step_shape(BatchSpec(slots_per_step=4096), max_tokens=1024).rows
    4

    PlanError when a row cannot hold the longest example, or when a step is not a whole number of rows.
    """
    capacity = batch.capacity or max_tokens
    if capacity < max_tokens:
        raise PlanError(
            f"batch.capacity {capacity:,} is smaller than render.max_tokens {max_tokens:,}: the longest examples would fit "
            f"in no row; raise batch.capacity to {max_tokens:,} or lower render.max_tokens to {capacity:,}"
        )
    is_packed = batch.pack == "best_fit"
    if batch.examples_per_step is not None:
        return StepShape(capacity, None, batch.examples_per_step, is_packed)
    slots = DEFAULT_ROWS * capacity if batch.slots_per_step is None else batch.slots_per_step
    widest = capacity if is_packed else _padded(capacity)
    if slots < widest or (is_packed and slots % capacity):
        near = [size for size in (slots // widest * widest, -(-slots // widest) * widest) if size > 0]
        sizes = " or ".join(f"{size:,} ({size // widest} row{'s' * (size > widest)})" for size in near)
        raise PlanError(
            f"batch.slots_per_step {slots:,} is not a whole number of rows of {widest:,} slots; the nearest that is: {sizes}"
        )
    return StepShape(capacity, slots, None, is_packed)


def _padded(length: int) -> int:
    return -(-length // _PAD_TO) * _PAD_TO


def cut_windows(lengths: Int32, *, shape: StepShape, seed: int = 0) -> Layout:
    """The layout of documents of these lengths, given in the order of the run.

    >>> layout = cut_windows(np.array([5, 3, 6, 2, 4]), shape=StepShape(8, slots=16, examples=None, is_packed=True))
    >>> sorted(zip(layout.row.tolist(), layout.start.tolist()))            # three rows, the fourth is padding
    [(0, 0), (0, 6), (1, 0), (2, 0), (2, 5)]
    >>> layout.num_rows.tolist(), layout.slots.tolist()
    ([2, 2], [16, 16])
    """
    match shape:
        case StepShape(examples=None, is_packed=True):
            stretches = _packed_slots(lengths, shape, seed)
        case StepShape(examples=None):
            stretches = _padded_slots(lengths, shape, seed)
        case StepShape(is_packed=True):
            stretches = _packed_examples(lengths, shape)
        case _:
            stretches = _padded_examples(lengths, shape, seed)
    return _join(list(stretches), num_items=len(lengths))


def _join(stretches: list[_Stretch], *, num_items: int) -> Layout:
    row, start = np.full(num_items, -1, np.int64), np.zeros(num_items, np.int32)
    first = 0
    for stretch in stretches:
        row[stretch.items], start[stretch.items] = first + stretch.rows, stretch.starts
        first += sum(stretch.step_rows)
    assert (row >= 0).all(), "every draw is placed"
    num_rows = np.array([n for stretch in stretches for n in stretch.step_rows], np.int64)
    slots = np.array([n for stretch in stretches for n in stretch.step_slots], np.int64)
    window = np.arange(len(num_rows)) // WINDOW_STEPS
    return Layout(row, start, window, np.cumsum(num_rows) - num_rows, num_rows, slots)


def _shuffle(num: int, *, seed: int, window: int) -> Int64:
    """The new place of each of `num` things, a pure function of (seed, window)."""
    keys = pass_keys(seed, "\0window", np.full(num, window, np.int64))  # no task's name starts with \0
    return permute(np.arange(num), size=num, keys=keys)


def _packed_slots(lengths: Int32, shape: StepShape, seed: int) -> Iterator[_Stretch]:
    total = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    most_rows, most_slots = WINDOW_STEPS * shape.rows, WINDOW_STEPS * (shape.slots or 0)
    carried, taken, window = np.zeros(0, np.int64), 0, 0
    while taken < len(lengths) or len(carried):
        room = most_slots - int(lengths[carried].sum())
        end = int(np.searchsorted(total, total[taken] + room, "right")) - 1
        items = np.concatenate([carried, np.arange(taken, end)])
        packing = pack_lengths(lengths[items], capacity=shape.capacity)
        kept = _rows_to_keep(packing.rows, lengths[items], num_rows=packing.num_rows, most=most_rows, num_carried=len(carried))
        place = np.full(packing.num_rows, -1, np.int64)
        place[kept] = _shuffle(len(kept), seed=seed, window=window)
        is_kept = place[packing.rows] >= 0
        steps = -(-len(kept) // shape.rows)
        yield _Stretch(
            items[is_kept],
            place[packing.rows[is_kept]],
            packing.starts[is_kept],
            [shape.rows] * steps,
            [shape.rows * shape.capacity] * steps,
        )
        carried, taken, window = items[~is_kept], end, window + 1


def _rows_to_keep(rows: Int32, lengths: Int32, *, num_rows: int, most: int, num_carried: int) -> Int64:
    """The rows of this window: those holding the longest-waiting documents first, then the fullest."""
    if num_rows <= most:
        return np.arange(num_rows)
    fill = np.bincount(rows, weights=lengths, minlength=num_rows)
    oldest = np.full(num_rows, num_carried)
    np.minimum.at(oldest, rows, np.arange(len(rows)).clip(max=num_carried))
    return np.sort(np.lexsort((-fill, oldest))[:most])


def _packed_examples(lengths: Int32, shape: StepShape) -> Iterator[_Stretch]:
    per_step = shape.examples or 1
    for first in range(0, len(lengths), per_step):
        items = np.arange(first, min(first + per_step, len(lengths)))
        packing = pack_lengths(lengths[items], capacity=shape.capacity)
        slots = packing.num_rows * shape.capacity
        yield _Stretch(items, packing.rows.astype(np.int64), packing.starts, [packing.num_rows], [slots])


def _padded_examples(lengths: Int32, shape: StepShape, seed: int) -> Iterator[_Stretch]:
    per_step = shape.examples or 1
    for window, first in enumerate(range(0, len(lengths), WINDOW_STEPS * per_step)):
        items = np.arange(first, min(first + WINDOW_STEPS * per_step, len(lengths)))
        items = items[np.argsort(-lengths[items], kind="stable")]
        cuts = [*range(0, len(items), per_step), len(items)]
        yield _one_per_row(items, lengths, cuts, order=_full_steps_first(len(items), per_step, seed=seed, window=window))


def _full_steps_first(num_items: int, per_step: int, *, seed: int, window: int) -> Int64:
    """A shuffle of the steps that leaves a short last step last."""
    full = num_items // per_step
    places = _shuffle(full, seed=seed, window=window) if full else np.zeros(0, np.int64)
    return places if num_items % per_step == 0 else np.append(places, full)


def _padded_slots(lengths: Int32, shape: StepShape, seed: int) -> Iterator[_Stretch]:
    slots = shape.slots or 0
    widths = -(-lengths.astype(np.int64) // _PAD_TO) * _PAD_TO
    total = np.concatenate([[0], np.cumsum(widths)])
    carried, taken, window = np.zeros(0, np.int64), 0, 0
    while taken < len(lengths) or len(carried):
        room = WINDOW_STEPS * slots - int(widths[carried].sum())
        end = int(np.searchsorted(total, total[taken] + room, "right")) - 1
        items = np.concatenate([carried, np.arange(taken, end)])
        # Turn about, the shortest or the longest are what is left over: what is carried once is cut first next time.
        by_length = np.argsort(widths[items] * (1 if window % 2 else -1), kind="stable")
        items = items[by_length]
        cuts = _cut_by_slots(widths[items], slots)
        carried = np.zeros(0, np.int64)
        if end < len(lengths) and len(cuts) > 2:
            carried, items = np.sort(items[cuts[-2] :]), items[: cuts[-2]]
            cuts = cuts[:-1]
        yield _one_per_row(items, lengths, cuts, order=_shuffle(len(cuts) - 1, seed=seed, window=window))
        taken, window = end, window + 1


def _cut_by_slots(widths: Int64, slots: int) -> list[int]:
    """Where sorted rows are cut so that each piece, padded to its widest, has at most `slots`."""
    cuts = [0]
    widest_last = len(widths) > 0 and widths[-1] >= widths[0]
    while cuts[-1] < len(widths):
        first = cuts[-1]
        most = len(widths) - first

        def padded(rows: int, first: int = first) -> int:
            return rows * int(widths[first + rows - 1])

        if widest_last:
            rows = bisect.bisect_right(range(1, most + 1), slots, key=padded)
        else:
            rows = min(slots // int(widths[first]), most)
        cuts.append(first + rows)
    return cuts


def _one_per_row(items: Int64, lengths: Int32, cuts: list[int], *, order: Int64) -> _Stretch:
    """Steps of one document per row from sorted items; step i of the cuts goes to place `order[i]`."""
    num_rows = np.diff(cuts)
    widest = np.maximum.reduceat(lengths[items], cuts[:-1])
    by_place = np.argsort(order)
    rows_by_place, slots_by_place = num_rows[by_place], (num_rows * -(-widest // _PAD_TO) * _PAD_TO)[by_place]
    first_row = (np.cumsum(rows_by_place) - rows_by_place)[order]
    rows = np.repeat(first_row - np.asarray(cuts[:-1]), num_rows) + np.arange(len(items))
    return _Stretch(items, rows, np.zeros(len(items), np.int32), rows_by_place.tolist(), slots_by_place.tolist())
