"""Chat templates: Jinja in a sandbox, offering what `transformers.apply_chat_template` offers and nothing that could do harm.

A template is a program from a stranger. It runs without access to Python's internals, cannot change what it is given,
never asks the clock (the day is a setting), and both its output and its steps are capped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.utils
import jinja2.visitor
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tutelage.errors import TemplateError

Message = Mapping[str, Any]

MAX_CHARACTERS = 64_000_000
"""Longest rendering; above it a template has run away."""
MAX_PIECES = 2_000_000
"""A rendering is joined from so many printed pieces at most (an endless loop that prints ends here)."""


MAX_STEPS = 5_000_000
"""Turns of loops in one rendering; a call counts as fifty (an endless loop that prints nothing ends here, after seconds)."""
_CALL_STEPS = 50
_STEPS = "number of steps"  # a name that no template can spell


TEMPLATE_FAILURES = (
    jinja2.exceptions.TemplateError,
    ArithmeticError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RecursionError,
    MemoryError,
)
"""What a running template may raise."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` renders its body; who wrote what is found without it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope, not the bare statements: in transformers the block is a call, so assignments inside do not leave it.
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: jinja2.runtime.Macro) -> str:
        return str(caller())


class _Counting(jinja2.visitor.NodeTransformer):
    """Counts a step at every turn of a loop and every call of a macro, those that print nothing included."""

    def generic_visit(self, node: jinja2.nodes.Node, *args: Any, **kwargs: Any) -> jinja2.nodes.Node:
        node = super().generic_visit(node, *args, **kwargs)
        if isinstance(node, jinja2.nodes.For | jinja2.nodes.Macro | jinja2.nodes.CallBlock):
            is_plain_loop = isinstance(node, jinja2.nodes.For) and not node.recursive
            cost = 1 if is_plain_loop else _CALL_STEPS
            node.body.insert(0, jinja2.nodes.ExprStmt(_step_node(cost, node.lineno), lineno=node.lineno))
        if isinstance(node, jinja2.nodes.For) and node.test is not None:
            node.test = jinja2.nodes.And(_step_node(1, node.lineno), node.test, lineno=node.lineno)
        return node


def _step_node(cost: int, line: int) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(jinja2.nodes.Const(cost), "_step", [], [], None, None, lineno=line)


@jinja2.pass_context
def _step(context: jinja2.runtime.Context, cost: int) -> bool:
    steps = context.parent[_STEPS]
    steps[0] += cost
    if steps[0] > MAX_STEPS:
        raise jinja2.exceptions.SecurityError(f"more than {MAX_STEPS:,} steps; it has run away")
    return True


class _Code(jinja2.compiler.CodeGenerator):
    """Texts grow by `+` and `~` under the sandbox's eyes too."""

    def visit_Add(self, node: jinja2.nodes.BinExpr, frame: jinja2.compiler.Frame) -> None:  # noqa: N802 - jinja2's name
        self._call("environment.added", [node.left, node.right], frame)

    def visit_Concat(  # noqa: N802
        self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame
    ) -> None:
        self._call("environment.joined", node.nodes, frame)

    def _call(self, function: str, nodes: Sequence[jinja2.nodes.Node], frame: jinja2.compiler.Frame) -> None:
        self.write(f"{function}(")
        for node in nodes:
            self.visit(node, frame)
            self.write(", ")
        self.write(")")


class Sandbox(ImmutableSandboxedEnvironment):
    """The immutable sandbox, in which `'x' * 10**10` cannot take the machine down either."""

    code_generator_class = _Code
    intercepted_binops = frozenset(["*", "**", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree: jinja2.nodes.Template = _Counting().visit(super()._parse(source, name, filename))
        return tree

    def added(self, left: Any, right: Any) -> Any:
        """`left + right`."""
        made = left + right
        if type(made) is str:
            _refuse_long(len(made))
        return made

    def joined(self, *values: Any) -> str:
        """`a ~ b ~ c`."""
        texts = [str(value) for value in values]
        _refuse_long(sum(map(len, texts)))
        return "".join(texts)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """A text's `format`, as the sandbox has it, but for widths of millions."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def guarded(*args: Any, **kwargs: Any) -> str:
            _refuse_wide(value.__self__, [*args, *kwargs.values()])
            return str(wrapped(*args, **kwargs))

        return guarded

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as jinja2 has it
        """A call, but for those that pad or multiply a text beyond measure."""
        owner = getattr(__obj, "__self__", None)
        if type(owner) is str and __obj.__name__ in _WIDENING:
            _refuse_wide("", args)
            if __obj.__name__ == "replace" and all(type(text) is str for text in args[:2]):
                _refuse_long(owner.count(args[0]) * len(args[1]))
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """`left * right`, `left ** right` or `left % right`."""
        if operator == "%" and isinstance(left, str):
            _refuse_wide(left, right if isinstance(right, tuple) else (right,))
        if operator == "**" and isinstance(right, int | float) and right > 64:
            raise jinja2.exceptions.SecurityError(f"{left!r} ** {right!r} is too large")
        if operator == "*":
            size = max((len(v) for v in (left, right) if isinstance(v, str | list | tuple)), default=0)
            times = max((v for v in (left, right) if isinstance(v, int)), default=1)
            _refuse_long(size * times)
        return super().call_binop(context, operator, left, right)


_WIDENING = frozenset(["ljust", "rjust", "center", "zfill", "expandtabs", "replace"])
_WIDE = re.compile(r"%[-#0 +]*\d{7}|:[^{}]*\d{7}")


def _refuse_long(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise jinja2.exceptions.SecurityError(f"a text of {size} characters is too long")


def _refuse_wide(form: str, values: Sequence[Any]) -> None:
    """Refuses a width, in a format or as an argument, of millions of characters."""
    if _WIDE.search(form) or any(isinstance(value, int) and abs(value) > MAX_CHARACTERS for value in values):
        raise jinja2.exceptions.SecurityError("a text padded to millions of characters is too long")


class _Dict:
    """`dict(...)` for templates, without the class itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` for templates, without names that start with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no `self` in the signature: a template may store that name
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}: names with an underscore in front are private")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as transformers writes it: no HTML escapes, other alphabets as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def sandbox(date: str, kind: type[Sandbox]) -> Sandbox:
    """An environment of this class with everything that templates are offered; `date` is their today."""
    today = datetime.fromisoformat(date)

    def strftime_now(style: str) -> str:
        return today.strftime(style)

    environment = kind(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters |= {"tojson": _tojson, "_step": _step}
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


@lru_cache(maxsize=64)
def _compile(text: str, date: str) -> tuple[jinja2.Template, tuple[str, ...]]:
    environment = sandbox(date, Sandbox)
    try:
        constants = {node.value for node in environment.parse(text).find_all(jinja2.nodes.Const)}
        template = environment.from_string(text)
    except (jinja2.TemplateSyntaxError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise TemplateError(f"the chat template is not valid Jinja{line}: {error}; mend it or name another") from None
    literals = sorted((c for c in constants if isinstance(c, str) and len(c.strip()) > 2), key=lambda c: (-len(c), c))
    return template, tuple(literals)


class ChatTemplate:
    """A chat template, compiled once: `render(messages)` gives the text that `apply_chat_template` would.

    `content_as_parts`: the template shows no content that is a text, only `[{"type": "text", "text": ...}]`; it gets that.

    >>> template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    >>> template.render([{"role": "user", "content": "Hi"}])
    '<user>Hi'
    """

    def __init__(self, text: str, *, special_tokens: Mapping[str, str] | None = None, date: str = "2025-01-01") -> None:
        self.text = text
        self.date = date
        self.special_tokens = dict(special_tokens or {})
        self._template, self.literals = _compile(text, date)
        self.content_as_parts = False
        if not self._shows_plain_text():
            self.content_as_parts = True
            self.content_as_parts = self._shows_plain_text()

    def _shows_plain_text(self) -> bool:
        texts = ("Why one?", "Because two.")
        try:
            shown = self.render(
                [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
            )
        except TemplateError:
            return False
        return all(text in shown for text in texts)

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """The messages in the form that this template reads."""
        named = [_with_thinking(message) if "reasoning_content" in message else message for message in messages]
        return [_in_parts(message) for message in named] if self.content_as_parts else named

    def variables(self, messages: Sequence[Message], *, tools: Any = None, add_generation_prompt: bool = False) -> dict[str, Any]:
        """What the template is given."""
        return {
            _STEPS: [0],
            "messages": self.messages(messages),
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self.special_tokens,
        }

    def render(self, messages: Sequence[Message], *, tools: Any = None, add_generation_prompt: bool = False) -> str:
        """The text of a conversation; TemplateError when the template refuses it, fails or runs away."""
        variables = self.variables(messages, tools=tools, add_generation_prompt=add_generation_prompt)
        try:
            pieces = self._template.root_render_func(self._template.new_context(variables))
            text = "".join(islice(pieces, MAX_PIECES))
            runs_on = next(pieces, None) is not None
        except TEMPLATE_FAILURES as error:
            raise TemplateError(f"the chat template refuses this conversation: {error or type(error).__name__}") from None
        if runs_on or len(text) > MAX_CHARACTERS:
            raise TemplateError(
                f"the chat template prints more than {MAX_CHARACTERS:,} characters or {MAX_PIECES:,} pieces; it has run away"
            )
        return text


def _with_thinking(message: Message) -> Message:
    """The message with its reasoning under the second name that templates read it by."""
    return {"thinking": message["reasoning_content"], **message}


def _in_parts(message: Message) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def read_template(name: str, *, base: Path) -> str | None:
    """The text of a template file, or None for `model` (the tokenizer brings it). TemplateError when the file is not there."""
    if name == "model":
        return None
    path = base / Path(name).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise TemplateError(f"render.template: {path} is no file; give `model` or the path of a Jinja chat template") from None
    except UnicodeDecodeError as error:
        raise TemplateError(f"render.template: {path} is not UTF-8: {error}") from None


def template_in(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The templates that a tokenizer folder brings, by name (`default`, `tool_use`, ...), as transformers reads them.

    `chat_template.jinja` and `additional_chat_templates/` go before `chat_template` in tokenizer_config.json, which is a
    text or a list of named texts.
    """
    found: dict[str, str] = {}
    if (file := folder / "chat_template.jinja").exists():
        found["default"] = file.read_text(encoding="utf-8")
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = file.read_text(encoding="utf-8")
    if found:
        return found
    match config.get("chat_template"):
        case str(text):
            return {"default": text}
        case list(named):
            return {entry["name"]: entry["template"] for entry in named}
        case dict(named):
            return dict(named)
    return {}


def choose_template(templates: Mapping[str, str], *, has_tools: bool) -> str:
    """The template text that `apply_chat_template` would use; TemplateError without one.

    >>> choose_template({"default": "a", "tool_use": "b"}, has_tools=True)
    'b'
    """
    if has_tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates:
        return templates["default"]
    found = f"only {', '.join(sorted(templates))}" if templates else "none"
    raise TemplateError(f"the tokenizer brings no default chat template ({found}); name a file in `render.template`")


Render = Callable[..., str]
