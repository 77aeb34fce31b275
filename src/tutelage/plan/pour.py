"""Pour: an amount divided by weight between floors and caps, through nested groups, then settled in whole examples.

Every part takes level * weight, but no less than its floor and no more than its cap; the one level at which the parts
add up is found exactly. A group is a part whose floor and cap are those of its members together, so what one member
cannot take goes to its own group first, and only what the whole group cannot take to the groups beside it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

Number = Fraction | int
_EXACT_BITS = 4096
_ROUGH_BITS = 256


@dataclass(frozen=True)
class Vessel:
    """A name, or a group of vessels: its weight beside its neighbours, the least and the most it takes (None: no end)."""

    name: str
    weight: Number
    low: Number = 0
    high: Number | None = None
    parts: tuple[Vessel, ...] = ()

    def take(self, level: Number) -> Number:
        """The amount at a level of the group that it stands in."""
        amount = max(self.low, level * self.weight)
        return amount if self.high is None else min(amount, self.high)

    def leaves(self) -> Iterator[Vessel]:
        """The vessels without parts."""
        for part in self.parts:
            yield from part.leaves()
        if not self.parts:
            yield self

    @cached_property
    def _bends(self) -> list[tuple[Fraction, Number, Number]]:
        """(level, base, slope) by level: from that level on the parts hold base + slope * level together."""
        turns: list[tuple[Fraction, Number, Number]] = []
        for part in self.parts:
            turns.append((Fraction(part.low, part.weight), -part.low, part.weight))
            if part.high is not None:
                turns.append((Fraction(part.high, part.weight), part.high, -part.weight))
        base, slope = sum((part.low for part in self.parts), start=Fraction(0)), Fraction(0)
        bends: list[tuple[Fraction, Number, Number]] = [(Fraction(0), base, slope)]
        for level, rise, steeper in sorted(turns, key=lambda turn: turn[0]):
            base, slope = base + rise, slope + steeper
            bends.append((level, base, slope))
        return bends

    def level(self, amount: Number) -> Fraction:
        """The level at which the parts hold this amount together."""
        last = bisect_right(self._bends, amount, key=lambda bend: bend[1] + bend[2] * bend[0]) - 1
        level, base, slope = self._bends[max(last, 0)]
        return Fraction(amount - base) / slope if slope else level

    def held(self, level: Number) -> Number:
        """What the parts hold together at a level."""
        _, base, slope = self._bends[bisect_right(self._bends, level, key=lambda bend: bend[0]) - 1]
        return base + slope * level

    def turning_points(self) -> set[Number]:
        """The amounts at which some name below begins to rise above its floor, or reaches its cap."""
        if not self.parts:
            return {self.low} if self.high is None else {self.low, self.high}
        points: set[Number] = {base + slope * level for level, base, slope in self._bends}
        for part in self.parts:
            if part.parts:
                points |= {self.held(Fraction(point, part.weight)) for point in part.turning_points()}
        return points


def join(name: str, weight: Number, parts: Iterable[Vessel]) -> Vessel:
    """A group of vessels: its floor and its cap are theirs together."""
    kept = tuple(parts)
    whole, _ = integers({part.name: Fraction(part.weight) for part in kept})
    kept = tuple(Vessel(part.name, whole[part.name], part.low, part.high, part.parts) for part in kept)
    highs = [part.high for part in kept if part.high is not None]
    low = sum((part.low for part in kept), start=Fraction(0))
    return Vessel(name, weight, low, sum(highs, start=Fraction(0)) if len(highs) == len(kept) else None, kept)


def pour(vessel: Vessel, amount: Number) -> dict[str, Number]:
    """What each name gets of an amount between the vessel's floor and its cap.

    >>> tree = join("", 1, [Vessel("qa", 1), Vessel("maths", 1, high=1_500), Vessel("code", 1, high=6_000)])
    >>> {name: int(share) for name, share in pour(tree, 15_000).items()}
    {'qa': 7500, 'maths': 1500, 'code': 6000}
    >>> tree = join("", 1, [join("hard", 1, [Vessel("maths", 1, high=10), Vessel("code", 1)]), Vessel("chat", 1)])
    >>> {name: int(share) for name, share in pour(tree, 100).items()}      # hard keeps its half
    {'maths': 10, 'code': 40, 'chat': 50}
    """
    if not vessel.parts:
        return {vessel.name: amount}
    level = vessel.level(amount)
    return {name: got for part in vessel.parts for name, got in pour(part, part.take(level)).items()}


def amount_worth(vessel: Vessel, total: Number, prices: Mapping[str, Number]) -> Number:
    """The amount whose parts, each at its price, cost `total` together; the vessel's floor or cap when that is nearer.

    >>> tree = join("", 1, [Vessel("short", 1, high=30), Vessel("long", 1)])
    >>> amount_worth(tree, 100, {"short": 1, "long": 2})                   # 30 at price 1, then 35 at price 2
    Fraction(65, 1)
    """

    def cost(amount: Number) -> Number:
        return sum((got * prices[name] for name, got in pour(vessel, amount).items()), start=Fraction(0))

    points = sorted(vessel.turning_points())
    found = bisect_right(points, total, key=cost)
    if found == 0:
        return points[0]
    start = points[found - 1]
    if found == len(points) and vessel.high is not None:
        return vessel.high
    end = points[found] if found < len(points) else start + 1  # beyond the last turn the cost is one line
    first, last = cost(start), cost(end)
    return start + (total - first) * (end - start) / Fraction(last - first)


def settle(vessel: Vessel, quotas: Mapping[str, Number]) -> dict[str, int]:
    """Whole numbers for fractional quotas: each group's by largest remainder, then its members' in it, ties by name.

    They sum to the whole number nearest to the sum of the quotas, and each is its quota rounded down or up.

    >>> tree = join("", 1, [join("hard", 1, [Vessel("a", 1), Vessel("b", 1), Vessel("c", 1)]), Vessel("d", 1)])
    >>> settle(tree, {"a": Fraction(1, 3), "b": Fraction(1, 3), "c": Fraction(1, 3), "d": Fraction(1)})
    {'a': 1, 'b': 0, 'c': 0, 'd': 1}
    """
    units, unit = integers({name: Fraction(quota) for name, quota in quotas.items()})
    one = unit.denominator
    slack = 0 if all(units[name] == quotas[name] * one for name in quotas) else len(units)  # rounding must not hide a half
    total = (2 * (sum(units.values()) + slack) + one) // (2 * one)
    counts: dict[str, int] = {}
    _settle(vessel, units, total, one=one, counts=counts)
    return {name: counts[name] for name in quotas}


def _settle(vessel: Vessel, units: Mapping[str, int], total: int, *, one: int, counts: dict[str, int]) -> None:
    """Divides `total` whole numbers, of `one` units each, between the parts of a vessel; writes `counts`."""
    if not vessel.parts:
        counts[vessel.name] = total
        return
    due = {part.name: sum(units[leaf.name] for leaf in part.leaves()) for part in vessel.parts}
    whole = round_to_total(due, total, one=one)
    for part in vessel.parts:
        _settle(part, units, whole[part.name], one=one, counts=counts)


def round_to_total(due: Mapping[str, int], total: int, *, one: int) -> dict[str, int]:
    """Each amount in whole `one`s, rounded down, and one more for the largest remainders until `total` is reached.

    >>> round_to_total({"qa": 14, "maths": 7, "code": 9}, 3, one=10)       # 1.4, 0.7 and 0.9
    {'qa': 1, 'maths': 1, 'code': 1}
    """
    counts = {name: amount // one for name, amount in due.items()}
    by_remainder = sorted(due, key=lambda name: (-(due[name] % one), name))
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def integers(values: Mapping[str, Fraction]) -> tuple[dict[str, int], Fraction]:
    """Whole numbers in the same proportion, and their unit: exact, or to a part in 2^256 when that takes very long numbers.

    >>> integers({"a": Fraction(1, 2), "b": Fraction(1, 3)})
    ({'a': 3, 'b': 2}, Fraction(1, 6))
    """
    common = 1
    for value in values.values():
        common = math.lcm(common, value.denominator)
        if common.bit_length() > _EXACT_BITS:  # hundreds of names: this keeps arithmetic linear in their number
            smallest = min(value for value in values.values() if value)
            bits = smallest.denominator.bit_length() - smallest.numerator.bit_length()
            common = 1 << max(_ROUGH_BITS + bits, 0)
            break
    return {name: round(value * common) for name, value in values.items()}, Fraction(1, common)
