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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tutelage.store import Progress

Job = Callable[[Progress], None]
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


@dataclass
class _Child:
    pid: int
    pipe: int
    said: bytearray = field(default_factory=bytearray)


def do_ahead(jobs: Sequence[Job], *, processes: int, progress: Progress, meanwhile: Callable[[], None] | None = None) -> None:
    """Does the jobs, so many at a time, in their order. Returns when all have ended, whatever became of them.

    The children take numbers of jobs from one pipe, so each goes on as long as there is work, and opens nothing twice.
    `meanwhile` is done in this process, beside them.
    """
    tickets, issue = os.pipe()
    os.write(issue, b"".join(number.to_bytes(_TICKET, "big") for number in range(len(jobs))))
    os.close(issue)
    children: dict[int, _Child] = {}
    with selectors.DefaultSelector() as selector:
        try:
            for _ in range(min(processes, len(jobs))):
                child = _fork(jobs, tickets)
                children[child.pipe] = child
                selector.register(child.pipe, selectors.EVENT_READ)
            if meanwhile is not None:
                meanwhile()
            while children:
                for key, _ in selector.select():
                    child = children[key.fd]
                    if not _listen(child, progress):
                        selector.unregister(child.pipe)
                        del children[child.pipe]
                        os.close(child.pipe)
                        os.waitpid(child.pid, 0)
        finally:
            os.close(tickets)
            for child in children.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)
                os.close(child.pipe)


_TICKET = 2
"""Bytes of a job's number."""
_COLLECT_AFTER = 50_000
"""New objects between two looks for garbage: records come and go by tens of thousands, and hardly any is in a cycle."""


def _listen(child: _Child, progress: Progress) -> bool:
    """Passes on what a child says: notes, and null for a job that has ended. False when the child has."""
    heard = os.read(child.pipe, 1 << 16)
    child.said += heard
    *lines, rest = bytes(child.said).split(b"\n")
    child.said = bytearray(rest)
    for line in lines:
        note = json.loads(line)
        if note is None:
            progress.advance(1)
        else:
            progress.note(note)
    return bool(heard)


def _fork(jobs: Sequence[Job], tickets: int) -> _Child:
    here, there = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        os.close(there)
        return _Child(pid, here)
    try:
        os.close(here)
        _die_with(parent)
        gc.freeze()  # what the parent made is not looked through again and again
        gc.set_threshold(_COLLECT_AFTER)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are the parent's
        while ticket := os.read(tickets, _TICKET):
            with contextlib.suppress(Exception):  # the parent meets it again when it does the work itself
                jobs[int.from_bytes(ticket, "big")](_Told(there))
            os.write(there, b"null\n")
    finally:
        os._exit(0)  # no exit handlers, no buffers: those are the parent's


def _die_with(parent: int) -> None:
    """A child whose parent is killed goes too."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
