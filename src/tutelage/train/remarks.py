"""What people should hear of learning rates: the default of each mode, and the range that practice has found. Pure."""

from __future__ import annotations

from typing import Literal

Mode = Literal["full", "lora", "qlora"]

DEFAULT_RATES: dict[Mode, float] = {"full": 2e-5, "lora": 2e-4, "qlora": 2e-4}
"""Peak learning rate when the recipe states none."""
USUAL_RATES: dict[Mode, tuple[float, float]] = {"full": (1e-5, 5e-5), "lora": (1e-4, 3e-4), "qlora": (1e-4, 3e-4)}
"""Where published instruction tuning stays. Adapters start at zero and take about ten times the rate of whole weights."""


def peak_rate(stated: float | None, mode: Mode) -> float:
    """The run's peak learning rate: as stated, else the mode's own.

    >>> peak_rate(None, "full"), peak_rate(None, "lora"), peak_rate(1e-3, "lora")
    (2e-05, 0.0002, 0.001)
    """
    return DEFAULT_RATES[mode] if stated is None else stated


def rate_remark(stated: float | None, mode: Mode) -> str | None:
    """A sentence about a rate outside the usual range; None inside it, and for the default.

    >>> rate_remark(2e-4, "full")
    'train.learning_rate 0.0002 is 4 times the top of what is usual for full tuning, 1e-05 to 5e-05; watch the held-out loss'
    >>> rate_remark(3e-4, "lora") is None, rate_remark(None, "lora") is None
    (True, True)
    """
    low, high = USUAL_RATES[mode]
    if stated is None or low <= stated <= high:
        return None
    usual = f"what is usual for {'full tuning' if mode == 'full' else mode}, {low:g} to {high:g}"
    if stated > high:
        return f"train.learning_rate {stated:g} is {stated / high:.3g} times the top of {usual}; watch the held-out loss"
    return f"train.learning_rate {stated:g} is 1/{low / stated:.3g} of the bottom of {usual}; little may be learned"
