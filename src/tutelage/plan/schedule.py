"""Schedule: what a recipe says about changing rates, as stretches of the budget with rates of their own.

    interpolate   a stretch per percent of the change, at the mean of the curve over it; before and after it one stretch each
    stages        a stretch per stage
    two_stage     the specialised tasks, then the general ones and the replay

Progress is the share of the budget that is used, in the budget's unit. With a budget in tokens or steps, and steps of equal
slots, that is the share of the training done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from tutelage.errors import PlanError, did_you_mean
from tutelage.plan.rates import rate_weights
from tutelage.plan.rules import UnknownName
from tutelage.plan.schedule_spec import Interpolate, KnownAhead, Stages, TwoStage
from tutelage.plan.spec import Rates

_NUM_STEPS_OF_CHANGE = 100
_DIGITS = 12

Weights = dict[str, Fraction]
Number = Fraction | float


@dataclass(frozen=True)
class Stretch:
    """A part of the budget: its `share`, what each task's rate is there (summing to 1), and which stage it belongs to.

    `place` is the stage's path below `mix.schedule`, for people.
    """

    share: Fraction
    rates: Mapping[str, Number]
    place: str

    @property
    def names(self) -> frozenset[str]:
        """The tasks drawn on."""
        return frozenset(name for name, rate in self.rates.items() if rate)


def stretches_of(
    schedule: KnownAhead, sizes: Mapping[str, float], *, prices: Mapping[str, Fraction] | None = None, noun: str = "task"
) -> list[Stretch]:
    """The stretches of a schedule over tasks of these `sizes`; rates and sizes are in the unit that rates count.

    `prices` is what one such unit of a task takes from the budget, where the budget is in another unit.

    >>> sizes = {"maths": 1000, "chat": 3000}
    >>> two = TwoStage(first=["maths"], replay=0.1)                  # 1000 maths; then 3000 chat and a tenth of the maths
    >>> [(str(s.share), {name: str(rate) for name, rate in s.rates.items()}) for s in stretches_of(two, sizes)]
    [('10/41', {'maths': '1', 'chat': '0'}), ('31/41', {'maths': '1/31', 'chat': '30/31'})]
    >>> fade = Interpolate.model_validate({"from": "equal", "to": "proportional"})
    >>> parts = stretches_of(fade, sizes)
    >>> len(parts), [float(parts[i].rates["maths"]) for i in (49, 50, 99)]
    (100, [0.37625, 0.37375, 0.25125])

    PlanError names the place below `mix.schedule` of what cannot be.
    """
    match schedule:
        case Interpolate():
            return _interpolated(schedule, sizes, noun)
        case Stages():
            return [
                Stretch(Fraction(str(stage.share)), _rates(stage.rates, sizes, place := f"stages.{i}", noun), place)
                for i, stage in enumerate(schedule.stages)
            ]
        case TwoStage():
            return _two_stages(schedule, sizes, prices or dict.fromkeys(sizes, Fraction(1)), noun)


def _rates(rates: Rates, sizes: Mapping[str, float], place: str, noun: str) -> Weights:
    """A rule's shares, exact; what is wrong with it is said of its place in the schedule."""
    path = "mix.schedule." + (place if place in ("from", "to") else f"{place}.rates".lstrip("."))
    try:
        weights = rate_weights(sizes, rates, noun=noun)
    except UnknownName as error:
        raise UnknownName(error.name, str(error).replace("mix.rates", path)) from None
    except PlanError as error:
        raise PlanError(str(error).replace("mix.rates", path)) from None
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _interpolated(schedule: Interpolate, sizes: Mapping[str, float], noun: str) -> list[Stretch]:
    first, last = _rates(schedule.first, sizes, "from", noun), _rates(schedule.last, sizes, "to", noun)
    start, end = Fraction(str(schedule.start)), Fraction(str(schedule.end))
    ends = {name: (float(first[name]), float(last[name])) for name in sizes}
    out = [Stretch(start, first, "from")] if start else []
    for number in range(_NUM_STEPS_OF_CHANGE):
        part = float(_mean_progress(schedule.shape, number))
        rates = {name: (1 - part) * before + part * after for name, (before, after) in ends.items()}
        out.append(Stretch((end - start) / _NUM_STEPS_OF_CHANGE, rates, "from and to"))
    return [*out, Stretch(1 - end, last, "to")] if end < 1 else out


def _mean_progress(shape: str, number: int) -> Fraction:
    """How far the change is in one hundredth of it, on average over that hundredth.

    Half a cosine has reached (1 - cos(pi x)) / 2 at x, whose integral is x / 2 - sin(pi x) / (2 pi).

    >>> [float(_mean_progress("linear", n)) for n in (0, 99)], round(float(_mean_progress("cosine", 0)), 7)
    ([0.005, 0.995], 8.22e-05)
    """
    if shape == "linear":
        return Fraction(2 * number + 1, 2 * _NUM_STEPS_OF_CHANGE)
    a, b = number / _NUM_STEPS_OF_CHANGE, (number + 1) / _NUM_STEPS_OF_CHANGE
    risen = (math.sin(math.pi * b) - math.sin(math.pi * a)) / (2 * math.pi)
    return Fraction(f"{0.5 - risen * _NUM_STEPS_OF_CHANGE:.{_DIGITS}f}")


def _two_stages(schedule: TwoStage, sizes: Mapping[str, float], prices: Mapping[str, Fraction], noun: str) -> list[Stretch]:
    """With rates q and replay k: first q of the specialised; then q of the general and k q of the specialised.

    What counts what: `replay` is a fraction of the specialised amount (records, or tokens where rates count tokens) that the
    first stage has given. Both stages together take 1 + k Q times the amount without replay, Q the specialised tasks' share.
    """
    rates = _rates(schedule.rates, sizes, "", noun)
    _check_first(schedule, rates, noun)
    replay, none = Fraction(str(schedule.replay)), Fraction(0)
    first = {name: rate if name in schedule.first else none for name, rate in rates.items()}
    then = {name: rate * replay if name in schedule.first else rate for name, rate in rates.items()}
    takes = [sum((stage[name] * prices[name] for name in stage), none) for stage in (first, then)]
    places = ("first", "replay")
    return [
        Stretch(take / sum(takes), {name: rate / sum(stage.values()) for name, rate in stage.items()}, place)
        for stage, take, place in zip((first, then), takes, places, strict=True)
    ]


def _check_first(schedule: TwoStage, rates: Weights, noun: str) -> None:
    for index, name in enumerate(schedule.first):
        if name not in rates:
            raise UnknownName(name, f"mix.schedule.first.{index}: no {noun} `{name}`; {did_you_mean(name, rates)}")
        if rates[name] == 0:
            raise PlanError(f"mix.schedule.first.{index}: {noun} `{name}` has no share in mix.schedule.rates; give it one")
    if not any(rate for name, rate in rates.items() if name not in schedule.first):
        raise PlanError(f"mix.schedule.first: names every {noun} that has a share, so nothing is left for the second stage")


def replay_factor(schedule: TwoStage, sizes: Mapping[str, float]) -> Fraction:
    """What a budget in epochs is multiplied by, so that an epoch is every record once *and* the replay: 1 + k Q.

    >>> two = TwoStage(first=["maths"], replay=0.1)
    >>> sizes = {"maths": 1000, "chat": 3000}
    >>> replay_factor(two, sizes)
    Fraction(41, 40)
    """
    rates = _rates(schedule.rates, sizes, "", "task")
    return 1 + Fraction(str(schedule.replay)) * sum(rates[name] for name in set(schedule.first))
