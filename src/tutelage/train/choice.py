"""The torch optimizer that a recipe asks for, over groups of weights with rates of their own; rehearsed before it is needed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tutelage.errors import TrainError, did_you_mean
from tutelage.model.patterns import matches, nearest
from tutelage.train.memory import dump, load, starting_points
from tutelage.train.spec import AdamW, OtherOptimizer, TrainSpec, WeightGroup

_REFUSALS = (TypeError, ValueError, AttributeError, RuntimeError, LookupError, AssertionError)
"""What the constructor or step of an optimizer that cannot be used is known to raise."""


@dataclass(frozen=True)
class Chosen:
    """A torch optimizer, and for each of its groups that group's peak rate over the run's."""

    optimizer: torch.optim.Optimizer
    ratios: tuple[float, ...]

    def set_rate(self, learning_rate: float) -> None:
        """Nothing; each group steps at its own share of the run's rate from here on."""
        for group, ratio in zip(self.optimizer.param_groups, self.ratios, strict=True):
            group["lr"] = learning_rate * ratio


def choose(weights: Mapping[str, Tensor], spec: TrainSpec, *, peak: float | None = None) -> Chosen:
    """The recipe's optimizer over `weights`; `peak` is the run's peak rate, which groups with one of their own are set against.

    AdamW decays matrices and leaves vectors (norms, biases) alone; another class does what its arguments say. A group's
    `weight_decay` holds for all it matches. Raises `TrainError` for a group that matches nothing and for a class that
    cannot be imported, made or stepped with these arguments.
    """
    made, ratios = [], []
    for rule, part in _parted(weights, spec.groups, by_shape=isinstance(spec.optimizer, AdamW)):
        group: dict[str, Any] = {"params": list(part.values())}
        if isinstance(spec.optimizer, AdamW):
            group["weight_decay"] = spec.weight_decay if next(iter(part.values())).ndim >= 2 else 0.0
        if rule is not None and rule.weight_decay is not None:
            group["weight_decay"] = rule.weight_decay
        own = rule.learning_rate if rule is not None else None
        peak = spec.learning_rate if peak is None else peak
        assert own is None or peak is not None, "a group's own rate needs the peak of the run"
        made.append(group)
        ratios.append(1.0 if own is None or peak is None else own / peak)
    return Chosen(_make(made, spec), tuple(ratios))


def _parted(
    weights: Mapping[str, Tensor], rules: Sequence[WeightGroup], *, by_shape: bool
) -> list[tuple[WeightGroup | None, dict[str, Tensor]]]:
    """(rule, its weights), matrices apart from vectors where `by_shape`; the weights that no rule matches come first."""
    parts: dict[tuple[int, bool], dict[str, Tensor]] = {}
    for name, weight in weights.items():
        owner = next((i for i, rule in enumerate(rules) if matches(rule.match, name)), -1)
        parts.setdefault((owner, by_shape and weight.ndim < 2), {})[name] = weight
    for i, rule in enumerate(rules):
        if not any(matches(rule.match, name) for name in weights):
            raise TrainError(
                f"train.groups.{i}.match: {rule.match!r} matches no weight that is trained; {nearest(rule.match, list(weights))}"
            )
        if not any(found == i for found, _ in parts):
            raise TrainError(f"train.groups.{i}.match: every weight that {rule.match!r} matches is in a group before it")
    return [(None if key[0] < 0 else rules[key[0]], parts[key]) for key in sorted(parts)]


def _make(groups: list[dict[str, Any]], spec: TrainSpec) -> torch.optim.Optimizer:
    if isinstance(spec.optimizer, AdamW):
        return torch.optim.AdamW(groups, lr=0.0, betas=(spec.betas[0], spec.betas[1]), eps=1e-8, fused=True)
    kind = _imported(spec.optimizer)
    try:
        # Some refuse a rate of 0 at the start; the schedule's replaces this one before every step.
        made: torch.optim.Optimizer = kind(groups, lr=1e-3, **_arguments(spec.optimizer))
    except _REFUSALS as error:
        raise TrainError(f"train.optimizer: {spec.optimizer.module} refuses its arguments: {error}") from error
    if "weight_decay" not in made.defaults and any("weight_decay" in group for group in groups):
        raise TrainError(f"train.groups: {spec.optimizer.module} knows no `weight_decay`; leave it out of the groups")
    return made


def rehearse(spec: TrainSpec) -> None:
    """Nothing; raises `TrainError` naming `train.optimizer` when the class is of no use to us.

    It is imported, made over a small matrix, stepped, and its memory put away and taken back, as a checkpoint does: what
    would end a run at its first checkpoint ends it before the model is loaded.
    """
    choice = spec.optimizer
    if isinstance(choice, AdamW):
        return
    weight = torch.nn.Parameter(torch.ones(2, 2))
    made = _make([{"params": [weight]}], spec)
    if callable(getattr(made, "train", None)) and callable(getattr(made, "eval", None)):
        raise TrainError(
            f"train.optimizer: {choice.module} holds other weights for training than for measuring, which is not supported; "
            "take it with a schedule instead, `torch.optim:AdamW` with `schedule: wsd` say"
        )
    before = starting_points(made)
    weight.grad = torch.ones(2, 2)
    try:
        made.step()
    except _REFUSALS as error:
        raise TrainError(
            f"train.optimizer: {choice.module} cannot take a step from gradients alone ({error}); one that needs a closure "
            "or a second pass is not supported"
        ) from error
    load(made, {"w": weight}, dump(made, {"w": weight}, before))


def _imported(choice: OtherOptimizer) -> Any:
    """The class. Raises `TrainError` when there is none, or it is no optimizer that takes a learning rate."""
    module_name, _, class_name = choice.module.partition(":")
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise TrainError(
            f"train.optimizer: cannot import {module_name!r} ({error}); install it, or put it on PYTHONPATH"
        ) from error
    kind = getattr(module, class_name, None)
    if kind is None:
        known = [name for name, value in vars(module).items() if isinstance(value, type)]
        raise TrainError(f"train.optimizer: {module_name} has no {class_name!r}; {did_you_mean(class_name, known)}")
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise TrainError(f"train.optimizer: {choice.module} is no torch.optim.Optimizer; name one, `torch.optim:SGD` say")
    names = inspect.signature(kind).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in names.values())
    known = [name for name in names if name not in ("params", "lr", "kwargs")]
    if not takes_any and "lr" not in names:
        raise TrainError(f"train.optimizer: {choice.module} takes no `lr`, so that train.schedule could not move it")
    if not takes_any and (unknown := [name for name in choice.args if name not in known]):
        raise TrainError(
            f"train.optimizer.args.{unknown[0]}: {choice.module} takes no such argument; {did_you_mean(unknown[0], known)}"
        )
    return kind


def _arguments(choice: OtherOptimizer) -> dict[str, Any]:
    """The arguments as Python has them: lists are tuples, which is what `betas` are."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in choice.args.items()}
