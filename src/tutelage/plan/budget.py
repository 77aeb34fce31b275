"""Budget: how much a run takes in all, what bounds it, and the refusals that name what would be met."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from typing import Literal

from tutelage.errors import PlanError
from tutelage.plan.rates_spec import bound_of
from tutelage.plan.rules import Share, exact
from tutelage.plan.spec import MixSpec

Unit = Literal["examples", "tokens", "supervised_tokens"]
_EPOCH_DIGITS = 6


@dataclass(frozen=True)
class Supply:
    """What a task (or source) has to give: training examples, their tokens, and the tokens among them that carry loss weight.

    `lost` says what became of its records when none of them can be drawn. `num_drawn` counts the draws that earlier parts of
    the same run have made: caps and minima are of all parts together.
    """

    num_examples: int
    num_tokens: int
    num_supervised: int
    lost: str = ""
    num_drawn: int = 0

    def size(self, count: Unit) -> int:
        """The supply in the unit that rates count."""
        sizes = {"examples": self.num_examples, "tokens": self.num_tokens, "supervised_tokens": self.num_supervised}
        return sizes[count]

    def mean(self, count: Unit) -> Fraction:
        """So much of a unit is in one example, on average."""
        return Fraction(self.size(count), self.num_examples)


@dataclass(frozen=True)
class Budget:
    """`amount` of what `field` of the recipe counts, each worth `worth` of `unit`."""

    field: str
    amount: Fraction
    unit: Unit
    worth: Fraction | int = 1

    @property
    def total(self) -> Fraction:
        """The budget in `unit`."""
        return self.amount * self.worth

    def __str__(self) -> str:
        shown = f"{float(self.amount):g}" if self.field == "epochs" else f"{int(self.amount):,}"
        return f"mix.{self.field} {shown}"

    def largest_within(self, total: Fraction) -> str:
        """The largest value of the field that comes to no more than `total`.

        >>> Budget("epochs", Fraction(9), "examples", worth=300).largest_within(Fraction(700))
        '2.33333'
        """
        return self._written(total, ROUND_FLOOR)

    def smallest_above(self, total: Fraction) -> str:
        """The smallest value of the field that comes to no less than `total`."""
        return self._written(total, ROUND_CEILING)

    def _written(self, total: Fraction, rounding: str) -> str:
        value = total / self.worth
        if self.field != "epochs":
            return f"{math.floor(value) if rounding == ROUND_FLOOR else math.ceil(value):,}"
        context = Context(prec=_EPOCH_DIGITS, rounding=rounding)
        return f"{context.divide(Decimal(value.numerator), Decimal(value.denominator)).normalize():f}"


def budget_of(mix: MixSpec, drawn: Mapping[str, Supply]) -> Budget:
    """The budget that a recipe states; epochs are of all that have a share, in the unit of `count`.

    >>> budget_of(MixSpec(epochs=2.0, count="tokens"), {"qa": Supply(10, 700, 300)}).total
    Fraction(1400, 1)
    """
    assert mix.total_steps is None, "steps become examples where rows are known"
    for unit in ("examples", "tokens", "supervised_tokens"):
        amount = getattr(mix, f"total_{unit}")
        if amount is not None:
            return Budget(f"total_{unit}", Fraction(amount), unit)
    epochs = exact(1 if mix.epochs is None else mix.epochs)
    return Budget("epochs", epochs, mix.count, worth=sum(supply.size(mix.count) for supply in drawn.values()))


@dataclass(frozen=True)
class Bounds:
    """Examples by name: the least, the most that UniMax's own cap allows, and the most in all. No entry: no bound."""

    least: Mapping[str, int]
    own: Mapping[str, int]
    most: Mapping[str, int]


def bounds_of(tree: Share, drawn: Mapping[str, Supply], mix: MixSpec) -> Bounds:
    """The bounds of everyone with a share.

    PlanError when a minimum is above what the cap holds, or is given to a name without a share.
    """
    own = {
        s.name: max(math.floor(s.max_epochs * drawn[s.name].num_examples) - drawn[s.name].num_drawn, 0)
        for s in tree.leaves()
        if s.max_epochs is not None
    }
    most = dict(own)
    for name, supply in drawn.items():
        visits = bound_of(mix.max_visits, name)
        if visits is not None:
            allowed = max(visits * supply.num_examples - supply.num_drawn, 0)
            most[name] = min(allowed, own.get(name, allowed))
    asked = {name: (bound_of(mix.min_examples, name) or 0) - supply.num_drawn for name, supply in drawn.items()}
    least = {name: bound for name, bound in asked.items() if bound > 0}
    for name, bound in least.items():
        if bound > most.get(name, bound):
            num = drawn[name].num_examples
            raise PlanError(
                f"mix.min_examples {bound:,} is more than `{name}` can give: its {num:,} example{'s' * (num > 1)} under "
                f"{cap_text(mix, name, own)} make at most {most[name]:,}; ask for that at most, or raise the cap"
            )
    return Bounds(least, own, most)


def cap_text(mix: MixSpec, name: str | None, own: Mapping[str, int]) -> str:
    """What bounds a name (None: all of them), as the recipe says it."""
    parts = []
    if own and (name is None or name in own):
        parts.append("the max_epochs of `unimax`")
    if mix.max_visits is not None:
        visits = bound_of(mix.max_visits, name) if name is not None else mix.max_visits
        parts += [f"mix.max_visits {visits}"] if isinstance(visits, int) else ["mix.max_visits"] if name is None else []
    return " and ".join(parts)


def check_budget(budget: Budget, bounds: Bounds, costs: Mapping[str, Fraction], mix: MixSpec) -> None:
    """Refuses a budget below the minima or above the caps, and names the nearest that can be met; `costs` are of an example."""
    least = sum((count * costs[name] for name, count in bounds.least.items()), start=Fraction(0))
    if budget.total < least:
        raise PlanError(
            f"{budget} is too little for mix.min_examples: the minima alone take {budget.smallest_above(least)}; ask for "
            "that, or lower the minima"
        )
    if mix.refill == "none" or bounds.most.keys() != costs.keys():
        return
    most = sum((count * costs[name] for name, count in bounds.most.items()), start=Fraction(0))
    if budget.total > most:
        remedy = " or set mix.refill: none" if not bounds.own else ""
        raise PlanError(
            f"{budget} cannot be met: with {cap_text(mix, None, bounds.own)} all {mix.over} that have a share reach at most "
            f"{budget.largest_within(most)}; ask for that, raise the cap{',' * bool(remedy)}{remedy}"
        )
