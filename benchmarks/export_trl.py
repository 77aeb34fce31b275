"""Trains on exported rows with the code that the export's README gives, in TRL's own environment. Runs there, not here.

python export_trl.py JOB RESULT      both JSON; a job is a list of cases
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

QUIET = (
    'learning_rate=0.0, max_steps={steps}, logging_steps=1, report_to="none", use_cpu=True, bf16=False, save_strategy="no", '
    "dataloader_pin_memory=False, disable_tqdm=True, seed=1, "
)
"""What a case adds to the README's arguments: nothing learns, so every step's loss is that of the untouched model."""


def prepared(code: str, case: dict[str, Any], out: Path) -> str:
    """The README's code with the case's numbers, stopping before it trains."""
    code = code.replace('output_dir="out",', f'output_dir="{out}", {QUIET.format(steps=case["num_steps"])}')
    code = re.sub(r"(per_device_train_batch_size)=\d+", rf"\1={case['batch']}", code)
    code = re.sub(r"(gradient_accumulation_steps)=\d+", rf"\1={case['accumulation']}", code)
    code, found = re.subn(r"^((?:SFT)?Trainer\(.*)\.train\(\)$", r"trainer = \1", code, flags=re.MULTILINE)
    assert found == 1, "the README's code ends by training"
    return code


def documents(row: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each document of a row."""
    out, first = [], 0
    for length in row["seq_lengths"]:
        out.append((row["input_ids"][first : first + length], row["labels"][first : first + length]))
        first += length
    return out


def permuted(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its documents in another order."""
    found = documents(row)
    random.Random(len(row["input_ids"])).shuffle(found)
    return {
        "input_ids": [token for ids, _ in found for token in ids],
        "labels": [label for _, labels in found for label in labels],
        "seq_lengths": [len(ids) for ids, _ in found],
    }


def leaking(row: dict[str, Any]) -> dict[str, Any]:
    """The row as one document."""
    return row | {"seq_lengths": [len(row["input_ids"])]}


CHANGES = {"permuted": permuted, "leaking": leaking}


def run(case: dict[str, Any], out: Path) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(prepared(case["code"], case, out), "README", "exec"), names)
    trainer = names["trainer"]
    if case.get("change"):
        trainer.train_dataset = trainer.train_dataset.map(CHANGES[case["change"]], load_from_cache_file=False)
    trainer.train()
    steps = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "losses": [line["loss"] for line in steps],
        "grad_norms": [float(line["grad_norm"]) for line in steps],
        "attention": trainer.model.config._attn_implementation,
        "dtype": str(trainer.model.dtype),
    }


def main() -> None:
    import datasets
    import torch
    import transformers
    import trl

    torch.set_num_threads(2)
    cases = json.loads(Path(sys.argv[1]).read_text())
    result: dict[str, Any] = {name: run(case, Path(sys.argv[1]).parent / "out") for name, case in cases.items()}
    versions = {module.__name__: module.__version__ for module in (trl, transformers, datasets, torch)}
    Path(sys.argv[2]).write_text(json.dumps({"cases": result, "versions": versions}))


if __name__ == "__main__":
    main()
