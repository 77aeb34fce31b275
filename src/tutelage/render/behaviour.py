"""What a chat template does with conversations, found out by showing it a few: facts for people and for other checks.

Pure, like `provenance`: a template in, a dictionary out. A conversation that the template refuses leaves its facts False.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

from tutelage.errors import TemplateError
from tutelage.records import Kind
from tutelage.render.cells import CALLS, QUESTIONS, TOOLS, common_prefix
from tutelage.render.provenance import Message, Trace, trace
from tutelage.render.template import ChatTemplate

OTHER_DAY = "2020-02-29"
_MARKERS = re.compile(r"<{1,2}[^<>\s]{1,40}>{1,2}|\[/?[A-Z][A-Z_]{1,30}\]")
Rendering = Callable[..., str]


def describe(template: ChatTemplate) -> dict[str, bool | list[str]]:
    """What the template does, by name; every value but `markers` is a boolean.

    `keeps_prefix`: the rendering of the first turns begins that of one turn more, and so does the prompt before an answer;
    `appends_header`: a header for another answer always follows; `refuses_system`, `drops_system` (in silence);
    `drops_reasoning` of the last answer, `drops_earlier_reasoning`; `refuses_tools`, `hides_tools` (calls are not shown);
    `trims` white space around contents; `prints_date`; `content_as_parts`; `markers`: what it prints that looks like a token.

    >>> text = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}"
    >>> found = describe(ChatTemplate(text))
    >>> [name for name, value in found.items() if value is True]
    ['keeps_prefix', 'drops_reasoning', 'drops_earlier_reasoning', 'hides_tools', 'trims']
    >>> found["markers"]
    ['<user>', '</s>', '<assistant>', '<system>', '<tool>']
    """
    plain, system = _traced(template, QUESTIONS), _traced(template, [_SYSTEM, *QUESTIONS])
    padded, thinking = _traced(template, _PADDED), _traced(template, _THINKING)
    calls = _traced(template, CALLS, tools=TOOLS)
    shown = (made for made in (plain, system, calls) if made is not None)
    return {
        "keeps_prefix": _keeps_prefix(template.render),
        "appends_header": _appends_header(template, plain),
        "refuses_system": plain is not None and system is None,
        "drops_system": system is not None and not _has(system, 0, Kind.SYSTEM),
        "drops_reasoning": thinking is not None and not _has(thinking, 3, Kind.REASONING),
        "drops_earlier_reasoning": thinking is not None and not _has(thinking, 1, Kind.REASONING),
        "refuses_tools": calls is None,
        "hides_tools": calls is not None and not _has(calls, 1, Kind.TOOL_CALL),
        "trims": padded is not None and any(text not in padded.text for text in _PADS),
        "prints_date": _prints_date(template),
        "content_as_parts": template.content_as_parts,
        "markers": list(dict.fromkeys(word for made in shown for word in _MARKERS.findall(_scaffold(made)))),
    }


_SYSTEM = {"role": "system", "content": "Be exact."}
_PADS = ("\n padded one \n", "\n padded two \n")
_PADDED = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), _PADS, strict=True)]
_THINKING = [
    {**message, **({"reasoning_content": f"Let us see {turn}."} if message["role"] == "assistant" else {})}
    for turn, message in enumerate(QUESTIONS)
]


def _traced(template: ChatTemplate, messages: Sequence[Message], *, tools: object = None) -> Trace | None:
    """The conversation traced; None when the template refuses it."""
    try:
        return trace(partial(template.render, tools=tools), messages, literals=template.literals)
    except TemplateError:
        return None


def _has(made: Trace, turn: int, kind: Kind) -> bool:
    return any(span.part.turn == turn and span.part.kind == kind for span in made.spans)


def _scaffold(made: Trace) -> str:
    """The text without what comes from messages."""
    edges = [0, *(edge for span in made.spans for edge in span[:2]), len(made.text)]
    return "\n".join(made.text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))


def _keeps_prefix(render: Rendering) -> bool:
    try:
        for k in range(2, len(QUESTIONS) + 1):
            longer = render(QUESTIONS[:k])
            is_answer = QUESTIONS[k - 1]["role"] == "assistant"
            prompts = [False, True] if is_answer else [False]
            if not all(longer.startswith(render(QUESTIONS[: k - 1], add_generation_prompt=prompt)) for prompt in prompts):
                return False
    except TemplateError:
        return False
    return True


def _appends_header(template: ChatTemplate, plain: Trace | None) -> bool:
    """Whether the text ends like one in which the model is to answer, with what stands before answers."""
    if plain is None or len(plain.spans) != len(QUESTIONS):
        return False
    _, first, asked, answer = plain.spans
    before, between = plain.text[asked.end : answer.start].rstrip(), plain.text[first.end : asked.start]
    after = plain.text[answer.end :]
    header = _MARKERS.split(before)[-1] or before[before.rfind("<") :]
    is_more = bool(after[len(common_prefix(after, between)) :].strip())
    is_header = bool(header) and after.rstrip().endswith(header)
    return is_more and is_header and template.render(QUESTIONS, add_generation_prompt=True) == plain.text


def _prints_date(template: ChatTemplate) -> bool:
    other = ChatTemplate(template.text, special_tokens=template.special_tokens, date=OTHER_DAY)
    for messages in (QUESTIONS, [_SYSTEM, *QUESTIONS]):
        try:
            if template.render(messages) != other.render(messages):
                return True
        except TemplateError:
            continue
    return False
