"""A batch's second half: ids, kinds and turns of tokens, checks, and the fate of examples that do not pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from tutelage.errors import DataError
from tutelage.records import LEARNED_KINDS, ROLES, Flag, Float32, Int32, Int64, Kind, Rendered, UInt8
from tutelage.render.cells import Cells
from tutelage.render.forms import EMPTY_SYSTEM, Form, Job, Layer, learn_weights
from tutelage.render.overlong import exchanges, first_fitting, shorter_versions
from tutelage.render.provenance import Refusal
from tutelage.render.sheet import Sheet, sheet_of
from tutelage.render.spec import RenderSpec
from tutelage.render.tokens import Encoded, Encoder, Labelled, label
from tutelage.tables import TurnColumns

_MUST_HAVE_TOKENS = np.isin(np.arange(len(Kind)), [Kind.STOP, Kind.ASSISTANT])
_WRITTEN = [Kind.ASSISTANT, Kind.REASONING, Kind.TOOL_CALL]
_ASSISTANT = ROLES.index("assistant")


@dataclass
class Block:
    """The examples of a batch of records, flat: N tokens of E examples, in the order of records and their parts.

    `records` i64 (E,) positions in the batch; `parts` i32, `flags` i32 (`records.Flag`), `num_tokens` i64 and `num_turns` i64
    (E,); `ids` i32, `kinds` u8, `turns` i16 (N,); `turn_weights` f32, flat by example. `refusals` names the records without an
    example, `lost` examples of records that have others.
    """

    records: Int64
    parts: Int32
    flags: Int32
    num_tokens: Int64
    num_turns: Int64
    ids: Int32
    kinds: UInt8
    turns: np.ndarray
    turn_weights: Float32
    refusals: list[tuple[int, Refusal]] = field(default_factory=list)
    lost: list[tuple[int, Refusal]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    def results(self) -> list[Rendered | Refusal]:
        """Examples and refusals in the order of the records."""
        tokens, turns = _offsets(self.num_tokens).tolist(), _offsets(self.num_turns).tolist()
        rows: list[tuple[int, int, Rendered | Refusal]] = [(record, 0, refusal) for record, refusal in self.refusals]
        for i, (a, b), (c, d) in zip(range(len(self)), pairwise(tokens), pairwise(turns), strict=True):
            made = Rendered(self.ids[a:b], self.kinds[a:b], self.turns[a:b], self.turn_weights[c:d])
            rows.append((int(self.records[i]), int(self.parts[i]), made))
        return [made for _, _, made in sorted(rows, key=lambda row: row[:2])]


@dataclass(frozen=True)
class _Made:
    """One example by itself."""

    record: int
    job: Job
    flags: int
    ids: Int32
    kinds: UInt8
    turns: np.ndarray
    weights: Float32


@dataclass(frozen=True)
class Way:
    """How examples are made: layout, options, tokenizer; and the counts of what happened (see `Renderer`)."""

    layer: Layer
    spec: RenderSpec
    encoder: Encoder
    counts: Counter[str]


class Batch:
    """One batch's second half; `names` are the records' ids for error messages."""

    def __init__(self, way: Way, columns: TurnColumns, names: Sequence[str] | None) -> None:
        self.way, self.columns, self.names = way, columns, names
        self.spec, self.encoder, self.counts = way.spec, way.encoder, way.counts
        self.extra: list[_Made] = []
        self.refused: list[tuple[int, Refusal]] = []

    def finish(self, sheet: Sheet) -> Block:
        """The examples of a batch that was laid out, and why the other records have none."""
        self.refused = [(record, refusal) for record, _, refusal in sheet.refusals]
        block = self._examples(sheet) if len(sheet) else _empty_block()
        if self.extra:
            block = _merged(block, self.extra)
        self._account(block)
        return block

    def _examples(self, sheet: Sheet) -> Block:
        encoded = self.encoder.encode_batch(sheet.texts)
        labels = label(encoded, sheet.ends, sheet.kinds, sheet.turns)
        self.counts["by_offsets"] += int((~encoded.is_proved).sum())
        weights, num_turns = self._weights(sheet)
        flags, gone = sheet.flags.copy(), np.zeros(len(sheet), bool)
        self._take_out(sheet, encoded, labels, weights, gone, flags)
        parts = np.zeros(len(sheet), np.int32) if sheet.jobs is None else np.array([job.part for job in sheet.jobs], np.int32)
        block = Block(
            sheet.records, parts, flags, encoded.num_tokens, num_turns, encoded.ids, labels.kinds, labels.turns, weights
        )
        return _kept(block, ~gone) if gone.any() else block

    def _weights(self, sheet: Sheet) -> tuple[Float32, Int64]:
        """Learn weights of all turns, flat by example, and how many each has."""
        columns = self.columns
        num_turns = columns.num_turns[sheet.records].astype(np.int64)
        if columns.weight is None and (sheet.jobs is None or all(job.only < 0 for job in sheet.jobs)):
            return np.ones(int(num_turns.sum()), np.float32), num_turns
        parts = [learn_weights(columns, record, sheet.job(i)) for i, record in enumerate(sheet.records.tolist())]
        return np.concatenate(parts), num_turns

    def _take_out(
        self, sheet: Sheet, encoded: Encoded, labels: Labelled, weights: Float32, gone: np.ndarray, flags: Int32
    ) -> None:
        """Sets examples aside that are wrong, forged or too long, and does what is to be done with each."""
        forged = np.zeros(len(sheet), bool)
        hits = labels.cell[self.encoder.find_special(encoded.ids)]
        hits = hits[sheet.from_data[hits]]
        forged[np.searchsorted(sheet.offsets, hits, "right") - 1] = True
        flags[forged] |= Flag.FORGED
        self.counts["forged"] += int(forged.sum())
        problems = self._problems(sheet, encoded, labels, weights)
        if self.spec.special_tokens_in_content == "allow":
            forged[:] = False
        for i in np.flatnonzero(forged).tolist():
            gone[i] = True
            self._forged(sheet, i)
        for i, refusal in problems.items():
            if not gone[i]:
                gone[i] = True
                self._refuse(int(sheet.records[i]), refusal)
        for i in np.flatnonzero((encoded.num_tokens > self.spec.max_tokens) & ~gone).tolist():
            gone[i] = True
            self._shorten(int(sheet.records[i]), sheet.job(i), int(encoded.num_tokens[i]))

    def _refuse(self, record: int, refusal: Refusal) -> None:
        self.refused.append((record, refusal))

    def _problems(self, sheet: Sheet, encoded: Encoded, labels: Labelled, weights: Float32) -> dict[int, Refusal]:
        """What is wrong with an example's tokens, by position in the batch."""
        found: dict[int, Refusal] = {}
        turn_offsets = _offsets(self.columns.num_turns[sheet.records])
        for c in np.flatnonzero((labels.tokens_per_cell == 0) & _MUST_HAVE_TOKENS[sheet.kinds]).tolist():
            i, kind, turn = int(np.searchsorted(sheet.offsets, c, "right")) - 1, Kind(sheet.kinds[c]), int(sheet.turns[c])
            if weights[turn_offsets[i] + turn] > 0:
                detail = f"no token of its own is left for the {kind.name.lower()} of this turn"
                found[i] = Refusal("merged_away", detail, turn=turn)
        for i in np.flatnonzero(~encoded.is_proved).tolist():
            if i not in found and (problem := self._undecodable(sheet.texts.texts[i], encoded, labels, i)) is not None:
                found[i] = problem
        return found

    def _undecodable(self, text: str, encoded: Encoded, labels: Labelled, i: int) -> Refusal | None:
        """A learned span whose ids do not read as the text they stand for."""
        a, b = encoded.token_offsets[i], encoded.token_offsets[i + 1]
        base = encoded.byte_offsets[i]
        data = text.encode()
        # Special tokens are their own text; decoders set spaces beside them.
        is_text = ~self.encoder.is_special[encoded.ids[a:b]]
        mine = is_text & np.isin(labels.kinds[a:b], _WRITTEN)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mine, [0]])))
        for first, last in zip((edges[::2] + a).tolist(), (edges[1::2] + a).tolist(), strict=True):
            expected = data[encoded.starts[first] - base : encoded.ends[last - 1] - base].decode("utf-8", "replace")
            if not self.encoder.decodes(encoded.ids[first:last], expected):
                turn = int(labels.turns[first])
                return Refusal("undecodable", f"the tokenizer cannot write {expected[:60]!r} without loss", turn=turn)
        return None

    def _forged(self, sheet: Sheet, i: int) -> None:
        """An example whose messages spell special tokens: encoded so that they are text, or refused."""
        record, job = int(sheet.records[i]), sheet.job(i)
        made = self._literal(record, job, sheet.form(i), sheet.pieces(i))
        if isinstance(made, _Made) and len(made.ids) > self.spec.max_tokens:
            self._shorten(record, job, len(made.ids))
        else:
            self._take(record, made)

    def _take(self, record: int, made: _Made | Refusal) -> None:
        if isinstance(made, Refusal):
            self._refuse(record, made)
        else:
            self.extra.append(made)

    def _literal(self, record: int, job: Job, form: Form, pieces: list[str]) -> _Made | Refusal:
        if self.spec.special_tokens_in_content == "error":
            return Refusal("special_token", "a message spells a special token, and special_tokens_in_content is `error`")
        weights = learn_weights(self.columns, record, job)
        for turn, stop in self._stops_inside(record, weights, form, pieces):
            return Refusal("stop_in_answer", f"the answer spells {stop!r}, which ends answers", turn=turn)
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
        cells = Cells(ends, form.kinds.tolist(), form.turns.tolist(), form.from_data.tolist())
        text = "".join(pieces)
        encoded = self.encoder.encode_literal(text, cells)
        byte_ends = np.cumsum([len(piece.encode()) for piece in pieces])
        labels = label(encoded, byte_ends, form.kinds, form.turns)
        for c in np.flatnonzero((labels.tokens_per_cell == 0) & _MUST_HAVE_TOKENS[form.kinds]).tolist():
            if weights[form.turns[c]] > 0:
                return Refusal("merged_away", "no token of its own is left for a part of this turn", turn=int(form.turns[c]))
        if (problem := self._undecodable(text, encoded, labels, 0)) is not None:
            return problem
        return _Made(record, job, form.flags | Flag.FORGED, encoded.ids, labels.kinds, labels.turns, weights)

    def _stops_inside(self, record: int, weights: Float32, form: Form, pieces: Sequence[str]) -> Iterator[tuple[int, str]]:
        """Learned texts that spell a stop."""
        has_tools = self.columns.tools is not None and bool(self.columns.tools[record])
        closing = self.way.layer.style(has_tools=has_tools).closing
        tokens = [stop.token for stop in (closing.last, closing.between) if stop is not None and stop.token]
        for piece, kind, turn, from_data in zip(pieces, form.kinds, form.turns.tolist(), form.from_data, strict=True):
            if from_data and kind in LEARNED_KINDS and weights[turn] > 0:
                yield from ((turn, token) for token in tokens if token in piece)

    def _shorten(self, record: int, job: Job, num_tokens: int) -> None:
        """What `overlong` makes of an example that is too long."""
        limit = self.spec.max_tokens
        found = f"{num_tokens:,} tokens, `render.max_tokens` is {limit:,}"
        if self.spec.overlong == "error":
            where = f"record {self.columns.first_row + record}" if self.names is None else self.names[record]
            raise DataError(f"{where}: {found}; raise it, or choose `overlong: drop`, `truncate` or `split`")
        if self.spec.overlong == "drop":
            self._refuse(record, Refusal("overlong", found))
        elif self.spec.overlong == "truncate":
            self._truncate(record, job, found)
        else:
            self._split(record, job, found)

    def _fitting(self, record: int, job: Job) -> _Made | Refusal | None:
        """The example of these turns; None when it is still too long."""
        laid = self.way.layer.lay_one(self.columns, record, job)
        if laid.refusals:
            return laid.refusals[0][2]
        spec = self.spec.model_copy(update={"overlong": "drop"})
        deep = Batch(Way(self.way.layer, spec, self.encoder, Counter()), self.columns, self.names)
        block = deep.finish(sheet_of(laid))
        if not len(block):
            refusal = deep.refused[0][1]
            return None if refusal.reason == "overlong" else refusal
        return _Made(record, job, int(block.flags[0]), block.ids, block.kinds, block.turns, block.turn_weights)

    def _kept_roles(self, record: int, job: Job) -> tuple[list[int], list[str]]:
        a, b = self.columns.offsets[record : record + 2].tolist()
        kept = list(range(b - a)) if job.kept is None else list(job.kept)
        return kept, ["system" if turn == EMPTY_SYSTEM else ROLES[int(self.columns.role[a + turn])] for turn in kept]

    def _truncate(self, record: int, job: Job, found: str) -> None:
        kept, roles = self._kept_roles(record, job)

        def attempt(some: list[int]) -> _Made | None:
            shorter = Job(tuple(kept[k] for k in some), job.only, job.part, job.flags | Flag.TRUNCATED)
            made = self._fitting(record, shorter)
            return made if isinstance(made, _Made) else None

        short = first_fitting(shorter_versions(roles), attempt)
        if short is None:
            self._refuse(record, Refusal("overlong", f"{found}, and its last exchange alone does not fit"))
        else:
            self.extra.append(short)

    def _split(self, record: int, job: Job, found: str) -> None:
        """Windows of whole exchanges, each as long as fits, from the first on; an exchange that does not fit alone is lost."""
        kept, roles = self._kept_roles(record, job)
        system = [k for k, role in enumerate(roles) if role == "system"]
        last = max((k for k, role in enumerate(roles) if role == "assistant"), default=-1)
        groups = exchanges(roles[: last + 1])
        part = job.part
        while groups:
            made, taken, refusal = self._longest_window(record, job, kept, system, groups, part)
            if made is None:
                first = kept[groups[0][0]]
                reason = refusal or Refusal("overlong", f"{found}, and this exchange alone does not fit", turn=first)
                self._refuse(record, reason)
            else:
                self.extra.append(made)
                part += 1
            groups = groups[taken:]

    def _longest_window(
        self, record: int, job: Job, kept: list[int], system: list[int], groups: list[list[int]], part: int
    ) -> tuple[_Made | None, int, Refusal | None]:
        """The window of the most exchanges from the first on, how many it takes, and why there is none."""
        best: tuple[_Made | None, int, Refusal | None] = (None, 1, None)
        low, high = 1, len(groups)
        while low <= high:
            middle = (low + high) // 2
            some = sorted([*system, *(k for group in groups[:middle] for k in group)])
            made = self._fitting(record, Job(tuple(kept[k] for k in some), job.only, part, job.flags | Flag.WINDOW))
            if isinstance(made, _Made):
                best, low = (made, middle, None), middle + 1
            else:
                if middle == 1 and isinstance(made, Refusal):
                    best = (None, 1, made)
                high = middle - 1
        return best

    def _account(self, block: Block) -> None:
        """Which records have no example at all, which lost one, and the counts."""
        have = set(block.records.tolist()) if self.refused else set()
        for record, refusal in sorted(self.refused, key=lambda each: each[0]):
            (block.lost if record in have else block.refusals).append((record, refusal))
            have.add(record)  # a record is refused once, whatever the number of its examples
        names = (("truncated", Flag.TRUNCATED), ("windows", Flag.WINDOW), ("dropped_system", Flag.SYSTEM_HIDDEN))
        for name, flag in (*names, ("hidden_turns", Flag.TURN_HIDDEN), ("rewritten", Flag.REWRITTEN)):
            self.counts[name] += int((block.flags & flag > 0).sum())
        self.counts["lost_examples"] += len(block.lost)


def _offsets(lengths: Any) -> Int64:
    out = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=out[1:])
    return out


def _empty_block() -> Block:
    none, few = np.zeros(0, np.int64), np.zeros(0, np.int32)
    return Block(none, few, few, none, none, few, np.zeros(0, np.uint8), np.zeros(0, np.int16), np.zeros(0, np.float32))


def _kept(block: Block, keep: np.ndarray) -> Block:
    """The examples of a block that stay."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]))).reshape(-1, 2)

    def kept(flat: np.ndarray, lengths: Int64) -> np.ndarray:
        """The runs of examples that stay, copied as they lie."""
        return np.concatenate([flat[:0], *(flat[a:b] for a, b in _offsets(lengths)[edges].tolist())])

    return Block(
        block.records[keep],
        block.parts[keep],
        block.flags[keep],
        block.num_tokens[keep],
        block.num_turns[keep],
        kept(block.ids, block.num_tokens),
        kept(block.kinds, block.num_tokens),
        kept(block.turns, block.num_tokens),
        kept(block.turn_weights, block.num_turns),
    )


def _merged(block: Block, extra: Sequence[_Made]) -> Block:
    """A block with more examples, in the order of records and parts."""

    def joined(own: np.ndarray, more: list[Any]) -> np.ndarray:
        return np.concatenate([own, np.array(more, own.dtype)])

    records = joined(block.records, [made.record for made in extra])
    parts = joined(block.parts, [made.job.part for made in extra])
    flags = joined(block.flags, [made.flags for made in extra])
    num_tokens = joined(block.num_tokens, [len(made.ids) for made in extra])
    num_turns = joined(block.num_turns, [len(made.weights) for made in extra])
    order = np.lexsort((parts, records))
    tokens, turns = _gather(num_tokens, order), _gather(num_turns, order)

    def flat(own: np.ndarray, more: list[np.ndarray], index: Int64) -> np.ndarray:
        return np.concatenate([own, *(each.astype(own.dtype, copy=False) for each in more)])[index]

    return Block(
        records[order],
        parts[order],
        flags[order],
        num_tokens[order],
        num_turns[order],
        flat(block.ids, [made.ids for made in extra], tokens),
        flat(block.kinds, [made.kinds for made in extra], tokens),
        flat(block.turns, [made.turns for made in extra], tokens),
        flat(block.turn_weights, [made.weights for made in extra], turns),
    )


def _gather(lengths: Int64, order: Int64) -> Int64:
    """Positions of all elements of runs of these lengths, the runs in another order.

    >>> _gather(np.array([2, 1]), np.array([1, 0]))
    array([2, 0, 1])
    """
    starts, new = _offsets(lengths)[:-1][order], lengths[order]
    return np.repeat(starts - (np.cumsum(new) - new), new) + np.arange(int(new.sum()))
