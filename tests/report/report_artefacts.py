"""Small artefacts in the real schemas, made through the real store: two sources, a plan, a run of three steps.

maths  12 lines: 2 malformed, 10 records: row 0 held out, row 1 a copy, row 2 overlong, row 9 not drawn
chat   5 records: row 0 held out, row 4 rewritten
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

import toy
from tutelage import tables
from tutelage.records import Conversation, Dropped, Kind, Origin, Rendered, Rewrite, Sample, Score, Turn
from tutelage.store import Artefact, Counts, Outcome, Progress, Stage, Store

REASONS = {1: "exact_duplicate", 2: "overlong", 9: "not_drawn", 0: "held_out"}
NUM_RECORDS = {"maths": 10, "chat": 5}
PLANNED_ROWS = {"maths": [3, 4, 5, 6, 7, 8], "chat": [1, 2, 3, 4]}


@dataclass
class Fakes:
    """Stages and their artefacts by label."""

    store: Store
    stages: dict[str, Stage] = field(default_factory=dict)
    artefacts: dict[str, Artefact] = field(default_factory=dict)

    def add(self, label: str, write, counts: Counts, facts: Mapping = {}, packages=()) -> None:
        name, _, slot = label.partition(" ")

        def build(folder: Path, inputs: Mapping[str, Artefact], progress: Progress) -> Outcome:
            write(folder)
            return Outcome(counts, facts)

        self.stages[label] = Stage(name, 1, {"label": label}, build, slot=slot, packages=packages)
        self.artefacts[label] = self.store.produce(self.stages[label], {})


def finished_run(root: Path, *, is_trained: bool = True) -> Fakes:
    """All artefacts of a run, or those up to the plan."""
    fakes = Fakes(Store(root))
    for source, num in NUM_RECORDS.items():
        bad = 2 if source == "maths" else 0
        drops = {"broken_json": bad} if bad else {}
        fakes.add(f"read {source}", _read(source, bad), Counts(num + bad, num, drops), packages=("pyarrow",))
        fakes.add(f"render {source}", _render(source), Counts(num, num - (source == "maths"), {"overlong": 1} if bad else {}))
    fakes.add("rewrite chat", _rewrite, Counts(5, 5))
    fakes.add("rerender chat", lambda folder: _write_set(folder, "chat", [4]), Counts(1, 1))
    fakes.add("copies", _copies, Counts(15, 14, {"exact_duplicate": 1}))
    fakes.add("tokenizer", lambda folder: toy.toy_tokenizer().save_pretrained(folder), Counts(1, 1))
    fakes.add("plan", _plan, Counts(15, 10, {"held_out": 2, "exact_duplicate": 1, "overlong": 1, "not_drawn": 1}), _PLAN_FACTS)
    if is_trained:
        fakes.add("train", _train, Counts(10, 10), {"device": "cpu", "model_kind": "lora", "train_seconds": 3.5})
        fakes.add("measure before", _measure("before", 2.0), Counts(2, 2))
        fakes.add("measure after", _measure("after", 1.5), Counts(2, 2))
    return fakes


def _text(source: str, row: int) -> tuple[str, str]:
    return f"{source} question {row}?", f"answer {row}"


def _read(source: str, num_bad: int):
    def write(folder: Path) -> None:
        columns = tables.ConversationColumns()
        for row in range(NUM_RECORDS[source]):
            question, answer = _text(source, row)
            where = Origin(source, f"{source}.jsonl", row + 1)
            turns = (Turn("user", question), Turn("assistant", answer))
            licence = "MIT" if source == "maths" else "Apache-2.0"
            columns.append(Conversation(where, turns, source, licence, "human", None, bytes(16), bytes(16)))
        tables.write_table(folder / "conversations.parquet", columns.table())
        bad = [
            Dropped(source, f"{source}.jsonl", 90 + i, -1, "broken_json", "line ends inside a string", '{"a": "b')
            for i in range(num_bad)
        ]
        tables.write_records(folder / "dropped.parquet", tables.DROPPED, bad)

    return write


def _render(source: str):
    def write(folder: Path) -> None:
        rows = [row for row in range(NUM_RECORDS[source]) if (source, row) != ("maths", 2)]
        _write_set(folder, source, rows)
        drops = [Dropped("maths", "maths.jsonl", 3, 2, "overlong", "2,311 tokens, at most 64")] if source == "maths" else []
        tables.write_records(folder / "dropped.parquet", tables.DROPPED, drops)

    return write


def example(source: str, row: int) -> Rendered:
    """`<|im_start|>user QUESTION<|im_end|>...ANSWER<|im_end|>` as characters of the toy tokenizer."""
    question, answer = _text(source, row)
    parts = [
        (Kind.SCAFFOLD, [toy.IM_START, *map(ord, "user\n")]),
        (Kind.USER, list(map(ord, question))),
        (Kind.SCAFFOLD, [toy.IM_END, ord("\n"), toy.IM_START, *map(ord, "assistant\n")]),
        (Kind.ASSISTANT, list(map(ord, answer))),
        (Kind.STOP, [toy.IM_END]),
    ]
    ids = [i for _, some in parts for i in some]
    kinds = [int(kind) for kind, some in parts for _ in some]
    return Rendered(np.array(ids, np.int32), np.array(kinds, np.uint8), np.zeros(len(ids), np.int16), np.ones(2, np.float32))


def _write_set(folder: Path, source: str, rows: list[int]) -> None:
    rendered = [example(source, row) for row in rows]
    learned = [int(np.isin(r.kinds, [Kind.ASSISTANT, Kind.STOP]).sum()) for r in rendered]
    columns = {
        "row": rows,
        "part": [0] * len(rows),
        "task": [source] * len(rows),
        "num_tokens": [len(r.ids) for r in rendered],
        "num_turns": [2] * len(rows),
        "num_learned_tokens": learned,
        "flags": [0] * len(learned),
    }
    tables.RenderedSet.write(folder, pa.table(columns, schema=tables.EXAMPLES), rendered)


def _rewrite(folder: Path) -> None:
    edit = Rewrite("chat", 4, 1, "strip_boilerplate", "Sure! answer 4", "answer 4")
    tables.write_records(folder / "rewrites.parquet", tables.REWRITES, [edit])


def _copies(folder: Path) -> None:
    drop = Dropped("maths", "maths.jsonl", 2, 1, "exact_duplicate", "equal to maths/maths.jsonl:4", "maths question 1?")
    tables.write_records(folder / "dropped.parquet", tables.DROPPED, [drop])


def _lines() -> list[tuple[str, str, int, int]]:
    """(source, shard, index, row) of the planned examples; maths lost row 2, so that later rows lie one earlier."""
    maths = [("maths", "render", row - 1, row) for row in PLANNED_ROWS["maths"]]
    chat = [("chat", "rerender", 0, 4) if row == 4 else ("chat", "render", row, row) for row in PLANNED_ROWS["chat"]]
    return [*maths, *chat]


def _plan(folder: Path) -> None:
    lines = _lines()
    lengths = [len(example(source, row).ids) for source, _, _, row in lines]
    planned = {
        "source": [line[0] for line in lines],
        "shard": [line[1] for line in lines],
        "index": [line[2] for line in lines],
        "row": [line[3] for line in lines],
        "part": [0] * len(lines),
        "task": [line[0] for line in lines],
        "num_tokens": lengths,
        "multiplier": [0.5 if line[0] == "chat" else 1.0 for line in lines],
        "weight": [9.0] * len(lines),
        "num_visits": [1] * len(lines),
    }
    tables.write_table(folder / "planned.parquet", pa.table(planned, schema=tables.PLANNED))
    places = {"row": range(10), "example": range(10), "visit": [0] * 10, "start": [0] * 10, "length": lengths}
    tables.write_table(folder / "placements.parquet", pa.table({k: list(v) for k, v in places.items()}, schema=tables.PLACEMENTS))
    steps = {"step": range(5), "window": [0] * 5, "first_row": range(0, 10, 2), "num_rows": [2] * 5, "num_examples": [2] * 5}
    steps |= {"real_tokens": [80] * 5, "slots": [128] * 5, "total_weight": [18.0] * 5}
    tables.write_table(folder / "steps.parquet", pa.table({k: list(v) for k, v in steps.items()}, schema=tables.PLAN_STEPS))
    drops = [Dropped("maths", "", 0, row, reason) for row, reason in REASONS.items()] + [Dropped("chat", "", 0, 0, "held_out")]
    tables.write_records(folder / "dropped.parquet", tables.DROPPED, drops)


def _mixture(task: str, num: int) -> dict:
    amounts = {
        f"{part}_{unit}": num * n
        for part in ("available", "planned")
        for unit, n in (("examples", 1), ("tokens", 40), ("supervised", 9))
    }
    shares = dict.fromkeys(("share_examples", "share_tokens", "share_supervised", "promised_share"), num / 10)
    return {"task": task, **amounts, **shares, "visits_per_record": 1.0, "most_visits": 1, "is_capped": False}


_PLAN_FACTS = {
    "capacity": 64,
    "num_steps": 5,
    "slots_per_step": 128,
    "packing_efficiency": 0.62,
    "mixture": [_mixture("maths", 6), _mixture("chat", 4)],
    "notes": ["a note of the plan"],
}


def _train(folder: Path) -> None:
    """Three of the five planned steps."""
    rows = []
    for step in range(3):
        rows.append((step, "all", 20.0 - step, 10.0, 10, 1.0, 1e-4 * (3 - step), 0.5, 80, 128, 10**9))
        rows.append((step, "task maths", 12.0 - step, 6.0, 18, None, None, None, None, None, None))
    columns = {name: [row[i] if i < len(row) else None for row in rows] for i, name in enumerate(tables.STEPS.names)}
    tables.write_table(folder / "steps.parquet", pa.table(columns, schema=tables.STEPS))
    evals = [Score("during", step, task, "", "nll", 2.0 - step / 6, 10.0) for step in (0, 3) for task in ("maths", "")]
    tables.write_records(folder / "evals.parquet", tables.SCORES, evals)


def _measure(run: str, loss: float):
    def write(folder: Path) -> None:
        items = [("maths", "maths/maths.jsonl:1"), ("chat", "chat/chat.jsonl:1")]
        scores = [Score(run, 0, task, item, "nll", loss * 10, 10.0) for task, item in items]
        scores += [
            Score(run, 0, task, "", "nll", loss, 20.0 if task == "" else 10.0, loss - 0.1, loss + 0.1)
            for task in ("maths", "chat", "")
        ]
        if run == "after":
            scores += [Score(run, 3, task, "", "nll_change", -0.5, 10.0, -0.6, -0.4) for task in ("maths", "")]
        tables.write_records(folder / "scores.parquet", tables.SCORES, scores)
        samples = [
            Sample(run, 0, task, item, f"prompt of {task}", "ref", f"{run} said", run == "after", 5) for task, item in items
        ]
        tables.write_records(folder / "samples.parquet", tables.SAMPLES, samples)

    return write
