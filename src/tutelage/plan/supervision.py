"""Supervision: what a run's loss weight lies on, by task and kind, under the recipe's rule and beside the usual ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tutelage.plan.spec import FullLoss, InstructionModelling, LossRule, ResponseLoss
from tutelage.plan.sums import sum_cells
from tutelage.plan.tally import KIND_NAMES, NUM_CELLS, WRITTEN, Tally
from tutelage.plan.weights import cell_table, weigh_tally
from tutelage.records import Float64, Int32, Int64, Kind

POLICIES: Mapping[str, LossRule] = {
    "response": ResponseLoss(),
    "instruction_modelling": InstructionModelling(),
    "full": FullLoss(),
}
"""The rules that the recipe's own is shown beside."""
_NUM_KINDS = len(KIND_NAMES)


@dataclass(frozen=True)
class TalliedSet:
    """A rendered set as a plan uses it, one entry per example (E,): visits, task, and the multipliers of its weights.

    `multiplier` is all of it, `plain_multiplier` source times record weight, before normalising.
    """

    tally: Tally
    num_visits: Int32
    task: Int32
    multiplier: Float64
    plain_multiplier: Float64


@dataclass(frozen=True)
class Supervision:
    """Sums over the visits of a run, f64: `targets` and `weight` by task and kind (K, 9), multi-turn visits (K,).

    `open_weight` (cells,) is what each cell would weigh under a rule of 1 for everything.
    """

    targets: Float64
    weight: Float64
    num_multi_turn: Float64
    open_weight: Float64


def supervise(sets: Sequence[TalliedSet], *, num_tasks: int, loss: LossRule) -> Supervision:
    """The sums over these sets under a rule; kinds are those of `tally.KIND_NAMES`."""
    sums = np.zeros((3, num_tasks, NUM_CELLS))
    num_multi_turn = np.zeros(num_tasks)
    for one in sets:
        here, several = _sums(one, num_tasks=num_tasks, loss=loss)
        sums += here
        num_multi_turn += several
    targets, weight = sums[:2].reshape(2, num_tasks, _NUM_KINDS, 2).sum(axis=3)
    return Supervision(targets, weight, num_multi_turn, sums[2].sum(axis=0))


def _sums(one: TalliedSet, *, num_tasks: int, loss: LossRule) -> tuple[Float64, Int64]:
    """By task and cell of one set: targets, their weight, and their weight under a rule of 1 for everything (3, K, cells).

    And the visits with several requests by task (K,).
    """
    counted, several, is_plain = sum_cells(one.tally, num_visits=one.num_visits, task=one.task, num_tasks=num_tasks)
    targets = counted.astype(np.float64)
    visited = np.flatnonzero(one.num_visits)
    factors = [_only_value(multiplier, visited) for multiplier in (one.multiplier, one.plain_multiplier)]
    if is_plain and factors[0] is not None and factors[1] is not None:
        return np.stack([targets, targets * (cell_table(loss) * np.float32(factors[0])), targets * factors[1]]), several
    tally = one.tally
    here = tally.count * one.num_visits[tally.example].astype(np.float64)
    place = one.task[tally.example] * NUM_CELLS + tally.cell

    def by_cell(values: np.ndarray) -> Float64:
        sums: Float64 = np.bincount(place, weights=values, minlength=num_tasks * NUM_CELLS).astype(np.float64)
        return sums.reshape(num_tasks, NUM_CELLS)

    product = weigh_tally(tally, loss=loss).value * one.multiplier.astype(np.float32)[tally.example]
    mass = here * tally.turn_weight * one.plain_multiplier[tally.example]
    return np.stack([targets, by_cell(product * here), by_cell(mass)]), several


def _only_value(values: Float64, where: Int64) -> float | None:
    """The value at all of these places, None where they differ or there is none."""
    if not len(where):
        return None
    first = values[where[0]]
    is_same = (values == first).all() or (values[where] == first).all()
    return float(first) if is_same else None


def supervision_facts(found: Supervision, *, tasks: Sequence[str], loss: LossRule) -> dict[str, Any]:
    """`kinds` and `kind_weight` by task and kind, and by kind the share of weight under the recipe's rule and under POLICIES.

    The rules beside the recipe's are taken per token, with the weights of turns, records and sources.
    """
    shares = {name: _shares(_by_kind(cell_table(rule) * found.open_weight)) for name, rule in POLICIES.items()}
    return {
        "kinds": {task: _named(found.targets[i].astype(int)) for i, task in enumerate(tasks)},
        "kind_weight": {task: _named(found.weight[i]) for i, task in enumerate(tasks)},
        "kind_weight_by_policy": shares | {"recipe": _shares(found.weight.sum(axis=0))},
    }


def length_facts(targets: Float64, *, num_multi_turn: float, mixture: Mapping[str, Any]) -> dict[str, Any]:
    """What a line of the mixture says of lengths: tokens of instructions and outputs, their ratio, and two shares.

    Instructions are user text and system prompts, outputs what the model writes, stops included; `targets` f64 (9,). Shares
    and ratio are None where nothing is planned.

    >>> targets = np.zeros(9)
    >>> targets[[Kind.USER, Kind.ASSISTANT, Kind.STOP]] = 30, 18, 2
    >>> length_facts(targets, num_multi_turn=1, mixture={"planned_examples": 2, "planned_tokens": 80, "planned_supervised": 20})
    {'instruction_tokens': 30, 'output_tokens': 20, 'length_ratio': 1.5, 'supervised_share': 0.25, 'multi_turn_share': 0.5}
    """
    instruction, output = float(targets[[Kind.SYSTEM, Kind.USER]].sum()), float(targets[list(WRITTEN)].sum())
    return {
        "instruction_tokens": int(instruction),
        "output_tokens": int(output),
        "length_ratio": _ratio(instruction, output),
        "supervised_share": _ratio(mixture["planned_supervised"], mixture["planned_tokens"]),
        "multi_turn_share": _ratio(num_multi_turn, mixture["planned_examples"]),
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _by_kind(cells: Float64) -> Float64:
    sums: Float64 = cells.reshape(_NUM_KINDS, 2).sum(axis=1)
    return sums


def _shares(amounts: Float64) -> dict[str, float]:
    return _named(amounts / max(float(amounts.sum()), 1e-300))


def _named(amounts: np.ndarray) -> dict[str, Any]:
    return dict(zip(KIND_NAMES, amounts.tolist(), strict=True))
