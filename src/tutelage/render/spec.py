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
    overlong: Literal["drop", "error", "truncate", "split"] = "drop"
    """Longer examples are dropped, stop the run, lose whole oldest exchanges (system turn and last answer with its stop stay),
    or become several windows, none of which trains an answer's tail without its beginning."""
    history: Literal["as_template", "expand"] = "as_template"
    """One example per record as the template renders it, or one per assistant turn, each with the history that inference shows
    it (for templates that drop earlier reasoning)."""
    system: Literal["keep", "default", "drop"] = "keep"
    """System turns as they are; left out, so that the template's own default (if any) stands there; or left out, and the
    template's default suppressed by an empty system turn."""
    special_tokens_in_content: Literal["text", "error", "allow"] = "text"
    """A special token spelled out in a record's text is encoded as ordinary text, sets the record aside, or is let through."""
    tokenizer_engine: Literal["auto", "tokenizers", "gigatoken"] = "auto"
    """`auto` takes the fast engine where it is installed and proved equal to `tokenizers` on this tokenizer and on a sample of
    every source, and says so; a name forces one (`gigatoken` raises where it is not exact)."""
    append_eos: bool = False
    """Adds the model's end token after each answer when the template writes no stop."""
    date: str = "2025-01-01"
    """The day that templates print when they ask for today's date: fixed, so that renderings do not depend on the clock."""
