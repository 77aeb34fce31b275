"""Rows per pass that are found: as many as fit, and nothing of the run is touched by looking."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiny_training import make_batch, make_docs
from toy import tiny_llama
from tutelage.errors import TrainError
from tutelage.model import add_adapter
from tutelage.model.spec import Lora
from tutelage.train.fitting import find_rows, largest_that_fits, measured_rise, repeated
from tutelage.train.step import step_gradients

DOCS = make_docs(12, seed=3)
STEPS = [make_batch([DOCS[0:1], DOCS[1:3], DOCS[3:4], DOCS[4:5]]), make_batch([DOCS[5:8], DOCS[8:9]], step=1)]


@given(st.integers(1, 300), st.integers(0, 400))
def test_the_largest_that_fits_is_found_in_few_tries(most: int, limit: int) -> None:
    """Kills a search that stops one short, goes beyond the step, or tries every number."""
    tried: list[int] = []

    def fits(number: int) -> bool:
        tried.append(number)
        return number <= limit

    assert largest_that_fits(most, fits) == max(1, min(most, limit))
    assert all(n <= most for n in tried) and len(tried) <= 2 * most.bit_length() + 1


@pytest.mark.parametrize(("limit", "expected"), [(130, 1), (150, 2), (199, 2), (200, 4), (10**9, 4)])
def test_rows_follow_from_two_measurements_and_the_limit(limit: int, expected: int) -> None:
    """Kills a line without its fixed part (3 rows at 150), and a choice of 3 rows where 4 take as many passes as 2. By hand:
    100 bytes for any pass and 25 a row, so 2 rows take 150, 4 take 200.
    """
    rows, why = find_rows(tiny_llama(), STEPS, limit_bytes=limit, rise_of=lambda rows: 100 + 25 * rows)
    assert rows == expected and "estimated" in why


def test_rows_of_a_step_are_shared_between_devices_first() -> None:
    """Kills a pass longer than what one of two devices is given."""
    assert find_rows(tiny_llama(), STEPS, num_devices=2, limit_bytes=10**9, rise_of=lambda rows: rows)[0] == 2


def test_one_row_that_does_not_fit_is_an_error() -> None:
    """Kills a run that is killed by the system in its first step."""
    with pytest.raises(TrainError, match=r"train\.micro_batch_rows: not even one row of 32 slots"):
        find_rows(tiny_llama(), STEPS, limit_bytes=10, rise_of=lambda rows: 100 * rows)


def test_what_cannot_be_measured_falls_back_and_says_so() -> None:
    """Kills a guess that is called a measurement."""
    rows, why = find_rows(tiny_llama(), STEPS, limit_bytes=10, rise_of=lambda rows: -1)
    assert rows == 64 and "cannot be measured" in why


def test_looking_leaves_weights_gradients_mode_and_random_states_alone() -> None:
    """Kills a first step with the gradient of the trials in it, or with other dropout."""
    model = add_adapter(tiny_llama(), Lora(rank=2, alpha=4.0, dropout=0.5))
    model.eval()
    before, state = [p.detach().clone() for p in model.parameters()], torch.get_rng_state()
    find_rows(model, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters()) and not model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_the_dearest_row_is_measured() -> None:
    """Kills trials on the first row: the longest one comes later and does not fit."""
    seen: list[int] = []

    def watched(rows: int) -> int:
        from tutelage.train import fitting

        seen.append(fitting._dearest(STEPS)[0].real_tokens)
        return rows

    find_rows(tiny_llama(), STEPS, limit_bytes=10**9, rise_of=watched)
    assert set(seen) == {max(int(n) for step in STEPS for n in (step.segments > 0).sum(1))}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_more_rows_take_more_memory() -> None:
    """Kills a height that is the process's highest so far, which never moves again."""
    model = tiny_llama()
    row = make_batch([make_docs(30, seed=1, shortest=14)], capacity=512)
    ballast = torch.ones(30_000_000)
    del ballast  # the process has been higher than any of these passes
    few, many = measured_rise(model, repeated(row, 1)), measured_rise(model, repeated(row, 16))
    assert many > few + 8 * 512 * 32 * 8  # at least the hidden states of one layer of the other rows, by half


def test_a_repeated_row_is_a_step_like_any_other() -> None:
    """Kills weights that no longer add up to the total: the gradient of the mean is that of the row itself."""
    model = tiny_llama()
    row = make_batch([DOCS[0:2]])
    step_gradients(model, row)
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    step_gradients(model, repeated(row, 3))
    assert all(
        torch.allclose(p.grad, expected[name], rtol=1e-6, atol=1e-7) for name, p in model.named_parameters() if p.grad is not None
    )
