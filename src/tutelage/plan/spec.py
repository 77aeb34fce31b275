"""What a recipe can say about mixture, loss weights, batches and packing."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tutelage.spec import ByKind, Spec

KindName = Literal["scaffold", "system", "user", "assistant", "reasoning", "tool_call", "tool_result", "stop"]


class Proportional(Spec):
    """Each task by its size."""

    kind: Literal["proportional"] = "proportional"


class Equal(Spec):
    """The same share for every task."""

    kind: Literal["equal"] = "equal"


class Temperature(Spec):
    """q_i ~ p_i^(1/T): T=1 is proportional, T=inf equal."""

    kind: Literal["temperature"] = "temperature"
    temperature: float = Field(default=2.0, gt=0.0)
    """T."""


class Explicit(Spec):
    """Shares by task, in any scale; a task without one gets 0."""

    kind: Literal["explicit"] = "explicit"
    weights: dict[str, Annotated[float, Field(ge=0.0)]]
    """Task name to weight."""


Rates = Annotated[Annotated[Proportional | Equal | Temperature | Explicit, Field(discriminator="kind")], ByKind]


class MixSpec(Spec):
    """How often each task is seen."""

    rates: Rates = Proportional()
    """The rule that gives each task its share."""
    count: Literal["examples", "tokens", "supervised_tokens"] = "examples"
    """What a share counts."""
    epochs: float | None = Field(default=None, gt=0.0)
    """Budget as passes over the whole training set (in the unit of `count`); 1 when no budget is given."""
    total_examples: int | None = Field(default=None, ge=1)
    """Budget in examples, instead of epochs."""
    total_tokens: int | None = Field(default=None, ge=1)
    """Budget in tokens, instead of epochs."""
    max_visits: int | None = Field(default=None, ge=1)
    """No record is seen more often than this over the whole run."""
    refill: Literal["water_filling", "none"] = "water_filling"
    """Budget that a cap frees goes to the uncapped tasks, or stays unused."""
    seed: int = 0
    """Changes the order."""

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = [n for n in ("epochs", "total_examples", "total_tokens") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"one budget only, found {' and '.join(given)}")
        return self


class ResponseLoss(Spec):
    """Answers and their stop tokens."""

    kind: Literal["response"] = "response"
    turns: Literal["all", "last"] = "all"
    """`last`: of what the model writes, only the last answered turn counts."""


class InstructionModelling(Spec):
    """User and assistant text and stops, no template tokens (arXiv 2405.14394, equation 4)."""

    kind: Literal["instruction_modelling"] = "instruction_modelling"
    turns: Literal["all", "last"] = "all"
    """`last`: of what the model writes, only the last answered turn counts; user text counts as before."""


class FullLoss(Spec):
    """Every token."""

    kind: Literal["full"] = "full"


class LastResponse(Spec):
    """The last assistant turn and its stop: `response` with `turns: last`."""

    kind: Literal["last_response"] = "last_response"


class KindWeights(Spec):
    """A weight per kind of token; kinds left out get 0."""

    kind: Literal["weights"] = "weights"
    weights: dict[KindName, Annotated[float, Field(ge=0.0)]]
    """Kind to weight. What the template writes inside an answer (`<think>`, `<tool_call>`) weighs what `assistant` does."""
    turns: Literal["all", "last"] = "all"
    """`last`: of what the model writes, only the last answered turn counts; other kinds count as before."""


class PromptWeight(Spec):
    """Answers 1, user text and system prompt this much."""

    kind: Literal["prompt_weight"] = "prompt_weight"
    prompt_weight: float = Field(ge=0.0)
    """Weight of a prompt token."""
    turns: Literal["all", "last"] = "all"
    """`last`: of what the model writes, only the last answered turn counts; prompts count as before."""


LossRule = Annotated[
    Annotated[
        ResponseLoss | InstructionModelling | FullLoss | LastResponse | KindWeights | PromptWeight, Field(discriminator="kind")
    ],
    ByKind,
]


class BatchSpec(Spec):
    """What one optimizer step holds. Stated in slots (rows x capacity) or in examples."""

    slots_per_step: int | None = Field(default=None, ge=8)
    """Tokens' worth of room per step, padding included; divisible by the capacity."""
    examples_per_step: int | None = Field(default=None, ge=1)
    """Examples per step instead; rows then vary."""
    capacity: int | None = Field(default=None, ge=8)
    """Slots per row; `render.max_tokens` when left out."""
    pack: Literal["best_fit", "none"] = "best_fit"
    """Several documents per row, isolated from one another, or one document per row padded to a multiple of 8."""

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if self.slots_per_step is not None and self.examples_per_step is not None:
            raise ValueError("one of `slots_per_step` and `examples_per_step`, not both")
        return self
