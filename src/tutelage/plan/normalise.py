"""Normalise: making every example, or every task, count the same, by rewriting the weights.

    w_ij  <-  w_ij * f_i * s_i * r_i        token j of example i; f normalises, s is its source's weight, r its record's

The loss of a step stays sum(w * nll) / sum(w) over its targets, so there is one formula, and it is as exact under packing,
accumulation and ranks as without normalising. With v_i visits and t_i = sum_j w_ij before s and r, over the whole run

    W = sum_i v_i t_i        N = sum_i v_i        W_k = the part of W that is task k's        K = tasks with a part
    token    f_i = 1
    example  f_i = (W / N) / t_i             every visit weighs W / N
    task     f_i = (W / K) / W_k             every task weighs W / K

so the weight of the run is W before and after, and source and record weights mean the same under all three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tutelage.errors import PlanError
from tutelage.plan.spec import LossRule
from tutelage.plan.tally import Tokens, tally_examples
from tutelage.plan.weights import weigh_tally
from tutelage.records import Float64, Int32, Int64

Normalise = Literal["token", "example", "task"]


@dataclass(frozen=True)
class ExampleWeights:
    """What a plan must know of the weights of its E examples.

    `totals(m)` is the sum of each example's target weights (E,) when they are multiplied by `m` (E,); `multiplier` f64 (E,)
    is source weight times record weight; `num_supervised` i64 (E,) counts targets with weight.
    """

    totals: Callable[[Float64], Float64]
    num_supervised: Int64
    multiplier: Float64
    normalise: Normalise = "token"

    def settle(self, num_visits: Int32, task: Int32) -> tuple[Float64, Float64]:
        """The final multiplier and the final total weight of each example, once it is known how often each is visited."""
        if self.normalise == "token":
            return self.multiplier, self.totals(self.multiplier)
        plain = self.totals(np.ones(len(self.multiplier)))
        multiplier = normalising_factors(plain, num_visits, task, normalise=self.normalise) * self.multiplier
        with np.errstate(over="ignore", under="ignore"):
            single = multiplier.astype(np.float32)
        lost = np.flatnonzero(~(np.isfinite(single) & (single > 0)) & (num_visits > 0))
        if len(lost):
            raise PlanError(
                f"loss.normalise: {self.normalise} multiplies the weights of an example by {multiplier[lost[0]]:.3g}, which a "
                "32-bit number cannot hold; use smaller differences in the weights of turns, records and sources"
            )
        return multiplier, self.totals(multiplier)


def example_weights(tokens: Tokens, *, loss: LossRule, multiplier: Float64 | None = None) -> ExampleWeights:
    """The `ExampleWeights` of documents end to end under a rule, for `make_plan`.

    >>> from tutelage.plan.assemble import make_plan
    >>> from tutelage.plan.batch import Batches, InMemory
    >>> from tutelage.plan.spec import BatchSpec, ResponseLoss
    >>> from tutelage.records import Rendered
    >>> def example(num_answer):                                       # one token of request, so many of answer
    ...     kinds, turns = [2] + [3] * num_answer, [0] + [1] * num_answer
    ...     ids = np.arange(len(kinds), dtype=np.int32)
    ...     return Rendered(ids, np.array(kinds, np.uint8), np.array(turns, np.int16), np.ones(2, np.float32))
    >>> rendered = [example(1), example(3)]
    >>> loss = ResponseLoss(normalise="example")
    >>> weights = example_weights(InMemory(rendered), loss=loss)
    >>> plan = make_plan(["qa", "qa"], [2, 4], weights=weights, batch=BatchSpec(slots_per_step=8, capacity=8))
    >>> print(Batches.of(plan, rendered, loss=loss)[0].weights.round(4))             # 4 targets: 2 for each example
    [[0.6667 0.6667 0.6667 0.     2.     0.     0.     0.    ]]
    """
    weighed = weigh_tally(tally_examples(tokens), loss=loss)
    factors = np.ones(weighed.num) if multiplier is None else np.asarray(multiplier, np.float64)
    return ExampleWeights(weighed.totals, weighed.supervised(factors), factors, loss.normalise)


def plain_weights(totals: Float64, num_supervised: Int64) -> ExampleWeights:
    """Weights of which only the total of each example is known; they are not normalised."""
    return ExampleWeights(lambda multiplier: totals * multiplier.astype(np.float32), num_supervised, np.ones(len(totals)))


def normalising_factors(totals: Float64, num_visits: Int32, task: Int32, *, normalise: Normalise) -> Float64:
    """f_i of the formula above, f64 (E,); 1 where an example has no weight or its task is not visited.

    `totals` f64 (E,) is t_i, `num_visits` (E,) v_i and `task` (E,) the number of each example's task.

    >>> totals, visits, task = np.array([4.0, 8.0, 2.0]), np.array([1, 1, 2]), np.array([0, 0, 1])
    >>> normalising_factors(totals, visits, task, normalise="example").tolist()              # W / N = 16 / 4
    [1.0, 0.5, 2.0]
    >>> normalising_factors(totals, visits, task, normalise="task").round(4).tolist()        # W / K = 8; 12 and 4
    [0.6667, 0.6667, 2.0]
    """
    whole = float((totals * num_visits).sum())
    match normalise:
        case "token":
            return np.ones(len(totals))
        case "example":
            target, own = whole / max(int(num_visits.sum()), 1), totals
        case "task":
            by_task = np.bincount(task, weights=totals * num_visits).astype(np.float64)
            target, own = whole / max(int(np.count_nonzero(by_task)), 1), by_task[task]
    factors: Float64 = np.divide(target, own, out=np.ones(len(totals)), where=own > 0)
    return factors
