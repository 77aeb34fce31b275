"""Finding planned examples to look at: by task, source, text, record id or supervised share; and the page to browse them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tutelage.errors import DataError, TutelageError, did_you_mean
from tutelage.evaluate.stage import open_shards
from tutelage.pipeline import Run, weigher
from tutelage.plan.spec import FullLoss, InstructionModelling, LastResponse, LossRule, PromptWeight, ResponseLoss
from tutelage.plan.weights import weigh_examples, weigh_tokens
from tutelage.recipe import RecipeFile
from tutelage.records import LEARNED_KINDS, Int64, Kind
from tutelage.render.tokenizer import OpenTokenizer, open_tokenizer
from tutelage.render.tokens import byte_table
from tutelage.report.data import ShownExample
from tutelage.report.gather import show_example
from tutelage.report.look import Decode
from tutelage.report.packed import PlannedExample, Policy, Vocabulary
from tutelage.report.rows import find_record, row_ids, why_not_planned
from tutelage.report.tables import plural, spoken
from tutelage.store import write_atomic
from tutelage.tables import PLANNED, Shards, read_table

NUM_SHOWN, NUM_BROWSED = 3, 500
"""Examples in the terminal and on the page, where nobody asks for another number."""

STANDARD_RULES: tuple[LossRule, ...] = (
    ResponseLoss(),
    InstructionModelling(),
    FullLoss(),
    LastResponse(),
    PromptWeight(prompt_weight=0.1),
)
_SEARCHED_AT_ONCE = 256


@dataclass(frozen=True)
class Wanted:
    """Which examples to show; None means any. `search` is looked for in the decoded text, whatever its case.

    `row_id` is a full `source/file:line[#part]` or the unique end of one. `worst`: the smallest supervised share (targets
    with weight, over tokens) first, in plan order where shares are equal.
    """

    task: str | None = None
    source: str | None = None
    search: str | None = None
    row_id: str | None = None
    worst: bool = False
    number: int = NUM_SHOWN


@dataclass(frozen=True)
class _Look:
    """The plan of a run, opened for looking."""

    file: RecipeFile
    done: Run

    @cached_property
    def planned(self) -> pa.Table:
        return read_table(self.done.artefacts["plan"].file("planned.parquet"), PLANNED)

    @cached_property
    def shards(self) -> Shards:
        return open_shards(self.done.artefacts)

    @cached_property
    def tokenizer(self) -> OpenTokenizer:
        return open_tokenizer(self.done.artefacts["tokenizer"].path)

    @property
    def decode(self) -> Decode:
        """Ids to text, special tokens written out."""
        backend = self.tokenizer.backend
        return lambda ids: str(backend.decode(list(ids), skip_special_tokens=False))

    def labels(self, column: str) -> np.ndarray:
        """A label column of the plan as one string per line."""
        return np.asarray(self.planned[column].cast(pa.string()).to_numpy(zero_copy_only=False), object)


def find_examples(file: RecipeFile, done: Run, wanted: Wanted) -> list[ShownExample]:
    """The first `wanted.number` planned examples that fit, spread over the plan; DataError when none does."""
    look, weigh = _Look(file, done), weigher(file.recipe.loss)
    shown = []
    for example in _found(look, wanted):
        weights = weigh(example.rendered) * np.float32(example.multiplier)
        names = {"row_id": example.row_id, "task": example.task, "source": example.source}
        shown.append(show_example(example.rendered, weights, look.decode, **names, num_visits=example.num_visits))
    return shown


def write_page(file: RecipeFile, done: Run, wanted: Wanted, path: Path) -> dict[str, Any]:
    """Writes the page on which the examples that fit can be browsed; its facts: `html`, `num_examples`, `size_bytes`.

    DataError when no example fits; TutelageError when the page's folder does not exist.
    """
    from tutelage.report.browse import render_browse

    if not path.parent.is_dir():
        raise TutelageError(f"--html {path}: the folder {path.parent} does not exist; make it, or name another file")
    look = _Look(file, done)
    examples = sorted(_found(look, wanted), key=lambda example: example.place)
    page = render_browse(
        examples,
        policies(file.recipe.loss),
        _vocabulary(look),
        title=file.recipe.name,
        num_planned=look.planned.num_rows,
        sort="worst" if wanted.worst else "plan",
    ).encode("utf-8", "replace")
    write_atomic(path, page)
    return {"html": str(path), "num_examples": len(examples), "size_bytes": len(page)}


def page_line(facts: Mapping[str, Any]) -> str:
    """What is said of a page that was written.

    >>> page_line({"html": "look.html", "num_examples": 500, "size_bytes": 412_300})
    'look.html: 500 examples, 0.41 MB; open it in a browser'
    """
    return (
        f"{facts['html']}: {plural(facts['num_examples'], 'example')}, {facts['size_bytes'] / 1e6:.2f} MB; open it in a browser"
    )


def policies(own: LossRule) -> list[Policy]:
    """The recipe's own loss rule as a table over kinds, then the standard rules that differ from it."""
    return [_policy(rule) for rule in (own, *(rule for rule in STANDARD_RULES if rule != own))]


def _policy(rule: LossRule) -> Policy:
    """The rule as a table, read off `weigh_tokens`: each kind, then scaffold of a turn; and whether earlier turns count."""
    turns = np.array([-1, *[0] * len(Kind)], np.int16)
    table = weigh_tokens(np.array([*Kind, Kind.SCAFFOLD], np.uint8), loss=rule, turns=turns)
    learned = len(LEARNED_KINDS)
    twice = weigh_tokens(np.array(LEARNED_KINDS * 2, np.uint8), loss=rule, turns=np.repeat(np.arange(2, dtype=np.int16), learned))
    is_last_only = bool(twice[learned:].any() and not twice[:learned].any())
    name = spoken(rule.kind) + (", last turn" if is_last_only and not isinstance(rule, LastResponse) else "")
    return Policy(name, f"loss: {_written(rule)}", tuple(table.tolist()), is_last_only)


def _written(rule: LossRule) -> str:
    """The rule as a recipe says it.

    >>> from tutelage.plan.spec import KindWeights
    >>> _written(KindWeights(weights={"assistant": 1.0, "user": 0.1})), _written(FullLoss())
    ('{weights: {assistant: 1, user: 0.1}}', 'full')
    >>> _written(InstructionModelling(turns="last"))
    '{kind: instruction_modelling, turns: last}'
    """
    said = rule.model_dump(exclude_defaults=True) | {"kind": rule.kind}
    if list(said) == ["kind"]:
        return rule.kind
    if set(said) == {"kind", rule.kind}:
        return _flow({rule.kind: said[rule.kind]})
    return _flow({"kind": rule.kind} | said)


def _flow(value: Any) -> str:
    """A value in one line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _vocabulary(look: _Look) -> Vocabulary:
    table = byte_table(look.tokenizer)
    known: Sequence[bytes] = table.texts if table is not None else ()
    special = frozenset(look.tokenizer.id_of(text) for text in look.tokenizer.special)
    return Vocabulary(look.decode, lambda i: known[i] if i < len(known) else None, special)


def _found(look: _Look, wanted: Wanted) -> list[PlannedExample]:
    """The examples that fit, in the order asked for; DataError when none does."""
    for name, value in (("task", wanted.task), ("source", wanted.source)):
        _require_known(name, value, set(look.labels(name)))
    lines = _lines(look, wanted)
    if wanted.search is not None:
        lines = np.fromiter(islice(_with_text(look, lines, wanted.search), wanted.number), np.int64)
    if not len(lines):
        num = look.planned.num_rows
        raise DataError(f"no planned example fits; `tutelage explain` shows what was dropped, among {num:,} planned")
    return _examples(look, lines[: wanted.number])


def _lines(look: _Look, wanted: Wanted) -> Int64:
    """The lines of the plan that fit but for the text: the worst first, else in plan order, a spread where any would do."""
    fits = np.ones(look.planned.num_rows, bool)
    for name, value in (("task", wanted.task), ("source", wanted.source)):
        if value is not None:
            fits &= look.labels(name) == value
    if wanted.row_id is not None:
        fits &= _of_record(look, wanted.row_id)
    lines: Int64 = np.flatnonzero(fits)
    if wanted.worst:
        lines = lines[np.argsort(_supervised_shares(look, lines), kind="stable")]
    elif wanted.row_id is None and wanted.search is None and len(lines):
        lines = lines[np.linspace(0, len(lines) - 1, min(wanted.number, len(lines))).astype(int)]
    return lines


def _of_record(look: _Look, row_id: str) -> np.ndarray:
    """Which lines are examples of the record that this id names; DataError, saying why, where the plan has none."""
    source, row = find_record(look.done.artefacts, row_id)
    found: np.ndarray = (look.labels("source") == source) & (look.planned["row"].to_numpy() == row)
    if not found.any():
        raise DataError(f"--row {row_id}: {why_not_planned(look.done.artefacts, source, row)}")
    return found


def _supervised_shares(look: _Look, lines: Int64) -> np.ndarray:
    """Targets with weight over tokens, of each of these lines."""
    source, shard, index = look.labels("source")[lines], look.labels("shard")[lines], look.planned["index"].to_numpy()[lines]
    multiplier, out = look.planned["multiplier"].to_numpy()[lines], np.zeros(len(lines))
    for pair in sorted(set(zip(source, shard, strict=True))):
        here = (source == pair[0]) & (shard == pair[1])
        rendered = look.shards.set(*pair)
        _, supervised = weigh_examples(rendered, loss=look.file.recipe.loss)
        out[here] = supervised[index[here]] / np.diff(rendered.offsets)[index[here]]
    out[multiplier <= 0] = 0.0
    return out


def _with_text(look: _Look, lines: Int64, text: str) -> Iterator[int]:
    """Those of the lines whose decoded text holds this one, as they are found."""
    wanted = text.casefold()
    for start in range(0, len(lines), _SEARCHED_AT_ONCE):
        some = lines[start : start + _SEARCHED_AT_ONCE]
        columns = (column.to_pylist() for column in look.planned.select(["source", "shard", "index"]).take(pa.array(some)))
        ids = [look.shards.example(*place).ids.tolist() for place in zip(*columns, strict=True)]
        texts = look.tokenizer.backend.decode_batch(ids, skip_special_tokens=False)
        yield from (int(line) for line, text in zip(some, texts, strict=True) if wanted in text.casefold())


def _examples(look: _Look, lines: Int64) -> list[PlannedExample]:
    """The examples of these lines."""
    table = look.planned.take(pa.array(lines)).to_pylist()
    ids = row_ids(look.done.artefacts, [line["source"] for line in table], [line["row"] for line in table])
    return [
        PlannedExample(
            place=int(place),
            row_id=row_id,
            part=line["part"],
            task=line["task"],
            source=line["source"],
            num_visits=line["num_visits"],
            multiplier=line["multiplier"],
            rendered=look.shards.example(line["source"], line["shard"], line["index"]),
        )
        for place, row_id, line in zip(lines.tolist(), ids, table, strict=True)
    ]


def _require_known(name: str, value: str | None, known: set[str]) -> None:
    if value is not None and value not in known:
        raise DataError(f"--{name} {value}: no planned example has it; {did_you_mean(value, known)}")


def as_json(example: ShownExample) -> dict[str, Any]:
    """The example as plain values."""
    return dataclasses.asdict(example)
