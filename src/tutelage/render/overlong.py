"""Examples that are too long, shortened by whole exchanges: the oldest go first, the system turn and the last answer stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def exchanges(roles: Sequence[str]) -> list[list[int]]:
    """The turns of each exchange: a request (system turns aside) and everything up to the next one.

    >>> exchanges(["system", "user", "assistant", "user", "assistant", "tool", "assistant"])
    [[1, 2], [3, 4, 5, 6]]
    """
    groups: list[list[int]] = []
    previous = ""
    for turn, role in enumerate(roles):
        if role == "system":
            continue
        if not groups or (role == "user" and previous != "user"):
            groups.append([])
        groups[-1].append(turn)
        previous = role
    return groups


def shorter_versions(roles: Sequence[str]) -> list[list[int]]:
    """The turns that stay when 1, 2, ... of the oldest exchanges go. What follows the last answer goes first of all.

    >>> shorter_versions(["system", "user", "assistant", "user", "assistant", "user", "assistant"])
    [[0, 3, 4, 5, 6], [0, 5, 6]]
    >>> shorter_versions(["user", "assistant"])
    []
    """
    last_answer = max((turn for turn, role in enumerate(roles) if role == "assistant"), default=-1)
    system = [turn for turn, role in enumerate(roles) if role == "system"]
    groups = exchanges(roles[: last_answer + 1])
    return [sorted([*system, *(turn for group in groups[k:] for turn in group)]) for k in range(1, len(groups))]


def first_fitting(candidates: Sequence[list[int]], render: Callable[[list[int]], T | None]) -> T | None:
    """The rendering of the first candidate that fits (`render` gives None for one that does not), by halving.

    >>> first_fitting([[1], [2], [3], [4]], lambda turns: turns[0] if turns[0] >= 3 else None)
    3
    """
    low, high = 0, len(candidates)
    best: T | None = None
    while low < high:
        middle = (low + high) // 2
        made = render(candidates[middle])
        if made is None:
            low = middle + 1
        else:
            best, high = made, middle
    return best
