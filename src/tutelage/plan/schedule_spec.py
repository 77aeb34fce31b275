"""What a recipe can say about rates that change while training goes on."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from tutelage.plan.rates_spec import Counts, Proportional, RatePath, Rates, rate_names, uses_unimax
from tutelage.spec import ByKind, Many, Share, Spec


def _sets_no_budget(rates: Rates) -> Rates:
    if isinstance(rates, Counts) or uses_unimax(rates):
        raise ValueError(
            f"rates of kind `{rates.kind}` fix the budget of the whole run; a schedule takes shares: write `explicit` weights"
        )
    return rates


StageRates = Annotated[Rates, AfterValidator(_sets_no_budget)]
"""Rates of a part of the run."""


class Interpolate(Spec):
    """From one mixture to another: `from` until `start`, `to` after `end`, and in between along a line or half a cosine."""

    model_config = ConfigDict(serialize_by_alias=True)

    kind: Literal["interpolate"] = "interpolate"
    first: StageRates = Field(alias="from")
    """The rates at the beginning."""
    last: StageRates = Field(alias="to")
    """The rates at the end."""
    shape: Literal["linear", "cosine"] = "linear"
    """How the one becomes the other."""
    start: Share = 0.0
    """Where the change begins, as a share of the budget."""
    end: Share = 1.0
    """Where it ends."""

    @model_validator(mode="after")
    def _forwards(self) -> Self:
        if self.start >= self.end:
            raise ValueError(f"`start` {self.start:g} is not before `end` {self.end:g}; for a change at one point use `stages`")
        return self


class StageSpec(Spec):
    """A part of the run with rates of its own."""

    share: float = Field(gt=0.0, le=1.0)
    """Of the whole budget."""
    rates: StageRates
    """The rates in this stage."""


class Stages(Spec):
    """One mixture after another."""

    kind: Literal["stages"] = "stages"
    stages: Many[StageSpec] = Field(min_length=1)
    """In order; their shares sum to 1."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        shares = [Fraction(str(stage.share)) for stage in self.stages]
        if sum(shares) != 1:
            rest = 1 - sum(shares[:-1])
            remedy = f"; with {float(rest):.12g} for the last they do" if rest > 0 else ""
            raise ValueError(f"the shares sum to {float(sum(shares)):.12g}, not to 1{remedy}")
        return self


class TwoStage(Spec):
    """DMT (arXiv 2310.05492): the specialised tasks alone, then the general ones with a part of the specialised replayed."""

    kind: Literal["two_stage"] = "two_stage"
    first: Many[str] = Field(min_length=1)
    """The specialised tasks: their whole share comes first."""
    replay: Share
    """The part of what they gave that comes again among the general tasks; the paper's best is 1/256 = 0.0039."""
    rates: StageRates = Proportional()
    """The rates over all tasks, replay not counted."""


class Online(Spec):
    """Rates that follow the held-out loss of each task while training goes on (compare DoReMi, arXiv 2305.10429)."""

    kind: Literal["online"] = "online"
    rates: StageRates = Proportional()
    """The rates to start with."""
    every_steps: int = Field(default=100, ge=1)
    """Steps by the same shares; then every task's held-out loss is measured, and the next shares follow from it."""
    step_size: float = Field(default=1.0, gt=0.0)
    """A task that is one nat further behind the others gets exp of this times more, relative to them."""
    floor: Share = 0.02
    """The least share of a task that has one."""
    reference: Literal["start"] | dict[str, float] = "start"
    """What losses are compared with: each task's loss before training, or losses by task (of a good model)."""


Schedule = Annotated[Annotated[Interpolate | Stages | TwoStage | Online, Field(discriminator="kind")], ByKind]
KnownAhead: TypeAlias = Interpolate | Stages | TwoStage
"""Schedules that are all known before training."""


def schedule_names(schedule: Schedule) -> Iterator[tuple[RatePath, str]]:
    """Every task (or source) that a schedule names, with its place below `schedule`.

    >>> list(schedule_names(TwoStage(first=["maths"], replay=0.1)))
    [(('first', 0), 'maths')]
    """
    match schedule:
        case Interpolate():
            rules: list[tuple[RatePath, Rates]] = [(("from",), schedule.first), (("to",), schedule.last)]
        case Stages():
            rules = [(("stages", i, "rates"), stage.rates) for i, stage in enumerate(schedule.stages)]
        case TwoStage():
            yield from ((("first", i), name) for i, name in enumerate(schedule.first))
            rules = [(("rates",), schedule.rates)]
        case Online():
            if isinstance(schedule.reference, dict):
                yield from ((("reference", name), name) for name in schedule.reference)
            rules = [(("rates",), schedule.rates)]
    for place, rates in rules:
        yield from (((*place, *path), name) for path, name in rate_names(rates))
