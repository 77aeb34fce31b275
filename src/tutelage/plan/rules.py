"""Rules: what each kind of rates makes of the sizes of tasks (or sources): weights, and groups of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

from tutelage.errors import PlanError, did_you_mean
from tutelage.plan.rates_spec import (
    Capped,
    Counts,
    Equal,
    Explicit,
    Group,
    Groups,
    Proportional,
    Rates,
    RatesInGroup,
    Temperature,
    UniMax,
    rate_names,
)

Sizes = Mapping[str, Fraction | float]


class UnknownName(PlanError):
    """Rates that name what no example has: `name`."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


@dataclass(frozen=True)
class Share:
    """The weight of a name, or of a group, among those beside it; `max_epochs` is UniMax's own cap."""

    name: str
    weight: Fraction
    parts: tuple[Share, ...] = ()
    max_epochs: Fraction | None = None

    def leaves(self) -> Iterator[Share]:
        """The names in it, without the groups."""
        for part in self.parts:
            yield from part.leaves()
        if not self.parts:
            yield self


def share_tree(sizes: Sizes, rates: Rates, *, noun: str = "task") -> Share:
    """What a rule makes of sizes: weights in any scale, inside groups where there are any; weight 0 is left out.

    >>> tree = share_tree({"qa": 9000, "maths": 1000}, Capped(cap=3000))
    >>> [(share.name, int(share.weight)) for share in tree.leaves()]
    [('maths', 1000), ('qa', 3000)]

    UnknownName for a name that `sizes` lacks, PlanError for one that stands in no group, and when nobody has a weight.
    """
    for path, name in rate_names(rates):
        if name not in sizes:
            raise UnknownName(name, f"mix.rates.{'.'.join(map(str, path))}: no such {noun}; {did_you_mean(name, sizes)}")
    if not any(size > 0 for size in sizes.values()):
        raise PlanError(f"no {noun} has a training record; look at what the stages before dropped, and why")
    sizes = dict(sorted(sizes.items()))
    if not isinstance(rates, Groups):
        return Share("", Fraction(1), _names(sizes, rates, path="mix.rates"))
    _check_rest(sizes, rates, noun)
    parts = _groups(sizes, rates.groups, path="mix.rates.groups")
    return Share("", Fraction(1), parts)


def _check_rest(sizes: Sizes, rates: Groups, noun: str) -> None:
    grouped = {name for _, name in rate_names(rates)}
    rest = [name for name in sizes if name not in grouped]
    if rest and rates.rest == "error":
        raise PlanError(
            f"mix.rates.groups: in no group: {', '.join(rest)}; put every {noun} into one, or set mix.rates.rest: drop "
            "to leave these out"
        )


def _groups(sizes: Sizes, groups: Mapping[str, Group], *, path: str) -> tuple[Share, ...]:
    parts = []
    for name, group in sorted(groups.items()):
        if group.weight == 0:
            continue
        here = f"{path}.{name}"
        if group.groups:
            inside = _groups(sizes, group.groups, path=f"{here}.groups")
        else:
            inside = _names({member: sizes[member] for member in sorted(group.members)}, group.rates, path=f"{here}.rates")
        parts.append(Share(name, exact(group.weight), inside))
    if not parts:
        raise PlanError(f"{path}: every weight is 0; give at least one group a positive one")
    return tuple(parts)


def _names(sizes: Sizes, rates: Rates | RatesInGroup, *, path: str) -> tuple[Share, ...]:
    max_epochs = exact(rates.max_epochs) if isinstance(rates, UniMax) else None
    weights = _weights(sizes, rates)
    if not any(weights.values()):
        what = "every weight is 0; give at least one a positive one"
        if not isinstance(rates, Explicit | Counts):
            what = f"no training record of {', '.join(sizes)}; look at what the stages before dropped, and why"
        raise PlanError(f"{path}{_FIELD.get(rates.kind, '')}: {what}")
    return tuple(Share(name, weight, max_epochs=max_epochs) for name, weight in weights.items() if weight > 0)


_FIELD = {"explicit": ".weights", "counts": ".counts"}


def _weights(sizes: Sizes, rates: Rates | RatesInGroup) -> dict[str, Fraction]:
    """The weight of each name under a rule without groups."""
    match rates:
        case Proportional():
            return {name: exact(size) for name, size in sizes.items()}
        case Equal() | UniMax():
            return {name: Fraction(1) for name in sizes}
        case Temperature():
            return _tempered(sizes, rates.temperature)
        case Capped():
            return _tempered({name: min(size, rates.cap) for name, size in sizes.items()}, rates.temperature)
        case Explicit():
            return {name: exact(rates.weights.get(name, 0.0)) for name in sizes}
        case Counts():
            return {name: Fraction(rates.counts.get(name, 0)) for name in sizes}
        case Groups():
            raise AssertionError("groups are not weights")


def _tempered(sizes: Sizes, temperature: float) -> dict[str, Fraction]:
    if temperature == 1.0:
        return {name: exact(size) for name, size in sizes.items()}
    largest = max(sizes.values())  # ratios up to 1: nothing overflows, however cold
    return {name: exact(_power(size / largest, temperature)) for name, size in sizes.items()}


def _power(ratio: Fraction | float, temperature: float) -> float:
    return float(float(ratio) ** (1.0 / temperature)) if ratio > 0 else 0.0


def exact(value: Fraction | float) -> Fraction:
    """The number as it is written: 0.1 is one tenth.

    >>> exact(0.1), exact(3)
    (Fraction(1, 10), Fraction(3, 1))
    """
    return Fraction(str(float(value))) if isinstance(value, float) else Fraction(value)
