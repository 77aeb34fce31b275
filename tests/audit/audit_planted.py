"""Rendered examples with faults put in by hand, and a store in which the audit finds them; ids are those of the toy tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import toy
from tutelage import tables
from tutelage.audit.spec import AuditSpec
from tutelage.audit.stage import Audit, AuditInputs, Rule, audit_stage, read_audit
from tutelage.audit.tokens import Stretch
from tutelage.plan.spec import LossRule, ResponseLoss
from tutelage.plan.weights import weigh_tokens
from tutelage.records import Conversation, Dropped, Flag, Kind, Origin, Rendered, Turn
from tutelage.store import Artefact, Counts, Outcome, Progress, Stage, Store

START, END = toy.IM_START, toy.IM_END
ROLE_KINDS = {"system": Kind.SYSTEM, "user": Kind.USER, "assistant": Kind.ASSISTANT, "tool": Kind.TOOL_RESULT}
Said = Sequence[tuple[str, str]]


def rendered(said: Said, *, weights: Sequence[float] | None = None) -> Rendered:
    """`<|im_start|>R TEXT<|im_end|>` and a line end for each turn, every kind and turn as rendering gives them."""
    tokens: list[tuple[int, int, int]] = []
    for turn, (role, text) in enumerate(said):
        tokens += [(START, Kind.SCAFFOLD, -1), (ord(role[0]), Kind.SCAFFOLD, -1)]
        tokens += [(ord(c), ROLE_KINDS[role], turn) for c in text]
        is_answer = role == "assistant"
        tokens += [(END, Kind.STOP if is_answer else Kind.SCAFFOLD, turn if is_answer else -1), (10, Kind.SCAFFOLD, -1)]
    ids, kinds, turns = (np.array(column) for column in zip(*tokens, strict=True))
    learn = np.ones(len(said)) if weights is None else np.array(weights)
    return Rendered(ids.astype(np.int32), kinds.astype(np.uint8), turns.astype(np.int16), learn.astype(np.float32))


def without(example: Rendered, drop: np.ndarray) -> Rendered:
    """The example without some of its tokens."""
    return Rendered(example.ids[~drop], example.kinds[~drop], example.turns[~drop], example.turn_weights)


def stopless(example: Rendered, turn: int) -> Rendered:
    """The stop of one turn is gone."""
    return without(example, (example.kinds == Kind.STOP) & (example.turns == turn))


def cut(example: Rendered, num_tokens: int) -> Rendered:
    """The last tokens are gone, and the line end behind them."""
    return without(example, np.arange(len(example.ids)) >= len(example.ids) - num_tokens - 1)


def with_id(example: Rendered, kind: Kind, token: int) -> Rendered:
    """The last token of a kind has another id."""
    ids = example.ids.copy()
    ids[np.flatnonzero(example.kinds == kind)[-1]] = token
    return replace(example, ids=ids)


@dataclass
class Source:
    """A source to be: what each record says, what rendering made of it, flags, and what the stages dropped."""

    said: list[Said]
    examples: dict[int, Rendered] = field(default_factory=dict)
    flags: dict[int, Flag] = field(default_factory=dict)
    refused: dict[int, tuple[str, str]] = field(default_factory=dict)
    undrawn: dict[int, str] = field(default_factory=dict)
    part_of_line: dict[int, int] = field(default_factory=dict)
    again: dict[int, Rendered] = field(default_factory=dict)
    """Records that were rewritten and rendered anew."""

    def shown(self) -> dict[int, Rendered]:
        """The first rendering."""
        rows = [row for row in range(len(self.said)) if row not in self.refused]
        return {row: self.examples.get(row) or rendered(self.said[row]) for row in rows}

    def planned(self) -> list[tuple[str, int, int]]:
        """(shard, index in it, row) of what is planned."""
        first, second = list(self.shown()), list(self.again)
        rows = [row for row in sorted({*first, *second}) if row not in self.undrawn]
        return [("rerender", second.index(r), r) if r in self.again else ("render", first.index(r), r) for r in rows]


CLEAN_CHAT: Said = (("user", "why one?"), ("assistant", "because two."))


def clean(num: int, name: str = "q") -> list[Said]:
    """Records of one exchange, all different."""
    return [(("user", f"{name} {i}?"), ("assistant", f"it is {i}.")) for i in range(num)]


def weigher(loss: LossRule) -> Callable[[Stretch], np.ndarray]:
    """As the pipeline hands it in."""
    return lambda of: weigh_tokens(
        of.kinds, loss=loss, turns=of.turns, turn_weights=of.turn_weights, offsets=of.offsets, turn_offsets=of.turn_offsets
    )


def audited(
    root: Path,
    sources: Mapping[str, Source],
    *,
    loss: LossRule | None = None,
    spec: AuditSpec | None = None,
    facts: Mapping[str, Any] | None = None,
    **rule: Any,
) -> Audit:
    """The audit of these sources, made through a real store. `facts` are added to those of every rendering."""
    store = Store(root)
    stages, artefacts = _boxes(store, sources, {"stop_ids": [END], "stop_text": "<|im_end|>"} | dict(facts or {}))
    named: dict[str, dict[str, Stage]] = {"read": {}, "render": {}, "rerender": {}}
    for label, stage in stages.items():
        kind, _, name = label.partition(" ")
        if name:
            named[kind][name] = stage
    inputs = AuditInputs(stages["plan"], named["read"], named["render"], named["rerender"], stages["tokenizer"])
    stage = audit_stage(inputs, rule=Rule(weigher(loss or ResponseLoss()), **rule))
    return read_audit(store.produce(stage, artefacts), spec or AuditSpec())


def _boxes(store: Store, sources: Mapping[str, Source], facts: Mapping[str, Any]) -> tuple[dict[str, Stage], dict[str, Artefact]]:
    stages, artefacts = {}, {}

    def add(label: str, write: Callable[[Path], None], counts: Counts, told: Mapping[str, Any] = {}) -> None:
        def build(folder: Path, _: Mapping[str, Artefact], __: Progress) -> Outcome:
            write(folder)
            return Outcome(counts, told)

        name, _, slot = label.partition(" ")
        stages[label] = Stage(name, 1, {"label": label}, build, slot=slot)
        artefacts[label] = store.produce(stages[label], {})

    for name, source in sources.items():
        num, lost = len(source.said), Counts(len(source.said), len(source.shown()), _counted(source.refused))
        add(f"read {name}", lambda folder, n=name, s=source: _write_read(folder, n, s), Counts(num, num))
        add(f"render {name}", lambda folder, n=name, s=source: _write_set(folder, n, s, s.shown(), s.refused), lost, facts)
        if source.again:
            count = len(source.again)
            write = lambda folder, n=name, s=source: _write_set(folder, n, s, s.again, {})  # noqa: E731
            add(f"rerender {name}", write, Counts(count, count), facts)
    add("tokenizer", lambda folder: toy.toy_tokenizer().save_pretrained(folder), Counts(1, 1))
    add("plan", lambda folder: _write_plan(folder, sources), Counts(1, 1))
    return stages, artefacts


def _counted(refused: Mapping[int, tuple[str, str]]) -> dict[str, int]:
    reasons = [reason for reason, _ in refused.values()]
    return {reason: reasons.count(reason) for reason in reasons}


def _write_read(folder: Path, name: str, source: Source) -> None:
    columns = tables.ConversationColumns()
    for row, said in enumerate(source.said):
        example = source.examples.get(row)
        weights = [None if w == 1 else float(w) for w in example.turn_weights] if example else [None] * len(said)
        turns = tuple(Turn(role, text, weight=w) for (role, text), w in zip(said, weights, strict=True))
        key = hashlib.blake2b(repr(said).encode(), digest_size=16).digest()
        where = Origin(name, f"{name}.jsonl", row + 1, source.part_of_line.get(row, 0))
        columns.append(Conversation(where, turns, f"task of {name}", "MIT", "human", None, key, key))
    tables.write_table(folder / "conversations.parquet", columns.table())


def _write_set(
    folder: Path, name: str, source: Source, shown: Mapping[int, Rendered], refused: Mapping[int, tuple[str, str]]
) -> None:
    columns = {
        "row": list(shown),
        "part": [0] * len(shown),
        "task": [f"task of {name}"] * len(shown),
        "num_tokens": [len(example.ids) for example in shown.values()],
        "num_turns": [len(example.turn_weights) for example in shown.values()],
        "num_learned_tokens": [1] * len(shown),
        "flags": [int(source.flags.get(row, Flag(0))) for row in shown],
    }
    tables.RenderedSet.write(folder, pa.table(columns, schema=tables.EXAMPLES), list(shown.values()))
    drops = [Dropped(name, f"{name}.jsonl", row + 1, row, reason, detail) for row, (reason, detail) in refused.items()]
    tables.write_records(folder / "dropped.parquet", tables.DROPPED, drops)


def _write_plan(folder: Path, sources: Mapping[str, Source]) -> None:
    lines = [(name, *line) for name, source in sorted(sources.items()) for line in source.planned()]
    columns: dict[str, list[Any]] = {
        "source": [line[0] for line in lines],
        "shard": [line[1] for line in lines],
        "index": [line[2] for line in lines],
        "row": [line[3] for line in lines],
        "task": [f"task of {line[0]}" for line in lines],
    }
    columns |= {name: [1] * len(lines) for name in ("num_tokens", "multiplier", "weight", "num_visits")}
    columns["part"] = [0] * len(lines)
    table = {name: columns[name] for name in tables.PLANNED.names}
    tables.write_table(folder / "planned.parquet", pa.table(table, schema=tables.PLANNED))
    drops = [Dropped(name, "", -1, row, reason) for name, s in sources.items() for row, reason in s.undrawn.items()]
    tables.write_records(folder / "dropped.parquet", tables.DROPPED, drops)
