"""Advice: what others measured on sets like this one, with where they measured it. Nothing is ever switched by it.

lengths, sizes and visits of a plan + the loss rule  ->  lines of (about what, what to think of, the evidence)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.plan.spec import InstructionModelling, LossRule
from tutelage.plan.weights import kind_table
from tutelage.records import Kind

LONG_RATIO = 1.0
"""From this many instruction tokens per output token on, instructions are called long and completions short."""
SMALL_SET = 5_000
FEW_VISITS = 4
MULTI_TURN = (0.10, 0.15)
NUM_TASKS, NUM_PER_TASK = 10, 500
MOSTLY = 0.5
_NAMED = 3
_LESSON = "lesson *Instruction Tuning at Scale*"


@dataclass(frozen=True)
class Advice:
    """One line: what it is about, what to think of, and what was measured, by whom, on what."""

    about: str
    text: str
    evidence: str


@dataclass(frozen=True)
class Measured:
    """A set on which response loss and Instruction Modelling were compared: NLP mean of 18 tasks; `ratio` None if not told."""

    name: str
    ratio: float | None
    response: float
    instruction_modelling: float

    def __str__(self) -> str:
        where = "" if self.ratio is None else f" (ratio {self.ratio:g})"
        return f"{self.name}{where} {self.response:.2f} -> {self.instruction_modelling:.2f}"


MEASURED = (
    Measured("LIMA", 0.094, 48.79, 49.60),
    Measured("Dolly 9k", 0.30, 45.54, 48.00),
    Measured("LESS-BBH", 3.27, 48.28, 49.15),
    Measured("LESS-TydiQA", 5.9, 48.21, 48.70),
    Measured("LESS-MMLU-Chat", 26.3, 47.18, 47.84),
    Measured("Dolly 3k", None, 46.58, 48.95),
    Measured("Alpagasus-Alpaca 5k", None, 45.29, 47.47),
)
"""arXiv 2405.14394, LLaMA-2-7B (base 49.32), and the length ratios of its sets."""
CAVEATS = (
    "no seeds were reported; that loss was a mean per example, so prompts also diluted the outputs (to about 1/27 at ratio "
    "26.3): two effects in one; a KL term of 1.0 to the base kept the mean but took AlpacaEval 2 to 0.06"
)


def advise(
    mixture: Sequence[Mapping[str, Any]], total: Mapping[str, Any], *, loss: LossRule, prompt_share: float
) -> list[Advice]:
    """What to think of before training, most telling first.

    `mixture` and `total` are lines of the plan's facts; `prompt_share` is the part of the loss weight on user text and system
    prompts.

    >>> line = {"task": "qa", "available_examples": 900, "planned_examples": 900, "most_visits": 1, "length_ratio": 0.5}
    >>> line |= {"multi_turn_share": 0.12}
    >>> for advice in advise([line], line, loss=InstructionModelling(normalise="example"), prompt_share=0.3):
    ...     print(advice.about, "|", advice.text)
    coverage | 1 of 1 tasks has at least 500 examples; the lesson's target is 10
    """
    planned = [line for line in mixture if line["planned_examples"]]
    return [
        *_long_instructions(planned, loss=loss),
        *_small_set(total, loss=loss),
        *_prompts_weigh_most(prompt_share, loss=loss),
        *_other_normalising(loss),
        *_seen_often(planned),
        *_turns(total),
        *_coverage(mixture),
    ]


def _weighs_prompts(loss: LossRule) -> bool:
    return bool(kind_table(loss)[Kind.USER] > 0)


def _long_instructions(planned: Sequence[Mapping[str, Any]], *, loss: LossRule) -> Iterator[Advice]:
    found = [line for line in planned if (line["length_ratio"] or 0.0) >= LONG_RATIO]
    if not found or _weighs_prompts(loss):
        return
    found.sort(key=lambda line: (-line["length_ratio"], line["task"]))
    longest = found[0]["length_ratio"]
    ratios = ", ".join(f"{line['length_ratio']:.3g}" for line in found[:_NAMED])
    yield Advice(
        _tasks(found),
        f"instructions are long beside outputs (tokens per output token: {ratios}) and `loss: {loss.kind}` learns nothing from "
        "them; instruction_modelling is said to help most on such sets: compare the two on held-out output tokens",
        f"arXiv 2405.14394, LLaMA-2-7B, mean of 18 tasks, response -> instruction modelling: {_nearest(longest)}; AlpacaEval 1.0 "
        f"rose on 6 of 7 sets, most at ratio 26.3 (4.42 -> 9.78); {CAVEATS}",
    )
    yield Advice(
        _tasks(found),
        "outputs are shorter than instructions; a small weight on the prompt (`loss: {prompt_weight: 0.24}`) is worth a try",
        "arXiv 2401.13586 (EMNLP'24): prompt loss mattered for short completions, best at about 0.24, and not for longer ones; "
        "arXiv 2507.07817 (WIT): a prompt weight above 0 was best in 56 % of 75 settings",
    )


def _nearest(ratio: float) -> str:
    """The two measured sets whose ratios are nearest, as factors.

    >>> _nearest(4.0)
    'LESS-BBH (ratio 3.27) 48.28 -> 49.15, LESS-TydiQA (ratio 5.9) 48.21 -> 48.70'
    """
    told = [(each.ratio, each) for each in MEASURED if each.ratio is not None]
    nearest = sorted(told, key=lambda pair: abs(math.log(pair[0] / ratio)))[:2]
    return ", ".join(str(each) for _, each in sorted(nearest, key=lambda pair: pair[0]))


def _small_set(total: Mapping[str, Any], *, loss: LossRule) -> Iterator[Advice]:
    num = total["available_examples"]
    if num > SMALL_SET or _weighs_prompts(loss):
        return
    small = ", ".join(str(each) for each in MEASURED if each.name in ("Dolly 3k", "Alpagasus-Alpaca 5k", "Dolly 9k"))
    yield Advice(
        "whole set",
        f"{num:,} examples are few for `loss: {loss.kind}`; instruction_modelling gained most on small sets",
        f"arXiv 2405.14394, LLaMA-2-7B, mean of 18 tasks, response -> instruction modelling: {small}; {CAVEATS}",
    )


def _prompts_weigh_most(prompt_share: float, *, loss: LossRule) -> Iterator[Advice]:
    if prompt_share > MOSTLY and _weighs_prompts(loss):
        yield Advice(
            "whole set",
            f"{prompt_share:.0%} of the loss weight lies on prompts; `loss: {{prompt_weight: ...}}` sets how much they count",
            f"arXiv 2405.14394 and its per-example mean: {CAVEATS}; arXiv 2401.13586: about 0.24 was best for short completions",
        )


def _other_normalising(loss: LossRule) -> Iterator[Advice]:
    if isinstance(loss, InstructionModelling) and loss.normalise != "example":
        yield Advice(
            "loss",
            f"the weights are normalised per {loss.normalise}; the paper's own loss is `normalise: example`",
            "arXiv 2405.14394 takes the mean over each example's tokens first, so every example counts the same at any length",
        )


def _seen_often(planned: Sequence[Mapping[str, Any]]) -> Iterator[Advice]:
    found = sorted((line for line in planned if line["most_visits"] > FEW_VISITS), key=lambda line: -line["most_visits"])
    if found:
        yield Advice(
            _tasks(found),
            f"records are seen up to {found[0]['most_visits']} times; more records, or a lower mix.max_visits, may serve better",
            "arXiv 2305.16264: beyond about four visits repeated records stop paying (measured in pre-training)",
        )


def _turns(total: Mapping[str, Any]) -> Iterator[Advice]:
    share = total["multi_turn_share"]
    if share is not None and not MULTI_TURN[0] <= share <= MULTI_TURN[1]:
        side = "below" if share < MULTI_TURN[0] else "above"
        yield Advice(
            "whole set",
            f"{share:.1%} of the planned examples have several requests, {side} the lesson's 10-15 %",
            f"{_LESSON}: 10-15 % of multi-turn conversations (advice, no measurement given)",
        )


def _coverage(mixture: Sequence[Mapping[str, Any]]) -> Iterator[Advice]:
    full = sum(line["available_examples"] >= NUM_PER_TASK for line in mixture)
    if full < NUM_TASKS:
        few = [line for line in mixture if line["available_examples"] < NUM_PER_TASK]
        below = f"; fewer: {_tasks(few)}" if few else ""
        verb = "has" if full == 1 else "have"
        yield Advice(
            "coverage",
            f"{full} of {len(mixture)} tasks {verb} at least {NUM_PER_TASK} examples; the lesson's target is {NUM_TASKS}{below}",
            f"{_LESSON}: at least {NUM_TASKS} categories of {NUM_PER_TASK} examples (advice, no measurement given)",
        )


def _tasks(lines: Sequence[Mapping[str, Any]]) -> str:
    """A few tasks by name.

    >>> _tasks([{"task": name} for name in "abcde"])
    'tasks a, b, c and 2 more'
    """
    names = ", ".join(line["task"] for line in lines[:_NAMED])
    more = f" and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
    return f"task{'s' * (len(lines) > 1)} {names}{more}"
