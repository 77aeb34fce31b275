"""Unsloth through its own patched TRL trainer, packed as it packs. Needs a CUDA device, and an environment with Unsloth."""

from __future__ import annotations

from typing import Any

from train_side import Clock, Job, digest, held_out_loss, states_of

VERSIONS = ("unsloth", "trl", "transformers", "torch")


def train(job: Job, setting: str, micro_rows: int | None) -> dict[str, Any]:
    """`setting` is one of TRL's."""
    from unsloth import FastLanguageModel  # isort: skip  # it must come before everything that it patches
    from datasets import Dataset
    from peer_train_trl import _arguments, _documents, _laps, _tokenizer, _trainer_class
    from trl import SFTTrainer

    is_full = job.said["adapter"] == "full"
    how = {"max_seq_length": job.said["capacity"], "load_in_4bit": False, "full_finetuning": is_full}
    model, _ = FastLanguageModel.from_pretrained(job.said["model"], **how)
    if not is_full:
        model = FastLanguageModel.get_peft_model(model, r=32, lora_alpha=64, lora_dropout=0, use_gradient_checkpointing=False)
    documents = job.documents()
    dataset = Dataset.from_dict({"input_ids": [ids for ids, _ in documents], "labels": [labels for _, labels in documents]})
    clock = Clock(job.device)
    trainer = _trainer_class(SFTTrainer, clock)(
        model=model,
        args=_arguments(job, setting, micro_rows, len(documents)),
        train_dataset=dataset,
        processing_class=_tokenizer(job),
        callbacks=[_laps(clock)],
    )
    found = _documents(trainer.train_dataset)
    trainer.train()
    states = states_of(trainer.model, trainer.optimizer)
    result = clock.told() | {"digest": digest(found), "losses": [], "states": states}
    return result | {"held_out_loss": held_out_loss(trainer.model, job)}
