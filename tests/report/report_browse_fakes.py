"""Planned examples with a vocabulary of 256 bytes, for the page to browse them."""

from __future__ import annotations

import random

import numpy as np

from tutelage.looking import STANDARD_RULES, policies
from tutelage.plan.spec import KindWeights
from tutelage.records import Kind, Rendered
from tutelage.report.packed import PlannedExample, Vocabulary

OWN = KindWeights(weights={"assistant": 1.0, "user": 0.3, "stop": 2.0, "scaffold": 0.7})
RULES = (OWN, *STANDARD_RULES)
POLICIES = policies(OWN)
BYTES = Vocabulary(lambda ids: bytes(ids).decode("utf-8", "replace"), lambda i: bytes([i]), frozenset({0x7C}))
"""Every byte is a token; `|` is special."""


def planned(text: str, *, rendered: Rendered | None = None, turn_weights=(1.0, 1.0), **more) -> PlannedExample:
    """An example whose tokens are the bytes of the text: the first half user, the second assistant, the last one stop."""
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    half = len(ids) // 2
    kinds, turns = np.full(len(ids), Kind.ASSISTANT, np.uint8), np.ones(len(ids), np.int16)
    kinds[:half], turns[:half], kinds[len(ids) - 1 :] = Kind.USER, 0, Kind.STOP
    rendered = rendered or Rendered(ids, kinds, turns, np.array(turn_weights, np.float32))
    fields = {"place": 0, "row_id": "s/f.jsonl:1", "part": 0, "task": "t", "source": "s", "num_visits": 1, "multiplier": 1.0}
    return PlannedExample(**(fields | more), rendered=rendered)


def random_examples(num: int, *, seed: int = 0) -> list[PlannedExample]:
    """Examples of random kinds, turns, turn weights and multipliers; some without a learned token, some of one token."""
    draw, tasks = random.Random(seed), ("maths", "chat", "code")
    out = []
    for place in range(num):
        num_turns, length = draw.randint(1, 5), draw.choice([1, 2, 7, 40])
        kinds = [draw.randrange(8 if place % 5 else 3) for _ in range(length)]
        turns = sorted(draw.randint(-1, num_turns - 1) for _ in range(length))
        weights = [draw.choice([1.0, 0.0, 0.3, 1.7]) if place % 3 else 1.0 for _ in range(num_turns)]
        ids = [draw.randrange(32, 127) for _ in range(length)]
        rendered = Rendered(
            np.array(ids, np.int32), np.array(kinds, np.uint8), np.array(turns, np.int16), np.array(weights, np.float32)
        )
        names = {"row_id": f"src/file.jsonl:{place + 1}", "task": tasks[place % 3], "source": f"src{place % 2}"}
        out.append(planned("", rendered=rendered, place=place, multiplier=draw.choice([1.0, 0.7, 2.5]), **names))
    return out


HOSTILE = '</script><img src=x onerror="alert(1)">'


def hostile_examples() -> list[PlannedExample]:
    """Markup in every name and text, and characters that hide or turn text around."""
    names = {"row_id": f"{HOSTILE}:1", "task": HOSTILE, "source": HOSTILE}
    return [planned(f"{HOSTILE}\u202eabc\u200b\x00\u2028 \r\n", **names), planned("plain", place=1)]
