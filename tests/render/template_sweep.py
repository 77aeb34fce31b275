"""Any chat template against any tokenizer: random conversations, and `apply_chat_template` as the judge.

`open_case` takes a template and a tokenizer (a folder, or one of the small ones built here with the template's own markers
as special tokens); `conversations` and `draw_many` draw conversations that suit it; `verify` renders one through the public door and holds
every promise against what transformers says. A broken promise is an AssertionError, anything else an outcome to count.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest import mock

import jinja2
import numpy as np
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from render.styles import _bytes, _pieces
from tutelage.errors import TemplateError
from tutelage.records import LEARNED_KINDS, Conversation, Kind, Origin, Rendered, Turn
from tutelage.render.behaviour import describe
from tutelage.render.cells import CALLS, QUESTIONS, TOOLS
from tutelage.render.examples import Renderer
from tutelage.render.provenance import Refusal
from tutelage.render.spec import RenderSpec
from tutelage.render.template import ChatTemplate
from tutelage.render.tokenizer import OpenTokenizer, open_tokenizer

DAY = "2025-01-01"
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
MAX_MARKERS = 60
CONTENT = [Kind.SYSTEM, Kind.USER, Kind.ASSISTANT, Kind.REASONING, Kind.TOOL_CALL, Kind.TOOL_RESULT]
WORDS = [
    "hi",
    "hill.",
    " ",
    "\n",
    "\n\n",
    "é",
    "☃ 𝄞",
    "user",
    "?",
    "\u2028",
    "'\"\\",
    "{{ x }}",
    "x" * 30,
    "…",
    "日本",
    "\u202eb",
]
THOUGHTS = ["<think>", "</think>", "[/INST]", "<|im_end|>", "</s>", "assistant"]
_MARKER = re.compile(r"<{1,2}[^<>\s]{1,40}>{1,2}|\[/?[A-Z][A-Z_]{1,30}\]")


class _OneDay(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime.fromisoformat(DAY)


@contextlib.contextmanager
def one_day() -> Iterator[None]:
    """transformers' `strftime_now` reads the clock; here it is always the same day."""
    with mock.patch.object(chat_template_utils, "datetime", _OneDay):
        yield


@dataclass
class Case:
    """A template with a tokenizer, as we open both and as transformers does."""

    name: str
    template: str
    tokenizer: OpenTokenizer
    theirs: Any
    appends_eos: bool
    is_exact: bool  # ids decode to their text character by character

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the template does."""
        return describe(ChatTemplate(self.template, special_tokens=self.tokenizer.special_tokens))

    @cached_property
    def renderers(self) -> dict[str, Renderer]:
        """One for each way with special tokens in content."""
        return {how: self._renderer(how) for how in ("allow", "text")}

    def _renderer(self, how: str) -> Renderer:
        spec = RenderSpec(max_tokens=1 << 20, special_tokens_in_content=how, append_eos=self.appends_eos, date=DAY)
        return Renderer(self.tokenizer, spec, template=self.template)

    def expected(self, conversation: Conversation, *, tokenize: bool) -> Any:
        """What transformers makes of it; None when the template refuses."""
        messages = [dict(message) for message in conversation.messages()]
        for message in messages:
            if "reasoning_content" in message:
                message["thinking"] = message["reasoning_content"]
            if self.facts["content_as_parts"]:
                message["content"] = [{"type": "text", "text": message["content"]}]
        tools = json.loads(conversation.tools) if conversation.tools else None
        try:
            return self.theirs.apply_chat_template(
                messages, tools=tools, chat_template=self.template, tokenize=tokenize, return_dict=False
            )
        except (
            jinja2.exceptions.TemplateError,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RecursionError,
        ):
            return None


def small_tokenizer(kind: str, template: str) -> tuple[OpenTokenizer, PreTrainedTokenizerFast]:
    """A byte-level (`bytes`) or SentencePiece-like (`pieces`) tokenizer whose special tokens are the template's markers.

    The marker that follows a plain answer, and one that ends a call, are its end tokens beside `</s>`.
    """
    markers, ends = markers_of(template)
    backend = {"bytes": _bytes, "pieces": _pieces}[kind]()
    texts = dict.fromkeys([*NAMED.values(), *ends, *markers])
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
    folder = Path(mkdtemp(prefix="tutelage-sweep-"))
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **NAMED}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ids = [backend.token_to_id(text) for text in (NAMED["eos_token"], *ends)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **NAMED)
    opened = open_tokenizer(folder)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return opened, theirs


def markers_of(template: str) -> tuple[list[str], list[str]]:
    """What the template prints that looks like a token, and those of them that end an answer or a call."""
    made = ChatTemplate(template, special_tokens=NAMED)
    markers = describe(made)["markers"]
    assert isinstance(markers, list)
    ends = []
    answered = _rendered(made, QUESTIONS)
    for message in (QUESTIONS[1], QUESTIONS[3]):
        after = answered.rpartition(message["content"])[2].lstrip()
        ends += [match.group() for match in [_MARKER.match(after)] if match]
    called = _rendered(made, CALLS[:2], tools=TOOLS).rstrip()
    ends += [word for word in _MARKER.findall(called)[-1:] if called.endswith(word) and not word.startswith("</")]
    return markers[:MAX_MARKERS], [end for end in dict.fromkeys(ends) if end not in NAMED.values()]


def shows_all(template: str) -> bool:
    """Whether the template shows every turn of a plain conversation, in text or in parts, with tools if it must."""
    made = ChatTemplate(template, special_tokens=NAMED, date=DAY)
    shown = [_rendered(made, QUESTIONS), _rendered(made, QUESTIONS, tools=TOOL_LIST)]
    shown.append(_rendered(made, [{"role": "system", "content": "Be exact."}, *QUESTIONS]))
    return any(all(message["content"] in text for message in QUESTIONS) for text in shown)


def _rendered(template: ChatTemplate, messages: Sequence[Any], **more: Any) -> str:
    try:
        return template.render(messages, **more)
    except TemplateError:
        return ""


def open_case(name: str, template: str | None, tokenizer: str | Path) -> Case:
    """The case; `tokenizer` is `bytes`, `pieces` or a folder, whose own template is taken when none is given.

    TemplateError when the template cannot be used at all.
    """
    if tokenizer in ("bytes", "pieces"):
        assert template is not None
        opened, theirs = small_tokenizer(str(tokenizer), template)
    else:
        opened, theirs = open_tokenizer(Path(tokenizer)), AutoTokenizer.from_pretrained(str(tokenizer))
        template = opened.templates["default"] if template is None else template
    for appends_eos in (False, True):
        case = Case(name, template, opened, theirs, appends_eos, is_exact=tokenizer == "bytes")
        try:
            assert case.renderers
        except TemplateError as error:
            if not appends_eos and "append_eos" in str(error):
                continue
            raise
        return case
    raise AssertionError("unreachable")


# --- conversations


Pick = Callable[[Sequence[Any]], Any]


def _text(pick: Pick, words: Sequence[str]) -> str:
    """A text that is not blank."""
    return "".join([*(pick(words) for _ in range(pick(range(5)))), pick(["a", "Yes", "42.", "d \n"])])


def _conversation(pick: Pick, markers: Sequence[str], *, plain: bool) -> Conversation:
    words = [*WORDS, *THOUGHTS, *markers] if pick(range(3)) == 0 else WORDS
    mode = pick(["plain", "listed"] if plain else ["plain", "both", "tools", "reasoning", "listed"])
    turns = [Turn("system", _text(pick, words))] if pick(range(3)) == 0 else []
    for exchange in range(pick(range(1, 4))):
        turns.append(Turn("user", _text(pick, words)))
        if mode in ("tools", "both") and pick([True, exchange == 0]):
            turns += _calls(pick, words, f"call{exchange:05d}", reasons=mode == "both")
        turns.append(_answer(pick, words, reasons=mode in ("reasoning", "both")))
    tools = json.dumps(TOOL_LIST) if mode in ("tools", "both", "listed") else None
    return Conversation(Origin("s", "f.jsonl", 1), tuple(turns), "t", "MIT", "human", tools=tools)


def _answer(pick: Pick, words: Sequence[str], *, reasons: bool) -> Turn:
    reasoning = _text(pick, words) if reasons and pick([True, False]) else None
    return Turn("assistant", _text(pick, words), reasoning=reasoning, weight=pick([None, None, None, 0.0]))


def _calls(pick: Pick, words: Sequence[str], call_id: str, *, reasons: bool) -> list[Turn]:
    name = pick(["look_up", "add"])
    function = {"name": name, "arguments": {"word": _text(pick, words), "n": 3}}
    calls = json.dumps([{"id": call_id, "type": "function", "function": function}])
    return [
        Turn("assistant", "", tool_calls=calls, reasoning=_text(pick, words) if reasons else None),
        Turn("tool", _text(pick, words), name=name, call_id=call_id),
    ]


@st.composite
def conversations(draw: st.DrawFn, markers: Sequence[str] = (), *, plain: bool = False) -> Conversation:
    """A conversation of one to three exchanges, perhaps with a list of tools; not `plain`: with calls and reasoning too."""
    return _conversation(lambda options: draw(st.sampled_from(options)), markers, plain=plain)


def draw_many(count: int, markers: Sequence[str] = (), *, random_seed: int, plain: bool = False) -> list[Conversation]:
    """So many of them, the same for the same seed; drawn without Hypothesis, which takes ten times as long."""
    pick = random.Random(random_seed).choice
    return [_conversation(pick, markers, plain=plain) for _ in range(count)]


def _tool(name: str) -> dict[str, Any]:
    properties = {"word": {"type": "string", "description": "A word."}, "n": {"type": "integer", "description": "A number."}}
    parameters = {"type": "object", "properties": properties, "required": ["word"]}
    return {"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": parameters}}


TOOL_LIST = [_tool("look_up"), _tool("add")]


# --- promises


def verify(case: Case, chats: Sequence[Conversation]) -> list[str]:
    """The outcome of each conversation, `proved` or why it was refused, with every promise checked."""
    with one_day():
        allowed, guarded = (case.renderers[how].render(chats) for how in ("allow", "text"))
        for chat, free, safe in zip(chats, allowed, guarded, strict=True):
            _check_free(case, chat, free)
            _check_safe(case, chat, free, safe)
    return [made.reason if isinstance(made, Refusal) else "proved" for made in allowed]


def _check_free(case: Case, chat: Conversation, made: Rendered | Refusal) -> None:
    """Special tokens count wherever they stand: the ids are those of transformers, or the template refuses there too."""
    if isinstance(made, Refusal):
        is_refused = made.reason == "template_refuses"
        assert not is_refused or case.expected(chat, tokenize=False) is None, f"{case.name}: refused for no reason: {made}"
        return
    if not case.appends_eos:
        expected = case.expected(chat, tokenize=True)
        assert expected is not None, f"{case.name}: transformers refuses {chat.messages()}"
        assert made.ids.tolist() == list(expected), f"{case.name}: other ids for {chat.messages()}"
    elif case.is_exact:
        eos, read = NAMED["eos_token"], case.tokenizer.backend.decode(made.ids.tolist(), skip_special_tokens=False)
        assert read.replace(eos, "") == case.expected(chat, tokenize=False).replace(eos, ""), f"{case.name}: {chat.messages()}"
    _check_turns(case, chat, made)


def _check_safe(case: Case, chat: Conversation, free: Rendered | Refusal, safe: Rendered | Refusal) -> None:
    """Special tokens in content are text: nothing else changes, and none of them is left in content."""
    if isinstance(safe, Refusal):
        assert not isinstance(free, Rendered) or safe.reason in ("stop_in_answer", "undecodable", "merged_away"), (
            f"{case.name}: {safe}"
        )
        return
    is_special = case.renderers["text"].encoder.is_special
    inside = np.isin(safe.kinds, CONTENT) & is_special[safe.ids]
    assert not inside.any(), f"{case.name}: a special token in content: {chat.messages()}"
    if isinstance(free, Rendered) and not any(token in text for token in case.tokenizer.special for text in _texts(chat)):
        for name in ("ids", "kinds", "turns", "turn_weights"):
            assert np.array_equal(getattr(free, name), getattr(safe, name)), f"{case.name}: {name} differ: {chat.messages()}"
    _check_turns(case, chat, safe)


def _texts(chat: Conversation) -> list[str]:
    return [text for turn in chat.turns for text in (turn.content, turn.reasoning or "", turn.tool_calls or "")]


def _check_turns(case: Case, chat: Conversation, made: Rendered) -> None:
    """What the model writes stands in one stretch, in turn order, and ends with one stop; it reads as the template shows it."""
    where = f"{case.name}: {chat.messages()}"
    is_written = np.isin(made.kinds, LEARNED_KINDS) | ((made.kinds == Kind.SCAFFOLD) & (made.turns >= 0))
    shown = case.expected(chat, tokenize=False)
    for turn, message in enumerate(chat.turns):
        mine = np.flatnonzero(is_written & (made.turns == turn))
        if message.role != "assistant":
            assert not len(mine), where
            continue
        if message.weight == 0.0:
            continue
        assert len(mine) and (np.diff(mine) == 1).all(), f"{where}: turn {turn} is torn"
        stops = made.kinds[mine] == Kind.STOP
        assert stops.any() and (np.diff(stops.astype(int)) >= 0).all(), f"{where}: turn {turn} must end with one stop"
        _check_answer(case, message, made.ids[made.turns == turn], made.kinds[made.turns == turn], shown, where)


def _check_answer(case: Case, message: Turn, ids: Any, kinds: Any, shown: str, where: str) -> None:
    """The answer's tokens read as its text, where the template shows that text as it is (white space at its ends aside)."""
    read = case.tokenizer.backend.decode(ids[kinds == Kind.ASSISTANT].tolist(), skip_special_tokens=False)
    is_rewritten = any(word in message.content for word in THOUGHTS) or message.content.strip() not in shown
    if not is_rewritten and message.content.strip():
        _require_same(read, message.content, is_exact=case.is_exact, where=where)
    elif case.is_exact and not _has_gaps(kinds):
        assert read.strip() in shown, f"{where}: reads {read!r}"


def _require_same(read: str, text: str, *, is_exact: bool, where: str) -> None:
    """The same but for white space; a token that straddles a border may bring a character of the template's from each side."""
    squeezed, wanted = _squeezed(read), _squeezed(text)
    assert wanted in squeezed and len(squeezed) <= len(wanted) + 2, f"{where}: reads {read!r}"
    if is_exact:
        assert text.strip() in read and len(read) <= len(text) + 2, f"{where}: reads {read!r}"


def _squeezed(text: str) -> str:
    """Without the white space that decoders set beside special tokens, or write in place of `▁` inside them."""
    return "".join(text.replace("▁", " ").split())


def _has_gaps(kinds: Any) -> bool:
    return bool((np.diff(np.flatnonzero(kinds == Kind.ASSISTANT)) > 1).any())
