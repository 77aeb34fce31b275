"""One step as documents without padding, cut into forward passes, and added up again by task, source and kind.

Shapes: N real tokens of the step, D documents. Pure: NumPy in, NumPy out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tutelage.errors import TrainError
from tutelage.records import Batch, Document, Float32, Float64, Int64, Kind, Tally
from tutelage.train.batching import default_rows_per_pass


@dataclass(frozen=True, slots=True)
class Pass:
    """The share of a step that goes through the model at once: tokens `start : stop` are documents of these lengths."""

    start: int
    stop: int
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Aimed:
    """Beside the step's nll: what was minimised, per unit of weight, and the mean KL to the start, None without a pull."""

    objective: float | None
    kl: float | None


@dataclass(frozen=True, slots=True)
class FlatStep:
    """A step's documents one after another. Arrays are (N,); `lengths` and `rows` (row in the batch) are (D,).

    `inputs[i]` predicts `targets[i]` with weight `weights[i]`; `kinds` is the kind of the target.
    """

    inputs: Int64
    targets: Int64
    positions: Int64
    weights: Float32
    tasks: NDArray[np.int16]
    sources: NDArray[np.int16]
    kinds: NDArray[np.uint8]
    lengths: Int64
    rows: Int64
    documents: tuple[Document, ...]
    aimed: Aimed | None = None
    """What the step came to beside its nll, once it has run; None where the loss is all."""

    def passes(self, rows_per_pass: int, *, most_tokens: int | None = None) -> list[Pass]:
        """The passes over at most so many rows each, in order; rows of padding alone cost none.

        With `most_tokens` a pass ends before the document that would make it longer; a longer document goes alone.
        """
        whole = self._passes_of_rows(rows_per_pass)
        return whole if most_tokens is None else [part for one in whole for part in cut_pass(one, most_tokens)]

    def _passes_of_rows(self, rows_per_pass: int) -> list[Pass]:
        assert rows_per_pass >= 1
        bounds = np.searchsorted(self.rows // rows_per_pass, np.arange(self.rows.max(initial=-1) // rows_per_pass + 2))
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        return [
            Pass(int(ends[a]), int(ends[b]), tuple(int(n) for n in self.lengths[a:b]))
            for a, b in pairwise(bounds.tolist())
            if a < b
        ]


def flatten(batch: Batch) -> FlatStep:
    """The batch as a `FlatStep`: padding is left out, documents keep the order of rows and places.

    A row of two documents and one of one (0 = padding):

        segments   1  1  2  2  2  0        inputs   5  6  7  8  9 | 3  4
                   1  1  0  0  0  0   ->   lengths  2     3         2
        inputs     5  6  7  8  9  0        rows     0     0         1
                   3  4  0  0  0  0

    Raises `TrainError` when the batch's documents are not its segments.
    """
    segments_N = batch.segments.ravel()
    is_real_N = segments_N > 0
    rows_N = np.repeat(np.arange(batch.num_rows), batch.segments.shape[1])[is_real_N]
    segments_N = segments_N[is_real_N]
    is_first_N = np.ones(len(rows_N), bool)
    is_first_N[1:] = (np.diff(rows_N) != 0) | (np.diff(segments_N) != 0)
    starts_D = np.flatnonzero(is_first_N)
    lengths_D = np.diff(np.append(starts_D, len(rows_N))).astype(np.int64)
    documents = tuple(sorted(batch.documents, key=lambda document: (document.row, document.start)))
    if [document.length for document in documents] != lengths_D.tolist():
        raise TrainError(
            f"step {batch.step}: {len(documents)} documents are named but the rows hold {len(lengths_D)} segments of other "
            "lengths; every run of one segment number must be one document"
        )
    return FlatStep(
        inputs=batch.inputs.ravel()[is_real_N].astype(np.int64),
        targets=batch.targets.ravel()[is_real_N].astype(np.int64),
        positions=batch.positions.ravel()[is_real_N].astype(np.int64),
        weights=batch.weights.ravel()[is_real_N],
        tasks=batch.tasks.ravel()[is_real_N],
        sources=batch.sources.ravel()[is_real_N],
        kinds=batch.kinds.ravel()[is_real_N],
        lengths=lengths_D,
        rows=rows_N[starts_D].astype(np.int64),
        documents=documents,
    )


def cut_pass(whole: Pass, most_tokens: int) -> list[Pass]:
    """The pass as passes of at most so many tokens, documents in their order and never cut.

    >>> [part.lengths for part in cut_pass(Pass(10, 25, (4, 3, 2, 6)), 7)]
    [(4, 3), (2,), (6,)]
    >>> [(part.start, part.stop) for part in cut_pass(Pass(10, 25, (4, 3, 2, 6)), 5)]
    [(10, 14), (14, 19), (19, 25)]
    """
    groups: list[list[int]] = []
    for length in whole.lengths:
        if groups and sum(groups[-1]) + length <= most_tokens:
            groups[-1].append(length)
        else:
            groups.append([length])
    ends = np.cumsum([whole.start, *(sum(group) for group in groups)]).tolist()
    return [Pass(a, b, tuple(group)) for (a, b), group in zip(pairwise(ends), groups, strict=True)]


MicroBatchRows = int | Literal["auto"] | None
"""As recipes state it; a run settles `auto` before its first step, and until then it is as good as nothing."""


def rows_in_pass(capacity: int, micro_batch_rows: MicroBatchRows) -> int:
    """Rows per forward pass: as stated, else as many as fit 2,048 slots.

    >>> rows_in_pass(1024, None), rows_in_pass(8192, None), rows_in_pass(1024, 3)
    (2, 1, 3)
    """
    return micro_batch_rows if isinstance(micro_batch_rows, int) else default_rows_per_pass(capacity)


def check_weight(batch: Batch, flat: FlatStep) -> None:
    """Nothing; raises `TrainError` when the batch's weights are not what the plan divides by, or there are none."""
    found = float(flat.weights.sum(dtype=np.float64))
    if not batch.total_weight > 0:
        raise TrainError(
            f"step {batch.step}: every target has weight 0, so there is nothing to learn from; its examples are "
            f"{_first(flat.documents)}; look at the loss weights, or leave these examples out"
        )
    if not abs(found - batch.total_weight) <= 1e-5 * batch.total_weight:
        raise TrainError(
            f"step {batch.step}: its weights add up to {found:.8g} but the plan divides by {batch.total_weight:.8g}; "
            "the plan does not belong to these batches; plan again"
        )


def _first(documents: Sequence[Document], count: int = 5) -> str:
    """The first few example numbers, for a message."""
    shown = ", ".join(str(document.example) for document in documents[:count])
    return shown + (f" and {len(documents) - count} more" if len(documents) > count else "")


@dataclass(frozen=True, slots=True)
class Names:
    """What the numbers in a batch stand for."""

    tasks: tuple[str, ...]
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tallies:
    """A step's loss, whole and by task, source and kind."""

    loss: Tally
    by_task: dict[str, Tally]
    by_source: dict[str, Tally]
    by_kind: dict[str, Tally]


def tally(flat: FlatStep, nll_N: Float64, names: Names) -> Tallies:
    """The step's `Tallies` from the loss of each token: sums over segments of one pass, nothing is computed twice.

    >>> from tutelage.records import Document
    >>> flat = FlatStep(
    ...     inputs=np.array([5, 6, 7]), targets=np.array([6, 7, -100]), positions=np.arange(3),
    ...     weights=np.array([0, 0.5, 0], np.float32), tasks=np.array([1, 1, 1], np.int16), sources=np.zeros(3, np.int16),
    ...     kinds=np.array([2, 3, 0], np.uint8), lengths=np.array([3]), rows=np.array([0]), documents=(Document(0, 0, 3, 0, 0),))
    >>> sums = tally(flat, np.array([0, 4.0, 0]), Names(("maths", "chat"), ("a",)))
    >>> sums.loss, sums.by_task
    (Tally(loss_sum=2.0, weight=0.5, tokens=1), {'chat': Tally(loss_sum=2.0, weight=0.5, tokens=1)})
    >>> list(sums.by_source), list(sums.by_kind)
    (['a'], ['assistant'])
    """
    is_on_N = flat.weights > 0
    weights_S = flat.weights[is_on_N].astype(np.float64)
    losses_S = weights_S * nll_N[is_on_N]

    def by(labels_N: NDArray[np.integer], words: Sequence[str]) -> dict[str, Tally]:
        labels_S = labels_N[is_on_N]
        sums = np.bincount(labels_S, losses_S, len(words))
        weights = np.bincount(labels_S, weights_S, len(words))
        tokens = np.bincount(labels_S, minlength=len(words))
        columns = zip(words, sums.tolist(), weights.tolist(), tokens.tolist(), strict=True)
        return {word: Tally(loss, weight, count) for word, loss, weight, count in columns if count}

    return Tallies(
        loss=Tally(float(losses_S.sum()), float(weights_S.sum()), int(is_on_N.sum())),
        by_task=by(flat.tasks, names.tasks),
        by_source=by(flat.sources, names.sources),
        by_kind=by(flat.kinds, [kind.name.lower() for kind in Kind]),
    )


def not_finite(flat: FlatStep, nll_N: Float64) -> tuple[Document, ...]:
    """The documents that hold a token whose loss is NaN or infinite."""
    owners_N = np.repeat(np.arange(len(flat.lengths)), flat.lengths)
    return tuple(flat.documents[i] for i in np.unique(owners_N[~np.isfinite(nll_N)]))
