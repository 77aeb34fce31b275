"""Mistakes that only show between two parts of a recipe, or between a recipe and the files it names."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tutelage.errors import Problem, did_you_mean
from tutelage.recipe_errors import Located


def problems_between(sections: Mapping[str, Any], located: Located, *, folder: Path) -> list[Problem]:
    """All such problems; a section that is itself invalid is absent from `sections` and not looked at."""
    return [
        *_missing_files(sections, located, folder),
        *_unknown_tasks(sections, located),
        *_batch(sections, located),
    ]


def _missing_files(sections: Mapping[str, Any], located: Located, folder: Path) -> Iterator[Problem]:
    for name, source in sections.get("sources", {}).items():
        if source.path is not None and "://" not in source.path and not glob.glob(str(folder / source.path), recursive=True):
            yield located.problem(
                ("sources", name, "path"), f"no file matches {source.path!r} below {folder}; paths start at the recipe's folder"
            )
    render = sections.get("render")
    if render is not None and render.template != "model" and not (folder / render.template).is_file():
        yield located.problem(("render", "template"), f"no file {render.template!r} below {folder}; `model` is the model's own")


def _unknown_tasks(sections: Mapping[str, Any], located: Located) -> Iterator[Problem]:
    sources = sections.get("sources", {})
    whole = isinstance(located.data, dict) and len(sources) == len(located.data.get("sources") or {})
    if not whole or any(source.task_column for source in sources.values()):
        return  # tasks are not known before the data is read
    tasks = {source.task or name for name, source in sources.items()}
    for index, task in enumerate(sections["split"].unseen_tasks if "split" in sections else ()):
        if task not in tasks:
            yield located.problem(("split", "unseen_tasks", index), f"no source has task {task!r}; {did_you_mean(task, tasks)}")
    rates = sections["mix"].rates if "mix" in sections else None
    for task in getattr(rates, "weights", {}):
        if task not in tasks:
            yield located.problem(("mix", "rates", "weights", task), f"no source has this task; {did_you_mean(task, tasks)}")


def _batch(sections: Mapping[str, Any], located: Located) -> Iterator[Problem]:
    batch, render = sections.get("batch"), sections.get("render")
    if batch is None or render is None:
        return
    capacity = batch.capacity or render.max_tokens
    if capacity < render.max_tokens:
        yield located.problem(
            ("batch", "capacity"),
            f"a row of {capacity} cannot hold render.max_tokens {render.max_tokens}; raise one or lower the other",
        )
    if batch.slots_per_step is not None and batch.slots_per_step % capacity:
        low = batch.slots_per_step // capacity * capacity
        near = f"{low} or {low + capacity}" if low else f"{capacity}"
        yield located.problem(
            ("batch", "slots_per_step"),
            f"{batch.slots_per_step} slots are not whole rows of {capacity}; the nearest: {near}",
        )
    train = sections.get("train")
    if train is not None and train.micro_batch_rows and batch.slots_per_step and not batch.slots_per_step % capacity:
        rows = batch.slots_per_step // capacity
        if rows % train.micro_batch_rows:
            fits = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
            yield located.problem(
                ("train", "micro_batch_rows"), f"{rows} rows per step do not divide by {train.micro_batch_rows}; these do: {fits}"
            )
