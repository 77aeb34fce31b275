"""The whole way for a batch of records: layout, ids, kinds, and the fate of those that do not pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.errors import DataError, TemplateError
from tutelage.records import LEARNED_KINDS, ROLES, Conversation, Flag, Float32, Int32, Int64, Kind, Rendered, UInt8
from tutelage.render.behaviour import describe
from tutelage.render.cells import QUESTIONS, Cells, probe
from tutelage.render.engines import Chosen, EngineDiffers, Texts, choose_engine
from tutelage.render.forms import EMPTY_SYSTEM, WHOLE, Job, Laid, Layer, Style, columns_of, learn_weights
from tutelage.render.overlong import exchanges, first_fitting, shorter_versions
from tutelage.render.provenance import Refusal
from tutelage.render.spec import RenderSpec
from tutelage.render.template import ChatTemplate, choose_template
from tutelage.render.tokenizer import OpenTokenizer, open_tokenizer
from tutelage.render.tokens import BATCH_TEXTS, Encoded, Encoder, Labelled, label
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


class Renderer:
    """Turns records into examples with one tokenizer and one way of rendering.

    `counts` adds up what happened beside refusals: `forged` (records whose text spells a special token), `truncated`,
    `dropped_system` (system turns that the template leaves out), `hidden_turns`, `by_offsets` (examples whose positions came
    from the tokenizer's offsets), `windows`, `lost_windows`, `rewritten`.
    """

    def __init__(
        self, tokenizer: OpenTokenizer, spec: RenderSpec, *, template: str | None = None, engine: Chosen | None = None
    ) -> None:
        self.tokenizer, self.spec = tokenizer, spec
        self.templates = tokenizer.templates if template is None else {"default": template}
        self.counts: Counter[str] = Counter()
        self._styles: dict[str, Style] = {}
        self.default = self._style(has_tools=False)
        self.encoder = Encoder(tokenizer, engine or choose_engine(tokenizer, wanted=spec.tokenizer_engine))
        self._layer = Layer(self._style)
        self._has_jobs = spec.history != "as_template" or spec.system != "keep"
        self._lead = self._without_system()

    @property
    def stop_ids(self) -> list[int]:
        """The single tokens that end answers."""
        closing = self.default.closing
        tokens = [stop.token for stop in (closing.last, closing.between) if stop is not None and stop.token]
        tokens += [self.default.eos] if self.default.eos is not None and not tokens else []
        return [self.tokenizer.id_of(token) for token in dict.fromkeys(tokens)]

    def describe(self) -> dict[str, Any]:
        """What the template does (see `behaviour.describe`), and which of its markers this tokenizer takes apart."""
        found = _described(self.default.template)
        markers = found["markers"]
        assert isinstance(markers, list)
        backend = self.tokenizer.backend
        shown = self.default.template.render(QUESTIONS)  # what is printed around tools only may well be plain text
        known = [marker for marker in markers if marker in shown]
        apart = [marker for marker in known if len(backend.encode(marker, add_special_tokens=False).ids) > 1]
        return {**found, "split_markers": apart}

    def render(self, conversations: Sequence[Conversation]) -> list[Rendered | Refusal]:
        """The examples of each conversation in order (one, but for `expand` and `split`), or why there is none.

        DataError for `overlong: error` and a longer one.
        """
        return self.render_columns(columns_of(conversations), names=[c.row_id for c in conversations]).results()

    def render_columns(self, columns: TurnColumns, *, names: Sequence[str] | None = None) -> Block:
        """The same for columns; `names` are the records' ids for error messages."""
        return self.finish(columns, self.lay(columns), names=names)

    def lay(self, columns: TurnColumns) -> Laid:
        """The first half: texts and cells. Python, under the interpreter's lock."""
        return self._layer.lay(columns, (lambda record: self._jobs(columns, record)) if self._has_jobs else None)

    def finish(self, columns: TurnColumns, laid: Laid, *, names: Sequence[str] | None = None) -> Block:
        """The second half: ids, kinds, checks. Mostly outside the lock, so it can run beside the next batch's first half.

        EngineDiffers when a fast engine turns out not to be exact: `use_reference`, and start again.
        """
        return _Batch(self, columns, names).finish(laid)

    def use_reference(self, why: str) -> None:
        """From now on ids come from `tokenizers` itself."""
        if self.spec.tokenizer_engine == "gigatoken":
            raise TemplateError(f"render.tokenizer_engine: gigatoken is not exact for this data ({why}); choose `auto`")
        reference = self.encoder.engine.reference
        self.encoder.engine = Chosen(reference, reference, why)
        self.counts.clear()

    def _style(self, *, has_tools: bool) -> Style:
        text = choose_template(self.templates, has_tools=has_tools)
        if text not in self._styles:
            self._styles[text] = learn_style(self.tokenizer, text, date=self.spec.date, append_eos=self.spec.append_eos)
        return self._styles[text]

    def _without_system(self) -> tuple[int, ...]:
        """What stands in front when a record's system turn is dropped: an empty one where that keeps a default away."""
        if self.spec.system != "drop":
            return ()
        render = self.default.template.render
        plain = [{"role": "user", "content": "Why one?"}, {"role": "assistant", "content": "Because two."}]
        try:
            shorter = len(render([{"role": "system", "content": ""}, *plain])) < len(render(plain))
        except TemplateError:
            return ()
        return (EMPTY_SYSTEM,) if shorter else ()

    def _jobs(self, columns: TurnColumns, record: int) -> list[Job]:
        """The examples to be made of a record."""
        a, b = columns.offsets[record : record + 2].tolist()
        roles = [ROLES[role] for role in columns.role[a:b].tolist()]
        kept = list(range(len(roles)))
        if self.spec.system != "keep":
            kept = [*self._lead, *(turn for turn in kept if roles[turn] != "system")]
        whole = Job(None if len(kept) == len(roles) and self.spec.system == "keep" else tuple(kept))
        if self.spec.history == "as_template":
            return [whole]
        weights = learn_weights(columns, record, WHOLE)
        answers = [turn for turn in kept if turn >= 0 and roles[turn] == "assistant" and weights[turn] > 0]
        if len(answers) < 2:
            return [whole]
        upto = [tuple(turn for turn in kept if turn <= answer) for answer in answers]
        return [
            Job(turns, answer, part, int(Flag.EXPANDED)) for part, (turns, answer) in enumerate(zip(upto, answers, strict=True))
        ]


@lru_cache(maxsize=8)
def _described(template: ChatTemplate) -> dict[str, bool | list[str]]:
    """`describe`, once for all sources."""
    return describe(template)


@lru_cache(maxsize=8)
def learn_style(tokenizer: OpenTokenizer, text: str, *, date: str, append_eos: bool) -> Style:
    """What a template's text is under a tokenizer, learnt once for all sources; TemplateError without a stop."""
    template = ChatTemplate(text, special_tokens=tokenizer.special_tokens, date=date)
    # Longest first: a tokenizer's special tokens may begin with one another.
    special = sorted(tokenizer.special, key=len, reverse=True)
    closing = probe(template.render, end_tokens=tokenizer.end_tokens, special_tokens=special)
    if closing.last is not None and closing.between is not None:
        return Style(template, closing, None)
    if append_eos:
        if not tokenizer.end_tokens:
            raise TemplateError("render.append_eos: the tokenizer names no end token (`eos_token`)")
        return Style(template, closing, tokenizer.end_tokens[0])
    if closing.last is None:
        raise TemplateError(
            "the chat template writes nothing after an answer that a model could stop with, so it would never learn to stop; "
            "`render: {append_eos: true}` adds the model's end token after each answer, or name another template"
        )
    return Style(template, closing, None)


class _Batch:
    """One batch's second half."""

    def __init__(self, renderer: Renderer, columns: TurnColumns, names: Sequence[str] | None) -> None:
        self.renderer, self.columns, self.names = renderer, columns, names
        self.spec, self.encoder, self.counts = renderer.spec, renderer.encoder, renderer.counts
        self.extra: list[_Made] = []
        self.refused: list[tuple[int, Refusal]] = []

    def finish(self, laid: Laid) -> Block:
        try:
            data = "".join(laid.pieces).encode()
        except UnicodeEncodeError:
            laid = laid.encodable()
            data = "".join(laid.pieces).encode()
        self.refused = [(record, refusal) for record, _, refusal in laid.refusals]
        block = self._examples(laid, data) if len(laid) else _empty_block()
        if self.extra:
            block = _merged(block, self.extra)
        self._account(block)
        return block

    def _examples(self, laid: Laid, data: bytes) -> Block:
        cells = _flat_cells(laid, data)
        encoded = self.encoder.encode_batch(cells.texts)
        labels = label(encoded, cells.ends, cells.kinds, cells.turns)
        self.counts["by_offsets"] += int((~encoded.is_proved).sum())
        weights, num_turns = self._weights(laid)
        flags = np.array(laid.flags, np.int32)
        flags |= np.array([job.flags for job in laid.jobs], np.int32)
        gone = np.zeros(len(laid), bool)
        self._take_out(laid, encoded, labels, cells, weights, gone, flags)
        block = Block(
            np.array(laid.records, np.int64),
            np.array([job.part for job in laid.jobs], np.int32),
            flags,
            encoded.num_tokens,
            num_turns,
            encoded.ids,
            labels.kinds,
            labels.turns,
            weights,
        )
        return _kept(block, ~gone) if gone.any() else block

    def _weights(self, laid: Laid) -> tuple[Float32, Int64]:
        """Learn weights of all turns, flat by example, and how many each has."""
        columns = self.columns
        num_turns = columns.num_turns[laid.records].astype(np.int64)
        if columns.weight is None and all(job.only < 0 for job in laid.jobs):
            return np.ones(int(num_turns.sum()), np.float32), num_turns
        parts = [learn_weights(columns, record, job) for record, job in zip(laid.records, laid.jobs, strict=True)]
        return np.concatenate(parts), num_turns

    def _take_out(
        self,
        laid: Laid,
        encoded: Encoded,
        labels: Labelled,
        cells: _FlatCells,
        weights: Float32,
        gone: np.ndarray,
        flags: Int32,
    ) -> None:
        """Sets examples aside that are wrong, forged or too long, and does what is to be done with each."""
        forged = np.zeros(len(laid), bool)
        hits = np.flatnonzero(self.encoder.is_special[encoded.ids])
        hits = hits[cells.from_data[labels.cell[hits]]]
        forged[cells.example[labels.cell[hits]]] = True
        flags[forged] |= Flag.FORGED
        self.counts["forged"] += int(forged.sum())
        problems = self._problems(laid, encoded, labels, cells, weights)
        if self.spec.special_tokens_in_content == "allow":
            forged[:] = False
        for i in np.flatnonzero(forged).tolist():
            gone[i] = True
            self._forged(laid, cells, i)
        for i, refusal in problems.items():
            if not gone[i]:
                gone[i] = True
                self._refuse(laid.records[i], refusal)
        for i in np.flatnonzero((encoded.num_tokens > self.spec.max_tokens) & ~gone).tolist():
            gone[i] = True
            self._shorten(laid.records[i], laid.jobs[i], int(encoded.num_tokens[i]))

    def _refuse(self, record: int, refusal: Refusal) -> None:
        self.refused.append((record, refusal))

    def _problems(
        self, laid: Laid, encoded: Encoded, labels: Labelled, cells: _FlatCells, weights: Float32
    ) -> dict[int, Refusal]:
        """What is wrong with an example's tokens, by position in the batch."""
        found: dict[int, Refusal] = {}
        turn_offsets = _offsets(self.columns.num_turns[laid.records])
        for c in np.flatnonzero((labels.tokens_per_cell == 0) & _MUST_HAVE_TOKENS[cells.kinds]).tolist():
            i, kind, turn = int(cells.example[c]), Kind(cells.kinds[c]), int(cells.turns[c])
            if weights[turn_offsets[i] + turn] > 0:
                detail = f"no token of its own is left for the {kind.name.lower()} of this turn"
                found[i] = Refusal("merged_away", detail, turn=turn)
        for i in np.flatnonzero(~encoded.is_proved).tolist():
            if i not in found and (problem := self._undecodable(cells.texts.texts[i], encoded, labels, i)) is not None:
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

    def _forged(self, laid: Laid, cells: _FlatCells, i: int) -> None:
        """An example whose messages spell special tokens: encoded so that they are text, or refused."""
        record, job = laid.records[i], laid.jobs[i]
        made = self._literal(record, job, laid.forms[i], laid.flags[i] | job.flags, cells.pieces_of(laid, i))
        if isinstance(made, _Made) and len(made.ids) > self.spec.max_tokens:
            self._shorten(record, job, len(made.ids))
        else:
            self._take(record, made)

    def _take(self, record: int, made: _Made | Refusal) -> None:
        if isinstance(made, Refusal):
            self._refuse(record, made)
        else:
            self.extra.append(made)

    def _literal(self, record: int, job: Job, form: Any, flags: int, pieces: list[str]) -> _Made | Refusal:
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
        return _Made(record, job, flags | Flag.FORGED, encoded.ids, labels.kinds, labels.turns, weights)

    def _stops_inside(self, record: int, weights: Float32, form: Any, pieces: Sequence[str]) -> Iterator[tuple[int, str]]:
        """Learned texts that spell a stop."""
        has_tools = self.columns.tools is not None and bool(self.columns.tools[record])
        closing = self.renderer._style(has_tools=has_tools).closing
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
        laid = self.renderer._layer.lay_one(self.columns, record, job)
        if laid.refusals:
            return laid.refusals[0][2]
        deep = _Batch(self.renderer, self.columns, self.names)
        deep.spec, deep.counts = self.spec.model_copy(update={"overlong": "drop"}), Counter()
        block = deep.finish(laid)
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


@dataclass(frozen=True)
class _FlatCells:
    """The cells of a batch, one after another; `example` says whose each is, `ends` are bytes of the batch."""

    texts: Texts
    ends: Int64
    kinds: UInt8
    turns: np.ndarray
    from_data: np.ndarray
    example: Int64
    offsets: Int64

    def pieces_of(self, laid: Laid, i: int) -> list[str]:
        """The pieces of one example."""
        return laid.pieces[self.offsets[i] : self.offsets[i + 1]]


class _Pieces(Sequence[str]):
    """The texts of a batch, joined when asked for."""

    def __init__(self, pieces: list[str], offsets: list[int]) -> None:
        self._pieces, self._offsets = pieces, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return "".join(self._pieces[self._offsets[i] : self._offsets[i + 1]])


def _flat_cells(laid: Laid, data: bytes) -> _FlatCells:
    offsets = laid.offsets
    lengths = [len(piece) if piece.isascii() else len(piece.encode()) for piece in laid.pieces]
    ends = np.cumsum(lengths, dtype=np.int64)
    starts_of_examples = np.concatenate([[0], ends])[offsets]
    return _FlatCells(
        texts=Texts(_Pieces(laid.pieces, offsets.tolist()), data, starts_of_examples),
        ends=ends,
        kinds=np.concatenate([form.kinds for form in laid.forms]),
        turns=np.concatenate([form.turns for form in laid.forms]),
        from_data=np.concatenate([form.from_data for form in laid.forms]),
        example=np.repeat(np.arange(len(laid)), np.diff(offsets)),
        offsets=offsets,
    )


def _offsets(lengths: Any) -> Int64:
    out = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=out[1:])
    return out


def _empty_block() -> Block:
    none, few = np.zeros(0, np.int64), np.zeros(0, np.int32)
    return Block(none, few, few, none, none, few, np.zeros(0, np.uint8), np.zeros(0, np.int16), np.zeros(0, np.float32))


def _kept(block: Block, keep: np.ndarray) -> Block:
    """The examples of a block that stay."""
    tokens, turns = np.repeat(keep, block.num_tokens), np.repeat(keep, block.num_turns)
    return Block(
        block.records[keep],
        block.parts[keep],
        block.flags[keep],
        block.num_tokens[keep],
        block.num_turns[keep],
        block.ids[tokens],
        block.kinds[tokens],
        block.turns[tokens],
        block.turn_weights[turns],
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


def render_conversations(
    conversations: Iterable[Conversation],
    *,
    tokenizer: OpenTokenizer | Path | str,
    spec: RenderSpec | None = None,
    template: str | None = None,
) -> Iterator[Rendered | Refusal]:
    """One `Rendered` (several, under `history: expand` or `overlong: split`) or the `Refusal` for each conversation, in order.

    A bounded batch at a time. `tokenizer` is a folder that `AutoTokenizer` loads, or one already opened; `template` a chat
    template's text instead of the tokenizer's own.
    """
    tokenizer = tokenizer if isinstance(tokenizer, OpenTokenizer) else open_tokenizer(Path(tokenizer))
    renderer = Renderer(tokenizer, spec or RenderSpec(), template=template)
    source = iter(conversations)
    while batch := list(islice(source, BATCH_TEXTS)):
        yield from _rendered(renderer, batch)


def _rendered(renderer: Renderer, batch: Sequence[Conversation]) -> list[Rendered | Refusal]:
    try:
        return renderer.render(batch)
    except EngineDiffers as error:
        renderer.use_reference(str(error))
        return renderer.render(batch)
