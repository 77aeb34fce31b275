"""The processes of one run: how many there are, which one this is, and what they tell one another.

`torchrun` starts the same command several times, each a *rank*, on one machine or many. `meet` finds the others, `entered`
connects them; outside of it, and in a plain process, the world is `ALONE`. Ranks exchange JSON and numbers, no pickles.

    collective (every rank calls it, all get the same):   gather  first  total  agree  barrier  require_same
    from the first to the others, however late:           tell -> hear
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np

from tutelage.errors import TrainError
from tutelage.records import Float64

Json = Any

PATIENCE = timedelta(days=30)
"""How long ranks wait for the first while it prepares data or writes the report: as good as for ever."""
TIMEOUT_SECONDS = 1800
"""How long a rank waits for the others inside a step before it gives up; `TUTELAGE_RANK_TIMEOUT` is another number of seconds."""


@dataclass(frozen=True)
class World:
    """`rank` of `size` processes, `local_rank` of `local_size` on this machine. All methods are free when alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: Any = field(default=None, compare=False, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this process writes what there is one of: logs, checkpoints' manifests, reports."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other."""
        return self.size == 1

    def barrier(self) -> None:
        """Nothing; returns when every rank is here."""
        self.total(np.zeros(1))

    def total(self, values: Float64) -> Float64:
        """The sum over ranks of float64 arrays of one shape. Exact where at most one rank has other than zeros."""
        if self.is_alone:
            return values
        import torch
        import torch.distributed as dist

        summed = torch.from_numpy(np.array(values, np.float64))
        dist.all_reduce(summed)
        out: Float64 = summed.numpy()
        return out

    @property
    def agree(self) -> Callable[[int], int] | None:
        """What makes the largest of the ranks' numbers everyone's; None when there is nobody to agree with."""
        return None if self.is_alone else self._largest

    def _largest(self, number: int) -> int:
        import torch
        import torch.distributed as dist

        largest = torch.tensor([number])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def gather(self, value: Json) -> list[Json]:
        """What every rank gave, by rank; a JSON value each."""
        if self.is_alone:
            return [value]
        import torch
        import torch.distributed as dist

        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(mine)]))
        room = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8)
        room[: len(mine)] = mine
        rooms = [torch.zeros_like(room) for _ in range(self.size)]
        dist.all_gather(rooms, room)
        return [json.loads(bytes(r[: int(n)].numpy())) for r, n in zip(rooms, sizes, strict=True)]

    def first(self, value: Json) -> Json:
        """What the first rank gave; a JSON value."""
        return self.gather(value if self.is_first else None)[0]

    def require_same(self, what: str, value: Json) -> None:
        """Nothing; raises `TrainError` on every rank, saying who has what, when they do not agree."""
        found = self.gather(value)
        if odd := differing(found):
            raise TrainError(
                f"{what} differs between the processes of this run: {odd}. All must train on the same recipe, data, packages "
                "and code; `tutelage check RECIPE --cluster`, started the same way, tells what is wrong where"
            )

    def tell(self, name: str, value: Json) -> None:
        """Nothing; the first leaves a message for all others. Not collective: they may come for it hours later."""
        if not self.is_alone:
            self.store.set(name, json.dumps(value))

    def hear(self, name: str) -> Json:
        """What the first told under that name, waited for as long as it takes."""
        self.store.wait([name], PATIENCE)
        return json.loads(self.store.get(name))


ALONE = World()
_joined: list[World] = []


def current() -> World:
    """The world that this process has joined."""
    return _joined[-1] if _joined else ALONE


def rank_started() -> int:
    """The rank that `torchrun` gave this process, joined or not yet; 0 in a plain one."""
    return int(os.environ.get("RANK", "0")) if num_started() > 1 else 0


def num_started() -> int:
    """How many processes `torchrun` says there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def meet() -> World:
    """The world of the processes that `torchrun` started, which can `tell` and `hear`; all else after it is `entered`."""
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=timedelta(seconds=_timeout_seconds()))))
    except (RuntimeError, OSError) as error:
        raise _unreached(error, "open the rendezvous port between the machines (`--rdzv-endpoint HOST:PORT`)") from error
    local = {"local_rank": "LOCAL_RANK", "local_size": "LOCAL_WORLD_SIZE"}
    places = {name: int(os.environ[variable]) for name, variable in local.items() if variable in os.environ}
    return World(rank, size, **places, store=store)


def _unreached(error: Exception, remedy: str) -> TrainError:
    where, host = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}", socket.gethostname()
    first = str(error).strip().partition("\n")[0]
    return TrainError(f"rank {rank_started()} on {host} does not reach the others, who meet at {where}: {first}; {remedy}")


def _is_lost(error: RuntimeError) -> bool:
    """Whether it was raised because a connection broke or nobody answered: gloo says so in words alone."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _timeout_seconds() -> float:
    return float(os.environ.get("TUTELAGE_RANK_TIMEOUT", TIMEOUT_SECONDS))


@contextmanager
def entered(world: World, *, name: str = "world") -> Iterator[World]:
    """The same world, its processes connected until the end; entered again under another name.

    Messages between CPUs go by gloo and those between GPUs by NCCL; each rank takes the GPU of its place on its machine.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.set_device(world.local_rank % torch.cuda.device_count())
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if has_gpu else "gloo",
            store=PrefixStore(name, world.store),
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(seconds=_timeout_seconds()),
        )
    except (RuntimeError, OSError) as error:
        raise _unreached(error, "name the network that joins the machines: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME") from error
    _joined.append(world)
    try:
        yield world
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        first = str(error).strip().partition("\n")[0]
        raise TrainError(
            f"rank {world.rank} on {socket.gethostname()} lost another rank ({first}); look there for why. Checkpoints are "
            "kept: start all processes again with the same command, and they go on from the newest"
        ) from error
    finally:
        _joined.remove(world)
        dist.destroy_process_group()


def differing(found: list[Json]) -> str:
    """Who has what, the value of most ranks first; "" when all have the same.

    >>> differing(["a", "b", "a", "a"])
    "'a' on ranks 0, 2, 3; 'b' on rank 1"
    >>> differing([7, 7])
    ''
    """
    by_value: dict[str, list[int]] = {}
    for rank, value in enumerate(found):
        by_value.setdefault(repr(value), []).append(rank)
    if len(by_value) < 2:
        return ""
    parts = sorted(by_value.items(), key=lambda pair: -len(pair[1]))
    return "; ".join(f"{value} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" for value, ranks in parts)
