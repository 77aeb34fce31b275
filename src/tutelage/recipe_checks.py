"""Mistakes that only show between two parts of a recipe, or between a recipe and the files it names."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tutelage.errors import Problem, TrainError, did_you_mean
from tutelage.extend_spec import extension_problems
from tutelage.model.spec import ModelSpec
from tutelage.plan.rates_spec import Groups, bound_names, rate_names
from tutelage.plan.schedule_spec import Online, schedule_names
from tutelage.plan.spec import BatchSpec
from tutelage.plan.windows import DEFAULT_ROWS
from tutelage.recipe_errors import Located
from tutelage.train.batching import Shape, default_rows_per_pass, num_devices, solve
from tutelage.train.remarks import rate_remark
from tutelage.train.spec import TrainSpec


def problems_between(sections: Mapping[str, Any], located: Located, *, folder: Path) -> list[Problem]:
    """All such problems; a section that is itself invalid is absent from `sections` and not looked at."""
    return [
        *_missing_files(sections, located, folder),
        *_unknown_tasks(sections, located),
        *_unknown_in_mix(sections, located),
        *_batch(sections, located),
        *_online(sections, located),
        *_extensions(sections, located),
    ]


def _extensions(sections: Mapping[str, Any], located: Located) -> Iterator[Problem]:
    mix, extend = sections.get("mix"), sections.get("extend")
    if mix is not None and extend is not None:
        for i, field, message in extension_problems(mix, extend):
            yield located.problem(("extend", i, *([field] if field else [])), message)


def _missing_files(sections: Mapping[str, Any], located: Located, folder: Path) -> Iterator[Problem]:
    for name, source in sections.get("sources", {}).items():
        if source.path is not None and "://" not in source.path and not glob.glob(str(folder / source.path), recursive=True):
            yield located.problem(
                ("sources", name, "path"), f"no file matches {source.path!r} below {folder}; paths start at the recipe's folder"
            )
    render = sections.get("render")
    if render is not None and render.template != "model" and not (folder / render.template).is_file():
        yield located.problem(("render", "template"), f"no file {render.template!r} below {folder}; `model` is the model's own")


def _all_sources(sections: Mapping[str, Any], located: Located) -> dict[str, Any] | None:
    """The sources by name; None when one of them is itself invalid."""
    sources: dict[str, Any] = sections.get("sources", {})
    whole = isinstance(located.data, dict) and len(sources) == len(located.data.get("sources") or {})
    return sources if whole else None


def _tasks(sections: Mapping[str, Any], located: Located) -> set[str] | None:
    """The tasks; None when they are not known before the data is read."""
    sources = _all_sources(sections, located)
    if sources is None or any(source.task_column for source in sources.values()):
        return None
    return {source.task or name for name, source in sources.items()}


def _unknown_in_mix(sections: Mapping[str, Any], located: Located) -> Iterator[Problem]:
    """Tasks (or sources) that the mixture names and nobody has, and those that its groups forget."""
    mix = sections.get("mix")
    known = None
    if mix is not None:
        known = _all_sources(sections, located) if mix.over == "sources" else _tasks(sections, located)
    if mix is None or known is None:
        return
    missing = "no such source" if mix.over == "sources" else "no source has this task"
    named = [(("mix", "rates", *path), name) for path, name in rate_names(mix.rates)]
    if mix.schedule is not None:
        named = [(("mix", "schedule", *path), name) for path, name in schedule_names(mix.schedule)]
    bounds = [
        (("mix", field, name), name) for field in ("max_visits", "min_examples") for name in bound_names(getattr(mix, field))
    ]
    for path, name in [*named, *bounds]:
        if name not in known:
            yield located.problem(path, f"{missing}; {did_you_mean(name, known)}")
    if isinstance(mix.rates, Groups) and mix.rates.rest == "error":
        unseen = _unseen(sections)
        if mix.over == "sources":
            unseen = tuple(name for name, source in sections["sources"].items() if (source.task or name) in unseen)
        forgotten = sorted(set(known) - {name for _, name in named} - set(unseen))
        if forgotten:
            yield located.problem(
                ("mix", "rates", "groups"),
                f"in no group: {', '.join(forgotten)}; put each into one, or set `rest: drop` to leave them out",
            )


def _unseen(sections: Mapping[str, Any]) -> tuple[str, ...]:
    return sections["split"].unseen_tasks if "split" in sections else ()


def _unknown_tasks(sections: Mapping[str, Any], located: Located) -> Iterator[Problem]:
    tasks = _tasks(sections, located)
    if tasks is None:
        return
    for index, task in enumerate(_unseen(sections)):
        if task not in tasks:
            yield located.problem(("split", "unseen_tasks", index), f"no source has task {task!r}; {did_you_mean(task, tasks)}")


def _online(sections: Mapping[str, Any], located: Located) -> Iterator[Problem]:
    """What a mixture that is decided while training needs from other sections."""
    mix, batch, loss, split = (sections.get(name) for name in ("mix", "batch", "loss", "split"))
    if mix is None or not isinstance(mix.schedule, Online):
        return
    if batch is not None and batch.examples_per_step is None:
        yield located.problem(
            ("mix", "schedule"),
            "`online` needs batch.examples_per_step; with slots per step the number of steps would depend on the mixture",
        )
    if loss is not None and loss.normalise == "task":
        yield located.problem(("loss", "normalise"), "`task` needs the visits of the whole run, unknown ahead under `online`")
    if split is not None and split.held_out_share == 0:
        yield located.problem(("split", "held_out_share"), "`online` follows held-out losses; hold something out, 0.05 say")


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
    rows = _rows_per_step(batch, render.max_tokens)
    train = sections.get("train")
    if rows is not None and train is not None:
        yield from _division(rows, train.micro_batch_rows, located)


def _rows_per_step(batch: BatchSpec, max_tokens: int) -> int | None:
    """Rows of every full step; None where they vary, or where the section itself is at fault."""
    capacity = batch.capacity or max_tokens
    if batch.examples_per_step is not None or batch.pack == "none" or capacity < max_tokens:
        return None
    slots = DEFAULT_ROWS * capacity if batch.slots_per_step is None else batch.slots_per_step
    return slots // capacity if slots >= capacity and slots % capacity == 0 else None


def _division(rows: int, micro_batch_rows: int | str | None, located: Located) -> Iterator[Problem]:
    """Rows that do not divide by those of a pass, or by the devices that torchrun has started."""
    stated = micro_batch_rows if isinstance(micro_batch_rows, int) else None
    path = ("batch", "slots_per_step") if stated is None else ("train", "micro_batch_rows")
    try:
        solve(rows, rows_per_pass=stated or 1, num_devices=num_devices(os.environ), exact=True)
    except TrainError as error:
        yield located.problem(path, str(error))


def training_lines(batch: BatchSpec, *, max_tokens: int, train: TrainSpec, model: ModelSpec) -> list[str]:
    """What a recipe means for training, for people: the arithmetic of a step, and a rate outside the usual range."""
    shape, capacity, devices = step_shape(batch, max_tokens=max_tokens, train=train), batch.capacity or max_tokens, _devices()
    if shape is None:
        held = f"{batch.examples_per_step} examples" if batch.examples_per_step else f"{batch.slots_per_step} slots"
        line = f"batch: {held} per step; its rows vary, and those of a step are shared by {devices} device{'s' * (devices > 1)}"
    else:
        fitted = "; `auto` may take more rows per device" if train.micro_batch_rows == "auto" else ""
        line = f"batch: {shape.text}, {capacity:,} slots each{fitted}"
    remark = rate_remark(train.learning_rate, model.adapter.kind)
    return [line, *([remark] if remark else [])]


def step_shape(batch: BatchSpec, *, max_tokens: int, train: TrainSpec) -> Shape | None:
    """The rows of a step over devices and passes; None where their number varies from step to step."""
    rows, stated, devices = _rows_per_step(batch, max_tokens), train.micro_batch_rows, _devices()
    if rows is None:
        return None
    capacity = batch.capacity or max_tokens
    per_pass = stated if isinstance(stated, int) else min(default_rows_per_pass(capacity), max(1, rows // devices))
    return solve(rows, rows_per_pass=per_pass, num_devices=devices)


def _devices() -> int:
    return num_devices(os.environ)
