"""What a run leaves is opened by transformers and peft alone, and says what the model said inside the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from toy import IM_END, tiny_model, toy_tokenizer
from tutelage.cli import app
from tutelage.errors import ModelError
from tutelage.merging import merge_folder
from tutelage.model import add_adapter, hidden_states, load_model, load_tokenizer, save_model
from tutelage.model.isolation import logits_of
from tutelage.model.loss import head_of
from tutelage.model.names import describe, materialise, resolve
from tutelage.model.spec import Lora

LENGTHS = (7, 12, 3)
IDS = torch.arange(sum(LENGTHS)) * 37 % 128
NEWLINE = 10
STOPS = [IM_END, NEWLINE]

PLAIN = """
import json, sys, warnings
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
warnings.simplefilter("ignore")
job = json.load(open(sys.argv[1]))
found = {}
for name, folder in job["folders"].items():
    if name.endswith("adapter"):
        from peft import AutoPeftModelForCausalLM
        model = AutoPeftModelForCausalLM.from_pretrained(folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        parts = [model(input_ids=torch.tensor([ids])).logits[0].float() for ids in job["documents"]]
    np.save(f"{folder}/logits.npy", torch.cat(parts).numpy())
    turns = [{"role": "user", "content": "hi"}]
    found[name] = {
        "dtype": str(model.dtype),
        "eos": GenerationConfig.from_pretrained(folder).eos_token_id,
        "prompt": AutoTokenizer.from_pretrained(folder).apply_chat_template(turns, tokenize=False, add_generation_prompt=True),
    }
assert not [name for name in sys.modules if name.startswith("tutelage")]
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Shape:
    """A tiny model and its precision."""

    kind: str
    tied: bool
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return f"{self.kind}-{'tied' if self.tied else 'untied'}-{str(self.dtype).removeprefix('torch.')}"


SHAPES = [
    Shape("llama", tied=True),
    Shape("llama", tied=False),
    Shape("llama", tied=False, dtype=torch.bfloat16),
    Shape("qwen2", tied=True),
    Shape("qwen3", tied=False),
    Shape("gemma2", tied=True),
    Shape("gpt_neox", tied=False),
]
FORMS = ("full", "adapter", "merged")


def logits_inside(model: Any) -> torch.Tensor:
    """[N, V]: what training sees, the documents packed into one row."""
    with torch.no_grad():
        return logits_of(hidden_states(model, IDS[None], lengths=LENGTHS), head_of(model)).float()


def moved(model: Any) -> Any:
    """The model with its trainable weights away from where they started, as training would leave them."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.linspace(-0.05, 0.05, p.numel()).view_as(p))
    return model.eval()


def write_forms(folder: Path, base: Path, stops: list[int], *, tokenizer: Any, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """Logits inside the run of each form; `folder`/FORM is what was saved of it."""
    full = moved(load_model(base, dtype=dtype))
    save_model(full, folder / "full", tokenizer=tokenizer, stop_ids=stops)
    adapted = moved(add_adapter(load_model(base, dtype=dtype), Lora(rank=4, alpha=8.0), seed=1))
    save_model(adapted, folder / "adapter", tokenizer=tokenizer, stop_ids=stops, base=base)
    merge_folder(folder / "adapter", folder / "merged")
    inside = {"full": logits_inside(full), "adapter": logits_inside(adapted)}
    return inside | {"merged": inside["adapter"]}


def open_plainly(folder: Path, folders: dict[str, Path]) -> dict[str, Any]:
    """What transformers and peft find, in a process that has never heard of us; logits lie beside each model."""
    documents = [part.tolist() for part in torch.split(IDS, list(LENGTHS))]
    (folder / "job.json").write_text(json.dumps({"folders": {n: str(f) for n, f in folders.items()}, "documents": documents}))
    (folder / "plain.py").write_text(PLAIN)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(folder / "plain.py"), str(folder / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=clean, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@dataclass(frozen=True)
class Exported:
    folder: Path
    inside: dict[str, dict[str, torch.Tensor]]
    plain: dict[str, Any]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Every form of every shape, saved, and opened in one plain process."""
    folder = tmp_path_factory.mktemp("exported")
    inside = {}
    for shape in SHAPES:
        model = tiny_model(shape.kind, tied=shape.tied, dtype=shape.dtype)
        base = save_model(model, folder / shape.name / "base", tokenizer=toy_tokenizer(), stop_ids=[IM_END])
        dtype = str(shape.dtype).removeprefix("torch.")
        inside[shape.name] = write_forms(folder / shape.name, base, STOPS, tokenizer=toy_tokenizer(), dtype=dtype)
    folders = {f"{shape.name}-{form}": folder / shape.name / form for shape in SHAPES for form in FORMS}
    return Exported(folder, inside, open_plainly(folder, folders))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_plain_code_gets_the_logits_of_the_run(exported: Exported, shape: Shape, form: str) -> None:
    """Kills: weights that lost digits or their tie on the way, an adapter scaled otherwise, a merge that forgets alpha / rank."""
    found = torch.from_numpy(np.load(exported.folder / shape.name / form / "logits.npy"))
    inside = exported.inside[shape.name][form]
    spread = float(inside.std())
    if shape.dtype == torch.float32:
        torch.testing.assert_close(found, inside, rtol=0, atol=1e-5 * spread)
    else:  # bfloat16 has 8 bits: two layers, and for the merged one the sum rounded into the weights
        assert float((found - inside).abs().mean()) < 2 * torch.finfo(shape.dtype).eps * spread
    told = exported.plain[f"{shape.name}-{form}"]
    assert told["dtype"] == str(shape.dtype)


@pytest.mark.parametrize("form", FORMS)
def test_every_trained_stop_ends_an_answer_and_the_template_is_there(exported: Exported, form: str) -> None:
    """Kills: a model that was taught to stop at a token at which its generation goes on."""
    told = exported.plain[f"{SHAPES[0].name}-{form}"]
    assert set(STOPS) <= set(told["eos"])
    assert set(STOPS) <= set(describe(exported.folder / SHAPES[0].name / form).end_ids), "what `tutelage chat` stops at"
    assert told["prompt"] == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_the_command_merges_a_run_and_says_how_near_it_came(exported: Exported, tmp_path: Path) -> None:
    """Kills: a merge that only the library can do, and one that overwrites what it should not."""
    run = tmp_path / "run"
    (run / "model").parent.mkdir()
    (exported.folder / SHAPES[0].name / "adapter").rename(run / "model")
    try:
        out = tmp_path / "out"
        done = CliRunner().invoke(app, ["merge", str(run), str(out), "--json"])
        assert done.exit_code == 0, done.output
        told = json.loads(done.output)
        assert told["dtype"] == "float32" and told["difference"] < 1e-5 * told["spread"] and set(STOPS) <= set(told["stop_ids"])
        again = CliRunner().invoke(app, ["merge", str(run), str(out)])
        assert again.exit_code == 2 and "--overwrite" in again.output
        half = CliRunner().invoke(app, ["merge", str(run), str(out), "--overwrite", "--dtype", "bfloat16"])
        assert half.exit_code == 0 and "bfloat16" in half.output
        assert load_model(out, dtype="bfloat16").dtype == torch.bfloat16
    finally:
        (run / "model").rename(exported.folder / SHAPES[0].name / "adapter")


def test_what_cannot_be_merged_is_said(exported: Exported, tmp_path: Path) -> None:
    """Kills: a full model called merged, a folder of somebody else's files deleted."""
    shape = exported.folder / SHAPES[0].name
    with pytest.raises(ModelError, match="ordinary model folder already"):
        merge_folder(shape / "full", tmp_path / "out")
    with pytest.raises(ModelError, match="no such folder"):
        merge_folder(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ModelError, match="is the adapter itself"):
        merge_folder(shape / "adapter", shape / "adapter", overwrite=True)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mother.txt").write_text("dear")
    with pytest.raises(ModelError, match="is no model folder"):
        merge_folder(shape / "adapter", tmp_path / "letters", overwrite=True)
    assert (tmp_path / "letters" / "mother.txt").exists()
    with pytest.raises(ModelError, match="did you mean `float32`"):
        merge_folder(shape / "adapter", tmp_path / "out", dtype="float23")


@pytest.mark.model
@pytest.mark.slow
def test_the_real_model_says_plainly_what_it_said_inside(tmp_path: Path) -> None:
    """Kills: an export that only tiny models survive: shared embeddings, a real vocabulary, thirty layers."""
    try:
        source = materialise(resolve("bundled:smollm2-135m"), tmp_path / "source")
    except ModelError as error:
        pytest.skip(str(error))
    tokenizer = load_tokenizer(source)
    inside = write_forms(tmp_path, source, [tokenizer.eos_token_id, 198], tokenizer=tokenizer)
    told = open_plainly(tmp_path, {form: tmp_path / form for form in FORMS})
    for form in FORMS:
        found = torch.from_numpy(np.load(tmp_path / form / "logits.npy"))
        assert float((found - inside[form]).abs().max()) < 1e-3 * float(inside[form].std()), form
        assert {tokenizer.eos_token_id, 198} <= set(told[form]["eos"])
