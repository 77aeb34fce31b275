"""Compiled layers: the same numbers, and only where they pay."""

from __future__ import annotations

import shutil

import pytest
import torch

from tiny_training import make_batch, make_docs
from toy import tiny_llama, tiny_model
from tutelage.errors import ModelError, TrainError
from tutelage.model.compiled_layers import can_compile, compile_layers, decoder_layers
from tutelage.train.compiling import WORTH_FLOP, compile_if_worth
from tutelage.train.spec import TrainSpec
from tutelage.train.step import step_gradients


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_give_the_loss_and_gradient_of_plain_ones_for_any_packing() -> None:
    """Kills: a compiled layer that keeps the documents of the batch it was first run on."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    plain, compiled = tiny_llama(), tiny_llama()
    assert compile_layers(compiled) == 2
    for seed in (1, 2, 3):
        docs = make_docs(4 + seed, seed=seed)
        batch = make_batch([docs[:3], docs[3:]], capacity=64)
        losses = []
        for model in (plain, compiled):
            model.zero_grad()
            losses.append(step_gradients(model, batch)[1])
        assert abs(losses[0] - losses[1]).max() < 1e-6  # norms are float32 inside transformers
        for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_short_runs_are_not_compiled_and_say_why() -> None:
    """Kills: a minute of compiling before a run of a minute."""
    model = tiny_llama()
    size = sum(p.numel() for p in model.parameters())
    is_compiled, why = compile_if_worth(model, TrainSpec(), device="cpu", num_slots=int(0.9 * WORTH_FLOP["cpu"] / 6 / size))
    assert not is_compiled and ("pays from" in why or "compiler" in why)
    assert all(layer._compiled_call_impl is None for layer in decoder_layers(model))


def test_a_decision_once_made_is_kept() -> None:
    """Kills: a resumed run that decides anew and gets other last bits."""
    is_compiled, why = compile_if_worth(tiny_llama(), TrainSpec(), device="cpu", num_slots=10**12, decided=False)
    assert not is_compiled and why == "as this run began"


def test_what_cannot_be_compiled_is_refused_with_the_remedy() -> None:
    """Kills: `compile: true` that is left out without a word."""
    with pytest.raises(TrainError, match="parallel: ddp"):
        compile_if_worth(tiny_llama(), TrainSpec(compile=True), device="cpu", num_slots=1, is_sharded=True)
    with pytest.raises(ModelError, match="compile: false"):
        decoder_layers(_without_layers())
    assert can_compile("mps") is not None


def _without_layers() -> object:
    """A model whose list of layers was taken away."""
    model = tiny_model("llama")
    model.model.layers = model.model.layers[:1]
    return model
