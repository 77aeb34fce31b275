"""The arithmetic of a step over devices and passes: solved, printed, and refused with the nearest that divides. Pure.

per device x accumulation x devices = rows of a step            4 x 4 x 16 = 256
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tutelage.errors import TrainError

SLOTS_PER_PASS = 2048
"""Room of one forward pass when the recipe does not say."""


@dataclass(frozen=True, slots=True)
class Shape:
    """`num_rows` rows of a step, as passes of `rows_per_pass` rows, `num_passes` one after another, on `num_devices` at once."""

    num_rows: int
    rows_per_pass: int
    num_passes: int
    num_devices: int

    @property
    def room(self) -> int:
        """Rows that the passes could hold."""
        return self.rows_per_pass * self.num_passes * self.num_devices

    @property
    def idle_share(self) -> float:
        """The share of that room without a row: passes that are not full, and devices that wait for the others."""
        return 1.0 - self.num_rows / self.room

    @property
    def text(self) -> str:
        """The arithmetic in one line.

        >>> Shape(256, 4, 4, 16).text
        '4 x 4 x 16 = 256 rows per step (per device x accumulation x devices)'
        >>> Shape(10, 4, 1, 3).text
        '4 x 1 x 3 = 12 for 10 rows per step (per device x accumulation x devices); 17 % of the room is idle'
        """
        product = f"{self.rows_per_pass} x {self.num_passes} x {self.num_devices} = {self.room}"
        meaning = "(per device x accumulation x devices)"
        if self.room == self.num_rows:
            return f"{product} rows per step {meaning}"
        return f"{product} for {self.num_rows} rows per step {meaning}; {100 * self.idle_share:.0f} % of the room is idle"


def solve(num_rows: int, *, rows_per_pass: int, num_devices: int = 1, exact: bool = False) -> Shape:
    """The `Shape` of a step of `num_rows` rows: as few passes as hold them all, equally many on every device.

    >>> solve(256, rows_per_pass=4, num_devices=16)
    Shape(num_rows=256, rows_per_pass=4, num_passes=4, num_devices=16)
    >>> solve(10, rows_per_pass=4, num_devices=3).num_passes
    1

    With `exact` the rows must fill the passes. Raises `TrainError` otherwise, with the nearest numbers of rows, rows per
    pass and devices that do:

    >>> solve(10, rows_per_pass=4, num_devices=2, exact=True)
    Traceback (most recent call last):
        ...
    tutelage.errors.TrainError: 10 rows per step do not divide by 4 rows per pass x 2 devices; these do: 8 or 16 rows, \
1 or 5 rows per pass
    """
    assert num_rows >= 1 and rows_per_pass >= 1 and num_devices >= 1
    at_once = rows_per_pass * num_devices
    if exact and num_rows % at_once:
        raise TrainError(_refusal(num_rows, rows_per_pass, num_devices))
    return Shape(num_rows, rows_per_pass, -(-num_rows // at_once), num_devices)


def _refusal(num_rows: int, rows_per_pass: int, num_devices: int) -> str:
    at_once = rows_per_pass * num_devices
    down = num_rows // at_once * at_once
    ways = [f"{_either([n for n in (down, down + at_once) if n])} rows"]
    if num_rows % num_devices == 0:
        ways.append(f"{_either(_nearest_divisors(num_rows // num_devices, rows_per_pass))} rows per pass")
    if num_rows % rows_per_pass == 0 and num_devices > 1:
        ways.append(f"{_either(_nearest_divisors(num_rows // rows_per_pass, num_devices))} devices")
    by = " x ".join(
        [
            *([f"{rows_per_pass} rows per pass"] if rows_per_pass > 1 else []),
            *([f"{num_devices} devices"] if num_devices > 1 else []),
        ]
    )
    return f"{num_rows} rows per step do not divide by {by}; these do: {', '.join(ways)}"


def _nearest_divisors(number: int, wanted: int) -> list[int]:
    """The largest divisor up to `wanted` and the smallest above it.

    >>> _nearest_divisors(12, 5), _nearest_divisors(7, 3), _nearest_divisors(6, 9)
    ([4, 6], [1, 7], [6])
    """
    fitting = divisors(number)
    below, above = [n for n in fitting if n <= wanted], [n for n in fitting if n > wanted]
    return [*below[-1:], *above[:1]]


def divisors(number: int) -> list[int]:
    """The divisors of a number, in order.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    low = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def _either(numbers: list[int]) -> str:
    return " or ".join(str(n) for n in numbers)


def default_rows_per_pass(capacity: int) -> int:
    """Rows of `capacity` slots in one pass when the recipe does not say: `SLOTS_PER_PASS`, and one at least.

    >>> default_rows_per_pass(1024), default_rows_per_pass(8192)
    (2, 1)
    """
    return max(1, SLOTS_PER_PASS // capacity)


def num_devices(environment: Mapping[str, str]) -> int:
    """How many processes torchrun started (`WORLD_SIZE`), 1 without it. Raises `TrainError` when it is no such number.

    >>> num_devices({}), num_devices({"WORLD_SIZE": "16"})
    (1, 16)
    """
    said = environment.get("WORLD_SIZE", "1")
    if not said.isdecimal() or int(said) < 1:
        raise TrainError(f"WORLD_SIZE is {said!r} in the environment; torchrun sets it to the number of processes; unset it")
    return int(said)


def fit_rows(num_rows: int, fits_up_to: int) -> int:
    """Rows per pass that need the fewest passes for `num_rows` rows where `fits_up_to` fit, and no more rows than that takes.

    >>> fit_rows(16, 6), fit_rows(16, 100), fit_rows(7, 4)      # 3 passes of 6; one; two
    (6, 16, 4)
    """
    most = max(1, min(fits_up_to, num_rows))
    passes = -(-num_rows // most)
    return -(-num_rows // passes)
