"""Several processes on this machine as the ranks of one run, over gloo: what `torchrun` does, without starting Python anew."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

PRELOADED = ["toy", "tiny_training", "peft", "tutelage.train.loop", "tutelage.train.sharded", "torch.nn.parallel.distributed"]


def in_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returned in each of `size` processes, by rank; each has joined the world of all.

    A rank that raised is told as an AssertionError with its traceback. A mutant planted here is planted there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_enter, args=(theirs, rank, size, f"{folder}/store", function, args), daemon=True)
            process.start()
            theirs.close()
            ends.append(mine)
            processes.append(process)
        answers = [_answer(end) for end in ends]
        for process in processes:
            process.join(30)
    for rank, (is_well, answer) in enumerate(answers):
        assert is_well, f"rank {rank} of {size}:\n{answer}"
    return [answer for _, answer in answers]


def _answer(end: Connection) -> tuple[bool, Any]:
    if not end.poll(120):
        return False, "nothing was heard of it for two minutes"
    try:
        found: tuple[bool, Any] = end.recv()
    except EOFError:
        return False, "it ended without a word"
    return found


def _enter(end: Connection, rank: int, size: int, path: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch
    from torch.distributed import FileStore

    from tutelage.world import World, entered

    torch.set_num_threads(1)
    os.environ["TUTELAGE_RANK_TIMEOUT"] = "60"
    if name := os.environ.get("TUTELAGE_MUTANT"):
        import mutants

        mutants.plant(mutants.by_name(name))
    try:
        with entered(World(rank, size, rank, size, store=FileStore(path, size))):
            end.send((True, function(*args)))
    except Exception:  # noqa: BLE001 - whatever it is, the parent shall hear of it
        end.send((False, traceback.format_exc()))
