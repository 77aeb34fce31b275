"""One example as the model saw it: tokens with their kind and weight, merged into runs. Pure.

Both the terminal (`tutelage look`) and the page show these runs. Colour is never the only sign: every run of a kind is
also named, and weight shows as emphasis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tutelage.records import Kind, Rendered
from tutelage.report.data import Run

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens written out."""

_MOST_BYTES = 4  # of one UTF-8 character: no token waits longer than this for the rest of its character
_BIDI = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def token_texts(ids: Sequence[int], decode: Decode) -> list[str]:
    r"""The text of every token, so that they join to the text of the whole.

    A token that ends inside a character gets "" and the token that completes it gets the character; each token is decoded
    beside its neighbour, because some tokenizers drop the space of a token that stands alone.

    >>> table = {1: b" caf", 2: b"\xc3", 3: b"\xa9", 4: b"!"}
    >>> token_texts([1, 2, 3, 4], lambda ids: b"".join(table[i] for i in ids).decode(errors="replace"))
    [' caf', '', 'é', '!']
    """
    texts: list[str] = []
    anchor = read = 0
    for end in range(1, len(ids) + 1):
        known = decode(ids[anchor:read])
        text = decode(ids[anchor:end])
        is_open = text.endswith(_REPLACEMENT) and end - read < _MOST_BYTES and end < len(ids)
        texts.append("" if is_open else text[len(known) :])
        if not is_open:
            anchor, read = read, end
    return texts


def runs(rendered: Rendered, weights: NDArray[np.float32], texts: Sequence[str]) -> tuple[Run, ...]:
    """The example as runs of equal kind and weight, in order.

    `weights` f32 (T,) is the loss weight of each token as a target, `texts` from `token_texts`.

    >>> r = Rendered(np.array([5, 6, 7], np.int32), np.array([2, 3, 3], np.uint8), np.zeros(3, np.int16), np.ones(1, np.float32))
    >>> [(run.kind, run.weight, run.text) for run in runs(r, np.array([0, 1, 1], np.float32), ["Hi", "Yo", "!"])]
    [('user', 0.0, 'Hi'), ('assistant', 1.0, 'Yo!')]
    """
    assert len(weights) == len(texts) == len(rendered.ids), "one weight and one text per token"
    return tuple(
        Run(
            kind=Kind(int(rendered.kinds[start])).name.lower(),
            weight=round(float(weights[start]), 6),
            pieces=tuple(texts[start:end]),
            ids=tuple(int(i) for i in rendered.ids[start:end]),
        )
        for start, end in _spans(rendered.kinds, weights)
    )


def _spans(kinds: NDArray[np.uint8], weights: NDArray[np.float32]) -> Iterator[tuple[int, int]]:
    """Start and end of every stretch in which neither kind nor weight changes."""
    if not len(kinds):
        return
    changes = np.flatnonzero((kinds[1:] != kinds[:-1]) | (weights[1:] != weights[:-1])) + 1
    edges = [0, *changes.tolist(), len(kinds)]
    yield from pairwise(edges)


def chunks(run: Run, max_tokens: int) -> Iterator[Run]:
    """The run in pieces of at most `max_tokens`, so that hovering names a few tokens and not three hundred."""
    for start in range(0, len(run.pieces), max_tokens):
        end = start + max_tokens
        yield Run(run.kind, run.weight, run.pieces[start:end], run.ids[start:end])


def shortened(parts: Sequence[Run], *, head: int, tail: int) -> tuple[Run, ...]:
    """The runs of a long example with its middle left out, and said so: `head` tokens, a note, `tail` tokens.

    >>> long = Run("user", 0.0, ("a", "b", "c", "d", "e"), (1, 2, 3, 4, 5))
    >>> [run.text for run in shortened([long], head=2, tail=1)]
    ['ab', ' … 2 tokens left out … ', 'e']
    """
    num_tokens = sum(len(run.ids) for run in parts)
    if num_tokens <= head + tail:
        return tuple(parts)
    note = Run("left_out", 0.0, (f" … {num_tokens - head - tail:,} tokens left out … ",), ())
    return (*_window(parts, 0, head), note, *_window(parts, num_tokens - tail, num_tokens))


def _window(parts: Sequence[Run], start: int, end: int) -> Iterator[Run]:
    """The part of the runs that covers tokens `start : end`."""
    first = 0
    for run in parts:
        a, b = max(start - first, 0), max(end - first, 0)
        if run.ids[a:b]:
            yield Run(run.kind, run.weight, run.pieces[a:b], run.ids[a:b])
        first += len(run.ids)


def emphasis(weight: float) -> str:
    """The class of a weight: `none` (0), `light` (below 1), `full` (1) or `heavy` (above 1).

    >>> [emphasis(w) for w in (0.0, 0.1, 1.0, 2.0)]
    ['none', 'light', 'full', 'heavy']
    """
    if weight <= 0:
        return "none"
    return "full" if weight == 1 else "light" if weight < 1 else "heavy"


def visible(text: str) -> str:
    r"""The text with every character that could hide or reorder others written out.

    Control characters become their pictures, direction marks their code points, lone surrogates the replacement character.

    >>> visible("a\x00b\u202ec\td")
    'a␀b‹U+202E›c\td'
    """
    return "".join(_shown(char) for char in text)


def _shown(char: str) -> str:
    code = ord(char)
    if code < 0x20 and char not in "\n\t":
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\N{SYMBOL FOR DELETE}"
    if code in _BIDI or 0x80 <= code < 0xA0:
        return f"\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}U+{code:04X}\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}"
    if 0xD800 <= code < 0xE000 or code & 0xFFFE == 0xFFFE:
        return _REPLACEMENT
    return char
