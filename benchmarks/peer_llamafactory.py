"""LLaMA-Factory's own preparation, with its neat packing. Runs in LLaMA-Factory's environment, with templates of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from peer_meter import Meter

VERSIONS = ("llamafactory", "transformers", "datasets", "tokenizers", "torch", "numpy", "pyarrow")
TEMPLATES = {"qwen3": "qwen3", "llama3": "llama3", "smollm2": "smollm2"}
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system"}


def prepare(job: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Iterator[tuple[bytes, bytes]]]:
    """Loads the tokenizer and the template, then opens, tokenises and packs the files."""
    stand_in("torchaudio")
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    model, data, training, _, _ = get_train_args(_arguments(job, folder))
    module, meter = load_tokenizer(model), Meter()
    template = get_template_and_fix_tokenizer(module["tokenizer"], data)
    with meter:
        made = get_dataset(template, model, data, training, stage="sft", **module)["train_dataset"]
    num_tokens = sum(sum(1 for number in row if number) for row in made["attention_mask"])
    result = {f"packed_{name}": value for name, value in meter.spent.items()}
    result |= {"packing_efficiency": num_tokens / (len(made) * job["capacity"])}
    return {**meter.spent, **result, "num_tokens": num_tokens}, _documents(made)


def stand_in(name: str) -> None:
    """An empty module where one is missing: LLaMA-Factory imports torchaudio even for text, and there is none for every torch."""
    if find_spec(name) is None:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)


def _arguments(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    said = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": TAGS}
    data = {name: {"file_name": path, **said} for name, path in job["files"].items()}
    (folder / "dataset_info.json").write_text(json.dumps(data))
    return {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": job["model"],
        "finetuning_type": "full",
        "dataset_dir": str(folder),
        "dataset": ",".join(data),
        "template": TEMPLATES[Path(job["model"]).name],
        "cutoff_len": job["capacity"],
        "packing": True,
        "neat_packing": True,
        "preprocessing_num_workers": job["processes"],
        "output_dir": str(folder / "out"),
        "report_to": "none",
        "use_cpu": True,
    }


def _documents(dataset: Any) -> Iterator[tuple[bytes, bytes]]:
    import numpy as np

    for row in dataset.with_format("numpy"):
        ids, labels, numbers = row["input_ids"].astype(np.int32), row["labels"], row["attention_mask"]
        for number in range(1, int(numbers.max(initial=0)) + 1):
            own = np.flatnonzero(numbers == number)
            yield ids[own].tobytes(), (labels[own[1:]] != -100).tobytes()
