"""The part of a step that one of several ranks takes, and its place in the whole.

    rows of the step --share_rows--> rank 0: passes of its own rows     every rank makes equally many passes, because the
                                     rank 1: passes of its own rows     processes meet in them; one without rows runs a
                                                                        single token of weight 0

Shapes: N real tokens of the step, M of this rank, D documents of this rank. Pure: NumPy in, NumPy out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tutelage.ranks import PADDING_ROW, share_rows
from tutelage.records import NO_TARGET, Document, Float64, Int64
from tutelage.train.micro import FlatStep, Pass


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank computes: `flat` holds its tokens pass after pass, `tokens` (M,) says where each stands in the step.

    A token that only fills a pass has no place: -1.
    """

    flat: FlatStep
    passes: list[Pass]
    tokens: Int64

    def spread(self, values: Float64, num_tokens: int) -> Float64:
        """(..., num_tokens): this rank's values (..., M) at their places in the step, 0 where they are another's."""
        out = np.zeros((*values.shape[:-1], num_tokens))
        is_real_M = self.tokens >= 0
        out[..., self.tokens[is_real_M]] = values[..., is_real_M]
        return out


def share_of(flat: FlatStep, *, num_rows: int, rows_per_pass: int, rank: int, num_ranks: int, hidden_size: int) -> Share:
    """The `Share` of a rank: rows balanced by what they cost, every row with exactly one rank.

    >>> from tutelage.records import Document
    >>> flat = FlatStep(
    ...     inputs=np.array([5, 6, 7]), targets=np.array([6, 7, 8]), positions=np.array([0, 1, 0]),
    ...     weights=np.ones(3, np.float32), tasks=np.zeros(3, np.int16), sources=np.zeros(3, np.int16),
    ...     kinds=np.zeros(3, np.uint8), lengths=np.array([2, 1]), rows=np.array([0, 1]),
    ...     documents=(Document(0, 0, 2, 0, 0), Document(1, 0, 1, 1, 0)))
    >>> shares = [share_of(flat, num_rows=2, rows_per_pass=1, rank=r, num_ranks=3, hidden_size=8) for r in range(3)]
    >>> [share.tokens.tolist() for share in shares]                            # the third has nothing but a filler
    [[0, 1], [2], [-1]]
    >>> sum(share.spread(np.full(len(share.tokens), 1.5), 3) for share in shares).tolist()
    [1.5, 1.5, 1.5]
    """
    shared = share_rows(
        flat.rows, flat.lengths, num_rows=num_rows, num_ranks=num_ranks, micro_batch_rows=rows_per_pass, hidden_size=hidden_size
    )
    starts_D = np.cumsum(flat.lengths) - flat.lengths
    passes: list[Pass] = []
    tokens: list[Int64] = []
    documents: list[Int64] = []
    start = 0
    for rows in shared.rows[rank]:
        chosen = np.flatnonzero(np.isin(flat.rows, rows[rows != PADDING_ROW]))
        places = [np.arange(starts_D[i], starts_D[i] + flat.lengths[i]) for i in chosen] or [np.array([-1])]
        lengths = tuple(len(place) for place in places)
        passes.append(Pass(start, start + sum(lengths), lengths))
        start += sum(lengths)
        tokens += places
        documents.append(chosen if len(chosen) else np.array([-1]))
    return Share(_take(flat, np.concatenate(tokens), np.concatenate(documents)), passes, np.concatenate(tokens))


_FILLER = Document(0, 0, 1, 0, 0)


def _take(flat: FlatStep, tokens: Int64, documents: Int64) -> FlatStep:
    """These tokens and documents of a step, in this order; -1 stands for one token of weight 0."""
    is_filler_M, is_filler_D = tokens < 0, documents < 0

    def pick(values: np.ndarray, is_filler: np.ndarray, places: Int64, filler: float) -> np.ndarray:
        out = values[places]
        out[is_filler] = filler
        return out

    fillers = {"inputs": 0, "targets": NO_TARGET, "positions": 0, "weights": 0, "tasks": -1, "sources": -1, "kinds": 0}
    columns: dict[str, Any] = {name: pick(getattr(flat, name), is_filler_M, tokens, filler) for name, filler in fillers.items()}
    return FlatStep(
        **columns,
        lengths=pick(flat.lengths, is_filler_D, documents, 1),
        rows=pick(flat.rows, is_filler_D, documents, 0),
        documents=tuple(_FILLER if i < 0 else flat.documents[i] for i in documents.tolist()),
    )
