"""What every contestant trains on: the first steps of one plan, as documents; and models of other shapes than the bundled one."""

from __future__ import annotations

import glob
import json
from pathlib import Path
from typing import Any

BUNDLED = "bundled:smollm2-135m"
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "llama-small": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
}
"""Random Llamas with the bundled tokenizer. The last is Llama 3.2 1B's shape, its vocabulary of 128,256 words included."""
OTHERWISE: dict[str, dict[str, int]] = {
    "tiny": {"num_key_value_heads": 2, "head_dim": 16},
    "llama-small": {"num_key_value_heads": 4, "head_dim": 64},
    "llama-1b": {"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256},
}
NUM_HELD_OUT = 3_000
"""Tokens that the common measure reads, at most."""


def write_recipe(folder: Path, *, data: list[str], model: str, capacity: int, rows: int, adapter: str) -> Path:
    """A recipe that renders these files with the model's own template and packs them, nothing cleaned or left out."""
    import yaml

    files = sorted({str(Path(path).resolve()) for pattern in data for path in glob.glob(pattern, recursive=True)})
    if not files:
        raise SystemExit(f"--data: no file matches {' '.join(data)}")
    recipe = {
        "name": "train",
        "model": {"name": model, "adapter": {"kind": adapter}},
        "sources": {f"part{number}": {"path": path, "licence": "any"} for number, path in enumerate(files)},
        "curate": {"rules": [], "near_duplicates": None, "exact_duplicates": "keep"},
        "split": {"held_out_share": 0},
        "render": {"max_tokens": capacity, "overlong": "drop", "special_tokens_in_content": "allow"},
        "batch": {"slots_per_step": capacity * rows},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def write_steps(recipe: Path, *, store: Path, num_steps: int) -> dict[str, Any]:
    """`rows` by step and row as documents, `held_out` from the plan's last steps, and the model's folder; runs up to the plan."""
    from peer_train_tutelage import documents_of

    import tutelage
    from tutelage.model.stage import model_folder
    from tutelage.pipeline import open_batches
    from tutelage.profiling import training_artefacts

    file = tutelage.load_recipe(recipe)
    made = training_artefacts(file, store=store)
    batches = open_batches(made)
    if len(batches) < num_steps + 1:
        raise SystemExit(f"the data fill {len(batches)} steps; {num_steps} and one to measure on are asked for")
    held_out, used = [], 0
    for document in (document for row in documents_of(batches[num_steps]) for document in row):
        if used + len(document[0]) <= NUM_HELD_OUT:
            held_out.append(document)
            used += len(document[0])
    folder = str(model_folder(made["model"]).resolve())
    steps = [list(documents_of(batches[step])) for step in range(num_steps)]
    return {"rows": steps, "held_out": held_out, "model": folder}


def make_shape(name: str, folder: Path, *, bundled: Path) -> Path:
    """A folder with a random Llama of that shape and the bundled tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(bundled, **SHAPES[name], **OTHERWISE[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(bundled).save_pretrained(folder)
    return folder


def write_job(folder: Path, job: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(job))
