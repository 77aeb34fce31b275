"""Ordinary records, hundreds at a time: columns of texts instead of a turn at a time. Pure; None where one is not ordinary.

Every function here gives for all its records together what `shapes.py` and `chat.py` give for each of them, or None: then
the caller looks at fewer records at once, in the end at single ones, with the functions that also say what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

from tutelage.sources.chat import LISTS, MORE_FIELDS, OPENAI_ROLES, SHAREGPT_ROLES, check_order
from tutelage.sources.keys import ROLE_OF_LETTER
from tutelage.sources.reasons import Malformed
from tutelage.sources.shapes import PAIRS, Record, split_template
from tutelage.sources.spec import ColumnsSpec

_TEXT = {str}
_TEXT_OR_NULL = {str, type(None)}
_LETTER_OF_ROLE = {role: letter for letter, role in ROLE_OF_LETTER.items()}
_OPENAI_LETTERS = {name: _LETTER_OF_ROLE[role] for name, role in OPENAI_ROLES.items()}
_SHAREGPT_LETTERS = {name: _LETTER_OF_ROLE[role] for name, role in SHAREGPT_ROLES.items() if name != "function_call"}


class Texts(NamedTuple):
    """Records as columns: `orders[i]` has a letter per turn of record i (see `keys.ROLE_OF_LETTER`), `contents` is flat."""

    orders: list[str]
    contents: list[str]


Bulk = Callable[[Sequence[Record]], Texts | None]


def bulk_named(name: str, spec: ColumnsSpec | None) -> Bulk | None:
    """The bulk function of a shape; None for one that is always read a record at a time."""
    match name:
        case "alpaca":
            return alpacas
        case "prompt_completion":
            return prompts_completions
        case "messages":
            return partial(_chats, role_key="role", content_key="content", letters=_OPENAI_LETTERS)
        case "sharegpt":
            return partial(_chats, role_key="from", content_key="value", letters=_SHAREGPT_LETTERS)
        case "columns" if spec is not None:
            return partial(_filled, spec=spec)
        case _:
            return None


def alpacas(records: Sequence[Record]) -> Texts | None:
    r"""As `shapes.alpaca`.

    >>> alpacas([{"instruction": "Add.", "input": "2, 2", "output": "4"}, {"instruction": "Hi", "output": "Ho"}])
    Texts(orders=['ua', 'ua'], contents=['Add.\n\n2, 2', '4', 'Hi', 'Ho'])
    """
    requests = _first_given(records, "instruction")
    below = _first_given(records, "input", "context")
    if set(map(type, requests)) != _TEXT or not _TEXT_OR_NULL.issuperset(map(type, below)):
        return None
    if any(below):
        requests = [f"{request}\n\n{more}" if more else request for request, more in zip(requests, below, strict=True)]
    return _exchanges_after_system(records, requests, _first_given(records, "output", "response"))


def prompts_completions(records: Sequence[Record]) -> Texts | None:
    """As `shapes.prompt_completion`, where the first spelling that any record has fits all of them.

    >>> prompts_completions([{"question": "2+2?", "answer": "4"}])
    Texts(orders=['ua'], contents=['2+2?', '4'])
    """
    keys = set().union(*records)
    pair = next((pair for pair in PAIRS if keys.issuperset(pair)), None)
    if pair is None:
        return None
    return _exchanges_after_system(records, _first_given(records, pair[0]), _first_given(records, pair[1]))


def _exchanges_after_system(records: Sequence[Record], requests: list[Any], answers: list[Any]) -> Texts | None:
    if any(_first_given(records, "history")):
        return None
    return _exchanges(requests, answers, systems=_systems(records))


def _filled(records: Sequence[Record], *, spec: ColumnsSpec) -> Texts | None:
    """As `shapes.columns`."""
    requests, answers = _fill(spec.user, records), _fill(spec.assistant, records)
    systems = _fill(spec.system, records) if spec.system is not None else [""]
    if requests is None or answers is None or systems is None:
        return None
    return _exchanges(requests, answers, systems=systems)


def _fill(template: str, records: Sequence[Record]) -> list[str] | None:
    """As `shapes.fill`."""
    parts = []
    for index, piece in enumerate(split_template(template)):
        values = [record.get(piece) for record in records] if index % 2 else [piece] * len(records)
        if set(map(type, values)) != _TEXT:
            return None
        parts.append(values)
    return list(map("".join, zip(*parts, strict=True)))


def _exchanges(requests: list[Any], answers: list[Any], *, systems: list[Any]) -> Texts | None:
    """As `shapes.exchange`; `systems` may be shorter where it holds no text."""
    if set(map(type, requests)) != _TEXT or set(map(type, answers)) != _TEXT or not _TEXT_OR_NULL.issuperset(map(type, systems)):
        return None
    if _any_blank(requests) or _any_blank(answers):
        return None
    if any(systems):
        orders = ["sua" if system else "ua" for system in systems]
        return Texts(orders, [text for texts in zip(systems, requests, answers, strict=True) for text in texts if text])
    contents = [""] * (2 * len(requests))
    contents[::2], contents[1::2] = requests, answers
    return Texts(["ua"] * len(requests), contents)


def _chats(records: Sequence[Record], *, role_key: str, content_key: str, letters: dict[str, str]) -> Texts | None:
    """As `chat.messages` and `chat.sharegpt`, for messages of a role and a text and nothing more that is read."""
    chats, systems, tools = _first_given(records, *LISTS), _systems(records), _first_given(records, "tools")
    if set(map(type, chats)) != {list} or not _TEXT_OR_NULL.issuperset(map(type, systems)) or tools.count(None) < len(tools):
        return None
    if any(systems):
        leads = [[{role_key: "system", content_key: system}] if system else [] for system in systems]
        chats = [[*lead, *chat] for lead, chat in zip(leads, chats, strict=True)]
    messages = list(chain.from_iterable(chats))
    if set(map(type, messages)) != {dict} or (set(map(len, messages)) != {2} and _any_holds_more(messages)):
        return None
    try:
        turns = "".join([letters[message[role_key]] for message in messages])
        contents = [message[content_key] for message in messages]
    except (KeyError, TypeError):
        return None
    orders = [turns[start:stop] for start, stop in pairwise(accumulate(map(len, chats), initial=0))]
    if set(map(type, contents)) != _TEXT or not all(map(_is_sound, set(orders))):
        return None
    if _any_blank(contents) and _any_blank([text for turn, text in zip(turns, contents, strict=True) if turn in "ua"]):
        return None
    return Texts(orders, contents)


def _any_holds_more(messages: list[Record]) -> bool:
    names = set().union(*messages).intersection(MORE_FIELDS)
    return any(message.get(name) is not None for name in names for message in messages)


@lru_cache(maxsize=4096)
def _is_sound(order: str) -> bool:
    try:
        check_order([(ROLE_OF_LETTER[letter], "text", None, None, None, None, None) for letter in order])
    except Malformed:
        return False
    return True


def _systems(records: Sequence[Record]) -> list[Any]:
    """As `shapes.system_turn`."""
    return _first_given(records, "system", "system_prompt")


def _first_given(records: Sequence[Record], *names: str) -> list[Any]:
    """Of each record the first of these fields that is not null, None where all are."""
    values = [record.get(names[0]) for record in records]
    for name in names[1:]:
        if None in values:
            values = [record.get(name) if value is None else value for record, value in zip(records, values, strict=True)]
    return values


def _any_blank(texts: list[str]) -> bool:
    return not all(texts) or any(map(str.isspace, texts))
