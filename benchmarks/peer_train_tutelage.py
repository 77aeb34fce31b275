"""tutelage's own side: the recipe's plan through the training that `tutelage train` does, and what its steps execute."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from train_side import IGNORED, Clock, Document, Job, digest, held_out_loss, states_of, warm_up_steps

from tutelage.records import Batch
from tutelage.records import Document as Placed
from tutelage.store import Silent

SMALL_PASS = 768
"""Tokens of a pass where memory counts more than speed."""
VERSIONS = ("tutelage", "transformers", "torch")


def train(job: Job, setting: str, micro_rows: int | None) -> dict[str, Any]:
    """`setting`: "" for the plan as it is, "permuted" for each step's rows the other way round, "small" for small passes."""
    import torch

    threads = torch.get_num_threads()
    model, batches, task = _open(job, micro_rows, most_tokens=SMALL_PASS if setting == "small" else None)
    torch.set_num_threads(threads)
    steps = [batches[step] for step in range(job.num_steps)]
    if setting == "permuted":
        steps = [turned(batch) for batch in steps]
    documents = [document for batch in steps for row in documents_of(batch) for document in row]
    work = _flops(model, steps[warm_up_steps(len(steps)) :], task)
    clock, begun = Clock(job.device), time.perf_counter()
    _warm_up(model, steps[0])
    warm_up_seconds = time.perf_counter() - begun
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    run = _pure if job.precision == "bf16" and job.said["adapter"] == "full" else _whole
    clock.counts = [(batch.real_tokens, int((batch.weights > 0).sum())) for batch in steps]
    losses, states = run(model, _Steps(steps, clock), task, clock, job.folder)
    told = clock.told() | {"digest": digest(documents), "losses": losses, "states": states}
    told |= {"flops": work, "flops_per_second": work / told["seconds"], "warm_up_seconds": warm_up_seconds}
    return told | {"held_out_loss": held_out_loss(model, job)}


def ceiling(job: Job) -> dict[str, Any]:
    """Operations a second of a large product in the precision that the contestants compute in; and the untouched model's loss."""
    import torch
    from transformers import AutoModelForCausalLM

    from tutelage.train.profile import matmul_ceiling

    dtype = torch.float32 if job.precision == "float32" else torch.bfloat16
    told: dict[str, Any] = {"flops_per_second": matmul_ceiling(dtype, job.device)}
    if job.said["measures_before"]:
        model = AutoModelForCausalLM.from_pretrained(job.said["model"], dtype=torch.float32)
        told["held_out_before"] = held_out_loss(model, job)
    return told


def _open(job: Job, micro_rows: int | None, *, most_tokens: int | None) -> tuple[Any, Sequence[Batch], Any]:
    """Model, batches and task as `tutelage train` begins with them."""
    import tutelage
    from tutelage.profiling import begin_training

    dtype = "float32" if job.precision == "float32" else "auto" if job.precision == "defaults" else "bfloat16"
    said = {"train.dtype": dtype, "train.device": job.device, "train.checkpoint_every_steps": 10**6}
    if job.said["compiles"]:
        said["train.compile"] = "true"  # as a run of some minutes or more does by itself
    if most_tokens:
        said["train.micro_batch_tokens"] = most_tokens
    if micro_rows:
        said["train.micro_batch_rows"] = micro_rows
    if job.precision != "defaults":
        said |= {"train.learning_rate": job.said["learning_rate"], "train.weight_decay": job.said["weight_decay"]}
        said |= {"train.schedule.kind": "constant"}
    file = tutelage.load_recipe(Path(job.said["recipe"]), overrides=[f"{name}={value}" for name, value in said.items()])
    return begin_training(file, job.folder, store=Path(job.said["store"]))


class _Steps(Sequence[Batch]):
    """The first steps of the plan; asking for the first starts the clock."""

    def __init__(self, steps: Sequence[Batch], clock: Clock) -> None:
        self._steps, self._clock = steps, clock

    def __len__(self) -> int:
        return len(self._steps)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...

    def __getitem__(self, index: Any) -> Any:
        if index == 0 and not self._clock.seconds:
            self._clock.start()
        return self._steps[index]


class _Laps(Silent):
    """A step is over when the loop says so; what it does after the last, its checkpoint, is not on the clock."""

    def __init__(self, clock: Clock, num_steps: int) -> None:
        self._clock, self._num_steps = clock, num_steps

    def advance(self, amount: int = 1, text: str = "") -> None:
        if amount and text and len(self._clock.seconds) < self._num_steps:
            self._clock.lap()


def _whole(model: Any, batches: _Steps, task: Any, clock: Clock, folder: Path) -> tuple[list[float], dict[str, list[str]]]:
    """Through the loop itself, with whatever precision it keeps its weights in."""
    from tutelage.tables import STEPS, read_table
    from tutelage.train.loop import train as loop

    loop(model, batches, task, folder=folder, progress=_Laps(clock, len(batches)))
    lines = [line for line in read_table(folder / "steps.parquet", STEPS).to_pylist() if line["part"] == "all"]
    working = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    weights, memory = (_stored(folder, name) for name in ("weights", "optimizer"))
    kinds = {"working": working, "weights": _kinds(weights), "optimizer": _kinds(memory)}
    _put_back(model, weights)
    return [line["loss_sum"] / line["weight"] for line in lines], kinds


def _stored(folder: Path, name: str) -> dict[str, Any]:
    """What the last checkpoint keeps: the weights that the optimizer moves, and what it remembers of them."""
    from safetensors.torch import load_file

    return load_file(max((folder / "checkpoints").glob("step-*")) / f"{name}.safetensors")


def _kinds(tensors: dict[str, Any]) -> list[str]:
    return sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values() if value.ndim})


def _put_back(model: Any, weights: dict[str, Any]) -> None:
    """Nothing; the model holds the weights themselves, not their rounded copies: the peers are measured on theirs too."""
    import torch

    with torch.no_grad():
        model.float()
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])


def _pure(model: Any, batches: _Steps, task: Any, clock: Clock, folder: Path) -> tuple[list[float], dict[str, list[str]]]:
    """Our gradients with torch's AdamW on the model's own bfloat16 weights: what the peers do when their model is bfloat16.

    The library itself always keeps float32 weights behind narrow ones; this is here for equal precision alone.
    """
    import torch

    from tutelage.allocator import keep_memory
    from tutelage.train.step import learner_of, step_gradients

    if task.spec.micro_batch_tokens is None:  # as the loop does
        keep_memory()
    learner = learner_of(model, task.spec, Silent()).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=task.learning_rate, weight_decay=task.spec.weight_decay, fused=True)
    losses = []
    for step in range(len(batches)):
        batch = batches[step]
        optimizer.zero_grad(set_to_none=True)
        sizes = {name: getattr(task.spec, name) for name in ("micro_batch_rows", "micro_batch_tokens")}
        flat, nll_N = step_gradients(learner, batch, **sizes)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(float((flat.weights * nll_N).sum() / batch.total_weight))
        clock.lap()
    return losses, states_of(model, optimizer)


def _warm_up(model: Any, batch: Batch) -> None:
    """As the others: threads and kernels start on one short row; layers that are compiled are compiled now."""
    import torch

    from tutelage.model import Learner

    model.train()
    ids = torch.as_tensor(batch.inputs[0, :64].astype("int64"), device=next(model.parameters()).device)
    positions = torch.arange(len(ids), device=ids.device)
    loss_sum, *_ = Learner(model)(ids, ids, torch.ones(len(ids), device=ids.device), positions_N=positions, lengths=(len(ids),))
    loss_sum.backward()
    model.zero_grad(set_to_none=True)


def _flops(model: Any, steps: Sequence[Batch], task: Any) -> int:
    from tutelage.train.flops import executed, step_flops
    from tutelage.train.micro import flatten, rows_in_pass
    from tutelage.train.work import work_of

    work, total = work_of(model), 0
    for batch in steps:
        lengths, num_targets = executed(flatten(batch), rows_in_pass(batch.inputs.shape[1], task.spec.micro_batch_rows))
        total += step_flops(work, lengths, num_targets=num_targets).total
    return total


def documents_of(batch: Batch) -> Iterator[list[Document]]:
    """The documents of each row that holds any, their targets shifted back to the tokens they are."""
    rows: dict[int, list[Placed]] = {}
    for placed in sorted(batch.documents, key=lambda document: (document.row, document.start)):
        rows.setdefault(placed.row, []).append(placed)
    for row, documents in rows.items():
        yield [_document(batch, row, slice(at.start, at.start + at.length)) for at in documents]


def _document(batch: Batch, row: int, here: slice) -> Document:
    ids = batch.inputs[row, here].tolist()
    is_trained = (batch.weights[row, here][:-1] > 0).tolist()
    return ids, [IGNORED] + [token if on else IGNORED for token, on in zip(ids[1:], is_trained, strict=True)]


def turned(batch: Batch) -> Batch:
    """The same step with its rows in the opposite order: other sums, the same gradient but for rounding."""
    names = ("inputs", "targets", "weights", "positions", "segments", "tasks", "sources", "kinds")
    columns = {name: getattr(batch, name)[::-1].copy() for name in names}
    placed = tuple(dataclasses.replace(document, row=batch.num_rows - 1 - document.row) for document in batch.documents)
    return dataclasses.replace(batch, documents=placed, **columns)
