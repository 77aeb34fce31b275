"""The whole way for a batch of conversations: template, provenance, ids, kinds, and the fate of those that do not pass."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.errors import DataError, TemplateError
from tutelage.records import LEARNED_KINDS, Conversation, Float32, Kind, Rendered
from tutelage.render.cells import Closing, Layout, layout, probe
from tutelage.render.overlong import first_fitting, shorter_versions
from tutelage.render.provenance import Message, Refusal, trace
from tutelage.render.spec import RenderSpec
from tutelage.render.template import ChatTemplate, choose_template
from tutelage.render.tokenizer import OpenTokenizer, open_tokenizer
from tutelage.render.tokens import BATCH_TEXTS, Encoded, Encoder, Labelled, cells_in_bytes, label

_MUST_HAVE_TOKENS = np.isin(np.arange(len(Kind)), [Kind.STOP, *LEARNED_KINDS])


@dataclass(frozen=True)
class _Style:
    """A template and what was learnt of it."""

    template: ChatTemplate
    closing: Closing
    eos: str | None


class Renderer:
    """Turns conversations into examples with one tokenizer and one way of rendering.

    `counts` adds up what happened beside refusals: `forged` (records whose text spells a special token), `truncated`,
    `dropped_system` (system turns that the template leaves out), `hidden_turns`, `by_offsets` (examples whose positions came
    from the tokenizer's offsets), `appended_stops`.
    """

    def __init__(self, tokenizer: OpenTokenizer, spec: RenderSpec, *, template: str | None = None) -> None:
        self.tokenizer, self.spec = tokenizer, spec
        self.templates = tokenizer.templates if template is None else {"default": template}
        self.encoder = Encoder(tokenizer)
        self.counts: Counter[str] = Counter()
        self._styles: dict[str, _Style] = {}
        self.default = self._style(has_tools=False)

    @property
    def stop_ids(self) -> list[int]:
        """The single tokens that end answers."""
        closing = self.default.closing
        tokens = [stop.token for stop in (closing.last, closing.between) if stop is not None and stop.token]
        tokens += [self.default.eos] if self.default.eos is not None and not tokens else []
        return [self.tokenizer.id_of(token) for token in dict.fromkeys(tokens)]

    def render(self, conversations: Sequence[Conversation]) -> list[Rendered | Refusal]:
        """One example for each conversation, or why there is none; DataError for `overlong: error` and a longer one."""
        laid = [self._try_layout(conversation) for conversation in conversations]
        made = iter(self._encode([item for item in laid if isinstance(item, _Laid)]))
        results = [item if isinstance(item, Refusal) else next(made) for item in laid]
        return [self._fitted(c, result) for c, result in zip(conversations, results, strict=True)]

    def _style(self, *, has_tools: bool) -> _Style:
        text = choose_template(self.templates, has_tools=has_tools)
        if text not in self._styles:
            self._styles[text] = self._learn(text)
        return self._styles[text]

    def _learn(self, text: str) -> _Style:
        template = ChatTemplate(text, special_tokens=self.tokenizer.special_tokens, date=self.spec.date)
        # Longest first: a tokenizer's special tokens may begin with one another.
        special = sorted(self.tokenizer.special, key=len, reverse=True)
        closing = probe(template.render, end_tokens=self.tokenizer.end_tokens, special_tokens=special)
        if closing.last is not None and closing.between is not None:
            return _Style(template, closing, None)
        if self.spec.append_eos:
            if not self.tokenizer.end_tokens:
                raise TemplateError("render.append_eos: the tokenizer names no end token (`eos_token`)")
            return _Style(template, closing, self.tokenizer.end_tokens[0])
        if closing.last is None:
            raise TemplateError(
                "the chat template writes nothing after an answer that a model could stop with, so it would never learn to stop; "
                "`render: {append_eos: true}` adds the model's end token after each answer, or name another template"
            )
        return _Style(template, closing, None)

    def _try_layout(self, conversation: Conversation, turns: Sequence[int] | None = None) -> _Laid | Refusal:
        try:
            return self._layout(conversation, turns)
        except Refusal as refusal:
            return refusal
        except UnicodeEncodeError:
            return Refusal("invalid_unicode", "the text holds half of a surrogate pair")

    def _layout(self, conversation: Conversation, turns: Sequence[int] | None) -> _Laid:
        """The conversation (or these turns of it) rendered and cut into cells."""
        messages: list[Message] = list(conversation.messages())
        kept = list(range(len(messages))) if turns is None else list(turns)
        messages = [messages[turn] for turn in kept]
        tools = json.loads(conversation.tools) if conversation.tools else None
        style = self._style(has_tools=bool(tools))
        is_learned = [t.role == "assistant" and (t.weight is None or t.weight > 0) for t in (conversation.turns[k] for k in kept)]

        def render(these: Sequence[Message]) -> str:
            return style.template.render(these, tools=tools)

        traced = trace(render, messages, literals=style.template.literals)
        made = layout(traced, messages, style.closing, learned=is_learned, eos=style.eos)
        made.text.encode()
        for turn in made.hidden:
            self.counts["dropped_system" if messages[turn]["role"] == "system" else "hidden_turns"] += 1
        if turns is not None:
            made.cells.turns[:] = [kept[turn] if turn >= 0 else -1 for turn in made.cells.turns]
        return _Laid(conversation, made, cells_in_bytes(made.text, made.cells))

    def _encode(self, laid: Sequence[_Laid]) -> list[Rendered | Refusal]:
        if not laid:
            return []
        encoded = self.encoder.encode([item.layout.text for item in laid])
        return self._examples(laid, encoded, is_literal=False)

    def _examples(self, laid: Sequence[_Laid], encoded: Encoded, *, is_literal: bool) -> list[Rendered | Refusal]:
        """Kinds for a batch, each example checked; those that spell special tokens go their own way."""
        cells = _flat_cells(laid, encoded)
        labels = label(encoded, cells.ends, cells.kinds, cells.turns)
        problems = self._problems(laid, encoded, labels, cells)
        forged = np.zeros(len(laid), bool)
        hits = np.flatnonzero(self.encoder.is_special[encoded.ids] & cells.from_data[labels.cell])
        forged[cells.example[labels.cell[hits]]] = True
        out: list[Rendered | Refusal] = []
        edges = encoded.token_offsets.tolist()
        for i, item in enumerate(laid):
            a, b = edges[i], edges[i + 1]
            if forged[i] and not is_literal and self.spec.special_tokens_in_content != "allow":
                out.append(self._forged(item))
            elif i in problems:
                out.append(problems[i])
            else:
                out.append(Rendered(encoded.ids[a:b], labels.kinds[a:b], labels.turns[a:b], item.weights))
        self.counts["by_offsets"] += int((~encoded.is_proved).sum()) if not is_literal else 0
        return out

    def _problems(self, laid: Sequence[_Laid], encoded: Encoded, labels: Labelled, cells: _FlatCells) -> dict[int, Refusal]:
        """What is wrong with an example's tokens, by position in the batch."""
        found: dict[int, Refusal] = {}
        for c in np.flatnonzero((labels.tokens_per_cell == 0) & _MUST_HAVE_TOKENS[cells.kinds]).tolist():
            i, kind, turn = int(cells.example[c]), Kind(cells.kinds[c]), int(cells.turns[c])
            if laid[i].weights[turn] > 0 and kind in (Kind.STOP, Kind.ASSISTANT):
                found[i] = Refusal(
                    "merged_away", f"no token of its own is left for the {kind.name.lower()} of this turn", turn=turn
                )
        for i in np.flatnonzero(~encoded.is_proved).tolist():
            if i not in found and (problem := self._undecodable(laid[i], encoded, labels, i)) is not None:
                found[i] = problem
        return found

    def _undecodable(self, item: _Laid, encoded: Encoded, labels: Labelled, i: int) -> Refusal | None:
        """A learned span whose ids do not read as the text they stand for."""
        a, b = encoded.token_offsets[i], encoded.token_offsets[i + 1]
        base = encoded.byte_offsets[i]
        text = item.layout.text.encode()
        # Special tokens are their own text; decoders set spaces beside them.
        is_text = ~self.encoder.is_special[encoded.ids[a:b]]
        mine = is_text & np.isin(labels.kinds[a:b], [Kind.ASSISTANT, Kind.REASONING, Kind.TOOL_CALL])
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mine, [0]])))
        for first, last in zip((edges[::2] + a).tolist(), (edges[1::2] + a).tolist(), strict=True):
            expected = text[encoded.starts[first] - base : encoded.ends[last - 1] - base].decode("utf-8", "replace")
            if not self.encoder.decodes(encoded.ids[first:last], expected):
                turn = int(labels.turns[first])
                return Refusal("undecodable", f"the tokenizer cannot write {expected[:60]!r} without loss", turn=turn)
        return None

    def _forged(self, item: _Laid) -> Rendered | Refusal:
        """An example whose messages spell special tokens."""
        self.counts["forged"] += 1
        if self.spec.special_tokens_in_content == "error":
            return Refusal("special_token", "a message spells a special token, and special_tokens_in_content is `error`")
        for turn, stop in self._stops_inside(item):
            return Refusal("stop_in_answer", f"the answer spells {stop!r}, which ends answers", turn=turn)
        literal = self.encoder.encode_literal(item.layout.text, item.layout.cells)
        return self._examples([item], literal, is_literal=True)[0]

    def _stops_inside(self, item: _Laid) -> Iterator[tuple[int, str]]:
        closing = self._style(has_tools=bool(item.conversation.tools)).closing
        tokens = [stop.token for stop in (closing.last, closing.between) if stop is not None and stop.token]
        for turn, message in enumerate(item.conversation.turns):
            if message.role == "assistant" and item.weights[turn] > 0:
                yield from ((turn, token) for token in tokens if token in message.content)

    def _fitted(self, conversation: Conversation, made: Rendered | Refusal) -> Rendered | Refusal:
        """The example when it is short enough, else what `overlong` makes of it."""
        limit = self.spec.max_tokens
        if isinstance(made, Refusal) or len(made.ids) <= limit:
            return made
        found = f"{len(made.ids):,} tokens, `render.max_tokens` is {limit:,}"
        if self.spec.overlong == "error":
            raise DataError(f"{conversation.row_id}: {found}; raise it, or choose `overlong: drop` or `truncate`")
        if self.spec.overlong == "drop":
            return Refusal("overlong", found)

        def shortened(turns: list[int]) -> Rendered | None:
            laid = self._try_layout(conversation, turns)
            example = laid if isinstance(laid, Refusal) else self._encode([laid])[0]
            return example if isinstance(example, Rendered) and len(example.ids) <= limit else None

        short = first_fitting(shorter_versions([turn.role for turn in conversation.turns]), shortened)
        if short is None:
            return Refusal("overlong", f"{found}, and its last exchange alone does not fit")
        self.counts["truncated"] += 1
        return short


class _Laid:
    """A conversation with its layout, and the layout's cell ends in bytes."""

    __slots__ = ("conversation", "ends", "layout", "weights")

    def __init__(self, conversation: Conversation, made: Layout, ends: list[int]) -> None:
        self.conversation, self.layout, self.ends = conversation, made, ends
        self.weights: Float32 = np.array([1.0 if t.weight is None else t.weight for t in conversation.turns], np.float32)


@dataclass(frozen=True)
class _FlatCells:
    """The cells of a batch, one after another; `example` says whose each is."""

    ends: np.ndarray
    kinds: np.ndarray
    turns: np.ndarray
    from_data: np.ndarray
    example: np.ndarray


def _flat_cells(laid: Sequence[_Laid], encoded: Encoded) -> _FlatCells:
    counts = [len(item.ends) for item in laid]
    total = sum(counts)

    def flat(parts: Iterable[Any], dtype: Any) -> np.ndarray:
        return np.fromiter((value for part in parts for value in part), dtype, total)

    bases = np.repeat(encoded.byte_offsets[:-1], counts)
    return _FlatCells(
        ends=flat((item.ends for item in laid), np.int64) + bases,
        kinds=flat((item.layout.cells.kinds for item in laid), np.uint8),
        turns=flat((item.layout.cells.turns for item in laid), np.int16),
        from_data=flat((item.layout.cells.from_data for item in laid), bool),
        example=np.repeat(np.arange(len(laid)), counts),
    )


def render_conversations(
    conversations: Iterable[Conversation],
    *,
    tokenizer: OpenTokenizer | Path | str,
    spec: RenderSpec | None = None,
    template: str | None = None,
) -> Iterator[Rendered | Refusal]:
    """One `Rendered` (or the `Refusal` that says why not) for each conversation, in order, a bounded batch at a time.

    `tokenizer` is a folder that `AutoTokenizer` loads, or one already opened; `template` a chat template's text instead of
    the tokenizer's own.
    """
    tokenizer = tokenizer if isinstance(tokenizer, OpenTokenizer) else open_tokenizer(Path(tokenizer))
    renderer = Renderer(tokenizer, spec or RenderSpec(), template=template)
    source = iter(conversations)
    while batch := list(islice(source, BATCH_TEXTS)):
        yield from renderer.render(batch)
