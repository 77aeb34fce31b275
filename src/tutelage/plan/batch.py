"""Batches: the steps of a plan as arrays, assembled on demand from the rendered sets. No step depends on another."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from tutelage.plan.assemble import Placements, Plan, Steps
from tutelage.plan.spec import LossRule, ResponseLoss
from tutelage.plan.tally import Tokens
from tutelage.plan.weights import shift_targets, weigh_tokens
from tutelage.ranks import HIDDEN_SIZE, RankRows, share_rows
from tutelage.records import NO_TARGET, Batch, Document, Float32, Int32, Int64, Kind, Rendered
from tutelage.tables import PLACEMENTS, PLAN_STEPS, Shards, read_table


@dataclass(frozen=True)
class InMemory:
    """Rendered examples end to end, for people who have no store."""

    examples: Sequence[Rendered]

    def _join(self, name: str) -> np.ndarray:
        return np.concatenate([getattr(example, name) for example in self.examples])

    @cached_property
    def ids(self) -> np.ndarray:
        """Token ids."""
        return self._join("ids")

    @cached_property
    def kinds(self) -> np.ndarray:
        """One `Kind` per token."""
        return self._join("kinds")

    @cached_property
    def turns(self) -> np.ndarray:
        """The turn of each token."""
        return self._join("turns")

    @cached_property
    def turn_weights(self) -> Float32:
        """Learn weight of every turn."""
        return self._join("turn_weights")

    @cached_property
    def offsets(self) -> Int64:
        """First token of every example, and the total."""
        return np.cumsum([0, *(len(example.ids) for example in self.examples)])

    @cached_property
    def turn_offsets(self) -> Int64:
        """First turn of every example, and the total."""
        return np.cumsum([0, *(len(example.turn_weights) for example in self.examples)])


@dataclass(frozen=True)
class Documents:
    """Where the examples of a plan come from: entry `index` of set `shard`, with its task, source and weight multiplier."""

    sets: Sequence[Tokens]
    shard: Int32
    index: Int64
    task: Int32
    source: Int32
    multiplier: Float32


@dataclass(frozen=True)
class _Flat:
    """The documents of a step end to end; `length` has one entry per document, the others one per token."""

    length: Int64
    inputs: Int32
    targets: Int32
    weights: Float32
    kinds: np.ndarray


class Batches(Sequence[Batch]):
    r"""The steps of a finished plan: `len(batches)` of them, `batches[step]` a `Batch` of NumPy arrays.

    `Batches(plan_folder, shards)` opens a `plan` artefact; `Batches.of(plan, rendered)` needs no store:

    >>> from tutelage.plan.assemble import make_plan
    >>> from tutelage.plan.spec import BatchSpec
    >>> U, A, E = Kind.USER, Kind.ASSISTANT, Kind.STOP
    >>> def example(*ids, kinds):
    ...     turns = np.array([0 if kind == U else 1 for kind in kinds], np.int16)
    ...     return Rendered(np.array(ids, np.int32), np.array(kinds, np.uint8), turns, np.ones(2, np.float32))
    >>> rendered = [example(10, 11, 12, kinds=[U, A, E]), example(20, 21, 22, 23, kinds=[U, U, A, E])]
    >>> plan = make_plan(["a", "a"], [3, 4], weights=[2.0, 2.0], batch=BatchSpec(slots_per_step=8, capacity=8))
    >>> batch = Batches.of(plan, rendered)[0]
    >>> print(batch.inputs, batch.targets, batch.weights, batch.positions, batch.segments, sep="\n")
    [[20 21 22 23 10 11 12  0]]
    [[  21   22   23 -100   11   12 -100 -100]]
    [[0. 1. 1. 0. 1. 1. 0. 0.]]
    [[0 1 2 3 0 1 2 0]]
    [[1 1 1 1 2 2 2 0]]
    >>> batch.total_weight
    4.0
    """

    def __init__(self, plan_folder: Path, shards: Shards) -> None:
        facts = json.loads((plan_folder / "manifest.json").read_text())["facts"]
        self._loss: LossRule = TypeAdapter(LossRule).validate_python(facts["loss"])
        self._documents = _read_documents(plan_folder, shards, facts)
        placed = _columns(plan_folder / "placements.parquet", PLACEMENTS)
        self._placements = Placements(**placed)
        steps = _columns(plan_folder / "steps.parquet", PLAN_STEPS)
        del steps["step"]
        self._steps = Steps(**steps)

    @classmethod
    def of(cls, plan: Plan, rendered: Sequence[Rendered], *, loss: LossRule | None = None) -> Batches:
        """The batches of a plan that `make_plan` made of these examples, with the multipliers that it was given."""
        self = cls.__new__(cls)
        num = len(rendered)
        assert num == len(plan.num_visits), "one rendered example per example of the plan"
        task = np.zeros(num, np.int32)
        self._loss = loss or ResponseLoss()
        zeros = np.zeros(num, np.int32)
        multiplier = plan.multiplier.astype(np.float32)
        self._documents = Documents([InMemory(rendered)], zeros, np.arange(num), task, zeros, multiplier)
        self._placements, self._steps = plan.placements, plan.steps
        return self

    def placed(self, placements: Placements, steps: Steps) -> Batches:
        """The same documents in other rows of other steps."""
        other = copy.copy(self)
        other._placements, other._steps = placements, steps
        return other

    @property
    def documents(self) -> Documents:
        """The examples that rows are made of."""
        return self._documents

    def __len__(self) -> int:
        return len(self._steps)

    @overload
    def __getitem__(self, step: int) -> Batch: ...

    @overload
    def __getitem__(self, step: slice) -> list[Batch]: ...

    def __getitem__(self, step: int | slice) -> Batch | list[Batch]:
        if isinstance(step, slice):
            return [self[i] for i in range(*step.indices(len(self)))]
        if not -len(self) <= step < len(self):
            raise IndexError(f"step {step} of a plan of {len(self)} steps")
        step %= len(self)
        batch = self._assemble(self._placed(step), step)
        weight = float(batch.weights.sum(dtype=np.float64))
        assert np.isclose(weight, batch.total_weight, rtol=1e-9), (
            f"step {step}: weights sum to {weight}, the plan says {batch.total_weight}"
        )
        return batch

    def share_rows(self, step: int, *, num_ranks: int, micro_batch_rows: int = 1, hidden_size: int = HIDDEN_SIZE) -> RankRows:
        """Which rows of `batches[step]` each rank takes in each micro-batch, balanced by cost, as `ranks.share_rows` says."""
        step = range(len(self))[step]
        placed, num_rows = self._placed(step), int(self._steps.num_rows[step])
        rows = placed.row - self._steps.first_row[step]
        size = {"micro_batch_rows": micro_batch_rows, "hidden_size": hidden_size}
        return share_rows(rows, placed.length, num_rows=num_rows, num_ranks=num_ranks, **size)

    def _placed(self, step: int) -> Placements:
        first_row, num_rows = int(self._steps.first_row[step]), int(self._steps.num_rows[step])
        first, last = np.searchsorted(self._placements.row, [first_row, first_row + num_rows])
        return Placements(*(getattr(self._placements, name)[first:last] for name in _PLACEMENT_FIELDS))

    def _assemble(self, placed: Placements, step: int) -> Batch:
        first_row, num_rows = int(self._steps.first_row[step]), int(self._steps.num_rows[step])
        width = int(self._steps.slots[step]) // num_rows
        flat = _gather(self._documents, placed.example, loss=self._loss)
        assert (flat.length == placed.length).all(), f"step {step}: the plan and the rendered examples differ in length"
        row = placed.row - first_row
        begins = np.cumsum(flat.length) - flat.length
        position = np.arange(len(flat.inputs)) - np.repeat(begins, flat.length)
        slot = np.repeat(row * width + placed.start, flat.length) + position
        first_in_row = np.searchsorted(row, row)
        segment = np.arange(len(row)) - first_in_row + 1

        def lay(values: np.ndarray, *, empty: int, dtype: type) -> Any:
            out: np.ndarray = np.full(num_rows * width, empty, dtype)
            out[slot] = values
            return out.reshape(num_rows, width)

        documents = zip(row, placed.start, placed.length, placed.example, placed.visit, strict=True)
        return Batch(
            inputs=lay(flat.inputs, empty=0, dtype=np.int32),
            targets=lay(flat.targets, empty=NO_TARGET, dtype=np.int32),
            weights=lay(flat.weights, empty=0, dtype=np.float32),
            positions=lay(position, empty=0, dtype=np.int32),
            segments=lay(np.repeat(segment, flat.length), empty=0, dtype=np.int32),
            tasks=lay(np.repeat(self._documents.task[placed.example], flat.length), empty=-1, dtype=np.int16),
            sources=lay(np.repeat(self._documents.source[placed.example], flat.length), empty=-1, dtype=np.int16),
            kinds=lay(flat.kinds, empty=Kind.SCAFFOLD, dtype=np.uint8),
            documents=tuple(Document(*(int(value) for value in fields)) for fields in documents),
            step=step,
            total_weight=float(self._steps.total_weight[step]),
        )


_PLACEMENT_FIELDS = ("row", "example", "visit", "start", "length")


def _columns(path: Path, schema: Any) -> dict[str, np.ndarray]:
    table = read_table(path, schema)
    return {name: table[name].to_numpy() for name in schema.names}


def _codes(column: Any, names: Sequence[Any]) -> Int32:
    """A label column as positions in `names`."""
    encoded = column.unify_dictionaries().combine_chunks()
    place = {name: i for i, name in enumerate(names)}
    translate: Int32 = np.array([place[name] for name in encoded.dictionary.to_pylist()] or [0], np.int32)
    codes: Int32 = translate[encoded.indices.to_numpy()]
    return codes


def _read_documents(plan_folder: Path, shards: Shards, facts: dict[str, Any]) -> Documents:
    columns = ["source", "shard", "index", "task", "multiplier"]
    table = pq.read_table(plan_folder / "planned.parquet", columns=columns)
    sources = facts["sources"]
    kinds = ("render", "rerender")
    source, kind = _codes(table["source"], sources), _codes(table["shard"], kinds)
    both = source * len(kinds) + kind
    names = np.flatnonzero(np.bincount(both))
    number = np.zeros(names.max(initial=0) + 1, np.int32)
    number[names] = np.arange(len(names))
    return Documents(
        sets=[shards.set(sources[name // len(kinds)], kinds[name % len(kinds)]) for name in names],
        shard=number[both],
        index=table["index"].to_numpy(),
        task=_codes(table["task"], facts["tasks"]),
        source=source,
        multiplier=table["multiplier"].to_numpy().astype(np.float32),
    )


def _ranges(starts: Int64, lengths: Int64) -> Int64:
    """`starts[i], starts[i] + 1, ...`, `lengths[i]` of them, one after the other.

    >>> _ranges(np.array([10, 50]), np.array([3, 2])).tolist()
    [10, 11, 12, 50, 51]
    """
    ends = np.cumsum(lengths)
    flat: Int64 = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
    return flat


def _gather(documents: Documents, examples: Int32, *, loss: LossRule) -> _Flat:
    """The tokens of `examples` end to end in that order, shifted per document, with their final weights."""
    shard = documents.shard[examples]
    length = np.zeros(len(examples), np.int64)
    for name in np.unique(shard):
        offsets, index = documents.sets[name].offsets, documents.index[examples[shard == name]]
        length[shard == name] = offsets[index + 1] - offsets[index]
    begins, total = np.cumsum(length) - length, int(length.sum())
    ids = np.zeros((2, total), np.int32)
    flat = _Flat(length, ids[0], ids[1], np.zeros(total, np.float32), np.zeros(total, np.uint8))
    for name in np.unique(shard):
        mine = shard == name
        slots = _ranges(begins[mine], length[mine])
        chosen = examples[mine]
        parts = _shifted(documents.sets[name], documents.index[chosen], multiplier=documents.multiplier[chosen], loss=loss)
        for out, part in zip((flat.inputs, flat.targets, flat.weights, flat.kinds), parts, strict=True):
            out[slots] = part
    return flat


def _shifted(tokens: Tokens, index: Int64, *, multiplier: Float32, loss: LossRule) -> tuple[Int32, Int32, Float32, np.ndarray]:
    """Inputs, targets, target weights and target kinds of documents of one set, end to end."""
    length = tokens.offsets[index + 1] - tokens.offsets[index]
    num_turns = tokens.turn_offsets[index + 1] - tokens.turn_offsets[index]
    where = _ranges(tokens.offsets[index], length)
    kinds = tokens.kinds[where]
    offsets = np.concatenate([[0], np.cumsum(length)])
    weights = weigh_tokens(
        kinds,
        loss=loss,
        turns=tokens.turns[where],
        turn_weights=tokens.turn_weights[_ranges(tokens.turn_offsets[index], num_turns)],
        offsets=offsets,
        turn_offsets=np.concatenate([[0], np.cumsum(num_turns)]),
    )
    weights *= np.repeat(multiplier, length)
    inputs, targets, target_weights = shift_targets(tokens.ids[where], weights, offsets=offsets)
    _, target_kinds, _ = shift_targets(kinds.astype(np.int32), weights, offsets=offsets)
    return inputs, targets, target_weights, np.where(targets == NO_TARGET, Kind.SCAFFOLD, target_kinds).astype(np.uint8)
