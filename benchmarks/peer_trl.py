"""TRL's own preparation: SFTTrainer with `assistant_only_loss` and bfd packing. Runs in TRL's environment."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peer_meter import Meter

VERSIONS = ("trl", "transformers", "datasets", "tokenizers", "torch", "numpy", "pyarrow")


def prepare(job: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Iterator[tuple[bytes, bytes]]]:
    """Opens the JSONL and lets the trainer prepare it; packing is timed apart and taken off `seconds`."""
    import trl.trainer.sft_trainer as module
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    whole, packing, pack = Meter(), Meter(), module.pack_dataset

    def timed_pack(*args: Any, **kwargs: Any) -> Any:
        with packing:
            return pack(*args, **kwargs)

    class Timed(module.SFTTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            with whole:
                return super()._prepare_dataset(*args, **kwargs)

    module.pack_dataset = timed_pack
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(job["model"]))
    how = {"packing": True, "packing_strategy": "bfd", "max_length": job["capacity"], "assistant_only_loss": True}
    how |= {"dataset_num_proc": job["processes"] if job["processes"] > 1 else None}
    args = module.SFTConfig(**how, report_to="none", use_cpu=True, bf16=False, output_dir=str(folder / "out"))
    with whole:
        dataset = load_dataset("json", data_files=list(job["files"].values()), split="train")
    made = Timed(model=model, args=args, train_dataset=dataset, processing_class=tokenizer).train_dataset
    num_tokens = sum(sum(lengths) for lengths in made["seq_lengths"])
    result = {name: value - packing.spent[name] for name, value in whole.spent.items()}
    result |= {f"packed_{name}": value for name, value in whole.spent.items()}
    result |= {"num_tokens": num_tokens, "packing_efficiency": num_tokens / (len(made) * job["capacity"])}
    return result, _documents(made)


def _documents(dataset: Any) -> Iterator[tuple[bytes, bytes]]:
    import numpy as np

    for row in dataset.with_format("numpy"):
        ids, labels, first = row["input_ids"].astype(np.int32), row["labels"], 0
        for length in row["seq_lengths"].tolist():
            yield ids[first : first + length].tobytes(), (labels[first + 1 : first + length] != -100).tobytes()
            first += length
