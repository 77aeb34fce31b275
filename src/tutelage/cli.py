"""The command line: verbs and printing only; every verb is a call or two into the library.

Exit codes: 0 done, 1 failed (an audit that finds what makes training wrong is one), 2 a mistake in what was given,
130 interrupted, 143 (or `train.requeue_exit_code`) stopped by SIGTERM (what was done is kept).
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from tutelage.errors import AuditError, StoreError, TrainError, TutelageError

if TYPE_CHECKING:
    from tutelage.pipeline import Run
    from tutelage.recipe import RecipeFile


class _Verbs(typer.core.TyperGroup):
    """Turns our exceptions into one message and the documented exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (AuditError, TrainError, StoreError) as error:
            message, code = str(error), 1
        except TutelageError as error:
            message, code = str(error), 2
        except KeyboardInterrupt as error:
            message, code = str(error) or "interrupted; run the same command again to go on from here", 130
            if (told := getattr(error, "exit_code", None)) is not None:  # the run was asked to stop, and kept everything
                message, code = f"{message}\nto go on: {shlex.join(['tutelage', *sys.argv[1:]])}", told
        sys.stderr.write(message + "\n")
        raise typer.Exit(code)


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    rich_markup_mode=None,  # its renderer alone takes longer to import than the answer may take
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Instruction tuning, exact and visible: raw data to a tuned, evaluated model, and the evidence for it.",
    epilog="Exit codes: 0 done, 1 failed, 2 a mistake in what was given, 130 interrupted, 143 stopped by SIGTERM "
    "(run the same command to go on).",
)

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE", show_default=False)]
SetOption = Annotated[
    list[str], typer.Option("--set", help="Override a value: mix.rates.temperature=3. Repeatable.", metavar="KEY=VALUE")
]
StoreOption = Annotated[Path, typer.Option("--store", envvar="TUTELAGE_STORE", help="Folder of cached stages.")]
RunsOption = Annotated[Path, typer.Option("--runs", envvar="TUTELAGE_RUNS", help="Folder that run folders go into.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]

_STORE = Path(".tutelage")
_RUNS = Path("runs")


def main() -> None:
    """Runs the command line and exits with the documented code."""
    app()


def _load(path: Path, overrides: list[str]) -> RecipeFile:
    from tutelage.recipe import load_recipe

    return load_recipe(path, overrides=overrides)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


@contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    from tutelage.report.screen import make_progress
    from tutelage.store import Silent
    from tutelage.world import rank_started

    if quiet or rank_started():
        yield Silent()
        return
    with make_progress(sys.stderr) as progress:
        yield progress


def _run(path: Path, overrides: list[str], *, until: str, store: Path, runs: Path, quiet: bool) -> tuple[RecipeFile, Run]:
    from tutelage import pipeline

    file = _load(path, overrides)
    with _progress(quiet) as progress:
        done = pipeline.run(file, until=until, store=store, runs=runs, progress=progress)
    return file, done


@app.command()
def new(
    data: Annotated[Path | None, typer.Argument(help="A data file to look at.", show_default=False)] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the recipe.")] = Path("recipe.yaml"),
    demo: Annotated[bool, typer.Option("--demo", help="The demonstration recipe with its data, in a folder `demo`.")] = False,
) -> None:
    """Write a commented starter recipe from a data file, or the demonstration with --demo."""
    from tutelage import starter

    if demo == (data is not None):
        raise TutelageError("new: give a data file, or --demo")
    lines = starter.write_demo(Path("demo")) if data is None else starter.write_recipe(data, out=out)
    sys.stdout.write("\n".join(lines) + "\n")


@app.command()
def check(
    recipe: Annotated[Path | None, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE", show_default=False)] = None,
    overrides: SetOption = [],
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipes, for editors.")] = False,
    resolved: Annotated[bool, typer.Option("--resolved", help="Print every value with its origin.")] = False,
    data: Annotated[bool, typer.Option("--data", help="Audit the data too: what training would see, whole.")] = False,
    cluster: Annotated[bool, typer.Option("--cluster", help="Under torchrun: compare all processes and machines.")] = False,
    store: StoreOption = _STORE,
    runs: RunsOption = _RUNS,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Read a recipe strictly and list every mistake at once; with --data, audit the whole planned set. Nothing is trained."""
    from tutelage.recipe import json_schema, resolved_text

    if schema:
        _print_json(json_schema())
        return
    if recipe is None:
        raise TutelageError("check: name a recipe, or give --schema")
    if data:
        _audit(recipe, overrides, store=store, runs=runs, as_json=as_json, quiet=quiet)
        return
    file = _load(recipe, overrides)
    if cluster:
        _check_cluster(file, store=store, as_json=as_json)
        return
    sources = len(file.recipe.sources)
    if resolved:
        sys.stdout.write(resolved_text(file))
        return
    lines = [f"{recipe}: no mistakes; {sources} source{'s' * (sources != 1)}", *file.training_lines()]
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def _check_cluster(file: RecipeFile, *, store: Path, as_json: bool) -> None:
    """Prints what all processes found, once; exits with 1, every one of them, when something is wrong."""
    from tutelage.cluster import check_cluster
    from tutelage.world import rank_started

    report = check_cluster(file, store=store)
    if not rank_started():
        if as_json:
            _print_json(report.as_json())
        else:
            sys.stdout.write("".join(f"{line}\n" for line in report.lines()))
    if not report.passes:
        raise typer.Exit(1)


def _audit(path: Path, overrides: list[str], *, store: Path, runs: Path, as_json: bool, quiet: bool) -> None:
    """Prints the findings; exits with 1 when one of them would stop a run."""
    from tutelage import pipeline
    from tutelage.report import screen, tables

    file = _load(path, overrides)
    with _progress(quiet) as progress:
        audit = pipeline.audit(file, store=store, runs=runs, progress=progress)
    told = audit.as_json()
    if as_json:
        _print_json(told)
    else:
        screen.print_table(tables.supervision_table(told["sources"]))
        screen.print_table(tables.finding_table(told["findings"]))
        for line in [*tables.finding_lines(told["findings"]), audit.verdict]:
            sys.stdout.write(line + "\n")
    if not audit.passes:
        raise typer.Exit(1)


@app.command()
def explain(
    recipe: RecipeArgument,
    overrides: SetOption = [],
    store: StoreOption = _STORE,
    as_json: JsonOption = False,
) -> None:
    """Say for every stage whether the store has it, and if not, what changed."""
    from tutelage import pipeline
    from tutelage.report import screen, tables

    statuses = pipeline.explain(_load(recipe, overrides), store=store)
    if as_json:
        _print_json({"stages": [status.as_json() for status in statuses]})
        return
    screen.print_table(tables.explain_table([status.as_json() for status in statuses]))


@app.command()
def look(
    recipe: RecipeArgument,
    overrides: SetOption = [],
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    source: Annotated[str | None, typer.Option(help="Only this source.")] = None,
    search: Annotated[str | None, typer.Option(help="Only examples whose text contains this.")] = None,
    row: Annotated[str | None, typer.Option(help="One record by its id, source/file:line, or the end of one.")] = None,
    worst: Annotated[bool, typer.Option("--worst", help="The smallest share of supervised tokens first.")] = False,
    number: Annotated[int | None, typer.Option("--number", "-n", min=1, help="How many (3; with --html 500).")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page to browse them in instead.", metavar="FILE")] = None,
    store: StoreOption = _STORE,
    runs: RunsOption = _RUNS,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show examples as the model sees them, coloured by kind and weight."""
    from tutelage import looking
    from tutelage.report import screen

    file, done = _run(recipe, overrides, until="plan", store=store, runs=runs, quiet=quiet)
    number = number or (looking.NUM_SHOWN if html is None else looking.NUM_BROWSED)
    wanted = looking.Wanted(task=task, source=source, search=search, row_id=row, worst=worst, number=number)
    if html is not None:
        facts = looking.write_page(file, done, wanted, html)
        _print_json(facts) if as_json else sys.stdout.write(looking.page_line(facts) + "\n")
        return
    found = looking.find_examples(file, done, wanted)
    if as_json:
        _print_json([looking.as_json(example) for example in found])
        return
    screen.print_examples(found)


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: SetOption = [],
    until: Annotated[str, typer.Option(help="Stop after: sources, curate, render, plan, audit, train, eval, report.")] = "report",
    store: StoreOption = _STORE,
    runs: RunsOption = _RUNS,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run a recipe from raw data to a tuned model and a report; what is already done is not done again."""
    _run_and_show(recipe, overrides, until=until, store=store, runs=runs, as_json=as_json, quiet=quiet)


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: SetOption = [],
    preview: Annotated[bool, typer.Option("--preview", help="Estimate from a sample; its error is stated.")] = False,
    sample: Annotated[int | None, typer.Option(help="Records per source that a preview renders (2,000).", metavar="N")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with pictures too.", metavar="FILE")] = None,
    store: StoreOption = _STORE,
    runs: RunsOption = _RUNS,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Print the mixture, the steps and the packing before anything is trained; with --html, a page with pictures."""
    from tutelage import planning
    from tutelage.report import screen, summary
    from tutelage.report.plan_summary import PlanSummary

    if sample is not None and not preview:
        raise TutelageError("--sample: goes with --preview; a plan without it is exact")
    if html is not None:
        planning.check_page(html)
    if preview:
        file = _load(recipe, overrides)
        with _progress(quiet) as progress:
            view = planning.preview(file, num=sample or planning.NUM_SAMPLED, store=store, progress=progress)
        shown = PlanSummary(view)
    else:
        file, done = _run(recipe, overrides, until="plan", store=store, runs=runs, quiet=quiet)
        view = planning.exact_view(file, done)
        shown = PlanSummary(view, summary.run_summary(done.artefacts, folder=done.folder))
    page = planning.write_page(view, file, html) if html is not None else None
    if as_json:
        _print_json({**shown.as_json(), "batch": file.training_json(), **({} if page is None else page)})
        return
    for table in shown.tables():
        screen.print_table(table)
    for line in [*file.training_lines(), *shown.lines(), *([] if page is None else [planning.page_line(page)])]:
        sys.stdout.write(line + "\n")


def _verb(until: str, summary: str) -> Callable[..., None]:
    def command(
        recipe: RecipeArgument,
        overrides: SetOption = [],
        store: StoreOption = _STORE,
        runs: RunsOption = _RUNS,
        as_json: JsonOption = False,
        quiet: QuietOption = False,
    ) -> None:
        _run_and_show(recipe, overrides, until=until, store=store, runs=runs, as_json=as_json, quiet=quiet)

    command.__doc__ = summary
    return command


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: SetOption = [],
    profile: Annotated[bool, typer.Option("--profile", help="Time a few steps and keep nothing: where does a step go?")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps that --profile times (3).", metavar="N")] = None,
    store: StoreOption = _STORE,
    runs: RunsOption = _RUNS,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run up to the tuned model; with --profile, say where a step's time goes and train nothing."""
    if steps is not None and not profile:
        raise TutelageError("--steps: goes with --profile; how long training takes is in the recipe, under `mix`")
    if profile:
        _profile(recipe, overrides, steps=steps, store=store, as_json=as_json, quiet=quiet)
        return
    _run_and_show(recipe, overrides, until="train", store=store, runs=runs, as_json=as_json, quiet=quiet)


def _profile(path: Path, overrides: list[str], *, steps: int | None, store: Path, as_json: bool, quiet: bool) -> None:
    from tutelage import profiling
    from tutelage.report import screen

    file = _load(path, overrides)
    with _progress(quiet) as progress:
        found = profiling.profile_recipe(file, num_steps=steps or profiling.NUM_STEPS, store=store, progress=progress)
    if as_json:
        _print_json(found.as_json())
        return
    screen.print_table(profiling.profile_table(found))
    for line in found.lines():
        sys.stdout.write(line + "\n")


app.command("eval")(_verb("eval", "Run up to held-out loss before and after, and generations."))
app.command("report")(_verb("report", "Run up to the HTML report."))


def _run_and_show(recipe: Path, overrides: list[str], *, until: str, store: Path, runs: Path, as_json: bool, quiet: bool) -> None:
    _, done = _run(recipe, overrides, until=until, store=store, runs=runs, quiet=quiet)
    _show(done, as_json=as_json)


def _show(done: Run, *, as_json: bool) -> None:
    from tutelage.report import screen, summary

    if not done.artefacts:  # one of several processes, and the first of them reports
        return
    facts = summary.run_summary(done.artefacts, folder=done.folder)
    if as_json:
        _print_json(facts.as_json())
        return
    for table in facts.tables():
        screen.print_table(table)
    for line in facts.lines():
        sys.stdout.write(line + "\n")


@app.command()
def extend(
    finished: Annotated[Path, typer.Argument(help="A finished run's folder, or its recipe.", metavar="RUN", show_default=False)],
    overrides: SetOption = [],
    epochs: Annotated[float | None, typer.Option(help="Train so many epochs more.")] = None,
    steps: Annotated[int | None, typer.Option(help="Train so many steps more, instead.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak of the extension; that of the run when left out.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="`kept` goes on with its memory, `fresh` starts anew.")] = None,
    name: Annotated[str | None, typer.Option(help="Names the new run's folder; NAME-extended when left out.")] = None,
    store: StoreOption = _STORE,
    runs: RunsOption = _RUNS,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a finished run further: a plan of its own where its passes stopped, and the schedule of the recipe once more."""
    from tutelage import extending

    part = extending.extension(epochs=epochs, steps=steps, learning_rate=learning_rate, optimizer=optimizer)
    file = extending.open_run(finished, overrides=overrides)
    with _progress(quiet) as progress:
        done = extending.extend(file, part, name=name, store=store, runs=runs, progress=progress)
    _show(done, as_json=as_json)


@app.command()
def export(
    recipe: RecipeArgument,
    folder: Annotated[Path, typer.Argument(help="The folder to write.", metavar="FOLDER", show_default=False)],
    to: Annotated[str, typer.Option(help="Who trains: trl, axolotl, transformers; or weights, for a loop of your own.")] = "trl",
    file_format: Annotated[str, typer.Option("--format", help="A `datasets` folder, or plain `parquet`.")] = "datasets",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in the same folder.")] = False,
    overrides: SetOption = [],
    store: StoreOption = _STORE,
    runs: RunsOption = _RUNS,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write the packed rows of the plan for another trainer, and say how to train on them exactly as planned."""
    from tutelage import exporting

    wanted = exporting.wanted(to=to, file_format=file_format, overwrite=overwrite)
    file = _load(recipe, overrides)
    with _progress(quiet) as progress:
        made = exporting.export_recipe(file, folder, wanted, store=store, runs=runs, progress=progress)
    if as_json:
        _print_json(made.as_json())
        return
    for line in made.lines():
        sys.stdout.write(line + "\n")


@app.command()
def merge(
    folder: Annotated[Path, typer.Argument(help="A run folder, or an adapter's own.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The folder to write.", metavar="OUT", show_default=False)],
    dtype: Annotated[str | None, typer.Option(help="Precision to store; the base's own when left out.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier model in the same folder.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Add a tuned adapter into its base: an ordinary model folder for servers and converters that know no adapters."""
    from tutelage import merging

    made = merging.merge_folder(folder, out, dtype=dtype, overwrite=overwrite)
    if as_json:
        _print_json(made.as_json())
        return
    sys.stdout.write("".join(f"{line}\n" for line in made.lines()))


@app.command()
def chat(
    folder: Annotated[Path, typer.Argument(help="A model folder, or a run folder that has one.", show_default=False)],
    message: Annotated[str | None, typer.Option("--message", "-m", help="Say this, print the answer, and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 512,
) -> None:
    """Talk to a tuned model with its own template; the answer streams."""
    from tutelage import chatting

    session = chatting.open_session(folder, system=system, temperature=temperature, max_new_tokens=max_new_tokens)
    if message is not None:
        chatting.say(session, message, sys.stdout)
        return
    chatting.loop(session, sys.stdin, sys.stdout)


@app.command()
def gc(
    keep: Annotated[list[Path], typer.Option("--keep", help="A recipe whose stages stay. Repeatable.")] = [],
    store: StoreOption = _STORE,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List what no run and no named recipe refers to, and free it."""
    from tutelage import pipeline
    from tutelage.report import screen, tables
    from tutelage.store import Store

    place = Store(store)
    kept = [f"{s.stage}/{s.key}" for path in keep for s in pipeline.explain(_load(path, []), store=place)]
    doomed = place.garbage(kept)
    if as_json:
        _print_json([{"path": str(path), "size_bytes": size} for path, size in doomed])
    else:
        screen.print_table(tables.garbage_table(doomed))
    if doomed and (yes or (not as_json and typer.confirm("Remove these?", default=False))):
        place.collect([path for path, _ in doomed])
        if not as_json:
            sys.stdout.write(f"freed {sum(size for _, size in doomed) / 1e6:,.1f} MB\n")


if __name__ == "__main__":
    main()
