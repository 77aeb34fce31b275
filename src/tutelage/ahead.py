"""Independent work done beside one another, a process each: sources are read and rendered on all cores.

A job is done in a forked child, which leaves its results in the store and nothing else. A child that fails is no error
here: whoever needs its result does the work again in this process, and meets the error where it can be told.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import selectors
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NoReturn

import pyarrow as pa

from tutelage.allocator import COLLECT_AFTER, keep_memory
from tutelage.store import Progress

Job = Callable[[Progress], Callable[[], object] | None]
"""Work that returns what is left of it: waiting for the disk, while its process does another job."""
_PR_SET_PDEATHSIG = 1


def num_processes() -> int:
    """How many jobs to do at once: the cores this process may use, 8 at most; 1 where processes cannot be forked safely.

    `TUTELAGE_PROCESSES` says another number.
    """
    if not sys.platform.startswith("linux"):
        return 1
    said = os.environ.get("TUTELAGE_PROCESSES", "")
    return int(said) if said.isdigit() and int(said) > 0 else min(len(os.sched_getaffinity(0)), 8)


class _Told:
    """A child's progress: its notes go to the parent, a line of JSON each."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def start(self, label: str, total: int | None = None, unit: str = "") -> None:
        """Nothing: the parent has the bar."""

    def advance(self, amount: int = 1, text: str = "") -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """To the parent."""
        os.write(self._pipe, (json.dumps(text) + "\n").encode())


def do_ahead(
    jobs: Sequence[Job],
    *,
    processes: int,
    progress: Progress,
    then: Sequence[Job] = (),
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Does the jobs, so many at a time, in their order. Returns when all have ended, whatever became of them.

    `then` are jobs that follow: the i-th when the i-th of `jobs` has ended. Children take numbers of jobs from a pipe, so each
    goes on as long as there is work, and opens nothing twice. With `meanwhile`, which this process does beside the first jobs,
    those that follow are done by children that are forked when it is over; else by the same ones, whose memory is warm.
    """
    children, ready = _Children(progress), list[int]()
    first, following = _Tickets(), _Tickets()
    num_idle = 0

    def is_idle(_: int = 0) -> None:
        nonlocal num_idle
        num_idle += 1

    one, two = _Phase(jobs, first, ended=ready.append, free=_nothing), _Phase(then, following, ended=_nothing, free=is_idle)
    try:
        first.issue(range(len(jobs)))
        first.close()
        for _ in range(min(processes, len(jobs))):
            children.start([one] if meanwhile is not None or not then else [one, two], is_idle)
        num_more = min(processes, len(then)) if meanwhile is not None or not jobs else 0
        if meanwhile is not None:
            meanwhile()
        while children or num_more:
            while num_more and len(children) < processes:
                children.start([two], is_idle)
                num_more, num_idle = num_more - 1, num_idle + 1
            while ready and num_idle:
                following.issue([min(ready)])  # the first of them, not the one that was ready first
                ready.remove(min(ready))
                num_idle -= 1
            if not ready and not children.at_work(jobs):
                following.close()  # who waits for more work ends
            children.listen()
    finally:
        children.kill()
        first.discard()
        following.discard()


class _Tickets:
    """Numbers of jobs in a pipe, each taken by one child."""

    def __init__(self) -> None:
        self._take, self._issue = os.pipe()
        self._is_open = True

    def issue(self, numbers: Iterable[int]) -> None:
        os.write(self._issue, b"".join(number.to_bytes(_TICKET, "big") for number in numbers))

    def take(self) -> int | None:
        """The next number; None when there will be no more."""
        ticket = os.read(self._take, _TICKET)
        return int.from_bytes(ticket, "big") if ticket else None

    def close(self) -> None:
        """No more are issued from here."""
        if self._is_open:
            os.close(self._issue)
            self._is_open = False

    def discard(self) -> None:
        self.close()
        os.close(self._take)


@dataclass(frozen=True)
class _Phase:
    """Jobs that a child does by their tickets, and what is called here with the number of each.

    `free` when its child could do another, `ended` when nothing is left of it.
    """

    jobs: Sequence[Job]
    tickets: _Tickets
    ended: Callable[[int], None]
    free: Callable[[int], None]


def _nothing(_: int) -> None:
    pass


class _Children:
    """The children at work, and what they say: notes, and the number of each job that has ended."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._selector = selectors.DefaultSelector()
        self._by_pipe: dict[int, _Child] = {}

    def __len__(self) -> int:
        return len(self._by_pipe)

    def at_work(self, jobs: Sequence[Job]) -> bool:
        """Whether a child does these jobs."""
        return any(child.phases[0].jobs is jobs for child in self._by_pipe.values())

    def start(self, phases: Sequence[_Phase], moved: Callable[[], None]) -> None:
        """A child that does one phase after the other; `moved` is called here when it begins with another."""
        here, there = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        pid = os.fork()
        if not pid:
            os.close(here)
            _work(phases, there, parent)
        os.close(there)
        self._by_pipe[here] = _Child(pid, here, list(phases), moved)
        self._selector.register(here, selectors.EVENT_READ)

    def listen(self) -> None:
        """Waits for something to be said, or for a child to end."""
        for key, _ in self._selector.select() if self._by_pipe else ():
            child = self._by_pipe[key.fd]
            if not child.listen(self._progress):
                self._end(child)

    def _end(self, child: _Child) -> None:
        self._selector.unregister(child.pipe)
        del self._by_pipe[child.pipe]
        os.close(child.pipe)
        os.waitpid(child.pid, 0)

    def kill(self) -> None:
        """Ends all that are left."""
        for child in list(self._by_pipe.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
            self._end(child)
        self._selector.close()


@dataclass
class _Child:
    """A forked process, the pipe that it speaks through, what it does now and then, and whom to tell when it goes over."""

    pid: int
    pipe: int
    phases: list[_Phase]
    moved: Callable[[], None]
    said: bytearray = field(default_factory=bytearray)

    def listen(self, progress: Progress) -> bool:
        """Passes on what is said; False when the child has ended.

        Texts are notes, a number is a job that has ended, one in brackets a job that its child is free of, null a phase.
        """
        heard = os.read(self.pipe, 1 << 16)
        self.said += heard
        *lines, rest = bytes(self.said).split(b"\n")
        self.said = bytearray(rest)
        for line in lines:
            said = json.loads(line)
            if isinstance(said, str):
                progress.note(said)
            elif said is None:
                self.phases = self.phases[1:]
                self.moved()
            elif isinstance(said, list):
                self.phases[0].free(*said)
            else:
                progress.advance(1)
                self.phases[0].ended(said)
        return bool(heard)


def _work(phases: Sequence[_Phase], there: int, parent: int) -> NoReturn:
    """What a child does, to its end."""
    try:
        for phase in phases:
            phase.tickets.close()  # only the parent's issuing counts
        _die_with(parent)
        _keep_memory()
        gc.freeze()  # what the parent made is not looked through again and again
        gc.set_threshold(COLLECT_AFTER)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are the parent's
        for phase in phases:
            if phase is not phases[0]:
                os.write(there, b"null\n")
            with ThreadPoolExecutor(1, "rests") as behind:  # at its end nothing is left of any job of the phase
                while (number := phase.tickets.take()) is not None:
                    rest = None
                    with contextlib.suppress(Exception):  # the parent meets it again when it does the work itself
                        rest = phase.jobs[number](_Told(there))
                    os.write(there, f"[{number}]\n".encode())
                    behind.submit(_end, rest, number, there)
    finally:
        os._exit(0)  # no exit handlers, no buffers: those are the parent's


def _end(rest: Callable[[], object] | None, number: int, there: int) -> None:
    with contextlib.suppress(Exception):
        if rest is not None:
            rest()
    os.write(there, f"{number}\n".encode())


_TICKET = 2
"""Bytes of a job's number."""


def _keep_memory() -> None:
    """Arrays of a batch take the place of the last one's: giving pages back and taking new ones costs a few per cent.

    Arrow's own pools give theirs back, so it takes what it needs from the C library too.
    """
    pa.set_memory_pool(pa.system_memory_pool())
    keep_memory()


def _die_with(parent: int) -> None:
    """A child whose parent is killed goes too."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
