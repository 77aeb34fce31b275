"""Export: the packed rows of a plan, step by step, as a folder that other trainers train on exactly as planned.

    Batches --step by step--> one weight? equal rows per step? --> rows without padding --> shards, README, manifest

Trainers that know labels only learn a token whole or not at all: fractional weights are refused for them, never rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tutelage import __version__
from tutelage.errors import PlanError, did_you_mean
from tutelage.plan.row_folder import FORMATS, Format, RowFolder, check_folder
from tutelage.plan.trainers import CODE_LANGUAGE, SCHEMAS, TRAINERS, Trainer, Training, columns_of, flat_rows, how_to_train
from tutelage.records import Batch, Document
from tutelage.store import Progress, Silent

Word = TypeVar("Word", bound=str)
_WEIGHT_TOLERANCE = 1e-9


@dataclass(frozen=True)
class About:
    """What the README of an export says of where its rows come from; all of it may be left out.

    `facts` are further lines (recipe, loss rule, plan key, ...), `model` the folder or name of the model whose tokens these
    are, `name_of` what people call a document (its source, file and line).
    """

    facts: Mapping[str, str] = field(default_factory=dict)
    model: str = "MODEL"
    name_of: Callable[[Document], str] = lambda document: f"example {document.example}"


@dataclass(frozen=True)
class Exported:
    """What was written: where, how many steps, rows and tokens, and how to train on it.

    Every step has `rows_per_step` rows, the last one `last_rows` (0: the steps differ, which only `weights` allows).
    `factor` is the one weight that all trained tokens share, None for `weights`.
    """

    folder: Path
    to: Trainer
    format: Format
    num_steps: int = 0
    num_rows: int = 0
    rows_per_step: int = 0
    last_rows: int = 0
    capacity: int = 0
    num_tokens: int = 0
    num_trained: int = 0
    factor: float | None = None
    how_to_train: str = ""

    def as_json(self) -> dict[str, Any]:
        """The facts as plain values."""
        return vars(self) | {"folder": str(self.folder)}

    def lines(self) -> list[str]:
        """What to tell whoever asked for it."""
        told = f"{self.folder}: {self.num_rows:,} rows in {self.num_steps:,} steps for {self.to}, {self.num_tokens:,} tokens"
        return [f"{told}, {self.num_trained:,} trained", "", self.how_to_train.rstrip(), "", f"more in {self.folder}/README.md"]


def export_plan(
    batches: Sequence[Batch],
    folder: Path | str,
    *,
    to: Trainer = "trl",
    file_format: Format = "datasets",
    overwrite: bool = False,
    about: About | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Writes the rows of all steps in training order into `folder`, and returns the `Exported` facts.

    `to` says which columns: `trl` (input_ids, labels, seq_lengths), `axolotl` (with attention_mask and position_ids),
    `transformers` (with position_ids), or `weights` (shifted targets and their float32 weights, for loops of one's own).
    `file_format` is a `datasets` folder or plain `parquet`. Padding is left out, and rows of padding alone.

    >>> import tempfile
    >>> from tutelage.plan import assemble, batch, spec
    >>> from tutelage.records import Kind, Rendered
    >>> kinds, turns = np.array([Kind.USER, Kind.ASSISTANT, Kind.STOP], np.uint8), np.array([0, 1, 1], np.int16)
    >>> chats = [Rendered(np.array(ids, np.int32), kinds, turns, np.ones(2, np.float32)) for ids in ([10, 11, 12], [20, 21, 22])]
    >>> plan = assemble.make_plan(["qa", "qa"], [3, 3], weights=[2.0, 2.0], batch=spec.BatchSpec(slots_per_step=8, capacity=8))
    >>> with tempfile.TemporaryDirectory() as place:
    ...     made = export_plan(batch.Batches.of(plan, chats), f"{place}/rows", to="trl")
    >>> made.num_steps, made.num_rows, made.num_tokens, made.num_trained, made.factor
    (1, 1, 6, 4, 1.0)

    Raises PlanError, and leaves no folder, when the trainer could not do what the plan says: weights that differ from
    one another, or steps of unequally many rows; TutelageError when the folder exists (unless `overwrite`).
    """
    folder, about, progress = Path(folder), about or About(), progress or Silent()
    to, file_format = known_trainer(to), known_format(file_format)
    check_folder(folder, overwrite=overwrite)
    made = Exported(folder, to, file_format)
    one_weight, equal_rows = _OneWeight(to, about), _EqualRows(to)
    with RowFolder(folder, SCHEMAS[to], file_format=file_format, overwrite=overwrite) as out:
        progress.start("export", len(batches), "steps")
        for step in range(len(batches)):
            batch = batches[step]
            one_weight.check(batch)
            rows = flat_rows(batch)
            equal_rows.check(batch, len(rows))
            out.write(columns_of(rows, to))
            progress.advance()
            made = _add(made, batch, len(rows))
        made = replace(made, rows_per_step=equal_rows.per_step, last_rows=equal_rows.last, factor=one_weight.factor)
        made = replace(made, how_to_train=how_to_train(_training(made, about), to))
        out.finish({"README.md": _readme(made, about)}, _manifest(made, about))
    return made


def known_trainer(word: str) -> Trainer:
    """The trainer of that name; PlanError names the nearest."""
    return _known("to", word, TRAINERS)


def known_format(word: str) -> Format:
    """The format of that name; PlanError names the nearest."""
    return _known("format", word, FORMATS)


def _known(option: str, word: str, known: Sequence[Word]) -> Word:
    for name in known:
        if name == word:
            return name
    raise PlanError(f"--{option} {word}: {did_you_mean(word, known)}")


def _add(made: Exported, batch: Batch, num_rows: int) -> Exported:
    return replace(
        made,
        num_steps=made.num_steps + 1,
        num_rows=made.num_rows + num_rows,
        capacity=max(made.capacity, batch.inputs.shape[1]),
        num_tokens=made.num_tokens + batch.real_tokens,
        num_trained=made.num_trained + int((batch.weights > 0).sum()),
    )


class _OneWeight:
    """The weight that all trained tokens so far share: sum(w * nll) / sum(w) is then the mean that trainers compute."""

    def __init__(self, to: Trainer, about: About) -> None:
        self._to, self._name_of = to, about.name_of
        self._rule = f" (loss: {about.facts['loss']})" if "loss" in about.facts else ""
        self.factor: float | None = None
        self._first = ""

    def check(self, batch: Batch) -> None:
        if self._to == "weights":
            return
        trained = batch.weights > 0
        if self.factor is None and trained.any():
            self.factor = float(batch.weights[trained][0])
            self._first = self._where(batch, trained)
        if (differs := trained & (batch.weights != np.float32(self.factor or 0.0))).any():
            self._refuse(batch, differs)
        total = (self.factor or 0.0) * int(trained.sum())
        if not np.isclose(total, batch.total_weight, rtol=_WEIGHT_TOLERANCE):
            raise PlanError(
                f"step {batch.step}: its loss is divided by {batch.total_weight:g}, but its weights sum to {total:g}; "
                f"{self._to} divides by the number of trained tokens; export with --to weights"
            )

    def _refuse(self, batch: Batch, differs: np.ndarray) -> None:
        other, where = float(batch.weights[differs][0]), self._where(batch, differs)
        found = [(self.factor, self._first), (other, where)]
        if self.factor == 1.0:
            found.reverse()
        (weight, record), (second, place) = found
        raise PlanError(
            f"step {batch.step}: a token of {record} has loss weight {weight:g} and one of {place} {second:g}"
            f"{self._rule}; {self._to} learns a token whole or not at all, and nothing is rounded here. "
            "Either export with --to weights, for a loop that takes them, or make all weights one: a `loss` that gives 0 or 1 "
            "(response, instruction_modelling, full) with `normalise: token`, one `weight` for all sources and records, no learn "
            "weights between 0 and 1"
        )

    def _where(self, batch: Batch, marked: np.ndarray) -> str:
        row, slot = (int(value) for value in np.argwhere(marked)[0])
        inside = [d for d in batch.documents if d.row == row and d.start <= slot < d.start + d.length]
        return self._name_of(inside[0]) if inside else f"row {row}"


class _EqualRows:
    """How many rows each step has; trainers take equally many, and fewer only in the last."""

    def __init__(self, to: Trainer) -> None:
        self._to = to
        self.per_step, self.last = 0, 0

    def check(self, batch: Batch, num_rows: int) -> None:
        is_first = batch.step == 0 or not self.last
        if is_first:
            self.per_step = num_rows
        elif self.last != self.per_step or num_rows > self.per_step:
            if self._to != "weights":
                self._refuse(batch, num_rows)
            self.per_step = 0
        self.last = num_rows

    def _refuse(self, batch: Batch, num_rows: int) -> None:
        step, found = (batch.step, num_rows) if num_rows > self.per_step else (batch.step - 1, self.last)
        raise PlanError(
            f"step {step} has {found} rows and step 0 has {self.per_step}: {self._to} takes equally many rows each step, so the "
            "plan's steps would be cut elsewhere. Either state steps as `batch.slots_per_step` with packing, or as "
            "`batch.examples_per_step` with `pack: none`, or export with --to weights, which has a column `step`"
        )


def _training(made: Exported, about: About) -> Training:
    return Training(
        folder=str(made.folder),
        is_parquet=made.format == "parquet",
        model=about.model,
        rows_per_step=made.rows_per_step,
        capacity=made.capacity,
    )


def _manifest(made: Exported, about: About) -> dict[str, Any]:
    return {"tutelage": __version__, **made.as_json(), "columns": SCHEMAS[made.to].names, "about": dict(about.facts)}


def _readme(made: Exported, about: About) -> str:
    """What lies in the folder, and how it is trained on."""
    facts = {
        **about.facts,
        "rows": f"{made.num_rows:,} in {made.num_steps:,} steps, in training order; {made.num_tokens:,} tokens, no padding",
        "rows per step": _rows_per_step(made),
        "trained tokens": f"{made.num_trained:,}{_weight_note(made)}",
        "columns": ", ".join(SCHEMAS[made.to].names),
    }
    lines = [f"# Packed rows for {made.to}", "", *(f"* {name}: {value}" for name, value in facts.items()), ""]
    lines += [_ISOLATION[made.to], "", f"```{CODE_LANGUAGE[made.to]}", made.how_to_train.rstrip(), "```", ""]
    return "\n".join(lines)


def _rows_per_step(made: Exported) -> str:
    if not made.rows_per_step:
        return "they differ; the column `step` says which row is of which step"
    if made.last_rows == made.rows_per_step:
        return f"{made.rows_per_step}"
    return (
        f"{made.rows_per_step}, and {made.last_rows} in the last step; on several devices `accelerate` fills that one up with "
        "rows it has trained before"
    )


def _weight_note(made: Exported) -> str:
    if made.factor in (None, 1.0):
        return ""
    return f", each of weight {made.factor:g} in the plan: a factor common to all changes no mean, so it is left out"


_ISOLATION: dict[Trainer, str] = {
    "trl": (
        "Documents are kept apart by `seq_lengths`, from which `padding_free=True` makes positions that restart. With "
        "`flash_attention_2` (or 3) and, since transformers 5, with `sdpa` and `eager`, each document sees itself only. Without "
        "`padding_free` every row would be one document. Tried with TRL 1.16 and transformers 5.23, on a CPU with `sdpa`."
    ),
    "axolotl": (
        "Documents are kept apart by `position_ids` under flash attention, in micro-batches of one unpadded row. Padding or "
        "another attention would bring the attention mask back, and every row would be one document. Tried with axolotl 0.19, "
        "up to its collator: flash attention needs a GPU."
    ),
    "transformers": (
        "Documents are kept apart by `position_ids` that restart, as long as there is no `attention_mask` and no cache (training "
        "has none) and a micro-batch is one long row. The collator below joins rows so; the default one pads and would not. "
        "Tried with transformers 5.23, on a CPU with `sdpa`."
    ),
    "weights": (
        "`targets` are shifted already, per document: position i learns `targets[i]` with weight `loss_weights[i]`, and the last "
        "position of a document learns nothing. The loss of a step is `sum(loss_weights * nll) / total_weight` over all its "
        "rows. `segments` number the documents of a row from 1; `position_ids` restart with each."
    ),
}
