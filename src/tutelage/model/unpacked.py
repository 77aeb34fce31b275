"""Documents as right-padded rows, for models that cannot keep packed documents apart (state-space, recurrent, own masks).

Padding stands behind every real token, where causality hides it; whether the model at hand is causal in that sense is
proved by `isolation.require_unpacked`, which leaves its finding on the model. From then on `hidden_states` with document
lengths runs such rows, so loss, evaluation and objectives need not know of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal

import torch
from torch import Tensor

Rows = Literal["plain", "masked"]
"""How right-padded rows are run: as they are, or with an attention mask that hides the padding."""

_MARK = "_tutelage_rows"


def rows_of(base: Any) -> Rows | None:
    """How this transformers model (no wrapper) runs documents as rows; None for one that takes them packed."""
    found: Rows | None = getattr(base, _MARK, None)
    return found


def mark_rows(base: Any, rows: Rows | None) -> None:
    """Nothing; the model remembers how its documents are run."""
    setattr(base, _MARK, rows)


def unpacked_states(
    base: Any, ids_N: Tensor, *, lengths: Sequence[int], rows: Rows, embeddings_ND: Tensor | None = None
) -> Tensor:
    """[N, D]: the last hidden state of each token of documents of `lengths`, run as one right-padded batch.

    `ids_N` int64 [N] holds the documents one after another, N their sum; what comes back is in the same order.
    `embeddings_ND` stand in for those of the tokens.
    """
    padded_BT, is_real_BT = padded_rows(ids_N, lengths)
    mask = is_real_BT.long() if rows == "masked" else None
    tokens = {"input_ids": padded_BT}
    if embeddings_ND is not None:
        empty_BTD = embeddings_ND.new_zeros(*padded_BT.shape, embeddings_ND.shape[1])
        tokens = {"inputs_embeds": empty_BTD.index_put((is_real_BT,), embeddings_ND)}
    output = base.base_model(**tokens, attention_mask=mask, use_cache=False)
    hidden_BTD: Tensor = output.last_hidden_state
    return hidden_BTD[is_real_BT]


def padded_rows(ids_N: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(ids [B, T], bool [B, T]): one document per row from its first place on, then zeros; True where a real token is.

    >>> ids, is_real = padded_rows(torch.tensor([7, 8, 9, 4, 5]), [3, 2])
    >>> ids.tolist(), is_real.long().tolist()
    ([[7, 8, 9], [4, 5, 0]], [[1, 1, 1], [1, 1, 0]])
    """
    shape = (len(lengths), max(lengths))
    padded_BT = ids_N.new_zeros(shape)
    is_real_BT = torch.zeros(shape, dtype=torch.bool, device=ids_N.device)
    for row, (start, stop) in enumerate(pairwise(accumulate(lengths, initial=0))):
        padded_BT[row, : stop - start] = ids_N[start:stop]
        is_real_BT[row, : stop - start] = True
    return padded_BT, is_real_BT
