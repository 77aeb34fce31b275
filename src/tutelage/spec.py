"""The base of every recipe section: frozen, and unknown keys are refused.

A room states what it can be told in its own `spec.py`; `recipe.py` joins them into one tree.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

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


def _kind_first(value: Any) -> Any:
    """`"x"` and `{"x": {...}}` written out as `{"kind": "x", ...}`; anything else untouched."""
    if isinstance(value, str):
        return {"kind": value}
    if isinstance(value, dict) and len(value) == 1 and "kind" not in value:
        ((kind, body),) = value.items()
        if body is None:
            return {"kind": kind}
        if isinstance(body, dict):
            return {"kind": kind, **body}
    return value


ByKind = BeforeValidator(_kind_first)
"""Lets a union discriminated by `kind` be written `name`, `{name: {...}}` or `{kind: name, ...}`."""
