"""What a recipe's `model` and `train` come to before the first step, and what is refused before the model is loaded."""

from __future__ import annotations

import pytest

from toy import VOCAB_SIZE, tiny_llama
from tutelage.errors import ModelError, TrainError
from tutelage.model.embeddings import make_room
from tutelage.model.spec import Full, ModelSpec, QLora
from tutelage.store import Silent
from tutelage.train.prepare import adapted, check_early, settled
from tutelage.train.remarks import rate_remark
from tutelage.train.spec import Cosine, OtherOptimizer, TrainSpec


class Heard(Silent):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def early(model: ModelSpec | None = None, **changes: object) -> list[str]:
    heard = Heard()
    check_early(TrainSpec(**changes), model or ModelSpec(), num_steps=10, device="cpu", progress=heard)
    return heard.notes


@pytest.mark.parametrize(
    ("changes", "model", "message"),
    [
        ({"optimizer": OtherOptimizer(module="no.such:Thing")}, None, r"train\.optimizer: cannot import"),
        ({"schedule": Cosine(warmup_steps=10)}, None, r"train\.schedule\.warmup_steps"),
        ({}, ModelSpec(adapter=QLora()), "qlora needs a CUDA device"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_model_is_loaded(changes: dict, model: ModelSpec | None, message: str) -> None:
    """Kills minutes of loading before a mistake of the recipe is told."""
    with pytest.raises((TrainError, ModelError), match=message):
        early(model, **changes)


def test_a_rate_outside_the_usual_range_is_a_note_and_no_more() -> None:
    """Kills a warning for defaults, and full tuning held to the range of adapters."""
    assert early() == [] and early(learning_rate=2e-4) == []
    assert early(learning_rate=1e-3)[0].startswith("train.learning_rate 0.001 is 3.33 times the top of what is usual for lora")
    assert "full tuning, 1e-05 to 5e-05" in early(ModelSpec(adapter=Full()), learning_rate=2e-4)[0]
    assert rate_remark(5e-6, "full") is not None and rate_remark(5e-5, "full") is None
    assert rate_remark(1e-4, "qlora") is None and rate_remark(9e-5, "qlora") is not None


def test_the_number_of_trained_weights_is_said() -> None:
    """Kills a frozen half that nobody is told of."""
    model, heard = tiny_llama(), Heard()
    total = sum(p.numel() for p in model.parameters())
    adapted(model, ModelSpec(adapter=Full(), freeze=["embed_tokens"]), seed=0, new_token_ids=(), progress=heard)
    assert heard.notes == [f"training {total - VOCAB_SIZE * 32:,} of {total:,} weights ({100 - 3200 * VOCAB_SIZE / total:.3g} %)"]


def test_new_tokens_under_frozen_embeddings_are_refused() -> None:
    """Kills tokens that stay at the mean of all others for ever."""
    model = tiny_llama()
    make_room(model, [VOCAB_SIZE], num_old=VOCAB_SIZE)
    spec = ModelSpec(adapter=Full(), freeze=["embed_tokens"], new_tokens=["<a>"])
    with pytest.raises(ModelError, match="the embeddings are frozen"):
        adapted(model, spec, seed=0, new_token_ids=[VOCAB_SIZE], progress=Silent())


def test_rows_left_to_be_found_are_settled_once() -> None:
    """Kills a stated number overruled by an older `setup.json`."""
    assert settled(TrainSpec(micro_batch_rows="auto"), 3).micro_batch_rows == 3
    assert settled(TrainSpec(micro_batch_rows=2), 3).micro_batch_rows == 2
    with pytest.raises(TrainError, match="was not settled"):
        settled(TrainSpec(micro_batch_rows="auto"), None)
