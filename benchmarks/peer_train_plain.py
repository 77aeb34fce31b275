"""The loop that people write by hand: shuffled, right-padded batches through `model(...).loss`; and one with Liger's kernels.

`liger` takes our packed rows by `position_ids`, and Liger's fused linear cross-entropy, in place of padded batches.
"""

from __future__ import annotations

import random
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

from train_side import IGNORED, Clock, Document, Job, digest, held_out_loss, states_of, warm_up

VERSIONS = ("transformers", "torch")
MICRO_ROWS = 8


def train(job: Job, setting: str, micro_rows: int | None) -> dict[str, Any]:
    """`setting` is "padded" or "liger"."""
    import torch

    model = _open(job, setting)
    warm_up(model)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    more = {"weight_decay": job.said["weight_decay"], "fused": True}
    optimizer = torch.optim.AdamW(weights, lr=job.said["learning_rate"], **more)
    steps = _packed(job, micro_rows or 1) if setting == "liger" else _padded(job, micro_rows or MICRO_ROWS)
    is_autocast = job.precision == "masters"
    clock, losses = Clock(job.device), []
    clock.start()
    for step in steps:
        optimizer.zero_grad(set_to_none=True)
        total = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in step)
        loss_sum = 0.0
        for batch in step:
            num_targets = int((batch["labels"][:, 1:] != IGNORED).sum())
            clock.count(_num_real(batch), num_targets)
            inputs = {name: value.to(job.device) for name, value in batch.items()}
            with torch.autocast(job.device, torch.bfloat16) if is_autocast else nullcontext():
                loss = model(**inputs, use_cache=False).loss * (num_targets / total)
            loss.backward()
            loss_sum += loss.item()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss_sum)
        clock.lap()
    result = clock.told() | {"digest": digest(job.documents()), "losses": losses, "states": states_of(model, optimizer)}
    return result | {"held_out_loss": held_out_loss(model, job)}


def _open(job: Job, setting: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    if setting == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(fused_linear_cross_entropy=True, cross_entropy=False)
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    how = {"dtype": dtype, "attn_implementation": job.said["attention"]}
    model = AutoModelForCausalLM.from_pretrained(job.said["model"], **how).to(job.device).train()
    if job.said["adapter"] == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64, target_modules="all-linear"))
    return model


def _padded(job: Job, micro_rows: int) -> list[list[dict[str, Any]]]:
    """Steps of micro-batches of documents in random order, each padded to its longest."""
    documents = job.documents()
    random.Random(1).shuffle(documents)
    in_step = max(1, len(documents) // job.num_steps)
    bounds = [in_step * step for step in range(job.num_steps)] + [len(documents)]
    steps = [documents[first:last] for first, last in pairwise(bounds)]
    return [[_pad(step[i : i + micro_rows]) for i in range(0, len(step), micro_rows)] for step in steps]


def _pad(documents: list[Document]) -> dict[str, Any]:
    import torch

    longest = max(len(ids) for ids, _ in documents)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for ids, labels in documents:
        more = longest - len(ids)
        columns["input_ids"].append(ids + [0] * more)
        columns["labels"].append(labels + [IGNORED] * more)
        columns["attention_mask"].append([1] * len(ids) + [0] * more)
    return {name: torch.tensor(rows) for name, rows in columns.items()}


def _packed(job: Job, micro_rows: int) -> list[list[dict[str, Any]]]:
    """Steps of our packed rows, so many laid end to end in a micro-batch."""
    return [
        [_lay([doc for row in step[i : i + micro_rows] for doc in row]) for i in range(0, len(step), micro_rows)]
        for step in job.said["rows"]
    ]


def _lay(documents: list[Document]) -> dict[str, Any]:
    import torch

    ids = [token for one, _ in documents for token in one]
    labels = [label for _, one in documents for label in one]
    positions = [place for one, _ in documents for place in range(len(one))]
    columns = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: torch.tensor([values]) for name, values in columns.items()}


def _num_real(batch: dict[str, Any]) -> int:
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else int(batch["input_ids"].numel())
