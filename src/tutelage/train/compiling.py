"""Whether a run is long enough for compiled layers to pay."""

from __future__ import annotations

from typing import Any

from tutelage.errors import TrainError
from tutelage.model.compiled_layers import can_compile, compile_layers
from tutelage.train.spec import TrainSpec

WORTH_FLOP = {"cpu": 2e14, "cuda": 1e17}
"""Compiling takes up to a minute and saves about a seventh of each step: some minutes of training pay for it."""


def compile_if_worth(
    model: Any, spec: TrainSpec, *, device: str, num_slots: int, decided: bool | None = None, is_sharded: bool = False
) -> tuple[bool, str]:
    """(whether the layers of `model` are compiled now, why); `decided` is what an earlier try of the same run decided.

    `num_slots` tokens will be trained, so the run is 6 * weights * slots floating-point operations. Raises `TrainError`
    where `train.compile: true` cannot be met.
    """
    wanted, why = (decided, "as this run began") if decided is not None else _wanted(model, spec, device, num_slots)
    if wanted and is_sharded:
        if spec.compile is True:
            raise TrainError("train.compile: layers cut over ranks are not compiled; set it to false, or `train.parallel: ddp`")
        return False, "layers cut over ranks are not"
    if wanted:
        compile_layers(model)
    return wanted, why


def _wanted(model: Any, spec: TrainSpec, device: str, num_slots: int) -> tuple[bool, str]:
    if spec.compile != "auto":
        return spec.compile, "as the recipe says"
    if (missing := can_compile(device)) is not None:
        return False, missing
    work = 6.0 * sum(p.numel() for p in model.parameters()) * num_slots
    least = WORTH_FLOP[device.partition(":")[0]]
    if work < least:
        return False, f"the run is {work:.1g} FLOP, and compiling pays from {least:.0g} on"
    return True, f"the run is {work:.1g} FLOP; the first step takes up to a minute more"
