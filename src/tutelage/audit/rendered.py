"""One rendered set, read a million tokens at a time: what its planned examples hold, and the faults in them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tutelage.audit.tokens import KIND_NAMES, Hits, Stretch, Vocabulary, Weigh, mark
from tutelage.records import Float64, Int32, Int64
from tutelage.tables import RenderedSet

_CHUNK_TOKENS = 1 << 20


@dataclass(frozen=True)
class TokenFacts:
    """N examples of a rendered set, one entry each: `targets` i32 (N, 9) counts targets with weight by KIND_NAMES.

    `faults` by finding, with `example` in 0 .. N-1; `num_stops` counts the stops of learned turns; `flags` are `records.Flag`.
    """

    row: Int64
    part: np.ndarray
    flags: np.ndarray
    num_tokens: Int64
    targets: Int32
    num_stops: int
    faults: dict[str, Hits]

    @property
    def shares(self) -> Float64:
        """Targets with weight over tokens, (N,)."""
        shares: Float64 = self.targets.sum(axis=1) / np.maximum(self.num_tokens, 1)
        return shares


def measure_set(folder: Path, chosen: Int64, *, weigh: Weigh, vocabulary: Vocabulary) -> TokenFacts:
    """The facts of the examples at the positions `chosen` (ascending) of a rendered set."""
    rendered = RenderedSet(folder)
    place = np.full(len(rendered), -1)
    place[chosen] = np.arange(len(chosen))
    targets, num_stops = np.zeros((len(chosen), len(KIND_NAMES)), np.int32), 0
    faults: dict[str, list[Hits]] = defaultdict(list)
    for first, stretch in _stretches(rendered, chosen):
        marks = mark(stretch, weigh(stretch), vocabulary)
        places = place[first : first + len(stretch)]
        is_chosen = places >= 0
        targets[places[is_chosen]] = marks.targets[is_chosen]
        num_stops += int(marks.num_stops[is_chosen].sum())
        for finding, hits in marks.faults.items():
            mine = is_chosen[hits.example]
            faults[finding].append(Hits(places[hits.example[mine]], hits.turn[mine], hits.token[mine]))
    examples = rendered.examples
    row, part, flags, num_tokens = (examples[name].to_numpy()[chosen] for name in ("row", "part", "flags", "num_tokens"))
    joined = {finding: _joined(parts) for finding, parts in faults.items()}
    return TokenFacts(row, part, flags, num_tokens.astype(np.int64), targets, num_stops, joined)


def _joined(parts: list[Hits]) -> Hits:
    return Hits(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("example", "turn", "token")))


def _stretches(rendered: RenderedSet, chosen: Int64) -> Iterator[tuple[int, Stretch]]:
    """Consecutive examples, a million tokens or one example at a time, with the position of the first; gaps are passed over."""
    offsets, turn_offsets = rendered.offsets, rendered.turn_offsets
    at = 0
    while at < len(chosen):
        first = int(chosen[at])
        last = max(int(np.searchsorted(offsets, offsets[first] + _CHUNK_TOKENS, "right")) - 1, first + 1)
        a, b, c, d = offsets[first], offsets[last], turn_offsets[first], turn_offsets[last]
        fresh = RenderedSet(rendered.folder)  # maps the files anew, so that the pages of the last stretch are let go
        yield (
            first,
            Stretch(
                ids=np.asarray(fresh.ids[a:b]),
                kinds=np.asarray(fresh.kinds[a:b]),
                turns=np.asarray(fresh.turns[a:b]),
                turn_weights=np.asarray(fresh.turn_weights[c:d]),
                offsets=offsets[first : last + 1] - a,
                turn_offsets=turn_offsets[first : last + 1] - c,
            ),
        )
        at = int(np.searchsorted(chosen, last))
