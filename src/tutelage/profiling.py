"""What `tutelage train --profile` does: a recipe's own first steps, timed, with nothing kept of them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tutelage.pipeline import build_pipeline, open_batches, produced
from tutelage.recipe import RecipeFile
from tutelage.records import Batch
from tutelage.report.tables import Column, Table
from tutelage.store import Artefact, Progress, Silent, Store
from tutelage.train.stage import Making, open_training

if TYPE_CHECKING:
    from tutelage.train.loop import Task
    from tutelage.train.profile import StepProfile

NUM_STEPS = 3
"""Steps that are timed, after one that warms up."""


def profile_recipe(
    file: RecipeFile,
    *,
    num_steps: int = NUM_STEPS,
    store: Path = Path(".tutelage"),
    progress: Progress | None = None,
) -> StepProfile:
    """Where the steps of this recipe spend their time here. Runs up to the plan, then a few steps whose weights are thrown away.

    The run's folder, its checkpoints and logs are left as they are. Errors are those of training.
    """
    import torch

    from tutelage.train.profile import profile_steps

    threads = torch.get_num_threads()
    torch.set_num_threads(file.recipe.train.num_threads or threads)
    try:
        with tempfile.TemporaryDirectory(prefix="tutelage-profile-") as folder:
            begun = begin_training(file, Path(folder), store=store, progress=progress)
            return profile_steps(*begun, num_steps=num_steps, progress=progress)
    finally:
        torch.set_num_threads(threads)


def begin_training(
    file: RecipeFile, folder: Path, *, store: Path = Path(".tutelage"), progress: Progress | None = None
) -> tuple[Any, Sequence[Batch], Task]:
    """(model, batches, task) as the recipe's training begins with them, for `profile_steps` or `train.loop.train`.

    Runs up to the plan. `folder` gets what is decided for this machine (precision, threads, compiling) and nothing else.
    """
    recipe, progress = file.recipe, progress or Silent()
    made = training_artefacts(file, store=store, progress=progress)
    making = Making(open_batches, None, is_packed=recipe.batch.pack != "none")
    return open_training(folder, made, progress, of=(recipe.model, recipe.train, recipe.evaluate), making=making)


def training_artefacts(
    file: RecipeFile, *, store: Path = Path(".tutelage"), progress: Progress | None = None
) -> dict[str, Artefact]:
    """What training begins with, by label: the plan and all before it, and the model. No run folder is written."""
    place = Store(store)
    with place.in_use():
        pipeline = build_pipeline(file, store=place)
        wanted = {*pipeline.needed("plan"), "model"}
        return dict(produced(pipeline, [label for label in pipeline.stages if label in wanted], progress or Silent()))


def profile_table(profile: StepProfile) -> Table:
    """Parts of a step: seconds each, and their share."""
    columns = (Column("part", "part"), Column("seconds", "seconds a step", "loss"), Column("share", "share", "share"))
    rows = [(part, seconds / profile.num_steps, profile.shares[part]) for part, seconds in profile.seconds.items()]
    total = ("", profile.step_seconds / profile.num_steps, 1.0)
    return Table("Where a step goes", columns, (*rows, total))
