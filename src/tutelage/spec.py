"""The base of every recipe section: frozen, and unknown keys are refused.

A room states what it can be told in its own `spec.py`; `recipe.py` joins them into one tree.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import core_schema

T = TypeVar("T")

Share = Annotated[float, Field(ge=0.0, le=1.0)]
"""A fraction of a whole, 0 to 1."""

Many = Annotated[tuple[T, ...], Field(strict=False)]
"""A YAML list, frozen."""


class Spec(BaseModel):
    """A frozen recipe section that refuses unknown keys and numbers in disguise (`"3"` is not 3)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    def canonical(self) -> dict[str, Any]:
        """This section as plain JSON values with every default filled in: what goes into a store key."""
        return self.model_dump(mode="json")


_OWN_FIELD = ("weights", "counts", "groups")  # kinds whose one required field is a mapping with the kind's own name


def kind_first(value: Any) -> Any:
    """`"x"`, `{"x": {...}}` and `{"x": 3}` written out as `{"kind": "x", ...}`; anything else untouched.

    >>> kind_first("equal"), kind_first({"length": {"max": 3}}), kind_first({"temperature": 2})
    ({'kind': 'equal'}, {'kind': 'length', 'max': 3}, {'kind': 'temperature', 'temperature': 2})
    >>> kind_first({"weights": {"assistant": 1}})
    {'kind': 'weights', 'weights': {'assistant': 1}}
    >>> kind_first({"counts": {"qa": 500}})
    {'kind': 'counts', 'counts': {'qa': 500}}
    """
    if isinstance(value, str):
        return {"kind": value}
    if isinstance(value, dict) and len(value) == 1 and "kind" not in value:
        ((kind, body),) = value.items()
        match body:
            case None:
                return {"kind": kind}
            case dict() if kind not in _OWN_FIELD:
                return {"kind": kind, **body}
            case _:  # the one field of this kind has the kind's own name
                return {"kind": kind, kind: body}
    return value


class _ByKind:
    """Lets a union discriminated by `kind` be written `name`, `{name: {...}}` or `{kind: name, ...}`."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(kind_first, handler(source))

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        full = handler(schema)
        mapping = full.get("discriminator", {}).get("mapping", {})
        short = {
            "type": "object",
            "maxProperties": 1,
            "properties": {name: {} for name in mapping},
            "additionalProperties": False,
        }
        return {"anyOf": [{"enum": list(mapping)}, short, full]}


def module_first(value: Any) -> Any:
    """`"package:Class"` and `{"module": ...}` written out with `kind: other`; anything else as `kind_first` has it.

    >>> module_first("torch.optim:SGD"), module_first("adamw")
    ({'kind': 'other', 'module': 'torch.optim:SGD'}, {'kind': 'adamw'})
    >>> module_first({"module": "torch.optim:SGD", "args": {"momentum": 0.9}})
    {'kind': 'other', 'module': 'torch.optim:SGD', 'args': {'momentum': 0.9}}
    """
    if isinstance(value, str) and ":" in value:
        return {"kind": "other", "module": value}
    if isinstance(value, dict) and "kind" not in value and isinstance(value.get("module"), str):
        return {"kind": "other", **value}
    return kind_first(value)


class _ByModule(_ByKind):
    """`_ByKind`, and one of the kinds is what `module` names: `package:Class`, or `{module: package:Class, ...}`."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(module_first, handler(source))

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        ways = super().__get_pydantic_json_schema__(schema, handler)
        named = {"type": "string", "pattern": ":"}
        written = {"type": "object", "required": ["module"], "properties": {"module": named, "args": {"type": "object"}}}
        return {"anyOf": [named, written | {"additionalProperties": False}, *ways["anyOf"]]}


ByKind = _ByKind()
ByModule = _ByModule()
