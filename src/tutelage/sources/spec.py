"""What a recipe can say about raw data and its split."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from tutelage.spec import Many, Share, Spec

ShapeName = Literal["auto", "alpaca", "prompt_completion", "messages", "sharegpt", "natural_instructions", "columns"]


class ColumnsSpec(Spec):
    """Which column holds what, for files of any other shape. A `{name}` template may join several columns."""

    user: str
    """Column of the request, or a template such as `"{question}\\n{context}"`."""
    assistant: str
    """Column of the answer, or a template."""
    system: str | None = None
    """Column of the system prompt, or a template."""


class SourceSpec(Spec):
    """One source of training data."""

    path: str | None = None
    """A file, a glob, or fsspec URL; relative paths start at the recipe's folder. jsonl, json, csv, parquet, also .gz, .zst."""
    dataset: str | None = None
    """A Hugging Face hub dataset id, `name` or `name:config`, instead of `path` (extra `hub`)."""
    split_name: str = "train"
    """The split of a hub dataset."""
    shape: ShapeName = "auto"
    """How a record holds its conversation; `auto` decides per file from a sample and says what it decided."""
    columns: ColumnsSpec | None = None
    """The column names for `shape: columns`."""
    task: str | None = None
    """The task that mixtures count; the source's own name when left out."""
    task_column: str | None = None
    """A column that holds each record's task, instead of one task for the whole source."""
    licence: str = "unknown"
    """The licence of the data, an SPDX id where there is one."""
    licence_column: str | None = None
    """A column that holds each record's licence, where it varies."""
    origin: str = "human"
    """Who wrote the answers: `human` or `model:NAME`."""
    origin_column: str | None = None
    """A column that holds each record's origin, where it varies."""
    weight: float = Field(default=1.0, ge=0.0)
    """Multiplies the loss weight of every token of this source."""
    weight_field: str | None = None
    """A field at the top of each record that holds its own weight (a quality score, say), a number of 0 or more: it multiplies
    the loss weight of the record's tokens. A record without a usable one is set aside."""
    max_records: int | None = Field(default=None, ge=1)
    """Keep a seeded uniform sample of so many records (never the first ones)."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("needs exactly one of `path` and `dataset`")
        if (self.shape == "columns") != (self.columns is not None):
            raise ValueError("`shape: columns` and `columns:` go together")
        if self.origin != "human" and not (self.origin.startswith("model:") and len(self.origin) > 6):
            raise ValueError(f"origin is `human` or `model:NAME`, not {self.origin!r}")
        return self


class IntakeSpec(Spec):
    """What is let in at all."""

    licences: Many[str] | None = None
    """Only these licences; sources with another are refused before anything else happens. None allows all."""
    origins: Many[str] | None = None
    """Only these origins (`human`, `model:NAME`, or `model:*`). None allows all."""
    max_bad_share: Share = 0.01
    """The run stops before training when more than this share of a file's records is malformed."""
    max_record_bytes: int = Field(default=16_000_000, ge=1_000)
    """A longer line is set aside unread."""


class SplitSpec(Spec):
    """The one split into training and held-out records, made before anything else."""

    held_out_share: Share = 0.05
    """A record is held out when hash(seed, normalised first user text) falls below this share."""
    unseen_tasks: Many[str] = ()
    """Whole tasks kept out of training, to measure what carries over."""
    seed: int = 0
    """Changes which records are held out."""
