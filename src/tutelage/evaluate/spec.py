"""What a recipe can say about measuring."""

from __future__ import annotations

from pydantic import Field

from tutelage.spec import Spec


class EvaluateSpec(Spec):
    """Held-out loss and generations, before, during and after training."""

    every_steps: int | None = Field(default=None, ge=1)
    """Steps between measurements during training; a quarter of the run when left out."""
    stop_after: int | None = Field(default=None, ge=1)
    """Early stopping: end the run after so many measurements without a better held-out loss."""
    min_gain: float = Field(default=0.0, ge=0.0)
    """A held-out loss counts as better when it is lower by more than this, in nats per token."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Held-out tokens measured, shared equally over tasks (what a small task leaves goes to the others); all when left out."""
    samples: int = Field(default=8, ge=0)
    """Generations on fixed held-out prompts at each measurement."""
    max_new_tokens: int = Field(default=96, ge=1)
    """Longest generation."""
    overfit_tokens: int | None = Field(default=8192, ge=0)
    """Training tokens measured beside the held-out ones for the overfit card, by task as these and no more than these; 0
    leaves the card out."""
    keep_best: bool = True
    """The final model is the checkpoint with the lowest held-out loss; false takes the last."""
    seed: int = 0
    """Chooses the held-out subset and the prompts."""
