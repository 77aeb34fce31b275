"""The loops of rendering, for `compiled.kernel`: copying, trimming, walking over tokens, labelling and counting them."""

from __future__ import annotations

import numpy as np

from tutelage.compiled import kernel
from tutelage.records import Float32, Int32, Int64, UInt8

WORD = 8
PADDING = 2 * WORD
"""Zeros behind texts, so that a token's 16 bytes can be read anywhere."""
WORTH_COMPILING = 100_000
"""Tokens from which a kernel is worth being compiled, or read from disk."""


def load_kernels() -> None:
    """Compiles all kernels, or reads them from disk, by running each on next to nothing."""
    one, byte, edges, turn = np.ones(1, np.int64), np.ones(1, np.uint8), np.array([0, 1]), np.zeros(1, np.int16)
    flag, word = np.zeros(1, bool), np.ones(1, np.uint64)
    none = np.zeros(0, np.int64)
    kernel(copy_stretches)(byte, none, none, byte.copy())
    kernel(trim)(byte, np.zeros(256, bool), True, True, True, none, none)
    padded = np.ones(3 * WORD, np.uint8)
    words = np.ndarray((len(padded) - WORD + 1,), "<u8", padded.tobytes(), strides=(1,))
    ids = np.zeros(1, np.int32)
    frozen = np.frombuffer(b"a", np.uint8)
    text = np.frombuffer(padded.tobytes(), np.uint8)
    kernel(walk)(ids, edges, byte, word, word, frozen, edges, text, words, edges, one, one, flag)
    kernel(label_cells)(none, none, one, byte, turn, byte, byte.copy(), turn.copy(), none, one.copy())
    kernel(count_learned)(none.astype(np.uint8), turn[:0], none, none, np.zeros(0, np.float32), np.uint32(0), none)
    kernel(find_ids)(ids, 0, 0, flag, one)
    _loaded.append(True)


_loaded: list[bool] = []


def is_worth_a_kernel(num_tokens: int) -> bool:
    """Whether a kernel does so many tokens sooner than array operations: always, once they are loaded."""
    return bool(_loaded) or num_tokens > WORTH_COMPILING


def copy_stretches(source: UInt8, starts: Int64, lengths: Int64, out: UInt8) -> None:
    """Stretches of `source` end to end in `out`."""
    at = 0
    for i in range(len(starts)):
        start, length = starts[i], lengths[i]
        out[at : at + length] = source[start : start + length]
        at += length


def trim(  # noqa: C901 - a kernel takes arrays, not objects
    data: UInt8, which: np.ndarray, wide: bool, left: bool, right: bool, first: Int64, last: Int64
) -> None:
    """Moves each `first` and `last` past the characters that go, on the sides asked for.

    `which` (256,) are the bytes below 128 that go; `wide`: with them the white space beyond ASCII that `str.strip` takes, in
    UTF-8 C2 85, C2 A0, E1 9A 80, E2 80 80-8A, E2 80 A8, A9, AF, E2 81 9F, E3 80 80.
    """
    for i in range(len(first)):
        a, b = first[i], last[i]
        for side in range(2):
            going = left if side == 0 else right
            while going and a < b:
                going = False
                near = data[a] if side == 0 else data[b - 1]
                if near < 0x80:
                    width = 1 if which[near] else 0
                else:
                    width = 0
                    if wide and b - a >= 2:
                        at = a if side == 0 else b - 2
                        if data[at] == 0xC2 and (data[at + 1] == 0x85 or data[at + 1] == 0xA0):
                            width = 2
                    if wide and width == 0 and b - a >= 3:
                        at = a if side == 0 else b - 3
                        c, d, e = data[at], data[at + 1], data[at + 2]
                        if c == 0xE2 and d == 0x80 and (0x80 <= e <= 0x8A or e == 0xA8 or e == 0xA9 or e == 0xAF):
                            width = 3
                        elif (
                            (c == 0xE2 and d == 0x81 and e == 0x9F)
                            or (c == 0xE1 and d == 0x9A and e == 0x80)
                            or (c == 0xE3 and d == 0x80 and e == 0x80)
                        ):
                            width = 3
                if width > 0:
                    going = True
                    if side == 0:
                        a += width
                    else:
                        b -= width
        first[i], last[i] = a, b


def walk(  # noqa: PLR0913 - a kernel takes arrays, not objects
    ids: np.ndarray,
    first: Int64,
    lengths: UInt8,
    near: np.ndarray,
    far: np.ndarray,
    flat: UInt8,
    begins: Int64,
    data: UInt8,
    words: np.ndarray,
    offsets: Int64,
    starts: Int64,
    ends: Int64,
    is_proved: np.ndarray,
) -> None:
    """Byte positions of all tokens, and which examples they spell: `near` and `far` are bytes 0-7 and 8-15 of every token.

    Eight bytes are compared at a time, and most tokens need one look; `lengths` end at 255, so that they stay in the cache.
    See `tokens.ByteTable` and `tokens._walk_arrays`.
    """
    full = np.uint64(0xFFFFFFFFFFFFFFFF)
    for example in range(len(offsets) - 1):
        at, until = offsets[example], offsets[example + 1]
        # slices count from 0, so that no index is looked at for being negative
        here = slice(first[example], first[example + 1])
        own, own_starts, own_ends = ids[here], starts[here], ends[here]
        differs = np.uint64(0)
        for token in range(len(own)):
            i = np.uint32(own[token])
            length: int = lengths[i]
            if length == 255:
                length = begins[i + 1] - begins[i]
            own_starts[token] = at
            if at + length > until:
                differs = full
            if differs == 0 and length > 0:
                differs = near[i] ^ (words[at] & (full >> np.uint64(64 - 8 * min(length, WORD))))
                if length > WORD:
                    differs |= far[i] ^ (words[at + WORD] & (full >> np.uint64(64 - 8 * min(length - WORD, WORD))))
                for k in range(2 * WORD, length):
                    differs |= np.uint64(data[at + k] != flat[begins[i] + k])
            at += length
            own_ends[token] = at
        is_proved[example] = differs == 0 and at == until


def label_cells(  # noqa: PLR0913 - a kernel takes arrays, not objects
    starts: Int64,
    ends: Int64,
    cell_ends: Int64,
    cell_kinds: UInt8,
    cell_turns: np.ndarray,
    priority: UInt8,
    kinds: UInt8,
    turns: np.ndarray,
    cell: Int64,
    tokens_per_cell: Int64,
) -> None:
    """The kind, turn and cell of each token; a token over several cells goes to the one of the highest priority.

    Of equals it stays in the one where it begins, else it goes to the last. See `tokens.label_arrays`.
    """
    at, last = 0, len(cell_ends) - 1
    for token in range(len(starts)):
        start, end = starts[token], ends[token]
        while at < last and cell_ends[at] <= start:  # cell at + 1 begins where cell at ends
            at += 1
        chosen, other = at, at + 1
        while other <= last and cell_ends[other - 1] < end:
            wins = priority[other] > priority[at] and priority[other] >= priority[chosen]
            chosen = other if wins else chosen
            other += 1
        kinds[token], turns[token], cell[token] = cell_kinds[chosen], cell_turns[chosen], chosen
        tokens_per_cell[chosen] += 1


def find_ids(ids: Int32, low: int, high: int, wanted: np.ndarray, out: Int64) -> int:
    """How many ids are `wanted` (a flag per id, none outside `low` to `high`), their places in `out` as far as it reaches."""
    count = 0
    for i in range(len(ids)):
        one = ids[i]
        if low <= one <= high and wanted[one]:
            if count < len(out):
                out[count] = i
            count += 1
    return count


def count_learned(
    kinds: UInt8,
    turns: np.ndarray,
    token_offsets: Int64,
    turn_offsets: Int64,
    turn_weights: Float32,
    learned: np.uint32,
    counts: Int64,
) -> None:
    """Per example: tokens that a model writes (marks too), in turns that are to be learned; the first token is no target.

    Bit k of `learned` is set for a kind k that models write.
    """
    for example in range(len(counts)):
        here = slice(token_offsets[example] + 1, token_offsets[example + 1])  # counts from 0: no index can be negative
        own_kinds, own_turns = kinds[here], turns[here]
        weights = turn_weights[turn_offsets[example] : turn_offsets[example + 1]]
        number = np.int32(0)
        if len(weights) and weights.min() > 0:
            for token in range(len(own_kinds)):
                kind = np.uint32(own_kinds[token])
                number += np.int32(((learned >> kind) & np.uint32(1)) | (np.uint32(kind == 0) & np.uint32(own_turns[token] >= 0)))
        else:
            for token in range(len(own_kinds)):
                kind, turn = np.uint32(own_kinds[token]), own_turns[token]
                is_written = ((learned >> kind) & np.uint32(1)) | (np.uint32(kind == 0) & np.uint32(turn >= 0))
                if is_written and (turn < 0 or weights[turn] > 0):
                    number += np.int32(1)
        counts[example] = number
