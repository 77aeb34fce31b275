"""What an objective makes of one step: the pull on each token, the key of its noise, and the numbers that are reported.

Shapes: N tokens, D documents. Pure: NumPy in, NumPy out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tutelage.model.objective import KlRule, Objective, document_key
from tutelage.records import NO_TARGET, Float32, Float64, Int64, Kind
from tutelage.train.micro import Aimed, FlatStep, Pass
from tutelage.train.spec import TrainSpec


def objective_of(spec: TrainSpec) -> Objective:
    """What the recipe asks for."""
    kl = None
    if spec.kl is not None:
        kinds = tuple(int(Kind[name.upper()]) for name in spec.kl.kinds) if spec.kl.kinds is not None else None
        kl = KlRule(spec.kl.weight, spec.kl.direction, kinds)
    return Objective(spec.objective, spec.neftune_alpha, spec.seed, kl)


def aimed_numbers(flat: FlatStep) -> dict[str, Any]:
    """`objective` and `kl` of a step that has run, as a `StepReport` has them; both None where the loss is all."""
    found = flat.aimed or Aimed(None, None)
    return {"objective": found.objective, "kl": found.kl}


@dataclass(frozen=True, slots=True)
class Aim:
    """An objective at one step. The loss is (sum_i w_i * l_i + sum_i v_i * KL_i) / W with l = nll, or p(target) * nll for `dft`.

    W is the plan's total weight. Without `kinds`, v_i = `kl.weight` * w_i: KL is averaged as nll is. With `kinds`, v_i =
    `kl.weight` * W / C on each of the step's C targets of these kinds, trained or not, so that the term is `kl.weight` times
    their mean KL; halving every w changes nothing either way.
    """

    objective: Objective
    step: int
    total_weight: float
    num_chosen: int

    @classmethod
    def of(cls, objective: Objective, flat: FlatStep, *, step: int, total_weight: float) -> Aim:
        """The aim of a whole step, not of one rank's share: C counts all its tokens."""
        rule = objective.kl
        return cls(objective, step, total_weight, int(_is_chosen(flat, rule).sum()) if rule is not None else 0)

    def pulls(self, flat: FlatStep) -> Float32 | None:
        """(N,): v, None where nothing pulls; `flat` is the step or a share of it."""
        rule = self.objective.kl
        if rule is None:
            return None
        if rule.kinds is None:
            return (rule.weight * flat.weights).astype(np.float32)
        return np.where(_is_chosen(flat, rule), rule.weight * self.total_weight / max(self.num_chosen, 1), 0).astype(np.float32)

    def noise_keys(self, flat: FlatStep, part: Pass) -> Int64 | None:
        """(tokens of the pass,): `document_key` of each one's document, None without noise."""
        if not self.objective.neftune_alpha:
            return None
        first = int(np.searchsorted(np.cumsum(flat.lengths), part.start, side="right"))
        documents = flat.documents[first : first + len(part.lengths)]
        keys = [document_key(self.objective.seed, self.step, document.example, document.visit) for document in documents]
        return np.repeat(np.array(keys, np.int64), part.lengths)

    def reached(self, flat: FlatStep, nll_N: Float64, kl_N: Float64 | None) -> Aimed | None:
        """What the whole step came to; None where that is the plain loss."""
        if self.objective.is_plain:
            return None
        is_on_N = flat.weights > 0
        nll_S, weights_S = nll_N[is_on_N], flat.weights[is_on_N].astype(np.float64)
        share_S = np.exp(-nll_S) if self.objective.kind == "dft" else 1.0
        loss, kl = float((weights_S * share_S * nll_S).sum()) / self.total_weight, None
        pulls_N, rule = self.pulls(flat), self.objective.kl
        if rule is not None and pulls_N is not None and kl_N is not None:
            pull = float((pulls_N.astype(np.float64) * kl_N).sum()) / self.total_weight
            loss, kl = loss + pull, pull / rule.weight
        return Aimed(loss, kl)


def _is_chosen(flat: FlatStep, rule: KlRule) -> NDArray[np.bool_]:
    is_chosen: NDArray[np.bool_] = flat.weights > 0
    if rule.kinds is not None:
        is_chosen = np.isin(flat.kinds, rule.kinds) & (flat.targets != NO_TARGET)
    return is_chosen
