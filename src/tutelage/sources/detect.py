"""Which shape a file has: decided over a sample of its first block, not over its first record, and explained. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.errors import DataError, did_you_mean
from tutelage.sources import chat, shapes
from tutelage.sources.reasons import Malformed
from tutelage.sources.shapes import Record, Shape
from tutelage.sources.spec import ColumnsSpec

SAMPLE_RECORDS = 200


@dataclass(frozen=True, slots=True)
class Decision:
    """The shape of one file and the sentence that says why."""

    name: str
    why: str


def choose(found: Sequence[Record | Malformed]) -> Decision:
    """The shape that most of the sampled records have; DataError when none has one.

    >>> choose([{"question": "2+2?", "answer": "4", "id": 7}])
    Decision(name='prompt_completion', why='1 of 1 sampled records hold question, answer; not read: id')
    """
    records = [record for record in found if not isinstance(record, Malformed)]
    names = [_shape_of(record) for record in records]
    counts = {name: names.count(name) for name in dict.fromkeys(names) if name}
    if not counts:
        raise DataError(_nothing_fits(found, records))
    # max() keeps the first of equals, and what comes first in a file is no reason: break ties by name
    best = max(sorted(counts), key=lambda name: counts[name])
    example = next(record for record, name in zip(records, names, strict=True) if name == best)
    used = _keys_read(best, example)
    others = sorted({str(key) for record in records for key in record} - set(used))
    why = f"{counts[best]} of {len(found)} sampled records hold {', '.join(used)}"
    if others:
        why += f"; not read: {', '.join(others[:12])}"
    return Decision(best, why)


def spread(items: Sequence[Any], limit: int = SAMPLE_RECORDS) -> list[Any]:
    """At most `limit` items, evenly spread from the first to the last.

    >>> spread([0, 1, 2, 3, 4, 5, 6, 7, 8], 3)
    [0, 4, 8]
    """
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def shape_named(name: str, spec: ColumnsSpec | None) -> Shape:
    """The function of a shape; `natural_instructions` takes what `split_instances` returns."""
    match name:
        case "alpaca":
            return shapes.alpaca
        case "prompt_completion":
            return shapes.prompt_completion
        case "messages":
            return chat.messages
        case "sharegpt":
            return chat.sharegpt
        case "natural_instructions":
            return shapes.natural_instructions
        case _:
            assert spec is not None, "`shape: columns` has columns (see SourceSpec)"
            return shapes.columns(spec.user, spec.assistant, spec.system)


def check_columns(found: Sequence[Record | Malformed], names: Sequence[str]) -> None:
    """DataError when a column that the recipe names stands in none of the sampled records."""
    known = {str(key): None for record in found if not isinstance(record, Malformed) for key in record}
    for name in names:
        if known and name not in known:
            raise DataError(f"no column `{name}` in any of {len(found)} sampled records; {did_you_mean(name, known)}")


def _shape_of(record: Record) -> str:
    """The shape that the keys of one record speak for, "" for none."""
    listed = shapes.either(record, *chat.LISTS)
    if isinstance(listed, list) and listed and isinstance(listed[0], dict):
        if "from" in listed[0] and "value" in listed[0]:
            return "sharegpt"
        return "messages" if "role" in listed[0] else ""
    if isinstance(shapes.either(record, "instances", "Instances"), list):
        return "natural_instructions"
    if "inputs" in record and "targets" in record and "definition" in record:
        return "natural_instructions"
    if "instruction" in record and ("output" in record or ("response" in record and ({"input", "context"} & record.keys()))):
        return "alpaca"
    if any(request in record and answer in record for request, answer in shapes.PAIRS):
        return "prompt_completion"
    return ""


def _keys_read(shape: str, record: Record) -> list[str]:
    """The keys of a record that its shape reads, in the order they are read."""
    extra = ["system", "system_prompt", "history"]
    match shape:
        case "messages" | "sharegpt":
            keys = [*chat.LISTS, "tools", "system", "system_prompt"]
        case "natural_instructions":
            keys = ["definition", "Definition", "instruction", "positive_examples", "Positive Examples", "instances", "Instances"]
            keys += ["inputs", "targets"]
        case "alpaca":
            keys = ["instruction", "input", "context", "output", *extra]
            keys += [] if "output" in record else ["response"]
        case _:
            pair = next(pair for pair in shapes.PAIRS if pair[0] in record and pair[1] in record)
            keys = [*pair, *extra]
    return [key for key in keys if key in record]


def _nothing_fits(found: Sequence[Record | Malformed], records: Sequence[Record]) -> str:
    if not records:
        reasons = {item.reason: item.detail for item in found if isinstance(item, Malformed)}
        told = "; ".join(f"{reason} ({detail})" for reason, detail in list(reasons.items())[:3])
        return f"none of {len(found)} sampled records can be read: {told}"
    keys = list(dict.fromkeys(str(key) for record in records for key in record))
    return (
        f"no known shape fits any of {len(found)} sampled records; keys: {', '.join(keys[:20])}. "
        "Name the columns: shape: columns, columns: {user: ..., assistant: ...}"
    )
