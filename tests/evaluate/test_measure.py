"""The loss of a model on held-out examples, and a model that does not notice being measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from chats import chat, held_out
from hypothesis import given, settings
from hypothesis import strategies as st

from toy import IM_END, tiny_llama, tiny_model, toy_tokenizer
from tutelage.evaluate.measure import Measure, batches, evaluate_model, keeps_documents_apart, sum_nll, undisturbed
from tutelage.model.load import add_adapter
from tutelage.model.spec import Lora
from tutelage.records import Kind, Rendered

EXAMPLES = [
    chat("Hi", "Hello there."),
    chat("2 + 2?", "4"),
    chat("Say it", "once", "and again", "twice, at some length"),
    chat("Skip", "not this", "but", "this", weights=[1, 0, 1, 1]),
    chat("x" * 60, "y" * 3),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


def plain_nll(model: Any, example: Rendered) -> tuple[float, int]:
    """(sum of nats, number of targets) of one example alone, token by token."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(example.ids.astype(np.int64))[None], use_cache=False).logits[0]
    chances = logits.double().log_softmax(-1)
    total, count = 0.0, 0
    for i in range(1, len(example.ids)):
        is_own = example.kinds[i] in (Kind.ASSISTANT, Kind.REASONING, Kind.TOOL_CALL, Kind.STOP)
        if is_own and example.turn_weights[example.turns[i]] > 0:
            total -= chances[i - 1, example.ids[i]].item()
            count += 1
    return total, count


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral", "mamba"])
def test_each_example_scores_what_it_scores_alone(kind: str) -> None:
    """Kills: documents that see one another; a shift after packing; capped logits measured uncapped; counts of all tokens.

    Mamba cannot keep packed documents apart: it must be measured row by row instead of wrongly.
    """
    model = tiny_model(kind)
    assert keeps_documents_apart(model) == (kind != "mamba")
    found = sum_nll(model, EXAMPLES)
    expected = np.array([plain_nll(model, example) for example in EXAMPLES])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 300))
def test_how_examples_are_batched_changes_nothing(model: Any, lengths: list[int], batch_tokens: int) -> None:
    """Kills: a mean of batch means; a remainder left out; scores returned in the order of length."""
    examples = [chat("q" * (7 * n % 11 + 1), "ab"[i % 2] * n) for i, n in enumerate(lengths)]
    whole = sum_nll(model, examples, batch_tokens=10_000)
    np.testing.assert_allclose(sum_nll(model, examples, batch_tokens=batch_tokens), whole, rtol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=12), st.integers(1, 100), st.booleans())
def test_batches_hold_every_example_once_within_the_bound(lengths: list[int], batch_tokens: int, is_packed: bool) -> None:
    """Kills: a long example that is dropped; padding that is not counted; an empty first batch."""
    found = list(batches(lengths, batch_tokens=batch_tokens, is_packed=is_packed))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        sizes = [lengths[i] for i in batch]
        assert len(batch) == 1 or (sum(sizes) if is_packed else max(sizes) * len(sizes)) <= batch_tokens


def test_a_narrow_model_is_summed_in_float32() -> None:
    """Kills: nll added up in bfloat16, where 300 nats plus 1 is 300."""
    model = tiny_llama(dtype=torch.bfloat16)
    example = chat("q", "abcdefgh" * 60)
    found = sum_nll(model, [example])[0]
    with torch.no_grad():
        hidden = model.model(input_ids=torch.from_numpy(example.ids.astype(np.int64))[None], use_cache=False)[0][0]
        logits = torch.nn.functional.linear(hidden, model.lm_head.weight).float()
    _, counts = plain_nll(model, example)
    is_own = torch.from_numpy(np.isin(example.kinds[1:], [3, 7]))
    nll = -logits.log_softmax(-1)[:-1].gather(1, torch.from_numpy(example.ids[1:].astype(np.int64))[:, None]).squeeze(1)
    assert found[1] == counts
    assert found[0] == pytest.approx(nll[is_own].double().sum().item(), rel=2e-3)


def test_the_aggregate_is_the_sum_over_all_tokens_divided_once(model: Any) -> None:
    """Kills: the mean of the examples' means."""
    tasks = ["a", "a", "b", "b", "b"]
    scores = evaluate_model(model, held_out(EXAMPLES, tasks))
    sums = np.array([plain_nll(model, example) for example in EXAMPLES])
    total = next(s for s in scores if s.item == "" and s.task == "")
    by_task = {s.task: s for s in scores if s.item == "" and s.task}
    assert total.value == pytest.approx(sums[:, 0].sum() / sums[:, 1].sum())
    assert by_task["a"].value == pytest.approx(sums[:2, 0].sum() / sums[:2, 1].sum())
    assert total.weight == sums[:, 1].sum()
    assert [s.item for s in scores if s.item] == ["r0", "r1", "r2", "r3", "r4"]


def test_examples_without_targets_have_no_score(model: Any) -> None:
    """Kills: 0 nats over 0 targets counted as a perfect record; a division by zero."""
    mute = chat("q", "a", weights=[1, 0])
    scores = evaluate_model(model, held_out([mute, EXAMPLES[0]]))
    assert [s.item for s in scores if s.item] == ["r1"]
    assert evaluate_model(model, held_out([mute])) == []


@pytest.fixture
def in_training() -> Iterator[Any]:
    """A model with dropout in the midst of training: gradients there, one part frozen in eval mode."""
    model = add_adapter(tiny_llama(dtype=torch.float32), Lora(rank=2, alpha=4.0, dropout=0.5))
    model.train()
    model.get_base_model().model.norm.eval()
    hidden = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    hidden.sum().backward()
    yield model


def measuring(examples: list[Rendered], **more: Any) -> Measure:
    tasks = ["a" if i % 2 else "b" for i in range(len(examples))]
    return Measure(held_out(examples, tasks), toy_tokenizer(), [IM_END], **{"max_new_tokens": 4, "num_samples": 2, **more})


def test_measuring_leaves_the_model_and_every_random_state_as_they_were(in_training: Any) -> None:
    """Kills: a model left in eval mode; everything set to train, frozen parts too; random numbers used up; lost gradients."""
    modes = [module.training for module in in_training.modules()]
    gradients = {n: p.grad.clone() for n, p in in_training.named_parameters() if p.grad is not None}
    wants = [p.requires_grad for p in in_training.parameters()]
    state = torch.get_rng_state()
    measuring(EXAMPLES)(in_training, 3)
    assert [module.training for module in in_training.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in in_training.parameters()] == wants
    assert torch.is_grad_enabled()
    assert all(torch.equal(p.grad, gradients[n]) for n, p in in_training.named_parameters() if p.grad is not None)


def test_training_can_go_on_after_a_measurement(in_training: Any) -> None:
    """Kills: inference mode, whose cached tensors cannot be used in a backward."""
    measuring(EXAMPLES)(in_training, 0)
    in_training(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()


def test_dropout_is_off_while_measuring(in_training: Any) -> None:
    """Kills: measuring in train mode, where each call gives another loss."""
    first, second = (measuring(EXAMPLES, num_samples=0)(in_training, 0).loss for _ in range(2))
    in_training.eval()
    assert first == second == measuring(EXAMPLES, num_samples=0)(in_training, 0).loss


def test_modes_and_random_state_come_back_when_measuring_fails(in_training: Any) -> None:
    """Kills: a restoration that is skipped by an exception."""
    modes, state = [module.training for module in in_training.modules()], torch.get_rng_state()
    with pytest.raises(RuntimeError, match="stop"), undisturbed(in_training):
        torch.rand(3)
        raise RuntimeError("stop")
    assert [module.training for module in in_training.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_a_measurement_names_its_run_and_step_everywhere(model: Any) -> None:
    """Kills: scores of all steps under step 0."""
    found = measuring(EXAMPLES, run="mine")(model, 7)
    assert {(s.run, s.step) for s in [*found.scores, *found.samples]} == {("mine", 7)}
    assert found.step == 7
    assert found.loss == next(s.value for s in found.scores if s.metric == "nll" and s.item == "" and s.task == "")
    assert {s.metric for s in found.scores} == {"nll", "ended_share", "generated_tokens"}


def test_an_empty_held_out_set_has_no_loss(model: Any) -> None:
    """Kills: a crash, or a loss of 0, where nothing is held out."""
    found = measuring([])(model, 0)
    assert np.isnan(found.loss)
    assert (found.scores, found.samples) == ([], [])


def test_progress_hears_every_token(model: Any) -> None:
    """Kills: a bar that stops before its end."""
    heard: list[int] = []
    sum_nll(model, EXAMPLES, batch_tokens=50, on_progress=heard.append)
    assert sum(heard) == sum(len(example.ids) for example in EXAMPLES)
