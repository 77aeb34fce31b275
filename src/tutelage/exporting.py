"""What `tutelage export` does: a recipe to the packed rows of its plan, in a folder that another trainer trains on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tutelage.errors import PlanError
from tutelage.evaluate.stage import open_shards
from tutelage.model.stage import model_folder
from tutelage.pipeline import Run, run
from tutelage.plan.batch import Batches
from tutelage.plan.export import About, Exported, export_plan, known_format, known_trainer
from tutelage.plan.row_folder import Format, check_folder
from tutelage.plan.schedule_spec import Online
from tutelage.plan.trainers import Trainer
from tutelage.recipe import RecipeFile
from tutelage.records import Document
from tutelage.report.rows import row_ids
from tutelage.store import Progress, canonical_json
from tutelage.tables import PLANNED, read_table


@dataclass(frozen=True)
class Wanted:
    """For which trainer, in which format, and whether an earlier export in the same place may be replaced."""

    to: Trainer = "trl"
    file_format: Format = "datasets"
    overwrite: bool = False


def wanted(*, to: str, file_format: str, overwrite: bool) -> Wanted:
    """A `Wanted` from words; PlanError names the nearest known one."""
    return Wanted(known_trainer(to), known_format(file_format), overwrite)


def export_recipe(
    file: RecipeFile,
    folder: Path,
    how: Wanted | None = None,
    *,
    store: Path = Path(".tutelage"),
    runs: Path = Path("runs"),
    progress: Progress | None = None,
) -> Exported:
    """Runs a recipe up to its plan, and writes the plan's rows into `folder` as `export_plan` does.

    The audit stands before an export as it stands before training: what it finds wrong stops here too (AuditError).
    PlanError, before anything runs, for an online schedule, whose plan is made while training.
    """
    how = how or Wanted()
    check_folder(folder, overwrite=how.overwrite)
    _check_schedule(file)
    until = "audit" if file.recipe.audit.enabled else "plan"
    done = run(file, until=until, store=store, runs=runs, progress=progress)
    batches = Batches(done.artefacts["plan"].path, open_shards(done.artefacts))
    about = About(_facts(file, done, how.to), _model(file, done), _namer(done))
    return export_plan(batches, folder, **vars(how), about=about, progress=progress)


def _check_schedule(file: RecipeFile) -> None:
    if isinstance(file.recipe.mix.schedule, Online):
        raise PlanError(
            "mix.schedule (online): its shares follow from losses measured while training here, so there is no run to export; "
            "state `mix.rates`, or a schedule that is known ahead: `interpolate`, `stages` or `two_stage`"
        )


def _facts(file: RecipeFile, done: Run, to: Trainer) -> dict[str, str]:
    """What the README of the folder says of where its rows come from."""
    recipe, plan = file.recipe, done.artefacts["plan"]
    weights = {name: source.weight for name, source in recipe.sources.items() if source.weight != 1.0}
    facts = {
        "recipe": f"{recipe.name} ({file.path})",
        "model": f"{file.model_name}; the rows are ids of its tokenizer",
        "loss": canonical_json(recipe.loss.canonical()),
        "mix": canonical_json(recipe.mix.canonical()),
        "source weights": canonical_json(weights) if weights else "1",
        "plan": plan.key,
    }
    if to == "weights":
        facts |= {f"{name} by number": ", ".join(plan.facts[name]) for name in ("tasks", "sources")}
    return facts


def _model(file: RecipeFile, done: Run) -> str:
    """The folder that `from_pretrained` opens: a bundled model lies in the store."""
    return str(model_folder(done.artefacts["model"]).resolve()) if "model" in done.artefacts else file.model_name


def _namer(done: Run) -> Callable[[Document], str]:
    """A document's row id, `source/file:line`."""

    def name(document: Document) -> str:
        planned = read_table(done.artefacts["plan"].file("planned.parquet"), PLANNED).slice(document.example, 1).to_pylist()[0]
        return row_ids(done.artefacts, [planned["source"]], [planned["row"]])[0]

    return name
