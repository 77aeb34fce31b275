"""Trainers: which columns each of them isolates packed documents by, and the arguments that make it train the plan.

    plan's row     ids 5 6 7 | 8 9 .     weights 0 1 0 | 1 0 .      (. = padding, never exported)
    trl            input_ids 5 6 7 8 9   labels -100 -100 7 -100 9   seq_lengths 3 2
    transformers   input_ids             labels                      position_ids 0 1 2 0 1
    axolotl        input_ids             labels                      position_ids, attention_mask 1 1 1 1 1
    weights        input_ids             targets 6 7 -100 9 -100     loss_weights, position_ids, segments, ...

Models of `transformers` shift labels themselves, along the whole row: the first token of every document is -100 there, or
the last position of its neighbour would learn it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pyarrow as pa

from tutelage.records import NO_TARGET, Batch, Float32, Int32, Int64

Trainer = Literal["trl", "axolotl", "transformers", "weights"]
TRAINERS: tuple[Trainer, ...] = get_args(Trainer)

_INTS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
_LABELS = [("input_ids", _INTS), ("labels", _INTS)]
SCHEMAS: dict[Trainer, pa.Schema] = {
    "trl": pa.schema([*_LABELS, ("seq_lengths", _INTS)]),
    "axolotl": pa.schema([*_LABELS, ("attention_mask", pa.list_(pa.int8())), ("position_ids", _INTS)]),
    "transformers": pa.schema([*_LABELS, ("position_ids", _INTS)]),
    "weights": pa.schema(
        [
            ("step", pa.int64()),
            ("total_weight", pa.float64()),
            ("input_ids", _INTS),
            ("targets", _INTS),
            ("loss_weights", _FLOATS),
            ("position_ids", _INTS),
            ("segments", _INTS),
            ("tasks", pa.list_(pa.int16())),
            ("sources", pa.list_(pa.int16())),
            ("kinds", pa.list_(pa.uint8())),
        ]
    ),
}
"""One line per row of the plan, without padding. `total_weight` is the denominator of the whole step, on each of its rows."""


@dataclass(frozen=True)
class FlatRows:
    """A step's rows end to end without padding: `real` picks the tokens (N,) of a batch, `offsets` (R + 1,) bound the rows.

    `lengths` (D,) are the documents' and `document_offsets` (R + 1,) say which are in which row. Rows of
    padding alone are left out.
    """

    batch: Batch
    real: np.ndarray
    offsets: Int64
    lengths: Int64
    document_offsets: Int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def take(self, name: str) -> np.ndarray:
        """One array of the batch, its real tokens (N,)."""
        values: np.ndarray = getattr(self.batch, name)[self.real]
        return values


def flat_rows(batch: Batch) -> FlatRows:
    """The rows of a batch that hold a token."""
    real = batch.segments > 0
    tokens = real.sum(axis=1)
    is_first = real & (batch.positions == 0)
    starts = np.append(np.flatnonzero(is_first[real]), tokens.sum())
    kept = tokens > 0
    return FlatRows(
        batch=batch,
        real=real,
        offsets=np.concatenate([[0], np.cumsum(tokens[kept])]),
        lengths=np.diff(starts),
        document_offsets=np.concatenate([[0], np.cumsum(is_first.sum(axis=1)[kept])]),
    )


def labels_of(targets: Int32, weights: Float32) -> Int32:
    """Labels for models that shift by themselves, (N,): token i + 1 is learned where position i has a target with weight.

    >>> labels_of(np.array([6, 7, -100, 9, -100]), np.array([0, 1, 0, 1, 0], np.float32)).tolist()       # 5 6 7 | 8 9
    [-100, -100, 7, -100, 9]

    The last position of a document has no target, so the first token of the next, and of the next row, is never learned.
    """
    labels: Int32 = np.full(len(targets), NO_TARGET, np.int32)
    labels[1:] = np.where(weights[:-1] > 0, targets[:-1], NO_TARGET)
    return labels


def columns_of(rows: FlatRows, trainer: Trainer) -> pa.RecordBatch:
    """The rows of a step as the columns of `SCHEMAS[trainer]`."""
    ids, num = rows.take("inputs"), len(rows)
    labels = labels_of(rows.take("targets"), rows.take("weights"))
    assert (labels[labels != NO_TARGET] == ids[labels != NO_TARGET]).all(), "a label is the token itself"
    make: dict[str, Callable[[], Sequence[float] | np.ndarray]] = {
        "input_ids": lambda: ids,
        "labels": lambda: labels,
        "attention_mask": lambda: np.ones(len(ids), np.int8),
        "position_ids": lambda: rows.take("positions"),
        "loss_weights": lambda: rows.take("weights"),
    }
    columns = []
    for field in SCHEMAS[trainer]:
        match field.name:
            case "step":
                column = pa.array(np.full(num, rows.batch.step))
            case "total_weight":
                column = pa.array(np.full(num, rows.batch.total_weight))
            case "seq_lengths":
                column = _lists(rows.lengths, rows.document_offsets, field.type)
            case name:
                values = make[name]() if name in make else rows.take(name)
                column = _lists(np.asarray(values), rows.offsets, field.type)
        columns.append(column)
    return pa.record_batch(columns, schema=SCHEMAS[trainer])


def _lists(values: np.ndarray, offsets: Int64, kind: pa.DataType) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, kind.value_type), type=kind)


@dataclass(frozen=True)
class Training:
    """What a person must tell a trainer to train the plan: where the rows are, and how many make a step."""

    folder: str
    is_parquet: bool
    model: str
    rows_per_step: int
    capacity: int

    @property
    def loading(self) -> str:
        """The Python expression that opens the rows."""
        if self.is_parquet:
            return f'load_dataset("parquet", data_files="{self.folder}/*.parquet", split="train")'
        return f'load_from_disk("{self.folder}")'


def how_to_train(training: Training, trainer: Trainer) -> str:
    """The exact arguments, as text to copy."""
    opener = "load_dataset" if training.is_parquet else "load_from_disk"
    values = {**vars(training), "loading": training.loading, "opener": opener}
    parquet = f'\n    ds_type: parquet\n    data_files: "{training.folder}/*.parquet"\n    split: train'
    values["data_files"] = parquet if training.is_parquet else ""
    return _HOW[trainer].format(**values)


CODE_LANGUAGE: dict[Trainer, str] = {"trl": "python", "axolotl": "yaml", "transformers": "python", "weights": "python"}

_HOW: dict[Trainer, str] = {
    "trl": """\
from datasets import {opener}
from trl import SFTConfig, SFTTrainer

args = SFTConfig(
    output_dir="out",
    per_device_train_batch_size={rows_per_step},  # rows; times accumulation, times devices: {rows_per_step} is one step
    gradient_accumulation_steps=1,
    num_train_epochs=1,  # every pass over the data is in the rows already
    train_sampling_strategy="sequential",  # the plan's order
    padding_free=True,  # isolates by seq_lengths
    packing=False,  # the rows are packed
    max_length=None,
    dataset_kwargs={{"skip_prepare_dataset": True}},
)
SFTTrainer(model="{model}", args=args, train_dataset={loading}).train()
""",
    "axolotl": """\
base_model: {model}
datasets:
  - path: {folder}{data_files}
    type:  # empty: the rows are token ids already
sequence_len: {capacity}
sample_packing: false  # the rows are packed
pad_to_sequence_len: false  # a padded row would lose its isolation
attn_implementation: flash_attention_2  # isolates by position_ids; sdpa and eager do not here
micro_batch_size: 1  # rows; more than one a time are padded
gradient_accumulation_steps: {rows_per_step}  # times devices: {rows_per_step} rows are one step
num_epochs: 1  # every pass over the data is in the rows already
curriculum_sampling: true  # the plan's order
shuffle_merged_datasets: false
val_set_size: 0
""",
    "transformers": """\
from datasets import {opener}
from torch import tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


def joined(rows):  # the rows of a micro-batch as one long row; no attention_mask: documents are told apart by positions
    return {{name: tensor([sum((row[name] for row in rows), [])]) for name in ("input_ids", "labels", "position_ids")}}


args = TrainingArguments(
    output_dir="out",
    per_device_train_batch_size=1,  # rows; times accumulation, times devices: {rows_per_step} is one step
    gradient_accumulation_steps={rows_per_step},
    num_train_epochs=1,  # every pass over the data is in the rows already
    train_sampling_strategy="sequential",  # the plan's order
)
model = AutoModelForCausalLM.from_pretrained("{model}")
Trainer(model=model, args=args, train_dataset={loading}, data_collator=joined).train()
""",
    "weights": """\
from datasets import {opener}

rows = {loading}
# step by step: sum(loss_weights * nll(targets)) over all rows of a step, divided once by that step's total_weight
""",
}
