"""What a recipe can say about the optimization."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from tutelage.spec import ByKind, ByModule, Many, Share, Spec

TokenKind = Literal["scaffold", "system", "user", "assistant", "reasoning", "tool_call", "tool_result", "stop"]


class _Warmed(Spec):
    """A schedule that begins with a linear rise to the peak."""

    warmup_share: Share = 0.03
    """Share of all steps spent rising to the peak."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps spent rising, instead of a share; fewer than the run has."""

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        if self.warmup_steps is not None and "warmup_share" in self.model_fields_set:
            raise ValueError("one of `warmup_share` and `warmup_steps`, not both")
        return self

    @model_serializer(mode="wrap")
    def _without_idle_share(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A share that steps replace is left out: what is written can be read again."""
        written: dict[str, Any] = write(self)
        if self.warmup_steps is not None:
            written.pop("warmup_share", None)
        return written


class Cosine(_Warmed):
    """Linear warmup, then half a cosine down to a floor."""

    kind: Literal["cosine"] = "cosine"
    floor_ratio: Share = 0.1
    """The last learning rate over the peak."""


class Linear(_Warmed):
    """Linear warmup, then a straight line down to a floor."""

    kind: Literal["linear"] = "linear"
    floor_ratio: Share = 0.0
    """The last learning rate over the peak."""


class Constant(_Warmed):
    """Linear warmup, then the peak."""

    kind: Literal["constant"] = "constant"
    warmup_share: Share = 0.0
    """Share of all steps spent rising to the peak."""


class WarmupStableDecay(_Warmed):
    """Linear warmup, the peak, then a fall to the floor over the last steps (arXiv 2404.06395; `sqrt` is of 2405.18392)."""

    kind: Literal["wsd"] = "wsd"
    decay_share: Share = Field(default=0.1, gt=0.0)
    """Share of all steps spent falling, the last ones."""
    decay: Literal["linear", "cosine", "sqrt"] = "linear"
    """The shape of the fall: a line, half a cosine, or 1 - sqrt(share of the fall)."""
    floor_ratio: Share = 0.1
    """The last learning rate over the peak."""

    @model_validator(mode="after")
    def _room_for_both(self) -> Self:
        if self.warmup_steps is None and self.warmup_share + self.decay_share > 1.0 + 1e-9:
            raise ValueError(
                f"`warmup_share` {self.warmup_share:g} and `decay_share` {self.decay_share:g} are more than the whole run; "
                f"with this warmup, the longest decay is {1.0 - self.warmup_share:g}"
            )
        return self


Schedule = Annotated[Annotated[Cosine | Linear | Constant | WarmupStableDecay, Field(discriminator="kind")], ByKind]


class AdamW(Spec):
    """AdamW (arXiv 1711.05101) with `train.betas` and `train.weight_decay`."""

    kind: Literal["adamw"] = "adamw"


class OtherOptimizer(Spec):
    """Any torch optimizer that can be imported; importing it runs its code."""

    kind: Literal["other"] = "other"
    module: str
    """`module:Class`, say `torch.optim:SGD`: a `torch.optim.Optimizer` that takes `lr`."""
    args: dict[str, JsonValue] = Field(default={})
    """Its other arguments by name; they hold for all weights unless a group says otherwise."""

    @field_validator("module")
    @classmethod
    def _names_a_class(cls, module: str) -> str:
        package, _, name = module.partition(":")
        if not (name.isidentifier() and all(part.isidentifier() for part in package.split("."))):
            raise ValueError(f"{module!r} is no `module:Class`; write `torch.optim:SGD`, say")
        return module

    @model_validator(mode="after")
    def _one_rate(self) -> Self:
        if "lr" in self.args:
            raise ValueError("`args.lr` is what `train.learning_rate` and `train.schedule` say; leave it out")
        return self


OptimizerChoice = Annotated[Annotated[AdamW | OtherOptimizer, Field(discriminator="kind")], ByModule]


class WeightGroup(Spec):
    """Weights with a learning rate or weight decay of their own."""

    match: str = Field(min_length=1)
    """A pattern (`*`, `?`, `[0-9]`) that covers whole parts of a weight's name: `lora_B`, `embed_tokens`, `layers.[0-3].*`."""
    learning_rate: float | None = Field(default=None, gt=0.0)
    """Their peak learning rate, on the same schedule; `train.learning_rate` when left out."""
    weight_decay: float | None = Field(default=None, ge=0.0)
    """Their decay, vectors included; as for all others when left out."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.learning_rate is None and self.weight_decay is None:
            raise ValueError("a group states `learning_rate`, `weight_decay` or both")
        return self


class Kl(Spec):
    """A pull towards the starting model: `weight` times the mean KL over the whole vocabulary is added to the loss."""

    weight: float = Field(gt=0.0)
    """1.0 counts a nat of KL as much as a nat of loss."""
    direction: Literal["forward", "reverse"] = "forward"
    """`forward`: KL(start || model), against forgetting. `reverse`: KL(model || start), against making things up."""
    kinds: Annotated[Many[TokenKind], Field(min_length=1)] | None = None
    """Kinds of tokens it is averaged over, trained or not; the trained ones, by their loss weights, when left out."""


def _number_or_auto(value: Any) -> Any:
    if value is None or value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"a whole number from 1 up or `auto` is wanted; found {value!r}")


class TrainSpec(Spec):
    """Learning rate, schedule, precision, checkpoints."""

    objective: Literal["nll", "dft"] = "nll"
    """`nll`, or `dft` (arXiv 2508.05629): each token's loss times its probability, so that what is far off pulls less."""
    neftune_alpha: float = Field(default=0.0, ge=0.0)
    """Uniform noise on the embeddings (arXiv 2310.05914): at most alpha / sqrt(tokens of the document x size of an embedding)."""
    kl: Kl | None = None
    """Holds the model close to the one it started from."""
    dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Dropout inside attention and on what layers add; as the model's own configuration says when left out."""

    learning_rate: float | None = Field(default=None, gt=0.0)
    """Peak learning rate; 2e-5 for full tuning and 2e-4 for adapters when left out."""
    schedule: Schedule = Cosine()
    """How the rate moves over the run."""
    optimizer: OptimizerChoice = AdamW()
    """`adamw`, or any other as `module:Class` with arguments: `{module: "torch.optim:SGD", args: {momentum: 0.9}}`."""
    groups: Many[WeightGroup] = ()
    """Weights with rates of their own; a weight belongs to the first group that matches its name."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """AdamW's, on matrices only."""
    betas: Many[float] = (0.9, 0.999)
    """AdamW's two decay rates."""
    max_grad_norm: float | None = Field(default=1.0, gt=0.0)
    """Gradients are scaled down to this norm; null leaves them."""
    micro_batch_rows: Annotated[Literal["auto"] | int | None, BeforeValidator(_number_or_auto)] = None
    """Rows per forward pass, the last taking what is left; `auto` tries what fits into memory before training starts; 2,048
    slots' worth when left out. Gradients do not depend on it."""
    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Passes end before the document that would make them longer than this: less memory than a row takes. One process only."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """`auto` takes cuda, else mps, else cpu."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the model's weights; `auto` measures which is faster here, and says so."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several processes (torchrun) share the model: `ddp` has it whole in each, `fsdp` cuts it over them; `auto` is `ddp`."""
    compile: Literal["auto"] | bool = "auto"
    """Layers compiled by torch (needs a C++ compiler on a CPU); `auto` does so for runs long enough to pay for it."""
    num_threads: int | None = Field(default=None, ge=1)
    """CPU threads; results are bit-identical for one number of threads. All cores when left out."""
    checkpoint_every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; a tenth of the run when left out."""
    keep_checkpoints: int = Field(default=3, ge=1)
    """Last checkpoints kept, beside the best."""
    engine: Literal["loop", "hf_trainer"] = "loop"
    """Who takes the steps: our own loop, or transformers' Trainer over the same batches, for its callbacks."""
    callbacks: Many[Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]] = ()
    """`module:Class` of `transformers.TrainerCallback`s, for `hf_trainer`; importing them runs their code."""
    stop_within_seconds: float = Field(default=25.0, gt=0.0)
    """After SIGTERM or Ctrl-C a checkpoint is written within this time, a running step dropped where it would take longer.
    torchrun, Kubernetes and Slurm kill 30 seconds after SIGTERM unless told otherwise."""
    requeue_exit_code: int = Field(default=143, ge=0, le=255)
    """Exit code after SIGTERM; 143 is 128 + SIGTERM."""
    trackers: Many[Literal["tensorboard", "wandb"]] = ()
    """Where steps are logged beside steps.parquet and events.jsonl."""
    seed: int = 0
    """Initialises adapters and dropout."""

    @model_validator(mode="after")
    def _one_size_of_passes(self) -> Self:
        if self.micro_batch_tokens is not None and self.micro_batch_rows is not None:
            raise ValueError("`micro_batch_rows` and `micro_batch_tokens` both say how large a pass is; leave one out")
        return self

    @model_validator(mode="after")
    def _two_betas(self) -> Self:
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError("betas are two numbers in [0, 1)")
        return self

    @model_validator(mode="after")
    def _engine_is_the_one(self) -> Self:
        """Refuses callbacks that nobody would call."""
        if self.engine == "loop" and self.callbacks:
            raise ValueError("`callbacks` are called by transformers' Trainer: set `engine: hf_trainer`, or leave them out")
        return self

    @model_validator(mode="after")
    def _adamw_alone(self) -> Self:
        """Refuses what only AdamW reads, when it is another optimizer that will run."""
        if isinstance(self.optimizer, OtherOptimizer):
            fields = type(self).model_fields
            idle = [f"`{name}`" for name in ("weight_decay", "betas") if getattr(self, name) != fields[name].default]
            if idle:
                raise ValueError(f"{' and '.join(idle)} are AdamW's; say them in `optimizer.args`, or in `groups`")
        return self
