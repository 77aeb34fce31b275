"""What a recipe can say about the optimization."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tutelage.spec import ByKind, Many, Share, Spec


class Cosine(Spec):
    """Linear warmup, then half a cosine down to a floor."""

    kind: Literal["cosine"] = "cosine"
    warmup_share: Share = 0.03
    """Share of all steps spent rising to the peak."""
    floor_ratio: Share = 0.1
    """The last learning rate over the peak."""


class Linear(Spec):
    """Linear warmup, then a straight line down to a floor."""

    kind: Literal["linear"] = "linear"
    warmup_share: Share = 0.03
    """Share of all steps spent rising to the peak."""
    floor_ratio: Share = 0.0
    """The last learning rate over the peak."""


class Constant(Spec):
    """Linear warmup, then the peak."""

    kind: Literal["constant"] = "constant"
    warmup_share: Share = 0.0
    """Share of all steps spent rising to the peak."""


Schedule = Annotated[Annotated[Cosine | Linear | Constant, Field(discriminator="kind")], ByKind]


class TrainSpec(Spec):
    """Learning rate, schedule, precision, checkpoints."""

    learning_rate: float | None = Field(default=None, gt=0.0)
    """Peak learning rate; 2e-5 for full tuning and 2e-4 for adapters when left out."""
    schedule: Schedule = Cosine()
    """How the rate moves over the run."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """AdamW's, on matrices only."""
    betas: Many[float] = (0.9, 0.999)
    """AdamW's two decay rates."""
    max_grad_norm: float | None = Field(default=1.0, gt=0.0)
    """Gradients are scaled down to this norm; null leaves them."""
    micro_batch_rows: int | None = Field(default=None, ge=1)
    """Rows per forward pass, the last taking what is left; 2,048 slots' worth when left out. Gradients do not depend on it."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """`auto` takes cuda, else mps, else cpu."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the model's weights; `auto` measures which is faster here, and says so."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads; results are bit-identical for one number of threads. All cores when left out."""
    checkpoint_every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; a tenth of the run when left out."""
    keep_checkpoints: int = Field(default=3, ge=1)
    """Last checkpoints kept, beside the best."""
    trackers: Many[Literal["tensorboard", "wandb"]] = ()
    """Where steps are logged beside steps.parquet and events.jsonl."""
    seed: int = 0
    """Initialises adapters and dropout."""

    @model_validator(mode="after")
    def _two_betas(self) -> Self:
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError("betas are two numbers in [0, 1)")
        return self
