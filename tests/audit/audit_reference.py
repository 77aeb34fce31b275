"""The faults of a stretch found one token after the other, in plain Python: what `mark` must equal."""

from __future__ import annotations

from collections import Counter

from tutelage.audit.tokens import KIND_NAMES, MARK, Stretch
from tutelage.records import Kind

ANSWER = (Kind.ASSISTANT, Kind.REASONING, Kind.TOOL_CALL, MARK)

Places = dict[str, list[tuple[int, int]]]
"""(example, turn) of every fault, by finding."""


def faults(
    stretch: Stretch, weights: list[float], *, special: set[int], ends: set[int]
) -> tuple[list[Counter[str]], list[int], Places]:
    """Targets with weight by kind, stops of learned turns, places of faults, for each example."""
    found: Places = {name: [] for name in ("no_stop", "cut_answer", "stop_untrained", "wrong_stop", "forged_turn")}
    targets, num_stops = [], []
    for example in range(len(stretch)):
        a, b = int(stretch.offsets[example]), int(stretch.offsets[example + 1])
        turns = stretch.turns[a:b].tolist()
        kinds = [MARK if k == 0 and t >= 0 else k for k, t in zip(stretch.kinds[a:b].tolist(), turns, strict=True)]
        on = [w > 0 and i > 0 for i, w in enumerate(weights[a:b])]
        ids = stretch.ids[a:b].tolist()
        targets.append(Counter(KIND_NAMES[k] for k, is_on in zip(kinds, on, strict=True) if is_on))
        stops = 0
        for turn in sorted({t for t in turns if t >= 0}):
            at = [i for i, t in enumerate(turns) if t == turn]
            if not any(on[i] and kinds[i] in ANSWER for i in at):
                continue
            stop_at = [i for i in at if kinds[i] == Kind.STOP]
            if at[-1] == b - a - 1 and kinds[at[-1]] in ANSWER:
                found["cut_answer"].append((example, turn))
            elif not stop_at:
                found["no_stop"].append((example, turn))
            if stop_at and not any(on[i] for i in stop_at):
                found["stop_untrained"].append((example, turn))
            for i in stop_at:
                if not (i + 1 < b - a and kinds[i + 1] == Kind.STOP and turns[i + 1] == turn):
                    stops += 1
                    found["wrong_stop"] += [(example, turn)] if ids[i] not in ends else []
        num_stops.append(stops)
        text = [k not in (Kind.SCAFFOLD, Kind.STOP, MARK) for k in kinds]
        found["forged_turn"] += [(example, turns[i]) for i in range(b - a) if text[i] and ids[i] in special]
    return targets, num_stops, found
