"""A whole recipe small enough to run in seconds: three sources, two tasks and an unseen one, a tiny random model."""

from __future__ import annotations

import json
import random
from pathlib import Path

from toy import save_tiny

ADJECTIVES = ("red", "blue", "old", "new", "tall", "small", "quick", "slow", "kind", "plain", "loud", "calm")
NOUNS = ("fox", "river", "house", "letter", "garden", "window", "engine", "pencil", "harbour", "candle", "basket", "mirror")

RECIPE = """\
name: small
model: {name: "MODEL", adapter: {kind: lora, rank: 4, alpha: 8}}
sources:
  sums: {path: sums.jsonl, task: sums, licence: MIT}
  words: {path: "words*.jsonl", task: words, licence: Apache-2.0}
  hidden: {path: hidden.jsonl, task: hidden, licence: MIT}
split: {held_out_share: 0.1, unseen_tasks: [hidden]}
curate:
  rules: [strip_boilerplate, {length: {max_response_words: 60}}, refusal]
render: {max_tokens: 256}
mix: {rates: {kind: temperature, temperature: 2}, epochs: 2, max_visits: 4}
batch: {slots_per_step: 1024}
train: {learning_rate: 1e-2, num_threads: 1, dtype: float32, device: cpu, checkpoint_every_steps: 3}
evaluate: {every_steps: 6, max_tokens: 600, samples: 2, max_new_tokens: 4}
report: {num_examples: 3}
"""


def write_small(folder: Path, *, num_records: int = 60, model: str | None = None) -> Path:
    """The recipe's path; data, model and recipe are written into `folder`, the same bytes every time."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    sums, words, hidden = [], [], []
    for i in range(num_records):
        a, b = draw.randrange(100), draw.randrange(100)
        answer = f"Sure! {a} + {b} = {a + b}" if i % 7 == 0 else f"{a} + {b} = {a + b}"
        sums.append({"question": f"Add {a} to {b} ({i}).", "answer": answer})
        phrase = f"the {draw.choice(ADJECTIVES)} {draw.choice(NOUNS)} {i}"
        first = [{"role": "user", "content": f"Say {phrase}"}, {"role": "assistant", "content": phrase.title()}]
        again = [{"role": "user", "content": "Backwards?"}, {"role": "assistant", "content": phrase[::-1]}]
        words.append({"messages": first + (again if i % 3 == 0 else [])})
        hidden.append({"question": f"Which is larger, {a} or {b} ({i})?", "answer": str(max(a, b))})
    for name, rows in (("sums", sums), ("words", words), ("hidden", hidden[:12])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not (folder / "model").exists():
        save_tiny(folder / "model")
    path = folder / "small.yaml"
    path.write_text(RECIPE.replace("MODEL", str(model or folder / "model")))
    return path


BAD_LINES: tuple[tuple[bytes, str], ...] = (
    (b'{"question": "a", "answer": ', "broken JSON"),
    (b'{"question": "a", "answer": "b"', "broken JSON"),
    (b'["question", "answer"]', "no object"),
    (b'{"question": 3, "answer": "b"}', "wrong type"),
    (b'{"question": "a", "answer": ["b"]}', "wrong type"),
    (b'{"question": "a", "answer": ""}', "empty answer"),
    (b'{"question": "a", "answer": "  \\n "}', "empty answer"),
    (b'{"question": " ", "answer": "b"}', "empty request"),
    (b'{"question": "a"}', "no answer"),
    (b'{"question": "a\xff\xfe", "answer": "b"}', "invalid UTF-8"),
    (b'{"question": "a\\ud800", "answer": "b"}', "lone surrogate"),
    (b'{"question": "a", "question": "c", "answer": "b"}', "duplicate keys"),
    (b'{"question": "a", "answer": "b", "x": ' + b"[" * 3000 + b"]" * 3000 + b"}", "deep nesting"),
)
BAD_CHATS: tuple[tuple[object, str], ...] = (
    (
        [
            {"role": "system", "content": "s"},
            {"role": "system", "content": "t"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ],
        "two system turns",
    ),
    ([{"role": "narrator", "content": "a"}, {"role": "assistant", "content": "b"}], "unknown role"),
    ([{"role": "user", "content": "a"}], "no answer"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], "wrong type"),
    ("hello", "wrong type"),
    ([], "no turns"),
)
