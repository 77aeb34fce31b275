"""FSDP2: weights, gradients and the optimizer's memory cut in pieces, one per rank, and put together layer by layer when used.

Each decoder layer is a unit of its own (`fully_shard`), and the learner around them holds the rest: embeddings, last norm,
head, and the loss, which is inside its forward because only there the head is whole. Trained weights are cut in float32, which
is the precision of their gradients then, and put together in the model's own: a piece holds what rounding made of its master,
so nothing is lost there. Frozen weights stay in their precision: float32 adapters over a bfloat16 base share its units.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from tutelage.errors import TrainError
from tutelage.train.optimizer import NARROW
from tutelage.train.parallel import Parallel
from tutelage.world import World

T = TypeVar("T")


class Sharded(Parallel):
    """A learner whose weights are cut over the ranks. Gradients are averaged in every pass: whole ones are never kept.

    The pieces go to `device`, by default where the model is: a model left on the CPU may be larger than one GPU.
    """

    def __init__(self, model: Any, world: World, *, device: str | None = None) -> None:
        super().__init__(model, world)
        self.used_in = _narrow_dtype(self.own)
        mesh = init_device_mesh(device or next(self.own.parameters()).device.type, (world.size,))
        # Inputs stay as they are: loss weights rounded to bfloat16 would be other weights.
        policy = MixedPrecisionPolicy(
            param_dtype=self.used_in, reduce_dtype=torch.float32 if self.used_in else None, cast_forward_inputs=False
        )
        # TODO(meta-load): every rank holds the whole model, as it was loaded, until here; it could be read piece by piece.
        for unit in (*_layers(self.own), self.own):
            if self.used_in is not None:
                _widen_trained(unit)
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(self.own, "within")

    def average(self, weights: Mapping[str, Tensor]) -> None:
        """Nothing: every pass has done it."""

    def within(self, call: Callable[[Any], T]) -> T:
        """What `call(model)` returns, run inside the learner's forward. It must run the same forwards on every rank."""
        try:
            return self.own.within(call)
        finally:
            cast(Any, self.own).reshard()

    @torch.no_grad()
    def collect(self) -> None:
        """Nothing; the first rank's model holds whole weights, in the precision it came in and on the CPU; others hold none.

        The model can then be saved, and not run.
        """
        done: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        for module in self.own.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if isinstance(parameter, DTensor):
                    if id(parameter) not in done:
                        done[id(parameter)] = (parameter, self._whole(parameter))
                    setattr(module, name, done[id(parameter)][1])

    def _whole(self, parameter: Any) -> nn.Parameter:
        whole = parameter.full_tensor()
        if parameter.requires_grad and self.used_in is not None:
            whole = whole.to(self.used_in)
        kept = whole.cpu() if self.world.is_first else torch.empty_like(whole, device="meta")
        return nn.Parameter(kept, requires_grad=parameter.requires_grad)


def _narrow_dtype(learner: nn.Module) -> torch.dtype | None:
    """The narrow precision that trained weights are used in, None for a wide one. Raises `TrainError` where there are several."""
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    dtypes = {parameter.dtype for parameter in trained}
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise TrainError(
            f"train.parallel: fsdp trains weights of one precision, found {names}; use `train.parallel: ddp`, or "
            "`train.dtype: float32`"
        )
    return dtypes.pop() if dtypes & set(NARROW) else None


def _widen_trained(unit: nn.Module) -> None:
    """Nothing; the trained weights of a unit that is about to be cut are float32: a unit at a time, never the whole model."""
    for parameter in unit.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.float()


def _layers(learner: nn.Module) -> list[nn.Module]:
    """The modules that the architecture says must stay in one piece: its decoder layers. The outermost of nested ones."""
    names = set()
    for module in learner.modules():
        names |= set(getattr(module, "_no_split_modules", None) or ())
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in learner.modules():
        if type(module).__name__ in names and id(module) not in inside:
            found.append(module)
            inside |= {id(inner) for inner in module.modules()}
    return found


def save_pieces(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Nothing; every rank writes its own pieces, as safetensors that say where in the whole they belong. Collective.

    torch's distributed checkpoints, with its safetensors writer: the default one would leave pickles on the disk.
    """
    state = {name: tensor.detach() for name, tensor in tensors.items()}
    save(state, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def load_pieces(folder: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that any number of ranks saved, cut as their namesakes in `like` are; others whole, on the CPU.

    `what/NAME` is a namesake of `NAME` where it has its shape: an optimizer's moment is cut as its weight. Reads what
    this rank needs and no more.
    """
    reader = HuggingFaceStorageReader(str(folder))
    state: dict[str, Tensor] = {}
    for name, meta in reader.read_metadata().state_dict_metadata.items():
        size, dtype = cast(Any, meta).size, cast(Any, meta).properties.dtype
        model = model_of(name, like)
        if model is not None and model.shape == size:
            state[name] = torch.empty_like(model.detach(), dtype=dtype)
        else:
            state[name] = torch.empty(size, dtype=dtype)
    is_alone = not torch.distributed.is_initialized()
    with warnings.catch_warnings():
        if is_alone:  # one process reads what several wrote: that is what is wanted
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        load(state, storage_reader=reader, no_dist=is_alone)
    return state


def model_of(name: str, like: Mapping[str, Tensor]) -> Tensor | None:
    """The weight that a tensor of a checkpoint is, or is about: `what/NAME` is about `NAME`."""
    return like.get(name, like.get(name.partition("/")[2]))


def cut_like(whole: Tensor, like: Tensor | None) -> Tensor:
    """`whole` cut as `like` is; itself where that is not cut or of another shape."""
    if not isinstance(like, DTensor) or like.shape != whole.shape:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def is_cut(weights: Mapping[str, Tensor]) -> bool:
    """Whether these weights are pieces."""
    return any(isinstance(weight, DTensor) for weight in weights.values())
