"""What a run minimises beside or instead of the plain loss, and the numbers that noise is keyed by; no torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class KlRule:
    """`weight` times the mean KL to the starting model, over positions whose target is of `kinds` (None: the trained ones).

    `forward` is KL(start || model), `reverse` KL(model || start); see `chunks.Anchor`.
    """

    weight: float
    direction: Literal["forward", "reverse"] = "forward"
    kinds: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Objective:
    """`nll` or `dft`, uniform noise on the embeddings (`neftune_alpha`, 0 = none, drawn from `seed`), and a pull to the start."""

    kind: Literal["nll", "dft"] = "nll"
    neftune_alpha: float = 0.0
    seed: int = 0
    kl: KlRule | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the loss that is reported is the one that is minimised."""
        return self.kind == "nll" and self.kl is None


def document_key(seed: int, step: int, example: int, visit: int) -> int:
    """A signed 64-bit number that depends on all four: where the noise of a document in a step begins.

    Only these, so the noise is the same in any row, micro-batch or rank, and after a resume.

    >>> document_key(0, 1, 2, 3) == document_key(0, 1, 2, 3), document_key(0, 1, 2, 3) == document_key(0, 1, 3, 2)
    (True, False)
    """
    state = 0
    for number in (seed, step, example, visit):
        state = mix((state ^ (number & _MASK)) + _GAMMA)
    return state - (1 << 64) if state >> 63 else state


def mix(state: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): 64 bits to 64 bits, every input bit moving half of them.

    >>> mix(_GAMMA) == 0xE220A8397B1DCDAF                              # its first output from seed 0
    True
    """
    state &= _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
