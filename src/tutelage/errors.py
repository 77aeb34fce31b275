"""The exception tree and the one formatter for recipe errors.

Everything below `TutelageError` is something a user can mend; a broken promise of our own is an `assert`.
The command line turns a `TutelageError` into exit code 2 and its message, without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class TutelageError(ValueError):
    """A mistake in what the user gave us: the message says where, what was found, and what to do."""


class DataError(TutelageError):
    """Input data that cannot be used (a source file, a share of bad records above its bound)."""


class TemplateError(TutelageError):
    """A chat template whose tokens cannot be told apart for certain."""


class PlanError(TutelageError):
    """A mixture or batch that cannot be met; the message names the nearest that can."""


class ModelError(TutelageError):
    """A model that cannot be found, loaded or trained as asked."""


class AuditError(TutelageError):
    """A training set that an audit found faults in which would make training wrong; the message lists them all."""


class TrainError(TutelageError):
    """A training run that must not go on (loss is NaN, a step has no weight, a checkpoint does not fit)."""


class StoreError(TutelageError):
    """An artefact folder that is not what its manifest says."""


class MissingExtra(TutelageError, ImportError):
    """An optional package that is not installed; the message gives the extra to install.

    >>> str(MissingExtra("datasets", "hub"))
    "`datasets` is not installed; it comes with: pip install 'tutelage[hub]'"
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"`{package}` is not installed; it comes with: pip install 'tutelage[{extra}]'")


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe: `where` is `file:line` (or `--set`), `path` the dotted key, `message` what and what to do."""

    where: str
    path: str
    message: str


class RecipeError(TutelageError):
    """All mistakes of one recipe at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(format_problems(self.problems))


def format_problems(problems: Sequence[Problem]) -> str:
    """The problems as aligned lines, closed by their count.

    >>> print(format_problems([Problem("r.yaml:3", "mix.cap", "unknown key; did you mean `max_visits`?")]))
    r.yaml:3  mix.cap  unknown key; did you mean `max_visits`?
    1 problem; nothing was run.
    """
    where_width = max((len(p.where) for p in problems), default=0)
    path_width = max((len(p.path) for p in problems), default=0)
    lines = [f"{p.where:<{where_width}}  {p.path:<{path_width}}  {p.message}" for p in problems]
    count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}; nothing was run."
    return "\n".join([*lines, count])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A half-sentence that names the nearest known word, or lists what is known.

    >>> did_you_mean("weigth", ["path", "weight"])
    'did you mean `weight`?'
    >>> did_you_mean("zzz", ["path", "weight"])
    'known: path, weight'
    """
    choices = sorted(known)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"did you mean `{near[0]}`?" if near else f"known: {', '.join(choices)}"
