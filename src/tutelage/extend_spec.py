"""What a recipe can say about going on after its run: an extension is a part of its own, with its own plan and schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from tutelage.plan.schedule_spec import Online
from tutelage.plan.spec import BUDGETS, Counts, MixSpec, Rates
from tutelage.spec import Spec
from tutelage.train.spec import Schedule, TrainSpec


class ExtendSpec(Spec):
    """More of the same run: by how much, at which rates, and how the learning rate moves."""

    epochs: float | None = Field(default=None, gt=0.0)
    """By so many passes over the training set (in the unit of `mix.count`)."""
    steps: int | None = Field(default=None, ge=1)
    """By so many optimizer steps instead."""
    rates: Rates | None = None
    """Rates of the extension; those of `mix` when left out. To be stated after a `mix.schedule`, or rates of kind `counts`."""
    learning_rate: float | None = Field(default=None, gt=0.0)
    """Peak of the extension; that of the run when left out."""
    schedule: Schedule | None = None
    """How the rate moves over the extension: warmup and fall once more, as in `train.schedule` when left out. The rate has
    fallen once by then, so two parts are not what one longer run would have been, unless the schedule is constant."""
    optimizer: Literal["kept", "fresh"] = "kept"
    """The optimizer's memory goes on from the checkpoint that the weights come from, or starts anew."""

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("an extension states one of `epochs` and `steps`")
        return self

    def mix_of(self, mix: MixSpec) -> MixSpec:
        """The mixture of the extension of a run with this one: its rates and bounds, the budget of the extension."""
        changes = dict.fromkeys(BUDGETS) | {"epochs": self.epochs, "total_steps": self.steps, "schedule": None}
        return mix.model_copy(update=changes | ({} if self.rates is None else {"rates": self.rates}))

    def train_of(self, train: TrainSpec) -> TrainSpec:
        """How the extension of a run with this `train` is trained."""
        changes = {"learning_rate": self.learning_rate, "schedule": self.schedule}
        return train.model_copy(update={name: value for name, value in changes.items() if value is not None})


@dataclass(frozen=True)
class RunPart:
    """A part of a run: the run itself, or one of its extensions. The last part, whose weights are the result, has no `slot`."""

    slot: str
    mix: MixSpec
    train: TrainSpec
    optimizer: Literal["kept", "fresh"] = "kept"


def parts_of(mix: MixSpec, train: TrainSpec, extend: Sequence[ExtendSpec]) -> list[RunPart]:
    """The parts of a run, in the order they are trained in.

    >>> [part.slot for part in parts_of(MixSpec(), TrainSpec(), [ExtendSpec(epochs=1.0), ExtendSpec(steps=9)])]
    ['part 1', 'part 2', '']
    """
    slots = [*(f"part {i}" for i in range(1, len(extend) + 1)), ""]
    more = (RunPart(slot, e.mix_of(mix), e.train_of(train), e.optimizer) for slot, e in zip(slots[1:], extend, strict=True))
    return [RunPart(slots[0], mix, train), *more]


def extension_problems(mix: MixSpec, extend: Sequence[ExtendSpec]) -> Iterator[tuple[int, str, str]]:
    """(which extension, its field, what is wrong) of extensions that do not go with the mixture of the run."""
    for i, part in enumerate(extend):
        if isinstance(mix.schedule, Online):
            yield i, "", "the draws of an online mixture are not planned, so nothing can go on from them; extend a planned run"
        elif part.rates is None and mix.schedule is not None:
            yield i, "rates", "`mix.schedule` is over when the run is; state the rates of the extension"
        elif part.rates is None and isinstance(mix.rates, Counts):
            yield i, "rates", "`counts` say the whole of a run, not of its extension; state the rates of the extension"
        elif part.steps is not None and mix.refill == "none":
            yield i, "steps", "fills whole steps and `mix.refill: none` leaves room; extend by `epochs`"
