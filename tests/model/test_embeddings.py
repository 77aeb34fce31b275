"""New tokens get rows that start at the mean, are trained and are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_training import Doc, make_batch
from toy import IM_END, VOCAB_SIZE, save_tiny, tiny_llama, tiny_model, toy_tokenizer
from tutelage.errors import ModelError
from tutelage.model import add_adapter, load_model, merge_and_save, save_model
from tutelage.model.embeddings import add_tokens, make_room, write_with_tokens
from tutelage.model.spec import Lora, ModelSpec
from tutelage.train.optimizer import Optimizer
from tutelage.train.spec import TrainSpec
from tutelage.train.step import step_gradients

NEW = ["<|ask|>", "<|reply|>"]
IDS = [VOCAB_SIZE, VOCAB_SIZE + 1]
TEXT = torch.tensor([[65, 66, *IDS, 67, 68, IDS[0], 69]])
BATCH = make_batch([[Doc((65, IDS[0], 66, IDS[1], 67, IDS[0]), (1.0, 0.0, 1.0, 1.0, 1.0))]])


def heads(model: Any) -> list[torch.Tensor]:
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gemma2"])
def test_new_rows_are_the_mean_of_the_old_and_old_logits_stay(kind: str, tied: bool) -> None:
    """Kills rows of zeros or noise, and a resize that forgets the head."""
    model = tiny_model(kind, tied=tied)
    old, before = [weight.detach().clone() for weight in heads(model)], model(TEXT.clamp(max=127)).logits
    make_room(model, IDS, num_old=VOCAB_SIZE)
    for weight, was in zip(heads(model), old, strict=True):
        assert weight.shape[0] == VOCAB_SIZE + 2 and torch.equal(weight[:VOCAB_SIZE], was)
        assert torch.allclose(weight[IDS], was.mean(0).expand(2, -1), atol=1e-7)
    assert model.config.vocab_size == VOCAB_SIZE + 2
    assert torch.equal(model(TEXT.clamp(max=127)).logits[..., :VOCAB_SIZE], before)


def test_spare_rows_are_used_first_and_are_no_part_of_the_mean() -> None:
    """Kills a model cut down to its tokenizer, and a mean over rows that were never trained."""
    model = tiny_llama(vocab=144)
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCAB_SIZE:] = 1e6
    make_room(model, IDS, num_old=VOCAB_SIZE)
    weight = model.get_input_embeddings().weight
    assert weight.shape[0] == 144
    assert torch.allclose(weight[IDS], weight[:VOCAB_SIZE].mean(0).expand(2, -1), atol=1e-7)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_trains_new_rows_with_the_gradient_that_full_tuning_has(tied: bool) -> None:
    """Kills a head that sees the rows as they started: half of their gradient is missing."""

    def resized() -> Any:
        model = tiny_llama(tied=tied)
        make_room(model, IDS, num_old=VOCAB_SIZE)
        return model

    full = resized()
    step_gradients(full, BATCH)
    model = add_adapter(resized(), Lora(rank=2, alpha=4.0), new_token_ids=IDS)
    step_gradients(model, BATCH)
    rows = {name: p for name, p in model.named_parameters() if "trainable_tokens" in name}
    assert len(rows) == (1 if tied else 2)
    for name, row in rows.items():
        weight = full.get_output_embeddings().weight if "lm_head" in name else full.get_input_embeddings().weight
        assert row.grad is not None and weight.grad is not None
        assert torch.allclose(row.grad.double(), weight.grad[IDS], rtol=1e-5, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft calls it
@pytest.mark.parametrize("tied", [True, False])
def test_plain_peft_and_transformers_load_trained_rows(tied: bool, tmp_path: Path) -> None:
    """Kills rows that are trained and not saved: a template's tokens mean nothing to whoever loads the adapter."""
    from peft import AutoPeftModelForCausalLM, PeftModel

    start, base, adapter, merged = (tmp_path / name for name in ("start", "base", "adapter", "merged"))
    tiny_llama(tied=tied, dtype=torch.float32).save_pretrained(start)
    toy_tokenizer().save_pretrained(start)
    assert write_with_tokens(start, base, NEW) == IDS
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer("A<|ask|>").input_ids == [65, IDS[0]] and tokenizer.chat_template == toy_tokenizer().chat_template

    model = add_adapter(load_model(base), Lora(rank=2, alpha=4.0), new_token_ids=IDS)
    optimizer = Optimizer(model, TrainSpec())
    for _ in range(3):
        optimizer.zero()
        step_gradients(model, BATCH)
        optimizer.step(0.05)
    with torch.no_grad():
        expected = model(TEXT).logits
        save_model(model, adapter, tokenizer=tokenizer, stop_ids=[IM_END], base=base)
        merge_and_save(model, merged, tokenizer=tokenizer, stop_ids=[IM_END])
        over_start = AutoModelForCausalLM.from_pretrained(start)
        over_start.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        loaded = {
            "ours": load_model(adapter),
            "peft": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
            "peft by itself": AutoPeftModelForCausalLM.from_pretrained(adapter),
            "the old base": PeftModel.from_pretrained(over_start, adapter),
            "merged": AutoModelForCausalLM.from_pretrained(merged),
        }
        assert (load_model(base)(TEXT).logits - expected).abs().max() > 1e-2
        for name, plain in loaded.items():
            assert torch.allclose(plain(TEXT).logits, expected, atol=2e-5), name


def test_a_token_that_is_there_already_is_refused(tmp_path: Path) -> None:
    """Kills a trained row overwritten by the mean."""
    with pytest.raises(ModelError, match=r"model\.new_tokens\.1: the tokenizer has '<\|im_end\|>' already \(id 129\)"):
        write_with_tokens(save_tiny(tmp_path / "a"), tmp_path / "b", ["<|new|>", "<|im_end|>"])
    with pytest.raises(ValueError, match="each once"):
        ModelSpec(new_tokens=["<a>", "<a>"])


def test_tokens_are_special_and_one_id_each() -> None:
    """Kills tokens that are cut into letters, or that text in the data can forge."""
    tokenizer = toy_tokenizer()
    assert add_tokens(tokenizer, NEW) == IDS
    assert tokenizer("<|ask|>A<|reply|>").input_ids == [IDS[0], 65, IDS[1]]
    assert tokenizer.decode(IDS, skip_special_tokens=True) == ""
