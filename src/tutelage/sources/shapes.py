"""One object to turns: the shapes in which instruction data is published. Pure; no record object on the way.

A shape is a function from a parsed record to a `Draft`; `chat.py` has those that hold lists of messages. Keys that a shape
does not know are left alone (`detect.py` names them); a null counts as absent, as Parquet and csv cannot leave a key out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from tutelage.sources.keys import TurnRow
from tutelage.sources.reasons import Malformed

Record = dict[str, Any]
Draft = tuple[list[TurnRow], str | None]
"""The turns of one record, and its tool descriptions as JSON text."""
Shape = Callable[[Record], Draft]

PAIRS = (
    ("prompt", "completion"),
    ("question", "answer"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("instruction", "answer"),
    ("instruction", "output"),
    ("prompt", "answer"),
    ("prompt", "output"),
    ("question", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("request", "response"),
    ("input", "output"),
    ("input", "response"),
    ("inputs", "targets"),
    ("source", "target"),
    ("user", "assistant"),
)
"""Spellings of request and answer that `prompt_completion` knows; of several that fit, the first counts."""

MAX_POSITIVE_EXAMPLES = 2
"""As in Tk-Instruct (arXiv 2204.07705, section 5), whose best encoding is the definition and two positive examples."""

_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


def alpaca(record: Record) -> Draft:
    r"""Turns of (instruction, input, output); also spelled context and response. Input stands below the instruction.

    >>> turns, tools = alpaca({"instruction": "Add.", "input": "2, 2", "output": "4"})
    >>> [turn[:2] for turn in turns]
    [('user', 'Add.\n\n2, 2'), ('assistant', '4')]

    `system` and `history` (pairs of earlier request and answer) come first where they are given.
    """
    request = required(record, "instruction")
    answer = record.get("output")
    if answer is None:
        answer = required(record, "response" if "response" in record else "output")
    below = record.get("input")
    if below is None:
        below = record.get("context")
    return exchange(record, joined(request, below, "input"), answer)


def prompt_completion(record: Record) -> Draft:
    """Turns of one request and one answer, under the first of the spellings PAIRS that the record has.

    >>> [turn[:2] for turn in prompt_completion({"question": "2+2?", "answer": "4"})[0]]
    [('user', '2+2?'), ('assistant', '4')]
    """
    for request, answer in PAIRS:
        if record.get(request) is not None and record.get(answer) is not None:
            return exchange(record, record[request], record[answer])
    for request, answer in PAIRS:
        if request in record and answer in record:
            raise Malformed("missing_field", f"`{request if record[request] is None else answer}` is null")
    raise Malformed("missing_field", f"no request with its answer; {keys_of(record)}")


def exchange(record: Record, request: Any, answer: Any) -> Draft:
    """One request and its answer, checked, after `system` and `history` where the record has them."""
    if type(request) is not str or type(answer) is not str:
        raise _not_text(
            "the request" if type(request) is not str else "the answer", request if type(request) is not str else answer
        )
    if not request or request.isspace():
        raise Malformed("empty_request")
    if not answer or answer.isspace():
        raise Malformed("empty_answer")
    turns: list[TurnRow] = [
        ("user", request, None, None, None, None, None),
        ("assistant", answer, None, None, None, None, None),
    ]
    if "system" in record or "history" in record or "system_prompt" in record:
        turns = [*_before(record), *turns]
    return turns, None


def _before(record: Record) -> list[TurnRow]:
    turns: list[TurnRow] = system_turn(record)
    history = record.get("history") or []
    if not isinstance(history, list):
        raise Malformed("wrong_type", f"`history` is a {type(history).__name__}")
    for pair in history:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Malformed("wrong_type", "`history` is no list of pairs")
        turns += exchange({}, *pair)[0]
    return turns


def system_turn(record: Record) -> list[TurnRow]:
    """The turn of a `system` or `system_prompt` field; none when it is absent or empty."""
    text = record.get("system")
    if text is None:
        text = record.get("system_prompt")
    if text is None or text == "":
        return []
    if type(text) is not str:
        raise _not_text("`system`", text)
    return [("system", text, None, None, None, None, None)]


def split_instances(record: Record) -> list[Record | Malformed]:
    """The instances of a task as records of their own, `{"instance": ..., "task": the task}`, malformed ones marked.

    >>> task = {"Definition": ["Add."], "Instances": [{"input": "1+1", "output": ["2"]}, {"input": "1+2", "output": ["3"]}]}
    >>> len(split_instances(task))
    2
    """
    instances = either(record, "instances", "Instances")
    if instances is None and "inputs" in record and "targets" in record:
        instances = [{"input": record["inputs"], "output": record["targets"]}]
    if not isinstance(instances, list):
        raise Malformed("missing_field" if instances is None else "wrong_type", f"no list of `instances`; {keys_of(record)}")
    if not instances:
        raise Malformed("missing_field", "`instances` is empty")
    lead = _task_lead(record)
    return [_instance(each, lead) for each in instances]


def _instance(instance: Any, lead: tuple[str, str]) -> Record | Malformed:
    if not isinstance(instance, dict):
        return Malformed("wrong_type", f"an instance is a {type(instance).__name__}")
    return {**instance, "lead": lead}


def natural_instructions(record: Record) -> Draft:
    r"""Turns of one instance from `split_instances`: definition, at most two positive examples, then its input.

    >>> task = {"Definition": "Add.", "Positive Examples": [{"input": "1+1", "output": "2"}],
    ...         "Instances": [{"input": "1+2", "output": ["3", "three"]}]}
    >>> turns, _ = natural_instructions(split_instances(task)[0])
    >>> print(turns[0][1])
    Add.
    <BLANKLINE>
    Input: 1+1
    Output: 2
    <BLANKLINE>
    Input: 1+2
    Output:
    >>> turns[1][1]
    '3'

    Of several outputs the first is the answer. Without examples the input stands below the definition.
    """
    definition, examples = record["lead"]
    output = record.get("output")
    if isinstance(output, list) and output:
        output = output[0]
    if output is None or output == []:
        raise Malformed("missing_field", "the instance has no `output`")
    text = record.get("input")
    if not examples:
        return exchange({}, joined(definition, text, "input"), output)
    if type(text) is not str:
        raise _not_text("`input`", text)
    return exchange({}, f"{definition}\n\n{examples}Input: {text}\nOutput:", output)


def _task_lead(record: Record) -> tuple[str, str]:
    """The definition, and the positive examples written out."""
    definition = either(record, "definition", "Definition")
    if definition is None:
        definition = required(record, "instruction")
    if isinstance(definition, list):
        definition = "\n".join(text if type(text) is str else "" for text in definition)
    if type(definition) is not str or not definition.strip():
        raise Malformed("wrong_type" if type(definition) is not str else "empty_request", "the definition holds no text")
    shown = ""
    examples = either(record, "positive_examples", "Positive Examples") or []
    if not isinstance(examples, list):
        raise Malformed("wrong_type", "the positive examples are no list")
    for example in examples[:MAX_POSITIVE_EXAMPLES]:
        if not isinstance(example, dict) or type(example.get("input")) is not str or type(example.get("output")) is not str:
            raise Malformed("wrong_type", "a positive example has no `input` and `output` texts")
        shown += f"Input: {example['input']}\nOutput: {example['output']}\n\n"
    return definition, shown


def columns(user: str, assistant: str, system: str | None = None) -> Shape:
    r"""The shape that takes its texts from named columns, or from templates with `{column}` in them.

    >>> shape = columns("{title}\n{body}", "summary")
    >>> [turn[1] for turn in shape({"title": "T", "body": "B", "summary": "S"})[0]]
    ['T\nB', 'S']
    """

    def shape(record: Record) -> Draft:
        turns, tools = exchange({}, fill(user, record), fill(assistant, record))
        if system is not None and (text := fill(system, record)):
            turns.insert(0, ("system", text, None, None, None, None, None))
        return turns, tools

    return shape


def fill(template: str, record: Record) -> str:
    """A column's text, or the template with every `{column}` replaced."""
    if "{" not in template:
        return _column(template, record)
    return _PLACEHOLDER.sub(lambda found: _column(found.group(1), record), template)


def placeholders(template: str) -> Iterable[str]:
    """The columns that a template reads."""
    return split_template(template)[1::2]


def split_template(template: str) -> list[str]:
    """Text, column, text, column, ..., text.

    >>> split_template("{title}: {body}"), split_template("summary")
    (['', 'title', ': ', 'body', ''], ['', 'summary', ''])
    """
    return _PLACEHOLDER.split(template) if "{" in template else ["", template, ""]


def _column(name: str, record: Record) -> str:
    value = record.get(name)
    if type(value) is str:
        return value
    if value is None and name in record:
        return ""
    if value is None:
        raise Malformed("missing_field", f"no `{name}`; {keys_of(record)}")
    raise _not_text(f"`{name}`", value)


def joined(text: Any, below: Any, name: str) -> Any:
    """A text with another one below it, where there is another one."""
    if below is None or below == "":
        return text
    if type(below) is not str:
        raise _not_text(f"`{name}`", below)
    return f"{text}\n\n{below}" if type(text) is str else text


def required(record: Record, name: str) -> Any:
    """A field that must be there."""
    value = record.get(name)
    if value is None:
        raise Malformed("missing_field", f"`{name}` is null" if name in record else f"no `{name}`; {keys_of(record)}")
    return value


def either(record: Record, *names: str) -> Any:
    """The first of these fields that holds something."""
    return next((record[name] for name in names if record.get(name) is not None), None)


def keys_of(record: Record) -> str:
    """What a record does hold, for a message."""
    return f"keys: {', '.join(str(key) for key in list(record)[:12])}" if record else "the object is empty"


def json_text(value: Any) -> str:
    """JSON text in the order of the data: templates print tool calls in the order they were given."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise Malformed("bad_tool_call", str(error)) from None


def _not_text(what: str, value: Any) -> Malformed:
    return Malformed("wrong_type", f"{what} is a {type(value).__name__}: {str(value)[:40]}")
