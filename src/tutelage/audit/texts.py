"""Facts of records as read, from columns alone: system turns, answers that break off, copies, and the names of records.

Whether an answer breaks off is a guess, made so that lists, code, tables, verse and headings are left alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tutelage.records import Int64
from tutelage.tables import in_pieces

Bools = NDArray[np.bool_]

MIN_CHARACTERS, _MIN_LINE = 200, 60
_LIST_ITEM = re.compile(r"\s|[-*•>#|]|\w{1,3}[.):]\s")
_SIGNS_OF_CODE = re.compile(r"[=;{}<>|`\[\]\\_#$\t]|://")
_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
_NO_FULL_STOPS = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")  # Thai, Lao, Burmese, Khmer
_KEY_WORDS = 2


def looks_unfinished(texts: pa.Array) -> Bools:
    """Which answers break off, (N,): 200 characters or more, and a code fence left open or a last line broken off in prose.

    >>> said = "The first reason is that water expands when it freezes, which is why pipes burst in a hard winter. " * 2
    >>> looks_unfinished(pa.array([said, said + "The second reason is that the soil below the house moves and", "x,"])).tolist()
    [False, True, False]
    """
    out = np.zeros(len(texts), bool)
    at = np.flatnonzero(pc.greater_equal(pc.utf8_length(texts), MIN_CHARACTERS))
    long = texts.take(pa.array(at))
    is_odd = np.asarray(pc.count_substring(long, "```")) % 2 == 1
    last = pc.utf8_slice_codeunits(pc.utf8_rtrim_whitespace(pc.utf8_slice_codeunits(long, -_MIN_LINE)), -1)
    suspects = np.flatnonzero(is_odd | np.asarray(pc.or_(pc.utf8_is_alpha(last), pc.equal(last, ","))))
    out[at[suspects]] = [_breaks_off(text.rstrip()) for text in long.take(pa.array(suspects)).to_pylist()]
    return out


def _breaks_off(text: str) -> bool:
    if len(_FENCE.findall(text)) % 2:
        return True
    return (text[-1].isalpha() or text[-1] == ",") and _is_prose(text.rpartition("\n")[2])


def _is_prose(line: str) -> bool:
    """Whether a last line is running text: long, no list item or heading, no code or table, in a script with full stops."""
    signs = (_LIST_ITEM.match(line), _SIGNS_OF_CODE.search(line), _NO_FULL_STOPS.search(line))
    return len(line) >= _MIN_LINE and not any(signs)


def scan_turns(path: Path, *, batch_rows: int = 8192) -> tuple[Bools, Bools]:
    """Which records of a conversations.parquet have a system turn, and which an answer that breaks off, (R,) each.

    Answers that the data itself gives weight 0 are not looked at. Memory holds the texts of one batch.
    """
    wanted = [f"turns.list.element.{name}" for name in ("role", "content", "weight")]
    scanned = [(np.zeros(0, bool), np.zeros(0, bool))]
    for batch in in_pieces(path).iter_batches(batch_rows, columns=wanted):
        turns = batch["turns"].flatten()
        record = np.repeat(np.arange(batch.num_rows), np.diff(batch["turns"].offsets.to_numpy()))
        role = turns.field("role").cast(pa.string())
        is_learned = pc.fill_null(pc.not_equal(turns.field("weight"), 0.0), True)
        answers = np.flatnonzero(np.asarray(pc.and_(pc.equal(role, "assistant"), is_learned)))
        cut = answers[looks_unfinished(turns.field("content").cast(pa.string()).take(pa.array(answers)))]
        system = np.flatnonzero(np.asarray(pc.equal(role, "system")))
        has_system, is_cut = (np.bincount(record[at], minlength=batch.num_rows) > 0 for at in (system, cut))
        scanned.append((has_system, is_cut))
    has_system, is_cut = (np.concatenate(column) for column in zip(*scanned, strict=True))
    return has_system, is_cut


def content_keys(path: Path, rows: Int64) -> NDArray[np.uint64]:
    """The content keys of these records as two numbers each, (N, 2)."""
    if not len(rows):
        return np.zeros((0, _KEY_WORDS), np.uint64)
    column = pq.read_table(path, columns=["content_key"])["content_key"].combine_chunks()
    assert column.type.byte_width == 8 * _KEY_WORDS, "a content key has 16 bytes"
    flat = np.frombuffer(column.buffers()[1], np.uint64).reshape(-1, _KEY_WORDS)
    keys: NDArray[np.uint64] = flat[column.offset + rows]
    return keys


def first_of_equal(keys: NDArray[np.uint64]) -> Int64:
    """For each record the position of the first that is equal to it, (N,): itself where it is the first.

    >>> first_of_equal(np.array([[1, 2], [3, 4], [1, 2], [1, 5]], np.uint64)).tolist()
    [0, 1, 0, 3]
    """
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal keys keep their order
    begins = np.ones(len(order), bool)
    begins[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    out = np.zeros(len(order), np.int64)
    out[order] = order[np.flatnonzero(begins)][np.cumsum(begins) - 1] if len(order) else order
    return out


@dataclass(frozen=True)
class RecordNames:
    """The names of a source's records, as people use them."""

    path: Path
    source: str

    @cached_property
    def _table(self) -> pa.Table:
        return pq.read_table(self.path, columns=["file", "line", "part"])

    def of(self, rows: Int64) -> pa.Array:
        """`source/file:line` of these records, with `#part` where a line holds several."""
        table = self._table.take(pa.array(rows, pa.int64()))
        file, line, part = (table[name].cast(pa.string()) for name in ("file", "line", "part"))
        parts = pc.if_else(pc.equal(table["part"], 0), "", pc.binary_join_element_wise("#", part, ""))
        return pc.binary_join_element_wise(f"{self.source}/", file, ":", line, parts, "").combine_chunks()
