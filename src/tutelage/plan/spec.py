"""What a recipe can say about mixture, loss weights, batches and packing."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from tutelage.plan.rates_spec import Bound, uses_unimax
from tutelage.plan.rates_spec import Capped as Capped
from tutelage.plan.rates_spec import Counts as Counts
from tutelage.plan.rates_spec import Equal as Equal
from tutelage.plan.rates_spec import Explicit as Explicit
from tutelage.plan.rates_spec import Group as Group
from tutelage.plan.rates_spec import Groups as Groups
from tutelage.plan.rates_spec import Proportional as Proportional
from tutelage.plan.rates_spec import Rates as Rates
from tutelage.plan.rates_spec import Temperature as Temperature
from tutelage.plan.rates_spec import UniMax as UniMax
from tutelage.plan.schedule_spec import Online, Schedule
from tutelage.spec import ByKind, Spec

KindName = Literal["scaffold", "system", "user", "assistant", "reasoning", "tool_call", "tool_result", "stop"]
BUDGETS = ("epochs", "total_examples", "total_tokens", "total_supervised_tokens", "total_steps")


class MixSpec(Spec):
    """How often each task is seen."""

    rates: Rates = Proportional()
    """The rule that gives each task its share."""
    schedule: Schedule | None = None
    """Rates that change while training goes on, instead of `rates`."""
    over: Literal["tasks", "sources"] = "tasks"
    """What rates, `max_visits` and `min_examples` name. Loss and evaluation report by task either way."""
    count: Literal["examples", "tokens", "supervised_tokens"] = "examples"
    """What a share counts."""
    epochs: float | None = Field(default=None, gt=0.0)
    """Budget as passes over the whole training set (in the unit of `count`); 1 when no budget is given."""
    total_examples: int | None = Field(default=None, ge=1)
    """Budget in examples, instead of epochs."""
    total_tokens: int | None = Field(default=None, ge=1)
    """Budget in tokens, instead of epochs."""
    total_supervised_tokens: int | None = Field(default=None, ge=1)
    """Budget in tokens that carry loss weight, instead of epochs."""
    total_steps: int | None = Field(default=None, ge=1)
    """Budget in optimizer steps, all of them full, instead of epochs."""
    max_visits: Bound | None = None
    """No record is seen more often than this over the whole run; by name: `{default: 3, maths: 5}`."""
    min_examples: Bound | None = None
    """Everyone with a share gets at least so many examples, at the cost of the others; by name: `{maths: 100}`."""
    refill: Literal["water_filling", "none"] = "water_filling"
    """Budget that a cap frees goes to the uncapped tasks, or stays unused."""
    seed: int = 0
    """Changes the order."""

    @model_validator(mode="before")
    @classmethod
    def _rates_taken_back(cls, given: Any) -> Any:
        """`rates: null` beside a schedule: the rates of a base recipe do not count."""
        is_taken_back = isinstance(given, dict) and given.get("schedule") is not None and given.get("rates", "") is None
        return {name: value for name, value in given.items() if name != "rates"} if is_taken_back else given

    @model_validator(mode="after")
    def _one_mixture(self) -> Self:
        if self.schedule is not None and "rates" in self.model_fields_set:
            raise ValueError(
                "`mix.rates` and `mix.schedule` both say the rates; keep one (`rates: null` takes back those of a base recipe)"
            )
        return self

    @model_validator(mode="after")
    def _online_alone(self) -> Self:
        if isinstance(self.schedule, Online):
            asked = {"over": "sources", "refill": "none"}
            wrong = [f"`{name}: {value}`" for name, value in asked.items() if getattr(self, name) == value]
            wrong += ["`min_examples`"] if self.min_examples is not None else []
            if wrong:
                raise ValueError(f"`schedule` of kind `online` goes by losses of tasks, and cannot keep {' and '.join(wrong)}")
        return self

    @model_serializer(mode="wrap")
    def _without_idle_rates(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Rates that a schedule replaces are left out: what is written can be read again."""
        written: dict[str, Any] = write(self)
        if self.schedule is not None:
            del written["rates"]
        return written

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = [f"`{name}`" for name in BUDGETS if getattr(self, name) is not None]
        if isinstance(self.rates, Counts):
            given.insert(0, "`rates` of kind `counts`")
        if len(given) > 1:
            raise ValueError(f"one budget only, found {' and '.join(given)}")
        return self

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if isinstance(self.rates, Counts) and self.min_examples is not None:
            raise ValueError("`rates` of kind `counts` are exact, so `min_examples` has nothing to raise; leave it out")
        if self.refill == "none" and self.total_steps is not None:
            raise ValueError("`total_steps` fills whole steps and `refill: none` leaves room; leave one of them out")
        if self.refill == "none" and uses_unimax(self.rates):
            raise ValueError("`unimax` refills by definition; leave out `refill: none`, or take `equal` with `max_visits`")
        return self


class LossSpec(Spec):
    """What every loss rule can say beside which tokens count."""

    normalise: Literal["token", "example", "task"] = "token"
    """What counts the same: each `token` as the rule says, each visit of an `example`, or each `task` over the whole run. The
    weights are rewritten, the run's total stays what it was, and the weights of sources and records come after."""


class ResponseLoss(LossSpec):
    """Answers and their stop tokens."""

    kind: Literal["response"] = "response"
    turns: Literal["all", "last"] = "all"
    """`last`: of what the model writes, only the last answered turn counts."""


class InstructionModelling(LossSpec):
    """User and assistant text and stops, no template tokens (arXiv 2405.14394, equation 4)."""

    kind: Literal["instruction_modelling"] = "instruction_modelling"
    turns: Literal["all", "last"] = "all"
    """`last`: of what the model writes, only the last answered turn counts; user text counts as before."""


class FullLoss(LossSpec):
    """Every token."""

    kind: Literal["full"] = "full"


class LastResponse(LossSpec):
    """The last assistant turn and its stop: `response` with `turns: last`."""

    kind: Literal["last_response"] = "last_response"


class KindWeights(LossSpec):
    """A weight per kind of token; kinds left out get 0."""

    kind: Literal["weights"] = "weights"
    weights: dict[KindName, Annotated[float, Field(ge=0.0)]]
    """Kind to weight. What the template writes inside an answer (`<think>`, `<tool_call>`) weighs what `assistant` does."""
    turns: Literal["all", "last"] = "all"
    """`last`: of what the model writes, only the last answered turn counts; other kinds count as before."""


class PromptWeight(LossSpec):
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
    max_documents_per_row: int | None = Field(default=None, ge=1)
    """A packed row takes no more documents than this; no limit when left out."""

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        if self.slots_per_step is not None and self.examples_per_step is not None:
            raise ValueError("one of `slots_per_step` and `examples_per_step`, not both")
        if self.max_documents_per_row is not None and self.pack == "none":
            raise ValueError("`max_documents_per_row` is for packed rows; with `pack: none` a row has one document: leave it out")
        return self
