"""Advice: said when it applies, with what was measured nearest, and silent otherwise."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.plan.advice import CAVEATS, MEASURED, Advice, advise
from tutelage.plan.spec import InstructionModelling, LossRule, PromptWeight, ResponseLoss


def line(task: str = "qa", *, examples: int = 20_000, ratio: float | None = 0.3, visits: int = 1, turns: float = 0.12) -> Any:
    return {
        "task": task,
        "available_examples": examples,
        "planned_examples": examples * visits,
        "most_visits": visits,
        "length_ratio": ratio,
        "multi_turn_share": turns,
    }


TEN = [line(f"task {i}") for i in range(10)]


def about(mixture: list[Any], *, loss: LossRule | None = None, total: Any = None, prompt_share: float = 0.0) -> list[Advice]:
    whole = total or line("", examples=sum(each["available_examples"] for each in mixture))
    return advise(mixture, whole, loss=loss or ResponseLoss(), prompt_share=prompt_share)


def test_a_large_set_of_short_requests_needs_no_advice() -> None:
    """Kills advice that is always given, which nobody reads."""
    assert about(TEN) == []


def test_long_instructions_are_told_with_the_nearest_ratios() -> None:
    """Kills evidence from a set of another kind: 5 lies between BBH and TydiQA, 20 next to MMLU-Chat."""
    found = about([*TEN, line("long", ratio=5.0), line("longer", ratio=1.5)])
    assert [advice.about for advice in found] == ["tasks long, longer"] * 2
    assert "LESS-BBH (ratio 3.27) 48.28 -> 49.15, LESS-TydiQA (ratio 5.9) 48.21 -> 48.70" in found[0].evidence
    assert CAVEATS in found[0].evidence
    assert "0.24" in found[1].evidence and "56 % of 75" in found[1].evidence
    assert "LESS-MMLU-Chat (ratio 26.3)" in about([*TEN, line("long", ratio=20.0)])[0].evidence


@pytest.mark.parametrize("loss", [InstructionModelling(normalise="example"), PromptWeight(prompt_weight=0.1)])
def test_who_trains_on_prompts_is_not_told_to(loss: LossRule) -> None:
    """Kills advice to do what the recipe does."""
    assert about([*TEN, line("long", ratio=5.0)], loss=loss) == []
    assert about([*TEN[:9], line(examples=500, ratio=5.0)], loss=loss, total=line(examples=900)) == []


def test_small_sets_repeats_turns_and_coverage_are_told() -> None:
    """Kills thresholds on the wrong side."""
    found = {advice.about: advice for advice in about([line("a", examples=499, visits=5), line("b", examples=500)])}
    assert set(found) == {"whole set", "task a", "coverage"}
    assert "999 examples are few" in found["whole set"].text
    assert "Dolly 3k 46.58 -> 48.95" in found["whole set"].evidence
    assert "up to 5 times" in found["task a"].text and "2305.16264" in found["task a"].evidence
    assert found["coverage"].text == "1 of 2 tasks has at least 500 examples; the lesson's target is 10; fewer: task a"
    assert about([*TEN[:-1], line(visits=4)]) == []
    for share, side in ((0.09, "below"), (0.16, "above")):
        (advice,) = about(TEN, total=line(turns=share))
        assert side in advice.text
    assert about(TEN, total=line(turns=0.10)) == about(TEN, total=line(turns=0.15)) == []


def test_dilution_and_the_papers_own_normalising_are_told() -> None:
    """Kills Instruction Modelling taken for the paper's loss when it is normalised in another way."""
    (told,) = about(TEN, loss=InstructionModelling())
    assert "`normalise: example`" in told.text
    (told,) = about(TEN, loss=InstructionModelling(normalise="example"), prompt_share=0.84)
    assert told.text.startswith("84% of the loss weight lies on prompts")


def test_figures_are_those_of_the_paper() -> None:
    """Kills a slip of the pen; source: arXiv 2405.14394, table of the 18-task mean on LLaMA-2-7B."""
    gains = {each.name: round(each.instruction_modelling - each.response, 2) for each in MEASURED}
    assert gains == {
        "LIMA": 0.81,
        "Dolly 9k": 2.46,
        "LESS-BBH": 0.87,
        "LESS-TydiQA": 0.49,
        "LESS-MMLU-Chat": 0.66,
        "Dolly 3k": 2.37,
        "Alpagasus-Alpaca 5k": 2.18,
    }


@given(
    st.lists(st.tuples(st.integers(0, 30_000), st.none() | st.floats(0.0, 100.0), st.integers(0, 9)), min_size=1, max_size=6),
    st.sampled_from([ResponseLoss(), InstructionModelling()]),
    st.none() | st.floats(0.0, 1.0),
)
def test_any_plan_can_be_advised(lines: list[tuple[int, float | None, int]], loss: LossRule, turns: float | None) -> None:
    """Kills advice that fails a run: empty tasks, ratios of nothing, no turns known."""
    mixture = [line(f"t{i}", examples=n, ratio=ratio, visits=visits) for i, (n, ratio, visits) in enumerate(lines)]
    total = line(examples=sum(n for n, _, _ in lines)) | {"multi_turn_share": turns}
    for advice in advise(mixture, total, loss=loss, prompt_share=0.7):
        assert advice.about and advice.text and advice.evidence
