"""What a recipe can say about the model that is tuned."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

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


class QLora(Lora):
    """Low-rank adapters beside frozen weights kept in 4 bits (nf4, the scales quantised too; arXiv 2305.14314). On CUDA."""

    kind: Literal["qlora"] = "qlora"  # type: ignore[assignment]


class ModelSpec(Spec):
    """The model to start from and how it is adapted."""

    name: str = "bundled:smollm2-135m"
    """`bundled:smollm2-135m`, a folder (relative paths start at the recipe's), or a hub id."""
    adapter: Annotated[Annotated[Full | Lora | QLora, Field(discriminator="kind")], ByKind] = Lora()
    """`full`, or `lora` or `qlora` with their numbers."""
    freeze: Many[str] = ()
    """Weights that full tuning leaves as they are: patterns (`*`, `?`, `[0-9]`) that cover whole parts of their names, say
    `[embed_tokens, "layers.[0-9].*"]`."""
    new_tokens: Many[str] = ()
    """Special tokens that a template needs and the tokenizer lacks, say `["<|im_start|>"]`. They get rows of the embeddings that
    start at the mean of the old ones and are trained, under adapters too."""

    @model_validator(mode="after")
    def _something_to_freeze(self) -> Self:
        if self.freeze and not isinstance(self.adapter, Full):
            raise ValueError("`freeze` is for `adapter: full`; under an adapter the whole model is frozen: leave it out")
        if odd := sorted({token for token in self.new_tokens if not token.strip() or self.new_tokens.count(token) > 1}):
            raise ValueError(f"`new_tokens` are texts, each once; found {odd[0]!r}")
        return self
