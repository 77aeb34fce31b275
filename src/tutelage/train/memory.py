"""What a torch optimizer remembers, as named tensors that a checkpoint can hold, and back again to the bit.

exp_avg/model.norm.weight          a tensor of a weight
step:int/model.norm.weight         a number of a weight (int, float, bool), as a tensor of one element
d:float/group 0                    a number of a group that has moved since the optimizer was made
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tutelage.errors import TrainError

Numbers = Mapping[str, int | float | bool]
_KINDS: dict[str, tuple[type, torch.dtype]] = {
    "bool": (bool, torch.bool),
    "int": (int, torch.int64),
    "float": (float, torch.float64),
    "none": (type(None), torch.bool),
}


def starting_points(optimizer: torch.optim.Optimizer) -> list[Numbers]:
    """The numbers of each group now, its learning rate left out: what `dump` compares with."""
    return [
        {name: value for name, value in group.items() if name != "lr" and isinstance(value, bool | int | float)}
        for group in optimizer.param_groups
    ]


def dump(optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor], before: Sequence[Numbers]) -> dict[str, Tensor]:
    """The optimizer's memory as tensors by `what/weight name`; empty before the first step of most.

    `before` is what `starting_points` said when it was made. Raises `TrainError` when something remembered is neither a
    tensor nor a number.
    """
    names = {id(weight): name for name, weight in weights.items()}
    found: dict[str, Tensor] = {}
    for weight, state in optimizer.state.items():
        for what, value in state.items():
            found |= _entry(what, names[id(weight)], value, optimizer)
    for i, (then, now) in enumerate(zip(before, starting_points(optimizer), strict=True)):
        for what, value in now.items():
            if value != then.get(what):
                found |= _entry(what, f"group {i}", value, optimizer)
    return found


def _entry(what: str, owner: str, value: Any, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {f"{what}/{owner}": value}
    for kind, (python, dtype) in _KINDS.items():
        if type(value) is python:
            return {f"{what}:{kind}/{owner}": torch.tensor([0 if value is None else value], dtype=dtype)}
    raise TrainError(
        f"train.optimizer: {type(optimizer).__name__} remembers `{what}` as a {type(value).__name__}; checkpoints hold tensors "
        "and numbers only, so a run could not go on from one; choose another optimizer"
    )


def load(optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> None:
    """Nothing; the optimizer remembers what `dump` gave, on the devices of its weights, and nothing else."""
    optimizer.state.clear()
    groups = {f"group {i}": group for i, group in enumerate(optimizer.param_groups)}
    group_of = {id(weight): group for group in optimizer.param_groups for weight in group["params"]}
    for name, value in memory.items():
        whole, _, owner = name.partition("/")
        what, _, kind = whole.partition(":")
        number = None if kind == "none" else value.item() if kind else value
        if owner in groups:
            groups[owner][what] = number
        elif kind:
            optimizer.state[weights[owner]][what] = number
        else:
            weight = weights[owner]
            place = _place(what, weight, group_of[id(weight)])
            optimizer.state[weight][what] = value.to(place, copy=True)


def _place(what: str, weight: Tensor, group: Mapping[str, Any]) -> torch.device:
    """Where torch keeps it: step counts stay on the CPU unless the kernel that counts runs on the device."""
    counts_there = bool(group.get("fused") or group.get("capturable"))
    return torch.device("cpu") if what == "step" and not counts_there else weight.device
