"""The recipe's `train.callbacks`: `module:Class` to something that transformers' Trainer calls."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from tutelage.errors import MissingExtra, TrainError, did_you_mean


def require_accelerate() -> None:
    """Nothing; raises `MissingExtra` when transformers' Trainer could not be built."""
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise MissingExtra("accelerate", "hf") from error


def make_callbacks(names: Sequence[str]) -> list[Any]:
    """An instance of each class, in order. Raises `TrainError` for what is not there, cannot be made, or is no callback."""
    return [_make(name) for name in names]


def _make(name: str) -> Any:
    from transformers import TrainerCallback

    module_name, _, class_name = name.partition(":")
    where = f"train.callbacks: `{name}`"
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise TrainError(f"{where} cannot be imported ({error}); install it, or put its folder into PYTHONPATH") from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, TrainerCallback)):
        classes = [key for key, value in vars(module).items() if isinstance(value, type) and issubclass(value, TrainerCallback)]
        raise TrainError(f"{where} is no `transformers.TrainerCallback`; {did_you_mean(class_name, classes)}")
    try:
        return found()
    except TypeError as error:
        raise TrainError(f"{where} cannot be made without arguments ({error}); derive a class that gives them") from error
