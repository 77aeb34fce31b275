"""Slow, obviously right versions of what the plan room does fast, and small things to plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from tutelage.records import Kind, Rendered

LAYOUT = {
    "s": Kind.SCAFFOLD,
    "m": Kind.SCAFFOLD,
    "y": Kind.SYSTEM,
    "u": Kind.USER,
    "a": Kind.ASSISTANT,
    "r": Kind.REASONING,
    "e": Kind.STOP,
}


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of document numbers: the next longest goes into the fullest row that has room."""
    rows: list[list[int]] = []
    used: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = [r for r in range(len(rows)) if used[r] + lengths[i] <= capacity]
        if room:
            row = max(room, key=lambda r: used[r])
        else:
            row = len(rows)
            rows.append([])
            used.append(0)
        rows[row].append(i)
        used[row] += lengths[i]
    return rows


def water_filling(weights: Mapping[str, int], total: int, caps: Mapping[str, int]) -> dict[str, Fraction]:
    """Quotas by bringing tasks to their caps one at a time, until nobody is above."""
    fixed: dict[str, Fraction] = {}
    while True:
        free = {n: w for n, w in weights.items() if n not in fixed}
        left = total - sum(fixed.values())
        quotas = {n: Fraction(left * w, sum(free.values())) for n, w in free.items()}
        over = [n for n in quotas if quotas[n] > caps[n]]
        if not over:
            return fixed | quotas
        for name in over:
            fixed[name] = Fraction(caps[name])


def example(layout: str, *, first_id: int = 10, turn_weights: Sequence[float] | None = None) -> Rendered:
    """An example from one letter per token, ids counting up; a turn ends where a space stands.

    `example("su smae")`: user in turn 0, then mark (scaffold of its turn), assistant, stop in turn 1; `s` is of no turn.
    """
    parts = layout.split(" ")
    turns = [-1 if letter == "s" else turn for turn, part in enumerate(parts) for letter in part]
    kinds = [LAYOUT[letter] for letter in layout if letter != " "]
    weights = np.ones(len(parts)) if turn_weights is None else np.asarray(turn_weights)
    return Rendered(
        np.arange(first_id, first_id + len(kinds), dtype=np.int32),
        np.array(kinds, np.uint8),
        np.array(turns, np.int16),
        weights.astype(np.float32),
    )


def chat(num_user: int, num_answer: int, *, first_id: int = 10) -> Rendered:
    """One exchange with so many words on each side: `s u... sa...e`."""
    return example(f"s{'u' * num_user} s{'a' * num_answer}e", first_id=first_id)
