"""Held out or trained on: decided once, by the first request alone. Pure.

A record is held out when hash(seed, normalised first user text) falls below the share. So adding records moves none,
a larger share only adds to the held-out set, and equal requests are on one side whatever their task.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_RANGE = 1 << 64


def held_out_flags(
    prompt_keys: Iterable[bytes], tasks: Sequence[str], *, share: float, seed: int = 0, unseen_tasks: Collection[str] = ()
) -> NDArray[np.bool_]:
    """One flag per record: True = held out. Every record of an unseen task is, and else a `share` of the distinct requests.

    >>> keys = [bytes([i]) * 16 for i in range(8)]
    >>> held_out_flags(keys, ["maths"] * 8, share=0.4).astype(int)
    array([0, 0, 1, 0, 1, 0, 0, 1])
    >>> held_out_flags(keys[:3], ["maths", "riddles", "maths"], share=0.4, unseen_tasks=["riddles"]).astype(int)
    array([0, 1, 1])
    """
    start = blake2b(digest_size=8, key=seed.to_bytes(16, "little", signed=True)).copy
    drawn = []
    for prompt_key in prompt_keys:
        digest = start()
        digest.update(prompt_key)
        drawn.append(digest.digest())
    draws = np.frombuffer(b"".join(drawn), "<u8")
    # 2**64 * share as a whole number; at share 1.0 it does not fit into 64 bits, and holds out everything
    bound = round(share * _RANGE)
    flags = draws < np.uint64(bound) if bound < _RANGE else np.ones(len(draws), np.bool_)
    if unseen_tasks:
        flags |= np.fromiter((task in unseen_tasks for task in tasks), dtype=np.bool_, count=len(flags))
    return flags


def count_sides(tasks: Sequence[str], flags: NDArray[np.bool_]) -> dict[str, dict[str, int]]:
    """Records per task on each side.

    >>> count_sides(["a", "b", "a"], np.array([True, False, False]))
    {'a': {'train': 1, 'held_out': 1}, 'b': {'train': 1, 'held_out': 0}}
    """
    counts = Counter(zip(tasks, flags.tolist(), strict=True))
    return {task: {"train": counts[task, False], "held_out": counts[task, True]} for task in sorted(set(tasks))}


def add_sides(total: Mapping[str, Mapping[str, int]], more: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """The sum of two counts by task and side.

    >>> add_sides({"a": {"train": 1, "held_out": 0}}, {"a": {"train": 2, "held_out": 1}})
    {'a': {'train': 3, 'held_out': 1}}
    """
    none = {"train": 0, "held_out": 0}
    tasks = sorted({*total, *more})
    return {task: {side: total.get(task, none)[side] + more.get(task, none)[side] for side in none} for task in tasks}


def notes_on(sides: Mapping[str, Mapping[str, int]], *, share: float, unseen_tasks: Collection[str] = ()) -> list[str]:
    """What a reader of the split should know: tasks that have nothing on one side.

    >>> notes_on({"chat": {"train": 9, "held_out": 0}}, share=0.05)
    ['task chat has no held-out record (9 records, share 0.05): its loss cannot be measured']
    """
    notes = []
    for task, side in sides.items():
        total = side["train"] + side["held_out"]
        if not side["held_out"] and share > 0:
            notes.append(f"task {task} has no held-out record ({total} records, share {share:g}): its loss cannot be measured")
        if not side["train"] and task not in unseen_tasks:
            notes.append(f"task {task} has no training record: all {total} are held out")
    return notes
