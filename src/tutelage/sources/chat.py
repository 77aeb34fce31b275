"""One object that holds a list of messages to turns: OpenAI's spelling and ShareGPT's. Pure."""

from __future__ import annotations

import json
import math
from typing import Any

from tutelage.sources.keys import TurnRow
from tutelage.sources.reasons import Malformed
from tutelage.sources.shapes import Draft, Record, either, json_text, keys_of, system_turn

LISTS = ("messages", "conversations", "conversation")
"""Where the list of messages may stand."""
OPENAI_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
MORE_FIELDS = (
    *("reasoning_content", "reasoning", "thinking"),
    *("tool_calls", "function_call", "name", "tool_call_id"),
    *("weight", "train", "learn", "loss"),
)
"""What is read of a message beside its role and its text."""


def messages(record: Record) -> Draft:
    """Turns of OpenAI messages: roles, tools and tool calls, reasoning, text parts, a weight per message.

    >>> chat = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "weight": 0}]
    >>> [(turn[0], turn[1], turn[6]) for turn in messages({"messages": chat})[0]]
    [('user', '2+2?', None), ('assistant', '4', 0.0)]
    """
    turns = [*system_turn(record), *(_openai(message) for message in _list_of(record))]
    check_order(turns)
    tools = record.get("tools")
    return turns, None if tools is None else _tools(tools)


def sharegpt(record: Record) -> Draft:
    """Turns of (from, value) messages: human, gpt, system, tool, function_call, observation.

    >>> chat = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    >>> [turn[:2] for turn in sharegpt({"conversations": chat})[0]]
    [('user', '2+2?'), ('assistant', '4')]
    """
    turns = [*system_turn(record), *(_sharegpt(message) for message in _list_of(record))]
    check_order(turns)
    tools = record.get("tools")
    return turns, None if tools is None else _tools(tools)


def check_order(turns: list[TurnRow]) -> None:
    """Refuses turns that are no conversation to learn from: see the codes in `reasons.py`."""
    last = ""
    for index, turn in enumerate(turns):
        role = turn[0]
        if role == "system" and index:
            reason = "two_system_turns" if turns[0][0] == "system" else "system_not_first"
            raise Malformed(reason, f"turn {index}")
        if role == "tool" and last not in ("assistant", "tool"):
            raise Malformed("stray_tool_result", f"turn {index} follows {last or 'nothing'}")
        if not turn[1] or turn[1].isspace():
            _check_blank(turn, index)
        last = role
    roles = {turn[0] for turn in turns}
    if "user" not in roles:
        raise Malformed("no_request", "no user turn")
    if "assistant" not in roles:
        raise Malformed("no_answer", "no assistant turn")
    if last != "assistant":
        raise Malformed("ends_without_answer", f"the last turn is a {last} turn")


def _check_blank(turn: TurnRow, index: int) -> None:
    """Tool results and system turns may be blank, and answers that call a tool."""
    if turn[0] == "user":
        raise Malformed("empty_request", f"turn {index}")
    if turn[0] == "assistant" and turn[3] is None:
        raise Malformed("empty_answer", f"turn {index}")


def _list_of(record: Record) -> list[Any]:
    found = either(record, *LISTS)
    if found is None:
        raise Malformed("missing_field", f"no list of messages; {keys_of(record)}")
    if not isinstance(found, list):
        raise Malformed("wrong_type", f"the messages are a {type(found).__name__}")
    return found


def _openai(message: Any) -> TurnRow:
    role, content = _role_and_content(message, "role", "content", OPENAI_ROLES)
    if type(content) is str and len(message) == 2:
        return (role, content, None, None, None, None, None)
    calls = _tool_calls(message)
    return (
        role,
        _text(content, is_optional=calls is not None or role == "tool", role=role),
        _reasoning(message),
        calls,
        _optional_text(message, "name"),
        _optional_text(message, "tool_call_id"),
        _weight(message),
    )


def _sharegpt(message: Any) -> TurnRow:
    role, content = _role_and_content(message, "from", "value", SHAREGPT_ROLES)
    if type(content) is str and len(message) == 2 and message["from"] != "function_call":
        return (role, content, None, None, None, None, None)
    calls = None
    if message["from"] == "function_call":
        calls, content = _function_call(content), ""
    text = _text(content, is_optional=role == "tool", role=role)
    return (role, text, _reasoning(message), calls, _optional_text(message, "name"), None, _weight(message))


def _role_and_content(message: Any, role_key: str, content_key: str, roles: dict[str, str]) -> tuple[str, Any]:
    if type(message) is not dict:
        raise Malformed("wrong_type", f"a message is a {type(message).__name__}")
    role = message.get(role_key)
    if role is None:
        raise Malformed("missing_field", f"a message without `{role_key}`; {keys_of(message)}")
    if type(role) is not str:
        raise Malformed("wrong_type", f"`{role_key}` is a {type(role).__name__}")
    if role not in roles:
        raise Malformed("unknown_role", f"{role!r}; known: {', '.join(roles)}")
    return roles[role], message.get(content_key)


def _text(content: Any, *, is_optional: bool, role: str) -> str:
    """A message's text; lists of text parts are put together."""
    match content:
        case str():
            return content
        case None if is_optional:
            return ""
        case None:
            raise Malformed("missing_field", f"a {role} message without content")
        case list():
            return "".join(_part(part) for part in content)
        case _:
            raise Malformed("wrong_type", f"the content of a {role} message is a {type(content).__name__}")


def _part(part: Any) -> str:
    if type(part) is str:
        return part
    if type(part) is not dict:
        raise Malformed("wrong_type", f"a part of a message is a {type(part).__name__}")
    if part.get("type", "text") != "text" or type(part.get("text")) is not str:
        raise Malformed("unsupported_content", f"a part of type {part.get('type')!r}")
    text: str = part["text"]
    return text


def _reasoning(message: Record) -> str | None:
    for name in ("reasoning_content", "reasoning", "thinking"):
        if (text := _optional_text(message, name)) is not None:
            return text
    return None


def _optional_text(message: Record, name: str) -> str | None:
    value = message.get(name)
    if value is None or value == "":
        return None
    if type(value) is not str:
        raise Malformed("wrong_type", f"`{name}` of a message is a {type(value).__name__}")
    if "\0" in value:
        raise Malformed("nul_character", f"in `{name}`")
    return value


def _weight(message: Record) -> float | None:
    """The learn weight that the data gives a message: `weight`, `train`, `learn` or `loss`, a number >= 0 or true/false."""
    for name in ("weight", "train", "learn", "loss"):
        value = message.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or not math.isfinite(value) or value < 0:
            raise Malformed("wrong_type", f"`{name}` of a message is {str(value)[:40]!r}, not a number from 0 or true/false")
        return float(value)
    return None


def _tool_calls(message: Record) -> str | None:
    calls = message.get("tool_calls")
    if calls is None and (single := message.get("function_call")) is not None:
        calls = [{"type": "function", "function": single}]
    if calls is None or calls == []:
        return None
    if not isinstance(calls, list):
        raise Malformed("bad_tool_call", f"`tool_calls` is a {type(calls).__name__}")
    for call in calls:
        _check_named(call, "a tool call")
    return json_text(calls)


def _function_call(value: Any) -> str:
    """ShareGPT's function_call, `{"name": ..., "arguments": ...}` or a list of them as JSON text, in OpenAI's form."""
    found = _from_json(value, "function_call")
    calls = found if isinstance(found, list) else [found]
    for call in calls:
        _check_named(call, "a function call")
    return json_text([{"type": "function", "function": call} for call in calls])


def _tools(tools: Any) -> str | None:
    """Tool descriptions as JSON text; given as a list, or as the JSON text of one."""
    if tools == "" or tools == []:
        return None
    found = _from_json(tools, "tools")
    if not isinstance(found, list):
        raise Malformed("bad_tool_call", f"`tools` is a {type(found).__name__}")
    for tool in found:
        _check_named(tool, "a tool")
    return json_text(found) if found else None


def _check_named(call: Any, what: str) -> None:
    if not isinstance(call, dict):
        raise Malformed("bad_tool_call", f"{what} is a {type(call).__name__}")
    inner = call.get("function", call)
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise Malformed("bad_tool_call", f"{what} without a name")


def _from_json(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise Malformed("bad_tool_call", f"`{name}` is no JSON: {error}"[:200]) from None
