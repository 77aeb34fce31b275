"""Reach: how large a budget can be when caps must hold in stages that draw on different tasks.

A stage can only be filled by its own tasks, and a task's cap is for the whole run. That is a flow: from the stages, each with
its share of the budget, through the tasks that it draws on, each with what it holds. Where the flow stops short, the smallest
cut names the stages that are too large together (Ford and Fulkerson 1956).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

Stage = frozenset[str]
"""The tasks that a stage draws on."""


def largest_budget(shares: Mapping[Stage, Fraction], holds: Mapping[str, Fraction]) -> tuple[Fraction, list[Stage]]:
    """The largest budget that fills every stage, and the stages that allow no more.

    `shares` are of the budget, by the tasks drawn on; `holds` is what each task's cap lets it give, in the unit of the budget.

    >>> a, ab = frozenset("a"), frozenset("ab")
    >>> most, tight = largest_budget({a: Fraction(1, 2), ab: Fraction(1, 2)}, {"a": Fraction(30), "b": Fraction(100)})
    >>> most, tight == [a]                                     # half of 60 is 30, all of a; b fills the other half
    (Fraction(60, 1), True)
    """
    most = _sum(holds.values()) / _sum(shares.values())
    tight = list(shares)
    while over := _overfull({stage: share * most for stage, share in shares.items()}, holds):
        tight = over
        reached = frozenset[str]().union(*over)
        most = _sum(holds[name] for name in reached) / _sum(shares[stage] for stage in over)
    return most, tight


def _sum(amounts: Iterable[Fraction]) -> Fraction:
    return sum(amounts, Fraction(0))


def _overfull(needs: Mapping[Stage, Fraction], holds: Mapping[str, Fraction]) -> list[Stage]:
    """The stages that their tasks cannot fill, together; none when all can be filled at once."""
    left, room = dict(needs), dict(holds)
    given: dict[tuple[Stage, str], Fraction] = {}
    while True:
        came_from, task = _path(left, room, given)
        if task is None:
            return [stage for stage in needs if stage in came_from] if any(left.values()) else []
        steps: list[tuple[Stage, str]] = []
        at: Stage | str = task
        while (before := came_from[at]) is not None:
            steps.append((before, at) if isinstance(before, frozenset) else (at, before))  # type: ignore[arg-type]
            at = before
        assert isinstance(at, frozenset)
        backwards = steps[1::2]
        amount = min(left[at], room[task], *(given[step] for step in backwards))
        left[at] -= amount
        room[task] -= amount
        for number, step in enumerate(steps):
            given[step] = given.get(step, Fraction(0)) + (-amount if number % 2 else amount)


def _path(
    left: Mapping[Stage, Fraction], room: Mapping[str, Fraction], given: Mapping[tuple[Stage, str], Fraction]
) -> tuple[dict[Stage | str, Stage | str | None], str | None]:
    """The shortest way from an unfilled stage to a task with room: what each node was reached from, and the task."""
    came_from: dict[Stage | str, Stage | str | None] = {stage: None for stage, rest in left.items() if rest > 0}
    pending: deque[Stage | str] = deque(came_from)
    while pending:
        node = pending.popleft()
        if isinstance(node, str):
            if room[node] > 0:
                return came_from, node
            reached: Sequence[Stage | str] = [stage for (stage, task), amount in given.items() if task == node and amount > 0]
        else:
            reached = sorted(node)
        for other in reached:
            if other not in came_from:
                came_from[other] = node
                pending.append(other)
    return came_from, None
