"""What a recipe can say about the model that is tuned."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tutelage.spec import ByKind, Many, Spec


class Full(Spec):
    """Every weight is trained."""

    kind: Literal["full"] = "full"


class Lora(Spec):
    """Low-rank adapters (peft) beside frozen weights."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=32, ge=1)
    """Rank of the update."""
    alpha: float = Field(default=64.0, gt=0.0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapter's input."""
    targets: Literal["all_linear"] | Many[str] = "all_linear"
    """Which modules get an adapter: every linear layer but the head, or names."""
    top_layers: int | None = Field(default=None, ge=1)
    """Adapters on the last so many layers only: the layers below then need no backward pass and keep no activations."""


class ModelSpec(Spec):
    """The model to start from and how it is adapted."""

    name: str = "bundled:smollm2-135m"
    """`bundled:smollm2-135m`, a folder (relative paths start at the recipe's), or a hub id."""
    adapter: Annotated[Annotated[Full | Lora, Field(discriminator="kind")], ByKind] = Lora()
    """`full`, or `lora` with its numbers."""
