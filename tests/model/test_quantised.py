"""What of 4-bit training can be held to without a GPU: the contract, and every refusal. `docs/tuning.md` says what was run."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from toy import tiny_llama, toy_tokenizer
from tutelage.errors import MissingExtra, ModelError
from tutelage.model import add_adapter, merge_and_save
from tutelage.model.quantised import quantisation, require_quantisation
from tutelage.model.spec import Lora, ModelSpec, QLora


def test_a_recipe_can_ask_for_it_with_the_numbers_of_lora() -> None:
    """Kills a `qlora` that is read as `lora`, or that has defaults of its own."""
    spec = ModelSpec(adapter={"kind": "qlora", "rank": 8})
    assert isinstance(spec.adapter, QLora) and spec.adapter.kind == "qlora"
    assert spec.adapter.canonical() == Lora(rank=8).canonical() | {"kind": "qlora"}
    assert type(ModelSpec(adapter="lora").adapter) is Lora


def test_off_cuda_it_is_refused_with_what_to_do() -> None:
    """Kills a run on a CPU whose 4-bit layers stop gradients, in bfloat16, once they were measured with."""
    with pytest.raises(ModelError, match=r"model\.adapter: qlora needs a CUDA device and this run is on cpu; take `lora`"):
        require_quantisation("cpu")


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills an ImportError from deep inside transformers."""
    monkeypatch.setattr("tutelage.model.quantised.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"tutelage\[qlora\]"):
        require_quantisation("cuda")


def test_weights_are_nf4_with_quantised_scales_and_products_in_the_run_s_precision() -> None:
    """Kills fp4 weights, plain scales and products in float32, which are other models."""
    config = quantisation("bfloat16").to_dict()
    wanted = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    assert {name: config[name] for name in wanted} == wanted
    assert quantisation("bfloat16").bnb_4bit_compute_dtype == torch.bfloat16


def test_merging_into_four_bits_is_refused() -> None:
    """Kills an export that rounds the adapter away."""
    model = add_adapter(tiny_llama(), Lora(rank=2, alpha=4.0))
    model.get_base_model().is_loaded_in_4bit = True
    with pytest.raises(ModelError, match="4 bits without loss"):
        merge_and_save(model, "unused", tokenizer=toy_tokenizer(), stop_ids=[])


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_quantised_model_learns_through_its_adapter_alone(tmp_path: object) -> None:
    """Kills 4-bit layers that stop the gradient: the loss falls, and only adapters, in float32, are trained."""
    from pathlib import Path

    from tiny_training import make_batch, make_docs
    from tutelage.model.quantised import load_quantised
    from tutelage.train.optimizer import Optimizer
    from tutelage.train.spec import TrainSpec
    from tutelage.train.step import step_gradients

    folder = Path(str(tmp_path))
    tiny_llama(dtype=torch.float32).save_pretrained(folder)
    model = add_adapter(load_quantised(folder, device="cuda"), QLora(rank=4, alpha=8.0))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    optimizer, batch, losses = Optimizer(model, TrainSpec()), make_batch([make_docs(2, seed=1)]), []
    for _ in range(10):
        optimizer.zero()
        flat, nll = step_gradients(model, batch)
        optimizer.step(1e-2)
        losses.append(float((flat.weights * nll).sum()))
    assert losses[-1] < 0.8 * losses[0]
