"""YAML as recipes mean it: 1.2 scalars, no duplicate keys, no code, and the line of every value.

PyYAML reads YAML 1.1, where `no` is false and `1e-5` is text; both have ruined runs elsewhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from tutelage.errors import Problem

Path = tuple[str | int, ...]

_NULL = re.compile(r"(~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"[-+]?[0-9]+\Z")
_RADIX = re.compile(r"(0o[0-7]+|0x[0-9a-fA-F]+)\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_INFINITY = re.compile(r"[-+]?\.(inf|Inf|INF)\Z")
_NAN = re.compile(r"\.(nan|NaN|NAN)\Z")
_MAX_DEPTH = 50


@dataclass
class Document:
    """A parsed file: `data`, the line (from 1) of every path in it, and what was wrong with its form."""

    data: Any
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def scalar(text: str) -> Any:
    """The value of an unquoted YAML 1.2 scalar.

    >>> [scalar(t) for t in ("1e-5", "no", "12", ".inf", "", "0x1F", "2025-01-01")]
    [1e-05, 'no', 12, inf, None, 31, '2025-01-01']
    """
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text.lower() == "true"
    if _INT.match(text):
        return int(text)
    if _RADIX.match(text):
        return int(text, 0)
    if _FLOAT.match(text):
        return float(text)
    if _INFINITY.match(text):
        return float(text.replace(".", ""))
    return float("nan") if _NAN.match(text) else text


def parse(text: str, *, file: str) -> Document:
    """The document in `text`; form errors are collected as problems that name `file:line`."""
    document = Document(None)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        document.problems.append(Problem(f"{file}:{line}", "", f"not YAML: {error.problem or error.context}"))
        return document
    except yaml.YAMLError as error:  # a control character: no mark
        document.problems.append(Problem(f"{file}:1", "", f"not YAML: {str(error).splitlines()[0]}"))
        return document
    if node is not None:
        document.data = _Builder(document, file).value(node, ())
    return document


def parse_value(text: str) -> Any:
    """The value on the right of `--set key=value`; ValueError when it is not YAML."""
    document = parse(text, file="--set")
    if document.problems:
        raise ValueError(document.problems[0].message)
    return document.data


@dataclass
class _Builder:
    document: Document
    file: str
    seen: set[int] = field(default_factory=set)

    def value(self, node: yaml.Node, path: Path) -> Any:
        self.document.lines[path] = node.start_mark.line + 1
        if id(node) in self.seen:  # an alias: a few lines of them can stand for gigabytes
            return self._problem(node, path, "aliases are not read; write the value out, or share it through `from:`")
        self.seen.add(id(node))
        if len(path) > _MAX_DEPTH:
            return self._problem(node, path, f"nested deeper than {_MAX_DEPTH} levels")
        if node.tag not in _KNOWN_TAGS:
            return self._problem(node, path, f"tag `{node.tag}` is not allowed; recipes hold plain values only")
        match node:
            case yaml.MappingNode():
                return self._mapping(node, path)
            case yaml.SequenceNode():
                return [self.value(child, (*path, i)) for i, child in enumerate(node.value)]
            case yaml.ScalarNode(style=None):
                return scalar(node.value)
            case _:
                return node.value

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None or key == "<<":
                self._problem(key_node, path, "keys are plain words; merge keys and nested keys are not read (use `from:`)")
                continue
            if key in out:
                first = self.document.lines[(*path, key)]
                self._problem(key_node, (*path, key), f"key given twice (first on line {first}); keep one")
                continue
            out[key] = self.value(value_node, (*path, key))
            self.document.lines[(*path, key)] = key_node.start_mark.line + 1
        return out

    def _problem(self, node: yaml.Node, path: Path, message: str) -> None:
        where = f"{self.file}:{node.start_mark.line + 1}"
        self.document.problems.append(Problem(where, ".".join(map(str, path)), message))


_KNOWN_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "value", "merge")
}
