"""What a recipe can say about turning conversations into tokens."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tutelage.spec import Spec


class RenderSpec(Spec):
    """Chat template, length, and what happens at the edges."""

    template: str = "model"
    """`model` = the tokenizer's own chat template, or the path of a Jinja file."""
    max_tokens: int = Field(default=2048, ge=8)
    """Longest example, in tokens."""
    overlong: Literal["drop", "truncate", "error"] = "drop"
    """Longer examples are dropped, cut by whole oldest exchanges (the last answer keeps its stop), or stop the run."""
    special_tokens_in_content: Literal["text", "error", "allow"] = "text"
    """A special token spelled out in a record's text is encoded as ordinary text, sets the record aside, or is let through."""
    append_eos: bool = False
    """Adds the model's end token after each answer when the template writes no stop."""
    date: str = "2025-01-01"
    """The day that templates print when they ask for today's date: fixed, so that renderings do not depend on the clock."""
