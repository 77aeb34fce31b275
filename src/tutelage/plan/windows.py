"""Windows: the ordered examples cut into steps, a hundred at a time.

    draws in order --take until the window's slots are full--> best-fit rows --shuffle rows--> 100 steps
                            ^--------- rows beyond the 100th step stay open, and are filled up and used first next time

Packing moves an example only within its window, so it cannot undo the mixture; whole rows are shuffled, so that the long
documents, which are packed first, do not all stand in the first step.

Nothing waits for ever. A window takes no more tokens than it has slots, rows that wait with it included, and two rows never
fit into one (see `pack_onto`): so it makes fewer than twice its rows, fewer wait than one window has, and all of them are
used in the next. With a limit on documents per row as many rows again may be closed by it: the wait is two windows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tutelage.errors import PlanError
from tutelage.plan.fit import Begun, pack_lengths, pack_onto
from tutelage.plan.order import pass_keys, permute
from tutelage.plan.spec import BatchSpec
from tutelage.records import Int32, Int64

WINDOW_STEPS = 100
DEFAULT_ROWS = 8
_PAD_TO = 8


@dataclass(frozen=True)
class StepShape:
    """The size of a step: `slots` per step, or `examples` per step; `capacity` slots per row; packed or one document a row.

    `max_documents` is the most that one packed row takes.
    """

    capacity: int
    slots: int | None
    examples: int | None
    is_packed: bool
    max_documents: int | None = None

    @property
    def rows(self) -> int:
        """Rows of a packed step stated in slots."""
        assert self.slots is not None
        return self.slots // self.capacity


@dataclass(frozen=True)
class Cuts:
    """Where windows end: after so many `steps`, and at the draws `ends`, where one stage of a schedule gives way to another.

    No window reaches across an end; only what does not fill a whole step there goes over: into the first step behind it where
    rows are packed, anywhere into the next window where rows of like length stand together.
    """

    steps: int
    ends: tuple[int, ...] = ()

    def after(self, taken: int, num_draws: int, *, is_full: bool = False) -> int:
        """The next end behind `taken` draws, or at them where what waits there still makes a step; else the end of the run."""
        behind = bisect_left(self.ends, taken if is_full else taken + 1)
        return self.ends[behind] if behind < len(self.ends) else num_draws


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
        return StepShape(capacity, None, batch.examples_per_step, is_packed, batch.max_documents_per_row)
    slots = DEFAULT_ROWS * capacity if batch.slots_per_step is None else batch.slots_per_step
    widest = capacity if is_packed else _padded(capacity)
    if slots < widest or (is_packed and slots % capacity):
        near = [size for size in (slots // widest * widest, -(-slots // widest) * widest) if size > 0]
        sizes = " or ".join(f"{size:,} ({size // widest} row{'s' * (size > widest)})" for size in near)
        raise PlanError(
            f"batch.slots_per_step {slots:,} is not a whole number of rows of {widest:,} slots; the nearest that is: {sizes}"
        )
    return StepShape(capacity, slots, None, is_packed, batch.max_documents_per_row)


def _padded(length: int) -> int:
    return -(-length // _PAD_TO) * _PAD_TO


def cut_windows(lengths: Int32, *, shape: StepShape, seed: int = 0, cuts: Cuts | None = None) -> Layout:
    """The layout of documents of these lengths, given in the order of the run; `cuts` of a run whose mixture changes.

    >>> layout = cut_windows(np.array([5, 3, 6, 2, 4]), shape=StepShape(8, slots=16, examples=None, is_packed=True))
    >>> sorted(zip(layout.row.tolist(), layout.start.tolist()))            # three rows, the fourth is padding
    [(0, 0), (0, 6), (1, 0), (2, 0), (2, 5)]
    >>> layout.num_rows.tolist(), layout.slots.tolist()
    ([2, 2], [16, 16])
    """
    cuts = cuts or Cuts(WINDOW_STEPS)
    match shape:
        case StepShape(examples=None, is_packed=True):
            stretches = _packed_slots(lengths, shape, seed, cuts)
        case StepShape(examples=None):
            stretches = _padded_slots(lengths, shape, seed, cuts)
        case StepShape(is_packed=True):
            stretches = _packed_examples(lengths, shape, cuts)
        case _:
            stretches = _padded_examples(lengths, shape, seed, cuts)
    return _join([stretch for stretch in stretches if stretch.step_rows], num_items=len(lengths))


def _join(stretches: list[_Stretch], *, num_items: int) -> Layout:
    row, start = np.full(num_items, -1, np.int64), np.zeros(num_items, np.int32)
    first = 0
    for stretch in stretches:
        row[stretch.items], start[stretch.items] = first + stretch.rows, stretch.starts
        first += sum(stretch.step_rows)
    assert (row >= 0).all(), "every draw is placed"
    num_rows = np.array([n for stretch in stretches for n in stretch.step_rows], np.int64)
    slots = np.array([n for stretch in stretches for n in stretch.step_slots], np.int64)
    window = np.repeat(np.arange(len(stretches)), [len(stretch.step_rows) for stretch in stretches])
    return Layout(row, start, window, np.cumsum(num_rows) - num_rows, num_rows, slots)


def _shuffle(num: int, *, seed: int, window: int) -> Int64:
    """The new place of each of `num` things, a pure function of (seed, window)."""
    keys = pass_keys(seed, "\0window", np.full(num, window, np.int64))  # no task's name starts with \0
    return permute(np.arange(num), size=num, keys=keys)


@dataclass(frozen=True)
class _Waiting(Begun):
    """Rows that wait for the next window: their documents `items`, of each its row (from 0 here) and start."""

    items: Int64
    rows: Int32
    starts: Int32


def _packed_slots(lengths: Int32, shape: StepShape, seed: int, cuts: Cuts) -> Iterator[_Stretch]:
    most, limit = cuts.steps * shape.rows, shape.max_documents
    total = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    nothing = np.zeros(0, np.int32)
    waiting, taken, window = _Waiting(nothing, nothing, nothing.astype(np.int64), nothing, nothing), 0, 0
    while taken < len(lengths) or waiting.num_rows:
        room = int(waiting.free.sum(dtype=np.int64)) + (most - waiting.num_rows) * shape.capacity
        end = int(np.searchsorted(total, total[taken] + room, "right")) - 1
        if limit is not None:
            end = min(end, taken + most * limit - len(waiting.items))
        stop = cuts.after(taken, len(lengths), is_full=waiting.num_rows >= shape.rows)
        end = min(end, stop)
        whole = _top_up(waiting, lengths, (taken, end), shape)
        most_now = min(most, whole.num_rows // shape.rows * shape.rows) if end == stop < len(lengths) else most
        kept = _rows_to_keep(whole.free, most=most_now, num_waiting=waiting.num_rows)
        place = np.full(whole.num_rows, -1, np.int64)
        ahead = min(waiting.num_rows, len(kept)) if taken in cuts.ends else 0  # what an ended stage left over comes first
        place[kept[:ahead]] = np.arange(ahead)
        place[kept[ahead:]] = ahead + _shuffle(len(kept) - ahead, seed=seed, window=window)
        at = place[whole.rows]
        is_kept = at >= 0
        steps = -(-len(kept) // shape.rows)
        sizes = [shape.rows] * steps, [shape.rows * shape.capacity] * steps
        yield _Stretch(whole.items[is_kept], at[is_kept], whole.starts[is_kept], *sizes)
        waiting, taken, window = _still_waiting(whole, place < 0, ~is_kept), end, window + 1


def _top_up(waiting: _Waiting, lengths: Int32, taken: tuple[int, int], shape: StepShape) -> _Waiting:
    """The waiting rows filled up with the draws `taken[0] : taken[1]`, and the new rows behind them."""
    drawn = np.arange(*taken)
    packing = pack_onto(waiting, lengths[slice(*taken)], capacity=shape.capacity, max_documents=shape.max_documents)
    items = np.concatenate([waiting.items, drawn])
    rows, starts = np.concatenate([waiting.rows, packing.rows]), np.concatenate([waiting.starts, packing.starts])
    return _Waiting(packing.free, packing.held, items, rows, starts)


def _rows_to_keep(free: Int32, *, most: int, num_waiting: int) -> Int64:
    """The rows of this window: those that waited first, oldest first, then the fullest."""
    if len(free) <= most:
        return np.arange(len(free))
    if num_waiting >= most:
        return np.arange(most)
    fullest = num_waiting + np.argsort(free[num_waiting:], kind="stable")
    return np.sort(np.concatenate([np.arange(num_waiting), fullest[: most - num_waiting]]))


def _still_waiting(whole: _Waiting, row_waits: np.ndarray, item_waits: np.ndarray) -> _Waiting:
    number = (np.cumsum(row_waits) - 1).astype(np.int32)
    rows = number[whole.rows[item_waits]]
    return _Waiting(whole.free[row_waits], whole.held[row_waits], whole.items[item_waits], rows, whole.starts[item_waits])


def _packed_examples(lengths: Int32, shape: StepShape, cuts: Cuts) -> Iterator[_Stretch]:
    """Windows of steps that are packed one by one: nothing moves out of its step."""
    per_step = shape.examples or 1
    for first, last in _windows_of_examples(len(lengths), per_step, cuts):
        rows, starts, num_rows = [], [], list[int]()
        for begin in range(first, last, per_step):
            of_step = lengths[begin : min(begin + per_step, last)]
            packing = pack_lengths(of_step, capacity=shape.capacity, max_documents=shape.max_documents)
            rows.append(packing.rows.astype(np.int64) + sum(num_rows))
            starts.append(packing.starts)
            num_rows.append(packing.num_rows)
        slots = [num * shape.capacity for num in num_rows]
        yield _Stretch(np.arange(first, last), np.concatenate(rows), np.concatenate(starts), num_rows, slots)


def _windows_of_examples(num: int, per_step: int, cuts: Cuts) -> Iterator[tuple[int, int]]:
    """The draws of each window, whole steps but the last; the step that an end falls into is the first of the next window."""
    first = 0
    while first < num:
        end = cuts.after(first + per_step - 1, num)
        end = end if end == num else end // per_step * per_step
        last = min(first + cuts.steps * per_step, end)
        yield first, last
        first = last


def _padded_examples(lengths: Int32, shape: StepShape, seed: int, cuts: Cuts) -> Iterator[_Stretch]:
    per_step = shape.examples or 1
    for window, (first, last) in enumerate(_windows_of_examples(len(lengths), per_step, cuts)):
        items = np.arange(first, last)
        items = items[np.argsort(-lengths[items], kind="stable")]
        edges = [*range(0, len(items), per_step), len(items)]
        yield _one_per_row(items, lengths, edges, order=_full_steps_first(len(items), per_step, seed=seed, window=window))


def _full_steps_first(num_items: int, per_step: int, *, seed: int, window: int) -> Int64:
    """A shuffle of the steps that leaves a short last step last."""
    full = num_items // per_step
    places = _shuffle(full, seed=seed, window=window) if full else np.zeros(0, np.int64)
    return places if num_items % per_step == 0 else np.append(places, full)


def _padded_slots(lengths: Int32, shape: StepShape, seed: int, cuts: Cuts) -> Iterator[_Stretch]:
    slots = shape.slots or 0
    widths = -(-lengths.astype(np.int64) // _PAD_TO) * _PAD_TO
    total = np.concatenate([[0], np.cumsum(widths)])
    carried, taken, window = np.zeros(0, np.int64), 0, 0
    while taken < len(lengths) or len(carried):
        room = cuts.steps * slots - int(widths[carried].sum())
        end = int(np.searchsorted(total, total[taken] + room, "right")) - 1
        stop = cuts.after(taken, len(lengths))
        end = min(end, stop)
        items = np.concatenate([carried, np.arange(taken, end)])
        items = items[np.argsort(-widths[items], kind="stable")]
        edges = np.array(_cut_by_slots(widths[items], slots))
        most = min(cuts.steps, len(edges) - 2) if end == stop < len(lengths) else cuts.steps
        kept = _pieces_to_keep(items, edges, first_new=taken, most=most)
        is_kept = np.repeat(kept, np.diff(edges))
        sizes = np.diff(edges)[kept]
        order = _shuffle(len(sizes), seed=seed, window=window)
        if len(sizes):
            yield _one_per_row(items[is_kept], lengths, [0, *np.cumsum(sizes).tolist()], order=order)
        carried, taken, window = np.sort(items[~is_kept]), end, window + 1


def _cut_by_slots(widths: Int64, slots: int) -> list[int]:
    """Where rows sorted widest first are cut so that each piece, padded to its widest, has at most `slots`."""
    cuts = [0]
    while cuts[-1] < len(widths):
        cuts.append(min(cuts[-1] + slots // int(widths[cuts[-1]]), len(widths)))
    return cuts


def _pieces_to_keep(items: Int64, edges: Int64, *, first_new: int, most: int) -> np.ndarray:
    """Which pieces are the steps of this window: those that hold what waited longest, then those of the longest documents.

    The piece of the shortest, which may have few rows, is thus left to be filled up.
    """
    num = len(edges) - 1
    if num <= most:
        return np.ones(num, bool)
    oldest = np.minimum.reduceat(items, edges[:-1]).clip(max=first_new)
    kept = np.zeros(num, bool)
    kept[np.lexsort((np.arange(num), oldest))[:most]] = True
    return kept


def _one_per_row(items: Int64, lengths: Int32, cuts: list[int], *, order: Int64) -> _Stretch:
    """Steps of one document per row from sorted items; step i of the cuts goes to place `order[i]`."""
    num_rows = np.diff(cuts)
    widest = np.maximum.reduceat(lengths[items], cuts[:-1])
    by_place = np.argsort(order)
    rows_by_place, slots_by_place = num_rows[by_place], (num_rows * -(-widest // _PAD_TO) * _PAD_TO)[by_place]
    first_row = (np.cumsum(rows_by_place) - rows_by_place)[order]
    rows = np.repeat(first_row - np.asarray(cuts[:-1]), num_rows) + np.arange(len(items))
    return _Stretch(items, rows, np.zeros(len(items), np.int32), rows_by_place.tolist(), slots_by_place.tolist())
