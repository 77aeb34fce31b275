"""Mistakes that only show between two parts of a recipe, or between a recipe and the files it names."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tutelage.errors import Problem, did_you_mean
from tutelage.plan.rates_spec import Groups, bound_names, rate_names
from tutelage.plan.schedule_spec import Online, schedule_names
from tutelage.recipe_errors import Located


def problems_between(sections: Mapping[str, Any], located: Located, *, folder: Path) -> list[Problem]:
    """All such problems; a section that is itself invalid is absent from `sections` and not looked at."""
    return [
        *_missing_files(sections, located, folder),
        *_unknown_tasks(sections, located),
        *_unknown_in_mix(sections, located),
        *_batch(sections, located),
        *_online(sections, located),
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
    train = sections.get("train")
    if train is not None and train.micro_batch_rows and batch.slots_per_step and not batch.slots_per_step % capacity:
        rows = batch.slots_per_step // capacity
        if rows % train.micro_batch_rows:
            fits = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
            yield located.problem(
                ("train", "micro_batch_rows"), f"{rows} rows per step do not divide by {train.micro_batch_rows}; these do: {fits}"
            )
