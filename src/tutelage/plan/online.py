r"""Online: the mixture of the next steps from how well each task is doing, with the run's total and caps kept exactly.

    losses on held-out records --minus reference--> excess --multiplicative weights, floor--> shares --> counts of the next window

The rule is that of DoReMi (arXiv 2305.10429) and of online data mixing as a bandit (arXiv 2312.02406), simplified: shares grow
with exp(step_size * excess), and none falls below the floor. All that the next window depends on is plain JSON, so a
run that goes on from a checkpoint gets the same windows to the bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from tutelage.plan.rates import allocate
from tutelage.plan.timetable import fit_amounts

_DIGITS = 9
_LEAST_SHARE = 1e-12
"""A share that reached 0 could never grow again: it is multiplied."""

Losses = Mapping[str, float]


@dataclass(frozen=True)
class OnlineRule:
    """What does not change during a run. Shares are of the unit that rates count, an example of a task being `means` of it.

    `total` and `window` are in examples; `caps` too, for the tasks that have one. `reference` None is the loss at the start.
    """

    shares: Mapping[str, float]
    means: Mapping[str, float]
    caps: Mapping[str, int]
    total: int
    window: int
    step_size: float
    floor: float
    reference: Losses | None = None

    def __post_init__(self) -> None:
        assert len(self.shares) * self.floor < 1, "the floors leave something to share out"

    @property
    def num_windows(self) -> int:
        """Windows of the run; the last may be short."""
        return -(-self.total // self.window)

    def as_json(self) -> dict[str, Any]:
        """Plain values, from which `OnlineRule(**values)` is the same."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class OnlineWindow:
    """One window: the shares it was drawn by, its counts in examples, and the excess losses that led to it."""

    shares: dict[str, float]
    counts: dict[str, int]
    excess: dict[str, float]


class OnlineMixer:
    """The windows of a run, one after the other. The first is drawn by the rule's shares.

    >>> rule = OnlineRule({"easy": 0.5, "hard": 0.5}, {"easy": 1.0, "hard": 1.0}, {}, total=250, window=100, step_size=1.0,
    ...                   floor=0.1)
    >>> mixer = OnlineMixer(rule)
    >>> mixer.windows[0].counts
    {'easy': 50, 'hard': 50}
    >>> mixer.start({"easy": 2.0, "hard": 2.0})
    >>> mixer.next_window({"easy": 1.0, "hard": 2.0}).counts        # easy gained a nat: 1 / (1 + e) of 0.8, and the floor
    {'easy': 32, 'hard': 68}
    >>> mixer.next_window({"easy": 1.0, "hard": 2.0}).counts        # the total leaves 50
    {'easy': 10, 'hard': 40}
    >>> OnlineMixer.from_state(rule, mixer.state()).windows == mixer.windows
    True
    """

    def __init__(self, rule: OnlineRule) -> None:
        self.rule = rule
        self.windows: list[OnlineWindow] = []
        self._reference = None if rule.reference is None else dict(rule.reference)
        self._due = dict.fromkeys(rule.shares, 0.0)
        self._add(dict(rule.shares), {})

    @classmethod
    def from_state(cls, rule: OnlineRule, state: Mapping[str, Any]) -> OnlineMixer:
        """The mixer that `state` was taken of."""
        self = cls.__new__(cls)
        self.rule = rule
        self.windows = [OnlineWindow(**window) for window in state["windows"]]
        self._reference = state["reference"]
        self._due = dict(state["due"])
        return self

    def state(self) -> dict[str, Any]:
        """All that the next windows depend on, beside the rule; JSON that reads back as the same numbers."""
        windows = [dataclasses.asdict(window) for window in self.windows]
        return {"windows": windows, "reference": self._reference, "due": dict(self._due)}

    @property
    def drawn(self) -> dict[str, int]:
        """Examples of each task in all windows so far."""
        return self.drawn_before(len(self.windows))

    def drawn_before(self, number: int) -> dict[str, int]:
        """Examples of each task in the windows before one."""
        return {name: sum(window.counts[name] for window in self.windows[:number]) for name in self.rule.shares}

    @property
    def is_complete(self) -> bool:
        """Whether the total is given out."""
        return len(self.windows) == self.rule.num_windows

    def start(self, losses: Losses) -> None:
        """Nothing; the losses of the untouched model are the reference, where the rule names no other."""
        if self._reference is None:
            self._reference = {name: loss for name, loss in losses.items() if math.isfinite(loss)}

    def next_window(self, losses: Losses) -> OnlineWindow:
        """The next window, after tasks have reached these held-out losses (nats per learned token).

        A task without a loss or a reference moves as the others do on average.
        """
        assert not self.is_complete, "the total is given out"
        excess = self._excess(losses)
        return self._add(self._shares(excess), excess)

    def _excess(self, losses: Losses) -> dict[str, float]:
        reference = self._reference or {}
        known = [name for name in self.rule.shares if name in reference and math.isfinite(losses.get(name, math.nan))]
        excess = {name: losses[name] - reference[name] for name in known}
        if self.rule.reference is not None:  # below a given reference there is nothing left to gain
            excess = {name: max(value, 0.0) for name, value in excess.items()}
        return excess

    def _shares(self, excess: Mapping[str, float]) -> dict[str, float]:
        before = self.windows[-1].shares
        floor, num = self.rule.floor, len(before)
        whole = sum(before[name] for name in excess)
        mean = sum(before[name] * excess[name] for name in excess) / whole if whole else 0.0
        pull = {name: self.rule.step_size * (excess.get(name, mean) - mean) for name in before}
        strongest = max(pull.values())  # a factor that all have in common cancels
        grown = {name: max(share * math.exp(pull[name] - strongest), _LEAST_SHARE) for name, share in before.items()}
        total = sum(grown.values())
        return {name: (1 - num * floor) * value / total + floor for name, value in grown.items()}

    def _add(self, shares: dict[str, float], excess: dict[str, float]) -> OnlineWindow:
        """The window of these shares: what is due of each task by its end, less what was drawn, in whole examples."""
        names, drawn = list(shares), self.drawn
        num = min(self.rule.window, self.rule.total - sum(drawn.values()))
        due = np.array([self._due[name] for name in names])
        caps = np.array([float(self.rule.caps.get(name, np.inf)) for name in names])
        in_examples = np.array([shares[name] / self.rule.means[name] for name in names])
        wanted = num * in_examples / in_examples.sum()
        is_open = caps > due
        due[is_open] += fit_amounts(_to_sum(wanted[is_open], num), costs=np.ones(is_open.sum()), caps=(caps - due)[is_open])[:, 0]
        self._due = {name: round(float(value), _DIGITS) for name, value in zip(names, due, strict=True)}
        owed = {name: Fraction(str(max(self._due[name] - drawn[name], 0.0))) for name in names}
        left = {name: cap - drawn[name] for name, cap in self.rule.caps.items()}
        counts = dict.fromkeys(names, 0) | allocate({n: o for n, o in owed.items() if o}, num, caps=left).counts
        self.windows.append(OnlineWindow(shares, counts, excess))
        return self.windows[-1]


def _to_sum(amounts: np.ndarray, total: int) -> np.ndarray:
    """One column that sums to `total`."""
    scaled: np.ndarray = (amounts * (total / amounts.sum()))[:, None]
    return scaled
