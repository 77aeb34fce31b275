"""The recipe: one file that says it all, read strictly, with the origin of every value.

file (and the one it is `from:`) -> strict YAML -> merged -> `--set` -> Recipe, or all mistakes at once
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from tutelage import recipe_checks, strict_yaml
from tutelage.audit.spec import AuditSpec
from tutelage.curate.spec import CurateSpec
from tutelage.errors import Problem, RecipeError
from tutelage.evaluate.spec import EvaluateSpec
from tutelage.extend_spec import ExtendSpec
from tutelage.model.spec import ModelSpec
from tutelage.plan.spec import BatchSpec, LossRule, MixSpec, ResponseLoss
from tutelage.recipe_errors import Located, problems_of
from tutelage.render.spec import RenderSpec
from tutelage.report.spec import ReportSpec
from tutelage.sources.spec import IntakeSpec, SourceSpec, SplitSpec
from tutelage.spec import Many, Spec, kind_first
from tutelage.train.spec import TrainSpec

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
_SCHEDULED_RATES = tuple(("mix", "schedule", name) for name in ("from", "to", "rates"))
BY_KIND_PATHS = (("mix", "rates"), ("mix", "schedule"), *_SCHEDULED_RATES, ("loss",), ("train", "schedule"), ("model", "adapter"))


class Recipe(Spec):
    """From raw data to a tuned model: everything a run depends on, but the machine."""

    name: Name
    """Names the run's folder, `runs/NAME`."""
    model: ModelSpec = ModelSpec()
    """The model to start from and how it is adapted."""
    sources: dict[Name, SourceSpec] = Field(min_length=1)
    """Training data by source name."""
    intake: IntakeSpec = IntakeSpec()
    """What is let in at all."""
    split: SplitSpec = SplitSpec()
    """The one split into training and held-out records."""
    curate: CurateSpec = CurateSpec()
    """Cleaning."""
    render: RenderSpec = RenderSpec()
    """Chat template and length."""
    mix: MixSpec = MixSpec()
    """How often each task is seen."""
    loss: LossRule = ResponseLoss()
    """Which tokens are trained, and how much."""
    batch: BatchSpec = BatchSpec()
    """What one optimizer step holds."""
    audit: AuditSpec = AuditSpec()
    """What the planned set is looked at for before training."""
    train: TrainSpec = TrainSpec()
    """Learning rate, schedule, precision, checkpoints."""
    evaluate: EvaluateSpec = EvaluateSpec()
    """Held-out loss and generations."""
    report: ReportSpec = ReportSpec()
    """The HTML page."""
    extend: Many[ExtendSpec] = ()
    """What is trained after the run, each part from the weights of the one before; `tutelage extend` writes it."""


@dataclass(frozen=True)
class RecipeFile:
    """A recipe with where it came from: relative paths in it start at `folder`; `origins` maps dotted keys to `file:line`."""

    recipe: Recipe
    path: Path
    origins: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """The folder of the recipe file."""
        return self.path.parent

    @property
    def model_name(self) -> str:
        """`model.name`, a folder below the recipe's own made a path that can be opened from anywhere."""
        name = self.recipe.model.name
        return str(self.folder / name) if (self.folder / name).is_dir() else name

    def training_lines(self) -> list[str]:
        """The arithmetic of a step over devices and passes, and what is unusual about the learning rate."""
        recipe = self.recipe
        of: Any = {"max_tokens": recipe.render.max_tokens, "train": recipe.train, "model": recipe.model}
        return recipe_checks.training_lines(recipe.batch, **of)

    def training_json(self) -> dict[str, Any]:
        """The same arithmetic as plain values; rows and passes are null where their number varies from step to step."""
        recipe = self.recipe
        shape = recipe_checks.step_shape(recipe.batch, max_tokens=recipe.render.max_tokens, train=recipe.train)
        names = ("num_rows", "rows_per_pass", "num_passes", "num_devices", "idle_share")
        return {name: getattr(shape, name, None) for name in names}


@dataclass
class _Draft:
    """Raw data being merged, with the origin of each path."""

    data: dict[str, Any]
    origins: dict[strict_yaml.Path, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def load_recipe(path: Path | str, *, overrides: Sequence[str] = ()) -> RecipeFile:
    """The recipe in a YAML file, with `key.path=value` overrides applied last.

    Raises RecipeError with every mistake found, each with `file:line`, dotted path and remedy.
    """
    path = Path(path)
    draft = _read(path, allow_base=True)
    for override in overrides:
        _override(draft, override)
    recipe, problems = _validate(draft, path)
    if recipe is None or problems:
        raise RecipeError(_in_order(problems))
    return RecipeFile(recipe, path, {".".join(map(str, p)): where for p, where in draft.origins.items()})


def _validate(draft: _Draft, path: Path) -> tuple[Recipe | None, list[Problem]]:
    problems = list(draft.problems)
    located = Located(draft.data, draft.origins, str(path))
    recipe = None
    try:
        recipe = Recipe.model_validate(draft.data)
    except ValidationError as error:
        problems += problems_of(error, Recipe, located)
    problems += recipe_checks.problems_between(_sections(draft.data), located, folder=path.parent)
    return recipe, problems


def _sections(data: Mapping[str, Any]) -> dict[str, Any]:
    """The sections that are valid by themselves, so that checks across sections run beside other mistakes."""
    out: dict[str, Any] = {}
    for name, info in Recipe.model_fields.items():
        if name not in data:
            if not info.is_required():
                out[name] = info.get_default()
        elif name == "sources" and isinstance(data[name], dict):
            valid = {n: _valid(SourceSpec, body) for n, body in data[name].items()}
            out[name] = {n: source for n, source in valid.items() if source is not None}
        elif (value := _valid(_annotation(info), data[name])) is not None:
            out[name] = value
    return out


def _annotation(info: FieldInfo) -> Any:
    return Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation


def _valid(annotation: Any, body: Any) -> Any:
    try:
        return TypeAdapter(annotation).validate_python(body)
    except ValidationError:
        return None


def _in_order(problems: Sequence[Problem]) -> list[Problem]:
    def position(problem: Problem) -> tuple[str, int]:
        file, _, line = problem.where.rpartition(":")
        return (file, int(line)) if line.isdigit() else (problem.where, 0)

    return sorted(dict.fromkeys(problems), key=position)


def _read(path: Path, *, allow_base: bool) -> _Draft:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError([Problem(str(path), "", "no such file; `tutelage new --demo` writes one to start from")]) from None
    except (UnicodeDecodeError, OSError) as error:
        raise RecipeError([Problem(str(path), "", f"cannot be read: {error}")]) from None
    document = strict_yaml.parse(text, file=str(path))
    origins = {p: f"{path}:{line}" for p, line in document.lines.items()}
    if not isinstance(document.data, dict):
        problem = Problem(f"{path}:1", "", "a recipe is a mapping of sections (`name:`, `sources:`, ...)")
        raise RecipeError(document.problems or [problem])
    draft = _Draft(document.data, origins, document.problems)
    base = draft.data.pop("from", None)
    if base is None:
        return draft
    where = origins.pop(("from",))
    if not allow_base or not isinstance(base, str):
        draft.problems.append(Problem(where, "from", "names one base recipe, which has no `from:` of its own"))
        return draft
    return _merge(_read(path.parent / base, allow_base=False), draft)


def _merge(base: _Draft, child: _Draft) -> _Draft:
    merged = _Draft(base.data, dict(base.origins), base.problems + child.problems)
    _merge_into(merged, child, ())
    return merged


def _merge_into(merged: _Draft, child: _Draft, path: strict_yaml.Path) -> None:
    """Mappings merge key by key; lists, scalars and another `kind` replace what stood there."""
    into, new = _at(merged.data, path), _at(child.data, path)
    for name, value in new.items():
        here = (*path, name)
        old = into.get(name)
        if here in BY_KIND_PATHS:
            old, value = kind_first(old), kind_first(value)
            if isinstance(old, dict) and isinstance(value, dict) and value.get("kind", old.get("kind")) != old.get("kind"):
                old = None
            into[name], new[name] = old, value
        if isinstance(old, dict) and isinstance(value, dict):
            _merge_into(merged, child, here)
            continue
        into[name] = copy.deepcopy(value)
        merged.origins = {p: w for p, w in merged.origins.items() if p[: len(here)] != here}
        merged.origins |= {p: w for p, w in child.origins.items() if p[: len(here)] == here}


def _at(data: Any, path: strict_yaml.Path) -> Any:
    for step in path:
        data = data[step]
    return data


def _override(draft: _Draft, text: str) -> None:
    """Applies one `a.b.c=value` to the draft."""
    where = f"--set {text.partition('=')[0]}"
    dotted, equals, raw = text.partition("=")
    path = tuple(int(p) if p.isdigit() else p for p in dotted.strip().split("."))
    if not equals or not all(str(p) for p in path):
        draft.problems.append(Problem("--set", text, "is written key.path=value, for example mix.rates.temperature=3"))
        return
    try:
        value = strict_yaml.parse_value(raw)
    except ValueError as error:
        draft.problems.append(Problem("--set", dotted, str(error)))
        return
    target: Any = draft.data
    for depth, step in enumerate(path[:-1]):
        target = _step_into(target, step, here=path[: depth + 1], then=path[depth + 1])
        if target is None:
            draft.problems.append(Problem("--set", dotted, f"`{'.'.join(map(str, path[: depth + 1]))}` holds no keys"))
            return
    if isinstance(target, list) and not (isinstance(path[-1], int) and path[-1] < len(target)):
        draft.problems.append(Problem("--set", dotted, f"the list has {len(target)} entries, counted from 0"))
        return
    target[path[-1]] = value
    draft.origins = {p: w for p, w in draft.origins.items() if p[: len(path)] != path}
    draft.origins[path] = where


def _step_into(target: Any, step: str | int, *, here: strict_yaml.Path, then: str | int) -> Any:
    """The container below `target[step]`, made when absent; None when a plain value stands there."""
    if isinstance(target, list):
        if not isinstance(step, int) or step >= len(target):
            return None
        if isinstance(target[step], str) and target[step] == then:  # `strip_boilerplate` given keys of its own
            target[step] = {then: {}}
        return target[step] if isinstance(target[step], dict | list) else None
    child = target.get(step)
    if here in BY_KIND_PATHS:
        child = kind_first(child) if child is not None else _default_kind(here, then)
    target[step] = {} if child is None else child
    return target[step] if isinstance(target[step], dict | list) else None


def _default_kind(path: strict_yaml.Path, key: str | int) -> dict[str, Any]:
    """`{"kind": ...}` of the default at a by-kind path when that kind has such a key, else nothing."""
    section: Any = Recipe.model_construct(name="", sources={})
    for step in path:
        section = getattr(section, str(step), None)
    if section is None:
        return {}
    return {"kind": section.kind} if key in type(section).model_fields else {}


def resolved_text(file: RecipeFile, *, relative_to: Path | None = None) -> str:
    """The whole recipe as YAML, defaults filled in, each value followed by where it came from.

    Loading this text gives an equal recipe; `relative_to` names the folder it will be kept in, for the paths in it.
    """
    lines: list[str] = [f"# resolved from {file.path.name}; every value with its origin"]
    values = file.recipe.model_dump(mode="python")
    if relative_to is not None:
        _move_paths(values, file.folder, relative_to)
    _emit(values, (), file, lines)
    return "\n".join(lines) + "\n"


def moved(file: RecipeFile, path: Path) -> RecipeFile:
    """The recipe as it would stand in `path`: paths in it start at that one's folder and lead where they did."""
    values = file.recipe.model_dump(mode="python")
    _move_paths(values, file.folder, path.parent)
    return replace(file, recipe=Recipe.model_validate(values), path=path)


def _move_paths(values: dict[str, Any], old: Path, new: Path) -> None:
    """Rewrites paths that start at the recipe's folder so that they start at another."""

    def move(path: str) -> str:
        return path if "://" in path or Path(path).is_absolute() else os.path.relpath(old / path, new)

    if (old / values["model"]["name"]).is_dir():
        values["model"]["name"] = move(values["model"]["name"])
    for source in values["sources"].values():
        if source["path"] is not None:
            source["path"] = move(source["path"])
    if values["render"]["template"] != "model":
        values["render"]["template"] = move(values["render"]["template"])


def _emit(value: Any, path: strict_yaml.Path, file: RecipeFile, lines: list[str]) -> None:
    indent = "  " * (len(path))
    for name, child in value.items():
        here = (*path, name)
        if isinstance(child, dict) and child:
            lines.append(f"{indent}{_flow(name)}:")
            _emit(child, here, file, lines)
        else:
            lines.append(f"{indent}{_flow(name)}: {_flow(child)}  # {origin_of(here, file.origins)}")


def origin_of(path: strict_yaml.Path, origins: Mapping[str, str]) -> str:
    """`file:line`, `--set KEY`, or `default` for a dotted path; a value inside a stated one has that one's origin."""
    dotted = ".".join(map(str, path))
    if dotted in origins:
        return Path(origins[dotted]).name if not origins[dotted].startswith("--set") else origins[dotted]
    shorthand = [p for p in BY_KIND_PATHS if path[: len(p)] == p]
    if shorthand and path[-1] == "kind" and (parent := ".".join(map(str, path[:-1]))) in origins:
        return Path(origins[parent]).name
    return "default"


def _flow(value: Any) -> str:
    """One value as a single line of flow YAML."""
    if isinstance(value, float):
        return _float_text(value)
    if isinstance(value, str | int | None):
        return _scalar_text(type(value).__name__, value)
    return _dumped(value)


@lru_cache(maxsize=4096)
def _scalar_text(_: str, value: Any) -> str:  # the type tells True from 1
    return _dumped(value)


def _dumped(value: Any) -> str:
    plain = _plain(value)
    text = yaml.safe_dump(plain, default_flow_style=True, width=10**9, allow_unicode=True).strip("\n")
    text = text.removesuffix("\n...").strip("\n")
    ambiguous = isinstance(value, str) and not isinstance(strict_yaml.scalar(value), str)
    return f'"{value}"' if ambiguous and not text.startswith(("'", '"')) else text


def _float_text(value: float) -> str:
    return {float("inf"): ".inf", float("-inf"): "-.inf"}.get(value, repr(value))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def json_schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors: `# yaml-language-server: $schema=recipe.schema.json`."""
    schema = Recipe.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "tutelage recipe"
    schema["properties"]["from"] = {"type": "string", "description": "A base recipe whose values this one changes."}
    return schema
