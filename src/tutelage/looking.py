"""Finding planned examples to look at: by task, source, text or record id."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tutelage.errors import DataError, did_you_mean
from tutelage.evaluate.stage import open_shards
from tutelage.pipeline import Run, weigher
from tutelage.recipe import RecipeFile
from tutelage.report.data import ShownExample
from tutelage.report.fates import records_at
from tutelage.report.gather import open_decoder, show_example
from tutelage.tables import PLANNED, read_table


@dataclass(frozen=True)
class Wanted:
    """Which examples to show; None means any. `search` is looked for in the decoded text, whatever its case."""

    task: str | None = None
    source: str | None = None
    search: str | None = None
    row_id: str | None = None
    number: int = 3


def find_examples(file: RecipeFile, done: Run, wanted: Wanted) -> list[ShownExample]:
    """The first `wanted.number` planned examples that fit, spread over the plan; DataError when none does."""
    planned = read_table(done.artefacts["plan"].file("planned.parquet"), PLANNED).to_pylist()
    _require_known("task", wanted.task, {line["task"] for line in planned})
    _require_known("source", wanted.source, {line["source"] for line in planned})
    lines = [line for line in planned if wanted.task in (None, line["task"]) and wanted.source in (None, line["source"])]
    if wanted.row_id is None and wanted.search is None:
        lines = [lines[i] for i in np.linspace(0, len(lines) - 1, min(wanted.number, len(lines))).astype(int)]
    shown = []
    for example in _shown(file, done, lines, wanted):
        shown.append(example)
        if len(shown) == wanted.number:
            break
    if not shown:
        raise DataError(f"no planned example fits; `tutelage explain` shows what was dropped, among {len(planned):,} planned")
    return shown


def _shown(file: RecipeFile, done: Run, lines: list[dict[str, Any]], wanted: Wanted) -> Iterator[ShownExample]:
    shards = open_shards(done.artefacts)
    decode = open_decoder(done.artefacts["tokenizer"].path)
    weigh = weigher(file.recipe.loss)
    for line in lines:
        read = done.artefacts[f"read {line['source']}"]
        where = records_at(read.file("conversations.parquet"), [line["row"]])[line["row"]]
        row_id = f"{line['source']}/{where['file']}:{where['line']}"
        if wanted.row_id is not None and not row_id.endswith(wanted.row_id):
            continue
        example = shards.example(line["source"], line["shard"], line["index"])
        if wanted.search is not None and wanted.search.casefold() not in decode(example.ids.tolist()).casefold():
            continue
        weights = weigh(example) * np.float32(line["multiplier"])
        names = {"row_id": row_id, "task": line["task"], "source": line["source"]}
        yield show_example(example, weights, decode, **names, num_visits=line["num_visits"])


def _require_known(name: str, value: str | None, known: set[str]) -> None:
    if value is not None and value not in known:
        raise DataError(f"--{name} {value}: no planned example has it; {did_you_mean(value, known)}")


def as_json(example: ShownExample) -> dict[str, Any]:
    """The example as plain values."""
    return dataclasses.asdict(example)
