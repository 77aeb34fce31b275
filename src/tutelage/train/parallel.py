"""One model in the hands of several processes: how a step's gradient becomes the same on all of them.

    Parallel     alone; or gradients added up in float32 by ourselves at the end of the step: for weights in bfloat16, whose
                 gradients live in float32 masters that no wrapper of torch knows of
    Replicated   torch's DistributedDataParallel: added up while the last pass goes backward
    Sharded      FSDP2, weights and optimizer cut in `world.size` pieces (in sharded.py)

Every pass goes backward from loss_sum * world / W and the ranks' gradients are averaged, so their sum is divided by W once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from tutelage.errors import TrainError
from tutelage.model import Learner
from tutelage.model.loss import unwrapped
from tutelage.ranks import HIDDEN_SIZE
from tutelage.train.micro import FlatStep, Pass
from tutelage.train.optimizer import NARROW
from tutelage.train.shares import Share, share_of
from tutelage.world import World

T = TypeVar("T")

BUCKET_NUMBERS = 8_388_608
"""Numbers that travel at once: 32 MB in float32, enough to use a network and little beside a model."""


class Parallel:
    """A learner and the world it is trained in. `learner` is what passes are run through; `model` stays inside it."""

    used_in: torch.dtype | None = None
    """The narrow precision in which float32 pieces are put together; None where parameters are used as they are."""

    def __init__(self, model: Any, world: World) -> None:
        self.world = world
        self.own = model if isinstance(model, Learner) else Learner(model)
        self.learner: Any = self.own
        config = unwrapped(self.own.model).config.get_text_config()
        self._hidden_size = int(getattr(config, "hidden_size", HIDDEN_SIZE))

    def share(self, flat: FlatStep, *, num_rows: int, rows_per_pass: int, most_tokens: int | None = None) -> Share:
        """This rank's part of a step: all of it when alone. `most_tokens` of a pass are for one process."""
        if self.world.is_alone:
            return Share(flat, flat.passes(rows_per_pass, most_tokens=most_tokens), np.arange(len(flat.inputs)))
        more = {"rank": self.world.rank, "num_ranks": self.world.size, "hidden_size": self._hidden_size}
        return share_of(flat, num_rows=num_rows, rows_per_pass=rows_per_pass, **more)

    def passes(self, passes: Iterable[Pass], *, num_passes: int) -> Iterator[Pass]:
        """The passes one after another; what the ranks must do together in the last one happens inside it."""
        yield from passes

    def average(self, weights: Mapping[str, Tensor]) -> None:
        """Nothing; after the last pass the gradients of these weights are the mean over all ranks, the same everywhere."""
        if not self.world.is_alone:
            _average(list(weights.values()), self.world)

    def within(self, call: Callable[[Any], T]) -> T:
        """What `call(model)` returns, run where the model's weights are whole. Every rank must call it, and alike."""
        return call(self.own.model)

    def collect(self) -> None:
        """Nothing; `model` holds plain, whole weights again, to be saved (on the first rank alone where they were cut)."""


class Replicated(Parallel):
    """torch's DistributedDataParallel: each rank has the whole model, gradients are averaged in the last pass."""

    def __init__(self, model: Any, world: World) -> None:
        super().__init__(model, world)
        device = next(self.own.parameters()).device
        self.learner = nn.parallel.DistributedDataParallel(
            self.own,
            device_ids=[device.index if device.index is not None else torch.cuda.current_device()]
            if device.type == "cuda"
            else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )
        self._settle(device)

    def _settle(self, device: torch.device) -> None:
        """Nothing; one backward pass of zeros is behind the wrapper, after which it lays out its buckets for good.

        Else it would do so after the first step of each process, sums over three ranks or more would be rounded in another
        order there, and a run that goes on would differ in its last bits.
        """
        zeros_N = torch.zeros(2, dtype=torch.int64, device=device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            loss_sum, *_ = self.learner(
                zeros_N, zeros_N, zeros_N.float(), positions_N=torch.arange(2, device=device), lengths=(2,)
            )
            loss_sum.backward()
        for parameter in self.own.parameters():
            parameter.grad = None

    def passes(self, passes: Iterable[Pass], *, num_passes: int) -> Iterator[Pass]:
        """The passes one after another; gradients stay with their rank in all but the last."""
        for number, part in enumerate(passes, 1):
            with _unsynced(self.learner) if number < num_passes else _as_is():
                yield part

    def average(self, weights: Mapping[str, Tensor]) -> None:
        """Nothing: the last pass has done it."""


def parallelise(
    model: Any,
    world: World,
    *,
    kind: str = "auto",
    device: str | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Parallel:
    """The model made ready for `train.parallel: kind` in this world. With `fsdp` its parameters are others afterwards.

    Raises `TrainError` where the ranks do not start from the same weights.
    """
    if world.is_alone:
        if kind != "auto":
            note(f"train.parallel: {kind} means nothing for one process; start several with torchrun --nproc-per-node N")
        return Parallel(model, world)
    world.require_same("the starting model", _fingerprint(model))
    if kind == "fsdp":
        from tutelage.train.sharded import Sharded

        return Sharded(model, world, device=device)
    is_narrow = any(p.dtype in NARROW for p in model.parameters() if p.requires_grad)
    return Parallel(model, world) if is_narrow else Replicated(model, world)


def _fingerprint(model: nn.Module) -> list[Any]:
    """Number of weights and, for each trained one, its sum: cheap, and different for another model or adapter start."""
    sums = [float(p.detach().double().sum()) for p in model.parameters() if p.requires_grad]
    if not sums:
        raise TrainError("the model has no trainable weight; choose `model.adapter: lora` or `full`")
    return [sum(p.numel() for p in model.parameters()), len(sums), sum(sums)]


@torch.no_grad()
def _average(weights: Sequence[Tensor], world: World) -> None:
    """Nothing; gradients become their mean over ranks. A weight without one counts as zeros, unless no rank has one."""
    import torch.distributed as dist

    has_grad = world.total(np.array([float(weight.grad is not None) for weight in weights])) > 0
    waiting: list[tuple[Any, Tensor, list[Tensor]]] = []
    for bucket in _buckets([weight for weight, is_used in zip(weights, has_grad, strict=True) if is_used]):
        for weight in bucket:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        flat = torch.cat([_grad(weight).reshape(-1) for weight in bucket])
        waiting.append((dist.all_reduce(flat, async_op=True), flat, bucket))
    for work, flat, bucket in waiting:
        work.wait()
        flat /= world.size
        for weight, part in zip(bucket, torch.split(flat, [weight.numel() for weight in bucket]), strict=True):
            _grad(weight).copy_(part.view_as(weight))


def _buckets(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, together at most `BUCKET_NUMBERS` numbers; a larger weight goes alone."""
    bucket: list[Tensor] = []
    for weight in weights:
        size = sum(w.numel() for w in bucket) + weight.numel()
        if bucket and (size > BUCKET_NUMBERS or weight.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(weight)
    if bucket:
        yield bucket


def _grad(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad


@contextmanager
def _as_is() -> Iterator[None]:
    yield


def _unsynced(learner: Any) -> Any:
    """Inside, gradients stay with their rank."""
    return learner.no_sync()
