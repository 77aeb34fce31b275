"""transformers' Trainer in several processes: what the loop does alone, and what one rank's callbacks ask for, done by all."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from test_many_ranks import CASES, assert_same, run_all
from transformers import TrainerCallback

from several import in_ranks
from tiny_ranks import run_tiny_ranks
from tutelage.world import current

NAMES = ("full, tied", "full in bfloat16", "lora, cut", "full, tied, cut")
BY_TRAINER = (("engine", "hf_trainer"),)


@pytest.mark.slow
def test_the_trainer_in_two_ranks_does_what_the_loop_does_alone(tmp_path: Path) -> None:
    """Kills: gradients that the Trainer averages once more, weights that it moves or wraps, a rank that takes other steps."""
    by_loop = {name: CASES[name] for name in NAMES}
    alone = run_all(tmp_path / "alone", by_loop)
    by_trainer = {name: dataclasses.replace(tiny, changes=BY_TRAINER) for name, tiny in by_loop.items()}
    found = in_ranks(2, run_all, tmp_path / "two", by_trainer)
    for name, tiny in by_trainer.items():
        assert_same(alone[name], found[0][name], narrow=tiny.narrow)


class OfTheSecond(TrainerCallback):
    """Asks on the second rank alone, and keeps what every rank is told of itself."""

    seen: tuple[list[bool], list[int]] = ([], [])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen[0].append(state.is_world_process_zero)
        if current().rank == 1:
            control.should_save = state.global_step == 1
            control.should_training_stop = state.global_step == 2

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen[1].append(state.global_step)


def run_and_look(folder: Path) -> tuple[list[float], tuple[list[bool], list[int]]]:
    """The steps that were taken, and what this rank's callback saw."""
    changes = (*BY_TRAINER, ("callbacks", ("test_trainer_ranks:OfTheSecond",)))
    found = run_tiny_ranks(folder, dataclasses.replace(CASES["full, tied"], num_steps=4, changes=changes))
    return found.losses, OfTheSecond.seen


def test_what_one_rank_asks_for_is_done_by_all(tmp_path: Path) -> None:
    """Kills ranks that part: one that stops while the others wait for it, and a checkpoint that one writes alone."""
    (one, first), (two, second) = in_ranks(2, run_and_look, tmp_path)
    assert one == two and len(one) == 2
    assert (first[0], second[0]) == ([True, True], [False, False]), "one rank logs and writes files"
    assert first[1] == second[1] == [1]
    assert (tmp_path / "checkpoints" / "step-000001").is_dir()
    assert {path.name for path in (tmp_path / "trainer").iterdir()} == {"step-000001", "step-000002"}
