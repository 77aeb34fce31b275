"""Opens exported rows as axolotl does, with the README's configuration, and takes the loss of a step through its collator.

    python export_axolotl.py JOB RESULT      runs in axolotl's own environment, on the CPU

Flash attention needs a GPU. What it does with an attention mask of ones is known: it drops the mask and goes by positions.
So the loss is taken with the mask dropped, and once with the mask kept and plain attention, where rows must leak.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def opened(job: dict[str, Any], folder: Path) -> tuple[Any, Any, Any]:
    """(the data set after axolotl's own preparation, its collator, the configuration)."""
    import yaml
    from axolotl.cli.config import load_cfg
    from axolotl.core.builders.causal import HFCausalTrainerBuilder
    from axolotl.loaders import load_tokenizer
    from axolotl.utils.data import prepare_datasets

    more = {"output_dir": str(folder / "out"), "dataset_prepared_path": str(folder / "prepared"), "learning_rate": 1e-5}
    more |= {"optimizer": "adamw_torch", "lr_scheduler": "constant", "dataset_num_proc": 1, "use_cpu": True}
    config = yaml.safe_load(job["code"]) | more | {"special_tokens": {"pad_token": job["pad_token"]}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    cfg = load_cfg(str(folder / "config.yaml"))
    tokenizer = load_tokenizer(cfg)
    dataset = prepare_datasets(cfg, tokenizer)[0]
    builder = SimpleNamespace(cfg=cfg, tokenizer=tokenizer, processor=None)
    arguments = SimpleNamespace(pretraining=False, sample_packing=bool(cfg.sample_packing), eval_sample_packing=False)
    padding: dict[str, Any] = {"padding": True}
    if cfg.pad_to_sequence_len is not False:
        padding["pad_to_multiple_of"] = 64
    return dataset, HFCausalTrainerBuilder.build_collator(builder, arguments, **padding), cfg


def losses(job: dict[str, Any], dataset: Any, collator: Any) -> dict[str, float]:
    """The loss of the first step by what is done with the mask."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    sums, count = {"dropped": 0.0, "kept": 0.0}, 0
    columns = ["input_ids", "labels", "attention_mask", "position_ids"]
    for row in dataset.select(range(job["rows_per_step"])).select_columns(columns):
        batch = dict(collator([row]))
        assert bool((batch["attention_mask"] == 1).all()), "a row of a micro-batch of one is not padded"
        count += int((batch["labels"] != -100).sum())
        for name in sums:
            mask = None if name == "dropped" else batch["attention_mask"]
            with torch.no_grad():
                inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": mask}
                logits = model(**inputs, use_cache=False).logits[0, :-1].float()
            total = torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:], ignore_index=-100, reduction="sum")
            sums[name] += float(total)
    return {name: value / count for name, value in sums.items()}


def main() -> None:
    from importlib import metadata

    job, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]).parent
    dataset, collator, cfg = opened(job, folder)
    exported = [(row["input_ids"], row["labels"], row["position_ids"]) for row in dataset]
    result = {
        "losses": losses(job, dataset, collator),
        "rows": exported,
        "collator": type(collator).__name__,
        "settings": {name: cfg[name] for name in ("micro_batch_size", "gradient_accumulation_steps", "curriculum_sampling")},
        "versions": {name: metadata.version(name) for name in ("axolotl", "transformers", "datasets", "torch")},
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
