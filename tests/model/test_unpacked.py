"""Documents as right-padded rows: what it takes, and that it is what each gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiny_training import make_batch, make_docs
from toy import tiny_model, toy_tokenizer
from tutelage.errors import ModelError
from tutelage.model import add_adapter, hidden_states, isolation_probe, require_isolation, require_unpacked
from tutelage.model.generate import generate
from tutelage.model.spec import Lora
from tutelage.model.unpacked import mark_rows, rows_of
from tutelage.train.step import step_gradients

PROMPTS = [[72, 101, 108], [72, 101, 108, 111, 33], [1, 2, 3]]


def gradients_alone(model: Any, docs: Any) -> dict[str, torch.Tensor]:
    """By hand: each document through the model's own forward, sum_i w_i * nll_i / W."""
    model.zero_grad()
    total = sum(w for doc in docs for w in doc.weights)
    for doc in docs:
        ids = torch.tensor(doc.ids)
        log_shares = model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)
        nll = -log_shares[:-1].gather(1, ids[1:, None]).squeeze(1)
        ((nll * torch.tensor(doc.weights, dtype=torch.float64)).sum() / total).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_state_space_model_runs_as_rows_and_each_row_is_as_alone() -> None:
    """Kills: a state carried from one document into the next, and padding taken into a row."""
    model = tiny_model("mamba")
    with pytest.raises(ModelError, match=r"MambaForCausalLM.*batch\.pack: none"):
        require_isolation(model)
    assert require_unpacked(model) == "plain" == rows_of(model)
    assert isolation_probe(model) < 1e-5, "its norms and scan are float32 inside"


@pytest.mark.parametrize(
    ("adapter", "micro_batch_rows"), [(None, 1), (None, 3), (Lora(rank=4, alpha=8.0), 8)], ids=["full", "uneven", "lora"]
)
def test_the_gradient_of_padded_rows_is_that_of_each_document_alone(adapter: Lora | None, micro_batch_rows: int) -> None:
    """Kills: a padded forward that attends to padding, weights put on other tokens, and a mean over rows."""
    model = tiny_model("mamba")
    require_unpacked(model)
    if adapter is not None:
        model = add_adapter(model, adapter, seed=1)
        assert {n.split(".")[-4] for n, p in model.named_parameters() if p.requires_grad} == {"in_proj", "x_proj"}
    docs = make_docs(8, seed=3)
    expected = gradients_alone(model, docs)
    model.zero_grad()
    step_gradients(model, make_batch([[doc] for doc in docs], capacity=16), micro_batch_rows=micro_batch_rows)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=name)


def test_a_model_that_isolates_gives_the_same_states_either_way() -> None:
    """Kills: rows put together in another order than the documents came in."""
    model = tiny_model("qwen3")
    ids, lengths = torch.arange(20) * 5 % 128, [6, 3, 11]
    packed = hidden_states(model, ids[None], lengths=lengths)
    for rows in ("plain", "masked"):
        mark_rows(model, rows)
        torch.testing.assert_close(hidden_states(model, ids[None], lengths=lengths), packed, rtol=0, atol=1e-12)


def peeking(*, minds_mask: bool) -> Any:
    """A model that adds the mean over the row to each state, padding included unless a mask hides it."""

    def peek(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        hidden, mask = output.last_hidden_state, kwargs.get("attention_mask")
        seen = torch.ones(hidden.shape[:2]) if mask is None or not minds_mask else mask
        output.last_hidden_state = hidden + (hidden * seen[..., None]).sum(1, keepdim=True) / seen.sum(1)[:, None, None]
        return output

    model = tiny_model("llama")
    model.model.register_forward_hook(peek, with_kwargs=True)
    return model


def test_a_model_that_needs_the_mask_gets_it() -> None:
    """Kills: a probe that never tries the mask."""
    assert require_unpacked(peeking(minds_mask=True)) == "masked"


def test_a_model_that_looks_at_padding_is_refused() -> None:
    """Kills: a run whose losses depend on which rows share a batch."""
    model = peeking(minds_mask=False)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM gives a row other logits when padding stands behind it.*looks ahead"):
        require_unpacked(model)
    assert rows_of(model) is None


def test_generation_with_a_running_state_is_the_same_alone_and_in_a_batch() -> None:
    """Kills: left padding that enters the state, and a cache that is never handed on."""
    model = tiny_model("mamba")
    together = generate(model, toy_tokenizer(), PROMPTS, max_new_tokens=3, stop_ids=[])
    for prompt, found in zip(PROMPTS, together, strict=True):
        ids = list(prompt)
        for _ in range(3):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert found.ids == ids[len(prompt) :]


def test_generation_without_any_cache_reads_the_row_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: an architecture whose second token follows from one token alone."""
    model = tiny_model("mamba")
    cached = [g.ids for g in generate(model, toy_tokenizer(), PROMPTS, max_new_tokens=3, stop_ids=[])]
    monkeypatch.setattr("tutelage.model.generate._cache_name", lambda model: None)
    assert [g.ids for g in generate(model, toy_tokenizer(), PROMPTS, max_new_tokens=3, stop_ids=[])] == cached
