"""axolotl's own preparation: what `axolotl preprocess` does. Runs in axolotl's environment; it packs later, while it trains."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peer_meter import Meter

VERSIONS = ("axolotl", "transformers", "datasets", "tokenizers", "torch", "numpy", "pyarrow")


def prepare(job: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Iterator[tuple[bytes, bytes]]]:
    """Loads the configuration and the tokenizer, then lets axolotl open, tokenise and keep the files."""
    import yaml
    from axolotl.cli.config import load_cfg
    from axolotl.loaders import load_tokenizer
    from axolotl.utils.data import prepare_datasets

    os.environ["AXOLOTL_IS_PREPROCESS"] = "1"
    (folder / "config.yaml").write_text(yaml.safe_dump(_config(job, folder)))
    config = load_cfg(str(folder / "config.yaml"), is_preprocess=True)
    config.is_preprocess = True
    tokenizer, meter = load_tokenizer(config), Meter()
    with meter:
        made = prepare_datasets(config, tokenizer)[0]
    return {**meter.spent, "num_tokens": sum(map(len, made["input_ids"]))}, _documents(made)


def _config(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    how = {"type": "chat_template", "field_messages": "messages", "roles_to_train": ["assistant"], "train_on_eos": "turn"}
    datasets = [{"path": path, "ds_type": "json", **how} for path in job["files"].values()]
    from transformers import AutoTokenizer

    template = AutoTokenizer.from_pretrained(job["model"]).chat_template
    end = "<|eot_id|>" if "<|eot_id|>" in template else "<|im_end|>"
    return {
        "base_model": job["model"],
        "datasets": datasets,
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "chat_template": "jinja",
        "chat_template_jinja": template,
        "eot_tokens": [end],
        "special_tokens": {"pad_token": "<|im_end|>" if end == "<|im_end|>" else "<|end_of_text|>"},
        "sequence_len": job["capacity"],
        "sample_packing": True,
        "dataset_num_proc": job["processes"],
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "learning_rate": 1e-5,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "attn_implementation": "eager",
        "use_cpu": True,
    }


def _documents(dataset: Any) -> Iterator[tuple[bytes, bytes]]:
    import numpy as np

    for row in dataset.with_format("numpy"):
        yield row["input_ids"].astype(np.int32).tobytes(), (row["labels"][1:] != -100).tobytes()
