"""A language model together with its loss, as one module: what is wrapped, sharded or compiled when it is trained.

The loss lies inside `forward` because wrappers act there: a sharded root has its head's weights whole only while its
forward runs, and data-parallel wrappers find the used weights by what the forward returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from tutelage.model.loss import Anchor, head_of, hidden_states, unwrapped, weighted_loss
from tutelage.model.noise import embedding_noise
from tutelage.model.objective import Objective
from tutelage.model.start import Start

T = TypeVar("T")


@dataclass(frozen=True)
class Guides:
    """What an objective needs of each token, made on the host; all None for the plain loss without checks left to skip.

    `rows_S` int64: positions with some weight, already checked (see `weighted_loss`). `pulls_N` float: weight of the KL there.
    `noise_keys_N` int64: `document_key` of each token's document.
    """

    rows_S: Tensor | None = None
    pulls_N: Tensor | None = None
    noise_keys_N: Tensor | None = None


class Learner(torch.nn.Module):
    """`model` with the weighted loss of packed documents as its forward; adapters and wrappers inside stay as they are.

    With a pull to the starting model in `objective`, that is the model as it is now: make the learner before the first update.
    """

    def __init__(self, model: Any, objective: Objective | None = None) -> None:
        super().__init__()
        self.model = model
        self.objective = objective or Objective()
        self.start = Start(model) if self.objective.kl is not None else None

    @property
    def num_words(self) -> int:
        """Size of the vocabulary that targets are of."""
        return int(head_of(self.model).weight.shape[0])

    def forward(
        self,
        ids_N: Tensor,
        targets_N: Tensor,
        weights_N: Tensor,
        *,
        positions_N: Tensor,
        lengths: Sequence[int],
        guides: Guides | None = None,
    ) -> tuple[Tensor, ...]:
        """(loss_sum, nll_N), and KL_N behind them where there is a pull to the start.

        `loss_sum` is what the objective makes of w * nll, with its gradient; nll and KL of each token are detached, 0 where their
        weight is 0. One row of documents of `lengths` tokens, N in all; ids, targets and positions int64 [N], weights float [N].
        The target of a position is its own: nothing is shifted here. A tuple, not a record: wrappers look for tensors in it.
        """
        guides = guides or Guides()
        anchor = self._anchor(ids_N, guides.pulls_N, positions_N=positions_N, lengths=lengths)
        noisy_ND = self._noisy(ids_N, guides.noise_keys_N, positions_N=positions_N, lengths=lengths)
        hidden_ND = hidden_states(self.model, ids_N[None], positions=positions_N[None], lengths=lengths, embeddings_ND=noisy_ND)
        head = head_of(self.model)
        options = head.options(objective=self.objective.kind)
        more: dict[str, Any] = {"options": options, "anchor": anchor, "rows_S": guides.rows_S}
        loss = weighted_loss(hidden_ND, head.weight, targets_N=targets_N, weights_N=weights_N, **more)
        return (loss.loss_sum, loss.nll_N) if loss.kl_N is None else (loss.loss_sum, loss.nll_N, loss.kl_N)

    def within(self, call: Callable[[Any], T]) -> T:
        """What `call(model)` returns: how other forwards than this one are run where wrappers make the weights whole."""
        return call(self.model)

    def _anchor(self, ids_N: Tensor, pulls_N: Tensor | None, *, positions_N: Tensor, lengths: Sequence[int]) -> Anchor | None:
        """What the starting model says to these documents, None where nothing pulls."""
        if self.start is None or self.objective.kl is None or pulls_N is None:
            return None
        hidden_ND, head = self.start.states(ids_N, positions_N=positions_N, lengths=lengths)
        return Anchor(hidden_ND, head, pulls_N, self.objective.kl.direction)

    def _noisy(self, ids_N: Tensor, keys_N: Tensor | None, *, positions_N: Tensor, lengths: Sequence[int]) -> Tensor | None:
        """[N, D] embeddings with noise, None outside training and where none is asked for."""
        alpha = self.objective.neftune_alpha
        if not alpha or keys_N is None or not self.model.training:
            return None
        embeddings_ND: Tensor = unwrapped(self.model).get_input_embeddings()(ids_N)
        size = embeddings_ND.shape[1]
        noise_ND = embedding_noise(keys_N, positions_N, lengths=lengths, size=size, alpha=alpha)
        return embeddings_ND + noise_ND.to(embeddings_ND.dtype)
