"""Templates that only put pieces together: run once on symbols, and every conversation of that form is a join of strings.

A template runs on symbols in place of the messages' texts. A symbol can be joined to other text and trimmed; whether it
holds a word is answered "no" and written down as a condition; anything else a template may do with a text (measure it,
index it, compare it with another, print it as JSON) ends the attempt. What comes out is therefore the rendering of *every*
conversation of the same roles whose texts are not blank and meet the conditions: literal text and the messages' own, in turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn, cast

import jinja2
import jinja2.nodes
import jinja2.runtime
import jinja2.visitor

from tutelage.errors import TemplateError
from tutelage.records import Kind
from tutelage.render.cells import Cells, Closing, layout
from tutelage.render.provenance import CONTENT_KINDS, FIRST_SENTINEL, LAST_SENTINEL, Part, Span, Trace
from tutelage.render.template import TEMPLATE_FAILURES, ChatTemplate, Sandbox, sandbox

_SYMBOL = re.compile(f"[{chr(FIRST_SENTINEL)}-{chr(LAST_SENTINEL)}]")
_BLANKS = frozenset(" \t\n\r\v\f")


class NotPlain(Exception):
    """The template does more with a text than put it somewhere."""


class Edit(NamedTuple):
    """White space cut off a text: `side` is strip, lstrip or rstrip; `characters` None means any white space."""

    side: str
    characters: str | None


class Slot(NamedTuple):
    """A place for one text of a turn (its content, or its reasoning), after these edits."""

    part: Part
    edits: tuple[Edit, ...]

    def fill(self, text: str) -> str:
        """What the template prints for this text."""
        for edit in self.edits:
            text = getattr(text, edit.side)(edit.characters)
        return text


@dataclass
class _Run:
    """One symbolic rendering: the slots by symbol, and the words that must not occur in a part's text."""

    slots: list[Slot] = field(default_factory=list)
    words: set[tuple[Part, str]] = field(default_factory=set)

    def symbol(self, slot: Slot) -> _Text:
        if slot not in self.slots:
            self.slots.append(slot)
        return _Text(chr(FIRST_SENTINEL + self.slots.index(slot)), self)

    def slot(self, symbol: str) -> Slot:
        return self.slots[ord(symbol) - FIRST_SENTINEL]


def _refuse(name: str) -> Callable[..., NoReturn]:
    def method(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotPlain(name)

    return method


class _Text(str):
    """A text with symbols in it. What it cannot answer for every conversation, it refuses."""

    run: _Run

    def __new__(cls, value: str, run: _Run) -> _Text:
        made = super().__new__(cls, value)
        made.run = run
        return made

    def __str__(self) -> str:
        return self

    def __bool__(self) -> bool:
        return True  # texts are not blank

    def __hash__(self) -> int:
        raise NotPlain("hash")

    def __add__(self, other: Any) -> _Text:
        return _Text(str.__add__(self, _as_text(other)), self.run)

    def __radd__(self, other: Any) -> _Text:
        return _Text(str.__add__(_as_text(other), self), self.run)

    def __contains__(self, word: Any) -> bool:
        if type(word) is not str or not word:
            raise NotPlain("in")
        parts = self._parts()
        if any(word in literal for literal in parts[::2]):
            return True
        for i in range(1, len(parts), 2):
            if len(word) > 1 and i > 1 and not parts[i - 1]:
                raise NotPlain("in, across two texts")
            if _may_straddle(parts[i - 1], parts[i + 1], word):
                raise NotPlain("in, across a border")
        self.run.words |= {(self.run.slot(symbol).part, word) for symbol in parts[1::2]}
        return False

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, str):
            return False
        if isinstance(other, _Text):
            if str.__eq__(self, other):
                return True
            raise NotPlain("==")
        if other.strip() and len(self._parts()) == 3 and str.__len__(self) == 1:
            self.run.words.add((self.run.slot(str.__str__(self)).part, other))
            return False
        if not other.strip():
            return False
        raise NotPlain("==")

    def __ne__(self, other: object) -> bool:
        return not self == other

    def startswith(self, prefix: Any, *at: Any) -> bool:
        return self._begins(prefix, at, edge=0, test=str.startswith)

    def endswith(self, suffix: Any, *at: Any) -> bool:
        return self._begins(suffix, at, edge=-1, test=str.endswith)

    def strip(self, characters: Any = None) -> _Text:
        return self._cut(Edit("lstrip", characters))._cut(Edit("rstrip", characters))

    def lstrip(self, characters: Any = None) -> _Text:
        return self._cut(Edit("lstrip", characters))

    def rstrip(self, characters: Any = None) -> _Text:
        return self._cut(Edit("rstrip", characters))

    def split(self, separator: Any = None, *most: Any) -> list[Any]:
        self._require_lacking(separator)
        return [self]

    def replace(self, old: Any, new: Any, *most: Any) -> _Text:
        self._require_lacking(old)
        return self

    def find(self, word: Any, *at: Any) -> int:
        if at:
            raise NotPlain("find")
        self._require_lacking(word)
        return -1

    def _parts(self) -> list[str]:
        """Literal, symbol, literal, ... , literal."""
        return re.split(f"({_SYMBOL.pattern})", str.__str__(self))

    def _require_lacking(self, word: Any) -> None:
        if type(word) is not str or not word or word in self:
            raise NotPlain("split or replace")

    def _begins(self, affix: Any, at: Any, *, edge: int, test: Callable[..., bool]) -> bool:
        if isinstance(affix, tuple):
            return any(self._begins(each, at, edge=edge, test=test) for each in affix)
        if at or type(affix) is not str or not affix:
            raise NotPlain("startswith")
        literal = self._parts()[edge]
        if len(literal) >= len(affix):
            return test(literal, affix)
        if literal:
            raise NotPlain("startswith, across a border")
        self.run.words.add((self.run.slot(self._parts()[1 if edge == 0 else -2]).part, affix))
        return False

    def _cut(self, edit: Edit) -> _Text:
        """White space cut off one end; a text is never blank, so the cut ends inside the first symbol it meets."""
        if edit.characters is not None and (type(edit.characters) is not str or not set(edit.characters) <= _BLANKS):
            raise NotPlain("strip")
        parts = self._parts()
        edge, near = (0, 1) if edit.side == "lstrip" else (-1, -2)
        parts[edge] = getattr(parts[edge], edit.side)(edit.characters)
        if not parts[edge]:
            slot = self.run.slot(parts[near])
            edits = slot.edits if slot.edits and slot.edits[-1] == edit else (*slot.edits, edit)
            parts[near] = str.__str__(self.run.symbol(Slot(slot.part, edits)))
        return _Text("".join(parts), self.run)


_ANSWERED = {
    *("__new__", "__init__", "__class__", "__str__", "__bool__", "__hash__", "__add__", "__radd__", "__contains__", "__eq__"),
    *("__ne__", "__getattribute__", "__getattr__", "__setattr__", "__delattr__", "__dir__", "__doc__", "__init_subclass__"),
    *("__subclasshook__", "__sizeof__", "__getstate__", "__dict__", "__module__", "__weakref__", "__qualname__"),
    *("startswith", "endswith", "strip", "lstrip", "rstrip", "split", "replace", "find"),
}
for _name in dir(str):
    if _name not in _ANSWERED:
        setattr(_Text, _name, _refuse(_name))


def _as_text(other: Any) -> str:
    if not isinstance(other, str):
        raise NotPlain("+")
    return other


def _may_straddle(before: str, after: str, word: str) -> bool:
    """Whether `word` could lie half in a text and half in the literal before or behind it."""
    for cut in range(1, len(word)):
        head, tail = word[:cut], word[cut:]
        if before and (before.endswith(head) or head.endswith(before)):
            return True
        if after and (after.startswith(tail) or tail.startswith(after)):
            return True
    return False


def _join(parts: Iterable[Any]) -> str:
    """`"".join` that keeps symbols symbols."""
    pieces = list(parts)
    joined = "".join(pieces)
    run = next((piece.run for piece in pieces if isinstance(piece, _Text)), None)
    return joined if run is None else _Text(joined, run)


def _holds_symbol(value: Any) -> bool:
    if isinstance(value, str):
        return isinstance(value, _Text) or _SYMBOL.search(value) is not None
    if isinstance(value, Mapping):
        return any(_holds_symbol(v) for v in value.values())
    return isinstance(value, list | tuple) and any(_holds_symbol(v) for v in value)


class _Length:
    """The length of a text that is not blank: at least 1, and no more is said."""

    def __bool__(self) -> bool:
        return True

    def __str__(self) -> str:
        raise NotPlain("length")

    def __hash__(self) -> int:
        raise NotPlain("length")

    def __gt__(self, other: object) -> bool:
        return _known(other in (0, -1), is_true=True)

    def __ge__(self, other: object) -> bool:
        return _known(other in (0, 1), is_true=True)

    def __lt__(self, other: object) -> bool:
        return _known(other in (0, 1), is_true=False)

    def __le__(self, other: object) -> bool:
        return _known(other == 0, is_true=False)

    def __eq__(self, other: object) -> bool:
        return _known(other == 0, is_true=False)

    def __ne__(self, other: object) -> bool:
        return _known(other == 0, is_true=True)


def _known(is_known: bool, *, is_true: bool) -> bool:
    if not is_known:
        raise NotPlain("length")
    return is_true


def _length(value: Any) -> Any:
    return _Length() if isinstance(value, _Text) else len(value)


class _Explicit(jinja2.visitor.NodeTransformer):
    """Writes `~` and `in`, which run inside Python where no text could refuse, as calls of filters."""

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:  # noqa: N802 - jinja2 names it
        self.generic_visit(node)
        return _call_filter("_concat", jinja2.nodes.List(node.nodes, lineno=node.lineno), [], node.lineno)

    def visit_Compare(self, node: jinja2.nodes.Compare) -> jinja2.nodes.Node:  # noqa: N802 - jinja2 names it
        self.generic_visit(node)
        if all(operand.op not in ("in", "notin") for operand in node.ops):
            return node
        if len(node.ops) > 1:
            raise NotPlain("a chain of comparisons")
        found = _call_filter("_in", node.expr, [node.ops[0].expr], node.lineno)
        return found if node.ops[0].op == "in" else jinja2.nodes.Not(found, lineno=node.lineno)


def _call_filter(name: str, value: Any, args: list[Any], line: int) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(value, name, args, [], None, None, lineno=line)


def _is_in(value: Any, within: Any) -> bool:
    if isinstance(value, _Text) and isinstance(within, str):
        raise NotPlain("in")
    return value in within


_OPEN_FILTERS = frozenset(
    [
        *("trim", "string", "default", "d", "first", "last", "list", "selectattr", "rejectattr", "select", "reject", "map"),
        *("items", "replace", "_concat", "_in", "_step"),
    ]
)
"""Filters that a text may enter: they hand it on, or use its own methods."""


class _Symbolic(Sandbox):
    """The sandbox, in which texts with symbols go nowhere unseen."""

    concat = staticmethod(_join)
    intercepted_binops = Sandbox.intercepted_binops | {"%"}

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree: jinja2.nodes.Template = _Explicit().visit(super()._parse(source, name, filename))
        return tree

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, _Text) or isinstance(right, _Text):
            raise NotPlain(operator)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as jinja2 has it
        owner = getattr(__obj, "__self__", None)
        is_own = isinstance(__obj, jinja2.runtime.Macro) or isinstance(owner, _Text | dict) or _is_builder(__obj)
        given = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}  # jinja2's own
        if not is_own and (_holds_symbol(args) or _holds_symbol(given)):
            if not (type(owner) is str and __obj.__name__ == "join"):
                raise NotPlain(f"a call of {getattr(__obj, '__name__', type(__obj).__name__)}")
            return _joined(owner, args[0])
        return super().call(__context, __obj, *args, **kwargs)


def _is_builder(function: Any) -> bool:
    return isinstance(function, type) or type(function).__name__ == "_Dict"


def _joined(between: str, items: Iterable[Any]) -> str:
    out: list[Any] = []
    for item in items:
        out += [between, str(item)] if out else [str(item)]
    return _join(out)


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, closed to symbols unless it is one of the open ones."""
    if name in _OPEN_FILTERS:
        return function

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if _holds_symbol(args) or _holds_symbol(kwargs):
            raise NotPlain(f"filter {name}")
        return function(*args, **kwargs)

    for mark in ("jinja_pass_arg", "contextfilter", "jinja_async_variant"):
        if hasattr(function, mark):
            setattr(guarded, mark, getattr(function, mark))
    return guarded


def _join_filter(value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        raise NotPlain("filter join")
    return _joined(d, value)


@lru_cache(maxsize=8)
def symbolic(template: ChatTemplate) -> jinja2.Template | None:
    """The template compiled for symbols; None when its very form cannot be followed."""
    environment = sandbox(template.date, _Symbolic)
    environment.filters = {name: _guarded(name, function) for name, function in environment.filters.items()}
    environment.filters |= {
        "_concat": lambda items: _join(map(str, items)),
        "_in": _is_in,
        "join": _join_filter,
        "length": _length,
        "count": _length,
    }
    environment.tests["in"] = _is_in
    for name in ("iterable", "sequence"):
        environment.tests[name] = _for_texts(cast("Callable[..., Any]", environment.tests[name]))
    try:
        return environment.from_string(template.text)
    except NotPlain:
        return None


def _for_texts(test: Callable[..., Any]) -> Callable[..., Any]:
    def of_type(value: Any) -> Any:
        return test("text" if isinstance(value, _Text) else value)

    return of_type


@dataclass(frozen=True)
class Skeleton:
    """A form of conversation, laid out once: piece i is `literals[i]`, or the text of `slots[i]` where that is None.

    The kinds and turns of the cells and how many pieces make each up; `words[k]` must not occur in the text of `parts[k]`.
    """

    literals: tuple[str | None, ...]
    slots: tuple[Slot, ...]
    kinds: tuple[int, ...]
    turns: tuple[int, ...]
    from_data: tuple[bool, ...]
    words: tuple[tuple[Part, str], ...]
    hidden: tuple[int, ...]

    @property
    def places(self) -> tuple[int, ...]:
        """Where in `literals` the slots stand."""
        return tuple(i for i, literal in enumerate(self.literals) if literal is None)


def make_skeleton(
    compiled: jinja2.Template,
    template: ChatTemplate,
    closing: Closing,
    *,
    roles: Sequence[str],
    reasoning: Sequence[bool],
    eos: str | None,
) -> Skeleton | None:
    """The skeleton of conversations with these roles, `reasoning[i]` telling which turns have some; None when there is none.

    `compiled` comes from `symbolic(template)`.
    """
    run = _Run()
    messages = []
    for turn, (role, thinks) in enumerate(zip(roles, reasoning, strict=True)):
        message: dict[str, Any] = {"role": role, "content": run.symbol(Slot(Part(turn, CONTENT_KINDS[role]), ()))}
        if thinks:
            message["reasoning_content"] = run.symbol(Slot(Part(turn, Kind.REASONING), ()))
        messages.append(message)
    try:
        pieces = compiled.root_render_func(compiled.new_context(template.variables(messages)))
        return _laid(str.__str__(_join(pieces)), run, messages, closing, eos)
    except (NotPlain, TemplateError, *TEMPLATE_FAILURES):
        return None


def _laid(text: str, run: _Run, messages: Sequence[Mapping[str, Any]], closing: Closing, eos: str | None) -> Skeleton | None:
    """The skeleton in a rendering of symbols. Each symbol is one character, so the layout of the text is that of its pieces."""
    spans = [Span(m.start(), m.end(), run.slot(m.group()).part, 0, 1) for m in _SYMBOL.finditer(text)]
    stand_ins = [{**message, "content": "x"} for message in messages]
    learned = [message["role"] == "assistant" for message in messages]
    made = layout(Trace(text, tuple(spans)), stand_ins, closing, learned=learned, eos=eos)
    return _cut(made.text, made.cells, run, made.hidden)


def _cut(text: str, cells: Cells, run: _Run, hidden: tuple[int, ...]) -> Skeleton | None:
    literals: list[str | None] = []
    slots: list[Slot] = []
    start = 0
    for end, from_data in zip(cells.ends, cells.from_data, strict=True):
        piece = text[start:end]
        is_symbol = _SYMBOL.fullmatch(piece) is not None
        if from_data != is_symbol or (not is_symbol and _SYMBOL.search(piece)):
            return None
        literals.append(None if is_symbol else piece)
        slots += [run.slot(piece)] if is_symbol else []
        start = end
    words = tuple(sorted(run.words))
    return Skeleton(
        tuple(literals), tuple(slots), tuple(map(int, cells.kinds)), tuple(cells.turns), tuple(cells.from_data), words, hidden
    )
