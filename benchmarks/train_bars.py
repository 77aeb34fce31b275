"""What the measurements of `train.py` come to: medians, ratios of sides that ran in the same round, and the bars. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

PACKED_BAR, BEST_BAR, CEILING_BAR, CURVE_BAR = 3.5, 2.0, 0.55, 0.01
"""Useful tokens a second over TRL packed and over TRL's best setting; share of the ceiling; relative difference of losses."""


@dataclass(frozen=True)
class Bar:
    """A promise, what was found, and whether it is kept."""

    what: str
    value: float
    said: str
    is_met: bool


Runs = list[dict[str, Any]]
"""Each with `side`, `round`, `precision` and what the side told."""


def of(runs: Runs, side: str, name: str) -> list[float]:
    return [run[name] for run in runs if run["side"] == side and name in run]


def ratios(runs: Runs, side: str, other: str, name: str = "useful_per_second") -> list[float]:
    """One ratio per round, of neighbours in time.

    >>> runs = [{"side": "a", "round": 0, "x": 6.0}, {"side": "b", "round": 0, "x": 2.0}, {"side": "a", "round": 1, "x": 4.0}]
    >>> ratios(runs, "a", "b", "x")
    [3.0]
    """
    values = {(run["side"], run["round"]): run[name] for run in runs if name in run}
    rounds = sorted({number for one, number in values if one == side} & {number for one, number in values if one == other})
    return [values[side, number] / values[other, number] for number in rounds]


def spread(values: list[float], style: str = ".2f") -> str:
    """The median, and the range where there is one.

    >>> spread([3.0, 1.0, 2.0]), spread([2.0])
    ('2.00 (1.00-3.00)', '2.00')
    """
    middle = f"{median(values):{style}}"
    return middle if len(values) == 1 else f"{middle} ({min(values):{style}}-{max(values):{style}})"


def speed_bars(runs: Runs) -> list[Bar]:
    """Speed and memory beside TRL packed and beside TRL's fastest setting of those that ran."""
    theirs = sorted({run["side"] for run in runs if run["side"].startswith("trl")})
    if not theirs or not of(runs, "tutelage", "useful_per_second"):
        return []
    best = max(theirs, key=lambda side: median(of(runs, side, "useful_per_second")))
    packed = next((side for side in theirs if side.partition("@")[0] == "trl-packed"), None)
    bars = [] if packed is None else _against(runs, packed, PACKED_BAR)
    return bars + _against(runs, best, BEST_BAR, what=f"TRL's best setting here, {best}")


def ours_beside(runs: Runs, side: str) -> str:
    """The fastest of our own settings that needs no more memory than `side`; our usual one where none does.

    >>> sides = {"tutelage": (9.0, 3), "tutelage-small": (7.0, 2), "trl-a": (2.0, 3), "trl-b": (4.0, 2), "trl-c": (1.0, 1)}
    >>> runs = [dict(side=side, round=0, useful_per_second=v, peak_bytes=m) for side, (v, m) in sides.items()]
    >>> [ours_beside(runs, side) for side in ("trl-a", "trl-b", "trl-c")]
    ['tutelage', 'tutelage-small', 'tutelage']
    """
    mine = [run["side"] for run in runs if run["side"] in ("tutelage", "tutelage-small") and "peak_bytes" in run]
    fits = [one for one in dict.fromkeys(mine) if median(ratios(runs, one, side, "peak_bytes")) <= 1.0]
    return max(fits, key=lambda one: median(of(runs, one, "useful_per_second")), default="tutelage")


def _against(runs: Runs, side: str, bar: float, *, what: str | None = None) -> list[Bar]:
    mine = ours_beside(runs, side)
    found, memory = ratios(runs, mine, side), ratios(runs, mine, side, "peak_bytes")
    what = (what or side) + ("" if mine == "tutelage" else f" ({mine})")
    return [
        Bar(f"useful tokens/s over {what}", median(found), f"{spread(found)}, at least {bar}", median(found) >= bar),
        Bar(f"peak memory over {what}", median(memory), f"{spread(memory)}, at most 1", median(memory) <= 1.0),
    ]


def ceiling_bar(runs: Runs) -> list[Bar]:
    """Executed operations a second over those of a large product in the same round."""
    found = ratios(runs, "tutelage", "ceiling", "flops_per_second")
    if not found:
        return []
    said = f"{spread(found)}, at least {CEILING_BAR}"
    return [Bar("executed FLOP/s over the matmul ceiling", median(found), said, median(found) >= CEILING_BAR)]


def same_targets(runs: Runs) -> list[Bar]:
    """Whether every side prepared the same documents with the same trained tokens.

    >>> same_targets([{"side": "a", "digest": "x"}, {"side": "b", "digest": "x"}])[0].is_met
    True
    >>> same_targets([{"side": "a", "digest": "x"}, {"side": "b", "digest": "y"}])[0].said
    'b differ from a'
    """
    known = {run["side"]: run["digest"] for run in runs if "digest" in run}
    if not known:
        return []
    first = "tutelage" if "tutelage" in known else next(iter(known))
    odd = [side for side, value in known.items() if value != known[first]]
    said = f"{', '.join(odd)} differ from {first}" if odd else f"equal in {len(known)} sides"
    return [Bar("documents and trained tokens", float(len(odd)), said, not odd)]


def curve_bar(curves: dict[str, list[float]]) -> list[Bar]:
    """The largest relative difference, over the steps, between bfloat16 and float32; the noise beside it is bfloat16's own.

    >>> bar, = curve_bar({"float32": [2.0, 1.0], "bfloat16": [2.0, 1.005], "permuted": [2.0, 1.004]})
    >>> round(bar.value, 4), bar.is_met
    (0.005, True)
    """
    if not {"float32", "bfloat16"} <= curves.keys():
        return []
    worst = _farthest(curves["bfloat16"], curves["float32"])
    noise = _farthest(curves["permuted"], curves["bfloat16"]) if "permuted" in curves else float("nan")
    said = (
        f"{worst:.3%} at most, over {len(curves['float32'])} steps; rows the other way round {noise:.3%}; allowed {CURVE_BAR:.0%}"
    )
    return [Bar("step losses in bfloat16 beside float32", worst, said, worst <= CURVE_BAR)]


def _farthest(ours: list[float], reference: list[float]) -> float:
    distances = [abs(a - b) / abs(b) for a, b in zip(ours, reference, strict=True)]
    return math.nan if any(map(math.isnan, distances)) else max(distances)
