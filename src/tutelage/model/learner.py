"""A language model together with its loss, as one module: what is wrapped, sharded or compiled when it is trained.

The loss lies inside `forward` because wrappers act there: a sharded root has its head's weights whole only while its
forward runs, and data-parallel wrappers find the used weights by what the forward returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tutelage.model.loss import head_of, hidden_states, weighted_loss


class Learner(torch.nn.Module):
    """`model` with the weighted loss of packed documents as its forward; adapters and wrappers inside stay as they are."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids_N: Tensor, targets_N: Tensor, weights_N: Tensor, *, positions_N: Tensor, lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """(loss_sum, nll_N): the sum of w * nll with its gradient, and the loss of each token, detached, 0 where w is 0.

        One row of documents of `lengths` tokens, N in all; ids, targets and positions int64 [N], weights float [N]. The
        target of a position is its own: nothing is shifted here. A tuple, not a record: wrappers look for tensors in it.
        """
        hidden_ND = hidden_states(self.model, ids_N[None], positions=positions_N[None], lengths=lengths)
        head = head_of(self.model)
        loss = weighted_loss(hidden_ND, head.weight, targets_N=targets_N, weights_N=weights_N, options=head.options())
        return loss.loss_sum, loss.nll_N
