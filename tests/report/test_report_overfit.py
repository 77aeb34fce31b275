"""The overfit card: the same mixture on both sides, and sentences that claim no more than was measured."""

from __future__ import annotations

import math

import pytest

from tutelage.records import Score
from tutelage.report.overfit import Overfit, TaskFit, gap_table, overfit_of, overfit_table


def scores(step: int, **by_metric: dict[str, tuple[float, float]]) -> list[Score]:
    return [
        Score("r", step, task, "", metric, value, weight)
        for metric, values in by_metric.items()
        for task, (value, weight) in values.items()
    ]


FINAL = scores(
    9,
    nll={"maths": (1.0, 30.0), "chat": (2.0, 10.0), "unseen": (9.0, 500.0), "": (7.0, 540.0)},
    train_nll={"maths": (0.5, 1.0), "chat": (1.0, 99.0), "": (0.995, 100.0)},
    copied_share={"maths": (0.5, 40.0), "": (0.5, 40.0)},
    reference_copied_share={"maths": (0.1, 80.0), "chat": (0.3, 20.0), "": (0.14, 100.0)},
)


def card() -> Overfit:
    first = scores(0, nll={"maths": (3.0, 30.0), "chat": (4.0, 10.0)}, train_nll={"maths": (3.0, 1.0), "chat": (3.6, 9.0)})
    made = overfit_of(FINAL, [*first, *FINAL, *scores(5, nll={"maths": (1.0, 1.0)})])
    assert made is not None
    return made


def test_both_losses_of_the_total_are_of_one_mixture() -> None:
    """Kills a gap that is a difference of mixtures: tasks weighted by their training tokens, or the unseen task on one side."""
    total = card().total
    assert (total.held_out, total.train, total.gap) == (1.25, 0.625, 0.625)
    assert [x.task for x in card().tasks] == ["chat", "maths"]


def test_the_gap_is_shown_at_every_measurement_that_has_both_sides() -> None:
    """Kills a gap between a loss of one step and a loss of another."""
    assert card().gaps == ((0, pytest.approx(0.1)), (9, 0.625))
    assert gap_table(card()).texts() == [["0", "+0.100"], ["9", "+0.625"]]


def test_what_was_not_generated_is_a_dash_and_not_zero() -> None:
    """Kills `no sign of copying` where nothing was looked at."""
    rows = {row[0]: row for row in overfit_table(card()).texts()}
    assert rows["chat"][4:] == ["\N{EN DASH}", "30.0 %"] and rows["maths"][4:] == ["50.0 %", "10.0 %"] and "all" in rows


@pytest.mark.parametrize(
    ("gap", "copied", "num_runs", "said", "not_said"),
    [
        (0.6, 0.5, 40, ["learns these records", "repeats what it was trained on"], ["no gap"]),
        (0.15, 0.15, 40, ["no gap to speak of", "no sign of copying"], ["learns these"]),
        (-0.2, 0.15, 40, ["below the loss"], ["learns these"]),
        (0.6, 0.9, 3, ["Too little was generated"], ["repeats", "no sign"]),
        (0.6, math.nan, 0, ["Too little was generated"], ["repeats", "no sign"]),
    ],
)
def test_the_sentence_claims_what_was_measured(
    gap: float, copied: float, num_runs: int, said: list[str], not_said: list[str]
) -> None:
    """Kills a verdict from three runs of tokens, and a gap of chance that is called overfitting."""
    total = TaskFit("", 1.0, 1.0 + gap, copied, 0.14, 40.0, num_runs)
    sentence = Overfit((), total, ((0, 0.1), (9, gap))).sentence()
    assert all(part in sentence for part in said) and not any(part in sentence for part in not_said)


def test_there_is_no_card_without_training_records() -> None:
    """Kills a card of dashes, and one whose JSON is not JSON."""
    assert overfit_of(scores(9, nll={"maths": (1.0, 3.0)}), []) is None
    assert card().as_json()["tasks"][0] == {
        "task": "chat", "train": 1.0, "held_out": 2.0, "gap": 1.0, "copied": None, "reference_copied": 0.3
    }  # fmt: skip
