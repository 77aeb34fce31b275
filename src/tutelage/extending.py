"""`tutelage extend`: a finished run with another part behind it, as a recipe of its own that can be run, killed and extended.

runs/first            the finished run                     part 1: plan, audit, training    found in the store
runs/first-extended   `extend: [{epochs: 1}]` in its recipe     then: plan, audit, training, evaluation, report
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tutelage import pipeline
from tutelage.errors import Problem, RecipeError, TrainError
from tutelage.extend_spec import ExtendSpec, extension_problems
from tutelage.pipeline import Run
from tutelage.recipe import RecipeFile, load_recipe, moved
from tutelage.store import Progress, Store

_WHERE = "tutelage extend"


def open_run(path: Path, *, overrides: Sequence[str] = ()) -> RecipeFile:
    """The recipe of a finished run, from its folder, `runs/NAME`, or from the recipe file with the same overrides.

    A run folder's recipe is read as if it stood where the run was started from: its data has the same names as then.
    """
    if not path.is_dir():
        return load_recipe(path, overrides=overrides)
    record = path / "run.json"
    if not record.exists():
        raise RecipeError([Problem(str(path), "", "is no folder of a finished run: it has no run.json; name one, or its recipe")])
    return moved(load_recipe(path / "recipe.yaml", overrides=overrides), Path(json.loads(record.read_text())["recipe"]))


def extension(**given: Any) -> ExtendSpec:
    """The extension that these options ask for. Raises `RecipeError` for what cannot be."""
    try:
        return ExtendSpec(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise RecipeError(
            [Problem(_WHERE, "", str(fault["msg"]).removeprefix("Value error, ")) for fault in error.errors()]
        ) from None


def extended(file: RecipeFile, part: ExtendSpec, *, name: str | None = None) -> RecipeFile:
    """The recipe of the run in `file` with one more part, under a name of its own.

    Raises `RecipeError` for an extension that does not go with the run's mixture.
    """
    recipe = file.recipe
    extend = (*recipe.extend, part)
    if problems := list(extension_problems(recipe.mix, extend)):
        paths = [(".".join(["extend", str(i), *([field] if field else [])]), message) for i, field, message in problems]
        raise RecipeError([Problem(_WHERE, path, message) for path, message in paths])
    name = name or name_of(recipe.name)
    if name == recipe.name:
        raise RecipeError([Problem(_WHERE, "name", f"`{name}` is the run that is extended; choose another")])
    changed = recipe.model_copy(update={"name": name, "extend": extend})
    return dataclasses.replace(
        file, recipe=changed, origins={**file.origins, "name": f"--set {_WHERE}", "extend": f"--set {_WHERE}"}
    )


def name_of(name: str) -> str:
    """What the extension of a run is called.

    >>> name_of("first"), name_of("first-extended"), name_of("first-extended-2")
    ('first-extended', 'first-extended-2', 'first-extended-3')
    """
    found = re.fullmatch(r"(.+-extended)(?:-(\d+))?", name)
    return f"{name}-extended" if found is None else f"{found[1]}-{int(found[2] or 1) + 1}"


def extend(
    file: RecipeFile,
    part: ExtendSpec,
    *,
    name: str | None = None,
    store: Store | Path | str = ".tutelage",
    runs: Path | str = "runs",
    progress: Progress | None = None,
) -> Run:
    """The finished extension of the finished run in `file`; killed and called again, it goes on like any run.

    Raises `TrainError` when the run is not finished, `RecipeError` and others as `pipeline.run` does.
    """
    store = store if isinstance(store, Store) else Store(store)
    longer = extended(file, part, name=name)
    _require_finished(file, store)
    return pipeline.run(longer, store=store, runs=runs, progress=progress)


def _require_finished(file: RecipeFile, store: Store) -> None:
    """Nothing; raises `TrainError` when the store does not have the training of this recipe."""
    stage = pipeline.build_pipeline(file, store=store).stages["train"]
    if store.find(stage) is None:
        why = ", ".join(store.why_missing(stage)[:5])
        raise TrainError(
            f"{file.path}: no finished run of this recipe is in {store.root} ({why}), so there is nothing to extend; run it "
            f"first: tutelage run {file.path}; or name the folder of the run, which knows the values that were set for it"
        )
