"""What a recipe can say about rates: the rules, groups of names, bounds by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from tutelage.errors import did_you_mean
from tutelage.spec import ByKind, Many, Spec


class Proportional(Spec):
    """Each task by its size."""

    kind: Literal["proportional"] = "proportional"


class Equal(Spec):
    """The same share for every task."""

    kind: Literal["equal"] = "equal"


class Temperature(Spec):
    """q_i ~ p_i^(1/T): T=1 is proportional, T=inf equal, below 1 the large ones gain."""

    kind: Literal["temperature"] = "temperature"
    temperature: float = Field(default=2.0, gt=0.0)
    """T."""


class Explicit(Spec):
    """Shares by task, in any scale; a task without one gets 0."""

    kind: Literal["explicit"] = "explicit"
    weights: dict[str, Annotated[float, Field(ge=0.0)]]
    """Task name to weight."""


class Counts(Spec):
    """Exactly so much of each task, in the unit of `count`, which is its own budget; a task without a count gets none."""

    kind: Literal["counts"] = "counts"
    counts: dict[str, Annotated[int, Field(ge=0)]]
    """Task name to amount; tokens come to the nearest whole number of examples."""


class Capped(Spec):
    """Examples-proportional mixing: q_i ~ min(e_i, K)^(1/T) (T5, arXiv 1910.10683, section 3.5.2; FLAN took K = 3,000)."""

    kind: Literal["capped"] = "capped"
    cap: int = Field(default=3000, ge=1)
    """K: no task counts as larger than this, in the unit of `count`."""
    temperature: float = Field(default=1.0, gt=0.0)
    """T, applied after the cap."""


class UniMax(Spec):
    """Equal shares, no task above so many passes; what it cannot take goes to the larger ones (UniMax, arXiv 2304.09151)."""

    kind: Literal["unimax"] = "unimax"
    max_epochs: float = Field(default=4.0, gt=0.0)
    """N_max: passes over any one task."""


RatesInGroup = Annotated[
    Annotated[Proportional | Equal | Temperature | Explicit | Capped | UniMax, Field(discriminator="kind")], ByKind
]


class Group(Spec):
    """Names, or groups, that share one weight."""

    weight: float = Field(default=1.0, ge=0.0)
    """Weight among the groups beside it."""
    members: Many[str] = ()
    """The names in it."""
    rates: RatesInGroup = Proportional()
    """The rule that divides the group between its members."""
    groups: dict[str, Group] = Field(default_factory=dict)
    """Groups instead of members, divided by their weights."""

    @model_validator(mode="after")
    def _one_content(self) -> Self:
        if bool(self.members) == bool(self.groups):
            raise ValueError("a group has `members` or `groups`, one of them and not empty")
        if self.groups and "rates" in self.model_fields_set:
            raise ValueError("`rates` divides a group between `members`; `groups` are divided by their `weight`")
        for name in getattr(self.rates, "weights", {}):
            if name not in self.members:
                raise ValueError(f"`rates.weights` names `{name}`, which is not a member; {did_you_mean(name, self.members)}")
        return self


class Groups(Spec):
    """Groups by weight, then inside each by its own rule; groups nest."""

    kind: Literal["groups"] = "groups"
    groups: Annotated[dict[str, Group], Field(min_length=1)]
    """Group name to group."""
    rest: Literal["error", "drop"] = "error"
    """A name that is in no group is a mistake, or gets no share."""

    @model_validator(mode="after")
    def _each_name_once(self) -> Self:
        seen: dict[str, str] = {}
        for path, name in _members(self.groups, ("groups",)):
            here = ".".join(map(str, path[:-1]))
            if name in seen:
                raise ValueError(f"`{name}` is in {seen[name]} and again in {here}; a name belongs to one group")
            seen[name] = here
        return self


Rates = Annotated[
    Annotated[Proportional | Equal | Temperature | Explicit | Counts | Capped | UniMax | Groups, Field(discriminator="kind")],
    ByKind,
]

RatePath = tuple[str | int, ...]


def rate_names(rates: Rates | RatesInGroup) -> Iterator[tuple[RatePath, str]]:
    """Every task (or source) that a rule names, with its place below `rates`.

    >>> list(rate_names(Groups(groups={"all": Group(members=("qa", "code"), rates=Explicit(weights={"qa": 1.0}))})))
    [(('groups', 'all', 'members', 0), 'qa'), (('groups', 'all', 'members', 1), 'code')]
    >>> list(rate_names(Counts(counts={"maths": 5})))
    [(('counts', 'maths'), 'maths')]
    """
    match rates:
        case Explicit():
            yield from ((("weights", name), name) for name in rates.weights)
        case Counts():
            yield from ((("counts", name), name) for name in rates.counts)
        case Groups():
            yield from _members(rates.groups, ("groups",))
        case _:
            return


def _members(groups: Mapping[str, Group], path: RatePath) -> Iterator[tuple[RatePath, str]]:
    for name, group in groups.items():
        for index, member in enumerate(group.members):
            yield (*path, name, "members", index), member
        yield from _members(group.groups, (*path, name, "groups"))


def uses_unimax(rates: Rates | RatesInGroup | Group) -> bool:
    """Whether a rule, or one inside its groups, is UniMax."""
    match rates:
        case Groups():
            return any(uses_unimax(group) for group in rates.groups.values())
        case Group():
            return uses_unimax(rates.rates) or any(uses_unimax(group) for group in rates.groups.values())
        case _:
            return isinstance(rates, UniMax)


def _is_amount(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _checked(value: Any) -> Any:
    found = value if isinstance(value, dict) else {"": value}
    for name, amount in found.items():
        if value is not None and not _is_amount(amount):
            where = f"{name}: " if name else ""
            raise ValueError(f"{where}a whole number of at least 1 is wanted (or such numbers by name), found {amount!r}")
    return value


_Amount = Annotated[int, Field(ge=1)]
Bound = Annotated[_Amount | dict[str, _Amount], BeforeValidator(_checked)]
"""One number for all, or numbers by name, of which `default` is for the others."""


def bound_of(bound: Bound | None, name: str) -> int | None:
    """The number that holds for a name; None where there is none.

    >>> bound_of(3, "maths"), bound_of({"default": 3, "maths": 5}, "maths"), bound_of({"maths": 5}, "qa")
    (3, 5, None)
    """
    return bound.get(name, bound.get("default")) if isinstance(bound, dict) else bound


def bound_names(bound: Bound | None) -> Iterator[str]:
    """The names that a bound is given for."""
    if isinstance(bound, dict):
        yield from (name for name in bound if name != "default")
