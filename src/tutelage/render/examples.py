"""The whole way for a batch of records: layout, ids, kinds, and the fate of those that do not pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from tutelage.errors import TemplateError
from tutelage.records import ROLES, Conversation, Flag, Rendered
from tutelage.render.behaviour import describe
from tutelage.render.cells import QUESTIONS, probe
from tutelage.render.engines import Chosen, EngineDiffers, choose_engine
from tutelage.render.finish import Batch, Block, Way
from tutelage.render.forms import EMPTY_SYSTEM, WHOLE, Job, Layer, Style, columns_of, learn_weights
from tutelage.render.groups import WORTH_GROUPING, arrow_texts, lay_together
from tutelage.render.provenance import Refusal
from tutelage.render.sheet import Sheet, sheet_of
from tutelage.render.spec import RenderSpec
from tutelage.render.template import ChatTemplate, choose_template
from tutelage.render.tokenizer import OpenTokenizer, open_tokenizer
from tutelage.render.tokens import BATCH_TEXTS, Encoder
from tutelage.tables import TurnColumns


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
        tokenizer.forget()
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

    def lay(self, columns: TurnColumns) -> Sheet:
        """The first half: texts and cells."""
        if self._has_jobs:
            return sheet_of(self._layer.lay(columns, lambda record: self._jobs(columns, record)))
        if len(columns) >= WORTH_GROUPING and (texts := arrow_texts(columns.content)) is not None:
            return lay_together(self._layer, columns, texts)
        return sheet_of(self._layer.lay(columns))

    def finish(self, columns: TurnColumns, sheet: Sheet, *, names: Sequence[str] | None = None) -> Block:
        """The second half: ids, kinds, checks. Mostly outside the interpreter's lock, so it can run beside the next first half.

        EngineDiffers when a fast engine turns out not to be exact: `use_reference`, and start again.
        """
        return Batch(Way(self._layer, self.spec, self.encoder, self.counts), columns, names).finish(sheet)

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
