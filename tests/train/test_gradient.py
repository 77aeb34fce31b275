"""One step, one gradient: however it is cut, packed or padded."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from tiny_training import Doc, make_batch, make_docs
from toy import tiny_llama, tiny_model
from tutelage.errors import TrainError
from tutelage.model import add_adapter
from tutelage.model.spec import Lora
from tutelage.records import Batch
from tutelage.train.optimizer import Optimizer
from tutelage.train.spec import TrainSpec
from tutelage.train.step import check_norm, step_gradients

DOCS = make_docs(16, seed=11)


def packed() -> Batch:
    """Eight rows of two documents."""
    return make_batch([DOCS[i : i + 2] for i in range(0, 16, 2)])


def padded() -> Batch:
    """The same documents, one per row."""
    return make_batch([[doc] for doc in DOCS], capacity=16)


def gradients(model: Any, batch: Batch, micro_batch_rows: int | None = None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    step_gradients(model, batch, micro_batch_rows=micro_batch_rows)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    assert a.keys() == b.keys() and a
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, atol=tolerance, rtol=tolerance, msg=name)


def reference_loss(model: Any, docs: list[Doc]) -> torch.Tensor:
    """sum_i w_i * nll_i / W, each document alone through the model's own forward, written out by hand."""
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for doc in docs:
        ids = torch.tensor(doc.ids)
        log_shares = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        for place, w in enumerate(doc.weights):
            total = total - w * log_shares[place, ids[place + 1]]
            weight += w
    return total / weight


@pytest.mark.parametrize("micro_batch_rows", [1, 2, 4, 3, None], ids=["8x1", "4x2", "2x4", "uneven", "1x8"])
@pytest.mark.parametrize("layout", [packed, padded])
def test_gradient_is_the_same_for_every_cut_and_layout(layout: Any, micro_batch_rows: int | None) -> None:
    """Kills the mean of micro-batch means, a division by the pass's own weight, and attention across packed documents."""
    model = tiny_llama(tied=True)
    model.zero_grad()
    reference_loss(model, DOCS).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert_same(expected, gradients(model, layout(), micro_batch_rows), 1e-12)


@pytest.mark.parametrize(("kind", "tolerance"), [("qwen3", 1e-12), ("gemma2", 1e-6), ("gpt_neox", 1e-12)])
def test_gradient_is_the_same_for_other_architectures(kind: str, tolerance: float) -> None:
    """Kills a head whose bias, cap or scale is forgotten, and windows that count across documents."""
    model = tiny_model(kind, tied=False)
    model.zero_grad()
    reference_loss(model, DOCS).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert_same(expected, gradients(model, packed(), 3), tolerance)  # gemma2's norms are float32 inside


def test_adapters_get_the_same_gradient_for_every_cut() -> None:
    """Kills a path where a frozen base hides passes from the adapter."""
    model = add_adapter(tiny_llama(), Lora(rank=4, alpha=8.0), seed=1)
    with torch.no_grad():  # away from the start, where half of the gradient is zero
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.linspace(-0.1, 0.1, p.numel()).view_as(p))
    whole = gradients(model, packed())
    assert all("lora" in name for name in whole)
    assert_same(whole, gradients(model, padded(), 1), 2e-6)  # adapters are float32
    assert_same(whole, gradients(model, packed(), 2), 2e-6)


def test_the_losses_are_those_of_the_reference() -> None:
    """Kills a shift by one, and losses that are already multiplied by their weight."""
    model = tiny_llama()
    flat, nll = step_gradients(model, packed(), micro_batch_rows=3)
    found = float((flat.weights * nll).sum() / packed().total_weight)
    assert found == pytest.approx(reference_loss(model, DOCS).item(), abs=1e-12)
    assert (nll[flat.weights == 0] == 0).all()


def test_halving_every_weight_changes_nothing_and_doubling_one_document_repeats_it() -> None:
    """Kills weights that are ignored, or used as a mask."""
    model = tiny_llama()
    whole = gradients(model, packed())
    halved = [dataclasses.replace(doc, weights=tuple(w / 2 for w in doc.weights)) for doc in DOCS]
    assert_same(whole, gradients(model, make_batch([halved[i : i + 2] for i in range(0, 16, 2)])), 1e-12)
    twice = dataclasses.replace(DOCS[3], weights=tuple(2 * w for w in DOCS[3].weights))
    doubled = gradients(model, make_batch([[doc] for doc in [*DOCS[:3], twice]], capacity=16))
    repeated = gradients(model, make_batch([[doc] for doc in [*DOCS[:4], DOCS[3]]], capacity=16))
    assert_same(doubled, repeated, 1e-12)


def test_rows_without_anything_to_learn_cost_and_change_nothing() -> None:
    """Kills padding rows that are run through the model, or that end in 0/0."""
    model = tiny_llama()
    silent = dataclasses.replace(DOCS[0], weights=(0.0,) * len(DOCS[0].weights))
    rows = [DOCS[i : i + 2] for i in range(0, 16, 2)]
    assert_same(gradients(model, packed(), 1), gradients(model, make_batch([[], *rows[:4], [silent], *rows[4:], []]), 1), 1e-12)


def test_bfloat16_weights_add_up_their_gradients_in_float32() -> None:
    """Kills accumulation in bfloat16: sixteen passes would then lose what one pass keeps."""
    coarse = {}
    for rows in (1, 16):
        model = tiny_llama(dtype=torch.bfloat16)
        optimizer = Optimizer(model, TrainSpec())
        step_gradients(model, padded(), micro_batch_rows=rows)
        coarse[rows] = {name: weight.grad for name, weight in optimizer.weights.items()}
        assert all(grad.dtype == torch.float32 for grad in coarse[rows].values())
        assert all(p.grad is None for p in model.parameters())
    exact = gradients(tiny_llama(dtype=torch.bfloat16).float(), padded())
    errors = {rows: _relative_error(grads, exact) for rows, grads in coarse.items()}
    assert errors[1] < 1.2 * errors[16]

    narrow = tiny_llama(dtype=torch.bfloat16)
    narrow_error = _relative_error({n: g.float() for n, g in gradients(narrow, padded(), 1).items()}, exact)
    assert errors[1] < 0.9 * narrow_error, "the float32 sum must be better than the bfloat16 one, or this test shows nothing"


def _relative_error(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    off = sum(float((found[name] - value).square().sum()) for name, value in exact.items())
    return float(np.sqrt(off / sum(float(value.square().sum()) for value in exact.values())))


def test_a_loss_that_is_no_number_names_its_examples() -> None:
    """Kills a run that goes on with NaN weights, and a message that leaves people searching."""
    model = tiny_llama(tied=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[99] = float("nan")
    docs = [Doc((1, 2, 3), (1.0, 1.0), example=1), Doc((1, 99, 3), (1.0, 1.0), example=2), Doc((4, 5), (1.0,), example=3)]
    batch = make_batch([docs[:2], docs[2:]], step=12)
    with pytest.raises(TrainError, match=r"step 12: the loss is not finite in 1 document: record 2 of left\. Nothing of this"):
        step_gradients(model, batch, name_of=lambda document: f"record {document.example} of left")


def test_a_gradient_that_is_no_number_is_refused() -> None:
    """Kills an optimizer step with an infinite norm, which clips every weight's gradient to 0 or NaN."""
    with pytest.raises(TrainError, match=r"step 0: the gradient is not finite in 16 documents: example 0, .* and 11 more"):
        check_norm(float("inf"), padded())
