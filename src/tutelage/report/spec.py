"""What a recipe can say about the report."""

from __future__ import annotations

from pydantic import Field

from tutelage.spec import Spec


class CoverageSpec(Spec):
    """What a general instruction set should cover; the plan says what is missing, and changes nothing."""

    min_tasks: int = Field(default=10, ge=0)
    """Tasks with a training record."""
    min_examples: int = Field(default=500, ge=0)
    """Examples of each task."""


class ReportSpec(Spec):
    """The HTML page."""

    title: str | None = None
    """Heading; the recipe's name when left out."""
    num_examples: int = Field(default=20, ge=0)
    """Training examples shown as the model saw them."""
    num_dropped: int = Field(default=50, ge=0)
    """Dropped records listed per source and reason."""
    coverage: CoverageSpec = CoverageSpec()
    """The target that the plan is held against."""
