"""Conversations as rendered examples of the toy tokenizer, written straight from their turns."""

from __future__ import annotations

import numpy as np

from toy import IM_END, IM_START
from tutelage.evaluate.held_out import HeldOut
from tutelage.records import Kind, Rendered

KIND_OF = {"system": Kind.SYSTEM, "user": Kind.USER, "assistant": Kind.ASSISTANT}


def chat(*contents: str, weights: list[float] | None = None) -> Rendered:
    """The example of turns that alternate user, assistant, user, ... in the toy tokenizer's ChatML."""
    ids: list[int] = []
    kinds: list[int] = []
    turns: list[int] = []

    def put(text: str, kind: Kind, turn: int) -> None:
        ids.extend(map(ord, text))
        kinds.extend([kind] * len(text))
        turns.extend([turn] * len(text))

    for turn, content in enumerate(contents):
        role = "user" if turn % 2 == 0 else "assistant"
        ids.append(IM_START)
        kinds.append(Kind.SCAFFOLD)
        turns.append(-1)
        put(f"{role}\n", Kind.SCAFFOLD, -1)
        put(content, KIND_OF[role], turn)
        ids.append(IM_END)
        kinds.append(Kind.STOP if role == "assistant" else Kind.SCAFFOLD)
        turns.append(turn if role == "assistant" else -1)
        put("\n", Kind.SCAFFOLD, -1)
    return Rendered(
        np.array(ids, np.int32),
        np.array(kinds, np.uint8),
        np.array(turns, np.int16),
        np.array(weights or [1.0] * len(contents), np.float32),
    )


def messages(*contents: str) -> list[dict[str, str]]:
    """The same turns as chat templates read them."""
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(contents)]


def held_out(examples: list[Rendered], tasks: list[str] | None = None) -> HeldOut:
    """The examples as a held-out set, named r0, r1, ..."""
    return HeldOut(tuple(f"r{i}" for i in range(len(examples))), tuple(tasks or ["t"] * len(examples)), tuple(examples))
