"""What a recipe can say about the report."""

from __future__ import annotations

from pydantic import Field

from tutelage.spec import Spec


class ReportSpec(Spec):
    """The HTML page."""

    title: str | None = None
    """Heading; the recipe's name when left out."""
    num_examples: int = Field(default=20, ge=0)
    """Training examples shown as the model saw them."""
    num_dropped: int = Field(default=50, ge=0)
    """Dropped records listed per source and reason."""
