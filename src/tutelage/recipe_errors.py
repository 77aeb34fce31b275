"""Pydantic's complaints as recipe problems: `file:line`, the dotted path as the user wrote it, what, and what to do."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from tutelage.errors import Problem, did_you_mean
from tutelage.spec import Spec

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Located:
    """Raw recipe data with the origin of its paths."""

    data: Any
    origins: Mapping[Path, str]
    file: str

    def problem(self, path: Path, message: str) -> Problem:
        """A problem at a path, or at its nearest parent that the file has."""
        return Problem(self.where(path), ".".join(map(str, path)), message)

    def where(self, path: Path) -> str:
        """`file:line` of the path or of its nearest parent."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.origins:
                return self.origins[path[:end]]
        return self.origins.get((), f"{self.file}:1")


def problems_of(error: ValidationError, model: type[Spec], located: Located) -> list[Problem]:
    """One problem per complaint."""
    out = []
    for complaint in error.errors():
        path = _written_path(complaint["loc"], located.data)
        out.append(located.problem(path, _message(complaint, model)))
    return out


def _written_path(loc: Sequence[str | int], data: Any) -> Path:
    """The location without the union tags that pydantic adds and the user did not write."""
    path: list[str | int] = []
    for position, step in enumerate(loc):
        is_last = position == len(loc) - 1
        if isinstance(data, Mapping) and step in data:
            data = data[step]
        elif isinstance(data, list) and isinstance(step, int) and step < len(data):
            data = data[step]
        elif not is_last or (isinstance(data, str) and data == step) or _is_tag(data, step):
            continue  # a tag: `kind: temperature` was written, or the value is the tag
        else:
            data = None
        path.append(step)
    return tuple(path)


def _is_tag(data: Any, step: str | int) -> bool:
    return isinstance(data, Mapping) and data.get("kind") == step


def _message(complaint: Any, model: type[Spec]) -> str:
    found = complaint.get("input")
    context = complaint.get("ctx", {})
    match complaint["type"]:
        case "extra_forbidden":
            return f"unknown key; {did_you_mean(str(complaint['loc'][-1]), _known_keys(model, complaint['loc'][:-1]))}"
        case "missing":
            return "is required and missing"
        case "union_tag_invalid":
            expected = context["expected_tags"].replace("'", "")
            return f"{context['tag']!r} is not one of: {expected}"
        case "union_tag_not_found":
            return f"found {_show(found)}; write a name, or a mapping with `kind:`"
        case "literal_error":
            return f"{_show(found)} is not one of: {context['expected'].replace(chr(39), '').replace(' or ', ', ')}"
        case "value_error":
            return str(context["error"])
        case "string_pattern_mismatch":
            return f"{_show(found)} is not a name: letters, digits, `-`, `_`, `.`, starting with a letter or digit"
        case "too_short":
            return "needs at least one entry"
        case "frozen_instance":
            return "cannot be changed"
        case kind:
            return f"{_wanted(kind, complaint['msg'])}; found {_show(found)}"


_WANTED = {
    "int_type": "a whole number is wanted",
    "float_type": "a number is wanted (infinity is written .inf)",
    "string_type": "text is wanted",
    "bool_type": "true or false is wanted",
    "model_type": "a mapping of keys is wanted",
    "dict_type": "a mapping of keys is wanted",
    "tuple_type": "a list is wanted",
}


def _wanted(kind: str, message: str) -> str:
    return _WANTED.get(kind, message.replace("Input should be", "must be"))


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _known_keys(model: Any, loc: Sequence[str | int]) -> list[str]:
    """The keys of the section at a pydantic location (union tags included)."""
    current: Any = model
    for step in loc:
        current = _descend(current, step)
    members = [m for m in _members(current) if isinstance(m, type) and issubclass(m, Spec)]
    return sorted({info.alias or name for member in members for name, info in member.model_fields.items()})


def _members(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, with `Annotated` and unions opened."""
    origin = get_origin(annotation)
    if origin is typing.Annotated:
        return _members(get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return [m for arg in get_args(annotation) for m in _members(arg)]
    return [annotation]


def _descend(annotation: Any, step: str | int) -> Any:
    for member in _members(annotation):
        origin = get_origin(member)
        if origin is dict:
            return get_args(member)[1]
        if origin is tuple and isinstance(step, int):
            return get_args(member)[0]
        if isinstance(member, type) and issubclass(member, Spec):
            by_key = {info.alias or name: info for name, info in member.model_fields.items()}
            if step in by_key:
                return by_key[str(step)].annotation
            kind = member.model_fields.get("kind")
            if kind is not None and kind.default == step:
                return member
    return None
