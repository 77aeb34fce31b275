"""TRL's SFTTrainer on the given documents: padded, grouped by length, packed, or padding-free. Runs in TRL's environment.

The documents come with ids and labels, so templates play no part and the targets are exactly ours. TRL itself meets the head
only at supervised positions, in tiles.
"""

from __future__ import annotations

from typing import Any

from train_side import IGNORED, Clock, Document, Job, digest, held_out_loss, states_of, warm_up

VERSIONS = ("trl", "transformers", "torch", "accelerate")
SETTINGS: dict[str, dict[str, Any]] = {
    "padded": {},
    "grouped": {"train_sampling_strategy": "group_by_length"},
    "packed": {"packing": True, "packing_strategy": "bfd"},
    "free": {"padding_free": True, "max_length": None},
    "default": {},
    "packed-kernels": {"packing": True, "packing_strategy": "bfd", "use_liger_kernel": True},
}


def train(job: Job, setting: str, micro_rows: int | None) -> dict[str, Any]:
    """`setting` as in SETTINGS; `micro_rows` are rows of a forward pass."""
    from datasets import Dataset
    from trl import SFTTrainer

    documents = job.documents()
    dataset = Dataset.from_dict({"input_ids": [ids for ids, _ in documents], "labels": [labels for _, labels in documents]})
    clock = Clock(job.device)
    trainer = _trainer_class(SFTTrainer, clock)(
        model=job.said["model"] if setting == "default" else _model(job),
        args=_arguments(job, setting, micro_rows, len(documents)),
        train_dataset=dataset,
        processing_class=_tokenizer(job),
        callbacks=[_laps(clock)],
        peft_config=_adapter(job) if job.said["adapter"] == "lora" else None,
    )
    found = _documents(trainer.train_dataset)
    trainer.model.train()
    warm_up(trainer.model)
    trainer.train()
    states = states_of(trainer.model, trainer.optimizer)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    result = clock.told() | {"digest": digest(found), "losses": losses, "states": states}
    return result | {"held_out_loss": held_out_loss(trainer.model, job)}


def _model(job: Job) -> Any:
    """The model in the precision of the job: with `masters` weights are float32 and autocast narrows them."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    return AutoModelForCausalLM.from_pretrained(job.said["model"], dtype=dtype, attn_implementation=job.said["attention"])


def _tokenizer(job: Job) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.said["tokenizer"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def _adapter(job: Job) -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64, lora_dropout=0.0, target_modules="all-linear")


def _arguments(job: Job, setting: str, micro_rows: int | None, num_documents: int) -> Any:
    """A step holds as many documents as ours do on average; of packed rows it takes as many as ours."""
    from trl import SFTConfig

    said: dict[str, Any] = {"output_dir": str(job.folder / "out"), "max_length": job.said["capacity"], "report_to": "none"}
    said |= {"use_cpu": job.device == "cpu", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 1}
    said |= {"max_steps": job.num_steps, "dataloader_pin_memory": job.device == "cuda", **SETTINGS[setting]}
    if setting == "default":
        return SFTConfig(**said)
    in_step = job.said["rows_per_step"] if said.get("packing") else max(1, num_documents // job.num_steps)
    micro_rows = min(micro_rows or (1 if said.get("packing") else 8), in_step)
    said |= {"per_device_train_batch_size": micro_rows, "gradient_accumulation_steps": max(1, round(in_step / micro_rows))}
    said |= {"learning_rate": job.said["learning_rate"], "lr_scheduler_type": "constant", "warmup_steps": 0}
    said |= {"weight_decay": job.said["weight_decay"], "gradient_checkpointing": False, "max_grad_norm": 1.0}
    return SFTConfig(**said, bf16=job.precision == "masters", optim="adamw_torch_fused")


def _trainer_class(base: type, clock: Clock) -> type:
    """The trainer, which also counts the tokens that reach a forward pass."""

    class Counting(base):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            ids, mask, labels = inputs["input_ids"], inputs.get("attention_mask"), inputs["labels"]
            clock.count(ids.numel() if mask is None else int(mask.sum()), int((labels[:, 1:] != IGNORED).sum()))
            return super().training_step(model, inputs, *args, **kwargs)

    return Counting


def _laps(clock: Clock) -> Any:
    from transformers import TrainerCallback

    class Laps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not clock.seconds:
                clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.lap()

    return Laps()


def _documents(dataset: Any) -> list[Document]:
    """What the trainer will train on, packed rows taken apart."""
    found: list[Document] = []
    for row in dataset:
        first = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            ids, labels = (list(row[name][first : first + length]) for name in ("input_ids", "labels"))
            found.append((ids, [IGNORED, *labels[1:]]))
            first += length
    return found
