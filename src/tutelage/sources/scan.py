"""Byte blocks to raw records: lines of JSONL, elements of one JSON array. Pure; memory is one block and one record."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.errors import DataError
from tutelage.sources.reasons import Malformed, excerpt_of

_KEPT_BYTES = 1_000  # of an over-long record: enough for its excerpt
_STRUCTURE = re.compile(rb'["\[\]{},]')
_STRUCTURE_INSIDE = re.compile(rb'["\[\]{}]')  # commas matter only between elements
_REST_OF_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+"', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive raw records: `lines[i]` is where `items[i]` starts, from 1; an item is bytes, a dictionary, or Malformed."""

    lines: Sequence[int]
    items: Sequence[Any]


def too_long(start: bytes, num_bytes: int, max_bytes: int) -> Malformed:
    """The mark left in place of a record that was not kept."""
    detail = f"{num_bytes} bytes; intake.max_record_bytes is {max_bytes}"
    return Malformed("too_long", detail, excerpt_of(start))


def split_lines(blocks: Iterable[bytes], *, max_bytes: int) -> Iterator[Block]:
    r"""The lines of a stream, split on "\n" and nothing else; a longer line than `max_bytes` becomes Malformed.

    >>> [b.items for b in split_lines([b"ab\r\nc", b"d\xe2\x80\xa8e\nf"], max_bytes=99)]
    [[b'ab\r'], [b'cd\xe2\x80\xa8e'], [b'f']]
    """
    first = 1
    pieces: list[bytes] = []  # of the line that the last block cut, `size` bytes so far
    size = 0
    for block in blocks:
        head, *others = block.split(b"\n")
        size += len(head)
        pieces = [*pieces, head] if size <= max_bytes else [b"".join([*pieces, head[:_KEPT_BYTES]])[:_KEPT_BYTES]]
        if not others:
            continue
        items = [_whole(pieces, size, max_bytes), *others[:-1]]
        if len(block) > max_bytes:
            items = [_whole([i], len(i), max_bytes) if isinstance(i, bytes) else i for i in items]
        yield Block(range(first, first + len(items)), items)
        first += len(items)
        pieces, size = [others[-1]], len(others[-1])
    if size:
        yield Block([first], [_whole(pieces, size, max_bytes)])


def _whole(pieces: list[bytes], size: int, max_bytes: int) -> bytes | Malformed:
    start = b"".join(pieces)
    return start if size <= max_bytes else too_long(start, size, max_bytes)


def split_array(
    blocks: Iterable[bytes], *, max_bytes: int, first_line: int = 1, after: Callable[[bytes], None] | None = None
) -> Iterator[Block]:
    r"""The elements of a JSON array (the stream starts at its "["), each as the bytes between two commas.

    >>> [(b.lines, b.items) for b in split_array([b'[{"a": [1, ', b'2]},\n "x,y"]'], max_bytes=99)]
    [([1, 2], [b'{"a": [1, 2]}', b'"x,y"'])]

    The rest of an array that is not closed is one Malformed item. Text after the array is a DataError, or is handed to
    `after`, piece by piece.
    """
    scanner = _ArrayScanner(max_bytes, first_line, after)
    for block in blocks:
        if found := scanner.feed(block):
            yield _as_block(found)
    if found := scanner.close():
        yield _as_block(found)


def _as_block(found: list[tuple[int, bytes | Malformed]]) -> Block:
    return Block([line for line, _ in found], [item for _, item in found])


class _ArrayScanner:
    """Where brackets and strings stand, across blocks. `depth` 0 = before or after the array, 1 = between its elements."""

    def __init__(self, max_bytes: int, first_line: int, after: Callable[[bytes], None] | None) -> None:
        self.max_bytes = max_bytes
        self.after = after
        self.line = first_line  # of the first byte of the element being collected
        self.depth = 0
        self.is_in_string = False
        self.is_closed = False
        self.pieces: list[bytes] = []
        self.size = 0
        self.newlines = 0
        self.held = b""  # a backslash that ended a block: it belongs to what follows
        self.found: list[tuple[int, bytes | Malformed]] = []

    def feed(self, block: bytes) -> list[tuple[int, bytes | Malformed]]:
        """Elements that end in this block."""
        block = self.held + block
        tail = len(block) - len(block.rstrip(b"\\"))
        self.held = b"\\" if tail % 2 else b""
        block = block[: len(block) - len(self.held)]
        self.found = []
        begin = position = 0
        while (position := self._step(block, position)) >= 0:
            if self.depth == 1 and block[position - 1 : position] in (b",", b"[") and not self.is_in_string:
                begin = self._finish(block, begin, position - 1, is_element=block[position - 1 : position] == b",")
            elif self.is_closed and self.depth == 0:
                begin = self._finish(block, begin, position - 1, is_element=True)
                self.depth = -1  # what follows the array is one piece of trailing text
        if self.is_closed and self.after is not None:
            self.after(block[begin:])
        else:
            self._keep(block[begin:])
        return self.found

    def close(self) -> list[tuple[int, bytes | Malformed]]:
        """What is left when the stream ends."""
        self.found = []
        rest = b"".join(self.pieces).strip()
        if not self.is_closed:
            self.found.append((self.line, Malformed("broken_json", "the file ends inside its array", excerpt_of(rest))))
        elif rest:  # how many records it holds cannot be known, so it cannot be set aside as one
            raise DataError(f"line {self.line}: text after the end of the array: {excerpt_of(rest)[:60]!r}")
        return self.found

    def _step(self, block: bytes, position: int) -> int:
        """The position after the next token that matters, -1 when the block is used up."""
        while self.depth >= 0:
            if self.is_in_string:
                end = _REST_OF_STRING.match(block, position)
                if end is None:
                    return -1
                self.is_in_string, position = False, end.end()
                continue
            token = (_STRUCTURE if self.depth <= 1 else _STRUCTURE_INSIDE).search(block, position)
            if token is None:
                return -1
            position = token.end()
            if self._takes(token.group()):
                return position
        return -1

    def _takes(self, token: bytes) -> bool:
        """Moves the depth; whether the token opens or closes the array or parts its elements."""
        match token:
            case b'"':
                self.is_in_string = True
                return False
            case b"[" | b"{":
                self.depth += 1
                return self.depth == 1
            case b"]" | b"}":
                self.depth -= 1
                self.is_closed = self.depth == 0
                return self.is_closed
            case _:
                return self.depth == 1

    def _keep(self, piece: bytes) -> None:
        self.size += len(piece)
        self.newlines += piece.count(b"\n")
        if self.size <= self.max_bytes:
            self.pieces.append(piece)
        else:
            self.pieces = [b"".join([*self.pieces, piece[:_KEPT_BYTES]])[:_KEPT_BYTES]]

    def _finish(self, block: bytes, begin: int, end: int, *, is_element: bool) -> int:
        """Closes the element that ends before the separator at `end`; returns where the next one begins."""
        self._keep(block[begin:end])
        start = b"".join(self.pieces)
        stripped = start.lstrip()
        line = self.line + start.count(b"\n", 0, len(start) - len(stripped))
        if is_element and self.size > self.max_bytes:
            self.found.append((line, too_long(stripped, self.size, self.max_bytes)))
        elif is_element and stripped:
            self.found.append((line, stripped.rstrip()))
        elif is_element and not self.is_closed:
            self.found.append((line, Malformed("broken_json", "nothing between two commas")))
        self.line += self.newlines
        self.pieces, self.size, self.newlines = [], 0, 0
        return end + 1
