"""Being asked to stop: Ctrl-C, and the SIGTERM that schedulers send some seconds before they kill.

    asked                          what is done before the process ends
    between two steps              a checkpoint
    inside a step                  the step is finished and kept, if that and a checkpoint fit into the deadline;
                                   else it ends at the next pass and its partial gradient is dropped
    while the model is measured    the measurement ends at once and is made up for when the run goes on

A position is always a number of finished steps, so nothing of a dropped step needs to be kept.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

INTERRUPTED = 130
"""128 + SIGINT: a person stopped the run."""
_SAVES_TO_RESERVE = 2.0
_RESERVE_UNKNOWN = 0.25


class Stopped(KeyboardInterrupt):
    """The run was asked to stop and did, with a checkpoint written; `exit_code` is for the process that ends here."""

    def __init__(self, message: str, signal_number: int, exit_code: int = INTERRUPTED) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = exit_code


class Abandoned(BaseException):
    """What was going on ended half done because the run is to stop. No `except Exception` of a library holds it."""


class StopRequest:
    """Whether the run is asked to stop, by which signal, and how many seconds are left of `within_seconds`.

    `agree` makes one answer of those of all ranks: it gets this one's signal number, 0 for none, and returns the largest. It
    is asked between steps by every rank alike. With it no step or measurement is cut short, since the others would wait.
    """

    def __init__(
        self,
        within_seconds: float,
        *,
        requeue_exit_code: int = 128 + signal.SIGTERM,
        agree: Callable[[int], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._within, self._requeue_exit_code = within_seconds, requeue_exit_code
        self._agree, self._clock = agree, clock
        self._number = 0
        self._asked_at = 0.0
        self._may_cut_short = False
        self._step_seconds = 0.0
        self._save_seconds: float | None = None

    def ask(self, number: int) -> None:
        """Nothing; the run is asked to stop by this signal. Raises `Abandoned` inside `cut_short`."""
        if not self._number:
            self._number, self._asked_at = number, self._clock()
        if self._may_cut_short and self._agree is None:
            raise Abandoned

    def number(self) -> int:
        """The signal that asks to stop, 0 for none; where there are ranks, the same answer in each."""
        return self._number if self._agree is None else self._agree(self._number)

    def stopped(self, message: str, number: int) -> Stopped:
        """What ends the run: SIGTERM's exit code is the one that the recipe states."""
        return Stopped(message, number, self._requeue_exit_code if number == signal.SIGTERM else INTERRUPTED)

    @property
    def seconds_left(self) -> float:
        """Until the deadline, infinite while nobody asks."""
        return self._within - (self._clock() - self._asked_at) if self._number else float("inf")

    def took(self, *, step: float | None = None, save: float | None = None) -> None:
        """Nothing; remembers how long a step or a checkpoint took, to know what still fits."""
        self._step_seconds = step if step is not None else self._step_seconds
        self._save_seconds = max(save, self._save_seconds or 0.0) if save is not None else self._save_seconds

    def in_time(self, passes: Sequence[T]) -> Iterator[T]:
        """The passes of a step, one after another; raises `Abandoned` before one from which the deadline cannot be kept.

        What is left is judged by this step so far and by the last whole one: passes on a GPU are queued, not done, when
        the next is asked for. Twice the longest checkpoint is kept free, or a quarter of the deadline before the first.

        >>> now = [0.0]
        >>> asked = StopRequest(8.0, clock=lambda: now[0])
        >>> done = []
        >>> try:
        ...     for number in asked.in_time(range(10)):
        ...         now[0] += 1.0                                     # a second each
        ...         done.append(number)
        ...         if number == 1:
        ...             asked.ask(15)                                 # 8 more to do, 8 - 2 seconds to do them in
        ... except Abandoned:
        ...     print(done)
        [0, 1]
        """
        began = self._clock()
        for number, part in enumerate(passes):
            if number and self._number and self._agree is None:
                left = 1 - number / len(passes)
                so_far = self._clock() - began
                expected = left * max(so_far * len(passes) / number, self._step_seconds)
                if expected + self._reserve() > self.seconds_left:
                    raise Abandoned
            yield part

    @contextmanager
    def cut_short(self) -> Iterator[None]:
        """Inside, the signal itself raises `Abandoned`, and so does one that came before: for what is not worth waiting for."""
        if self._number and self._agree is None:
            raise Abandoned
        self._may_cut_short = True
        try:
            yield
        finally:
            self._may_cut_short = False

    def _reserve(self) -> float:
        return _RESERVE_UNKNOWN * self._within if self._save_seconds is None else _SAVES_TO_RESERVE * self._save_seconds


@contextmanager
def listening(request: StopRequest) -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM goes to `request`; the second is handled as if we were not here."""
    if threading.current_thread() is not threading.main_thread():  # Python hands signals to the main thread alone
        yield
        return
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        for other, handler in before.items():
            signal.signal(other, handler)
        request.ask(number)

    try:
        for number in before:
            signal.signal(number, note)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
