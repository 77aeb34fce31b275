"""Independent work done beside one another, a process each: sources are read and rendered on all cores.

A job is done in a forked child, which leaves its results in the store and nothing else. A child that fails is no error
here: whoever needs its result does the work again in this process, and meets the error where it can be told.
"""

from __future__ import annotations

import contextlib
import ctypes
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


def do_ahead(jobs: Sequence[Job], *, processes: int, progress: Progress) -> None:
    """Does the jobs, so many at a time, the first ones first. Returns when all have ended, whatever became of them."""
    waiting = list(reversed(jobs))
    children: dict[int, _Child] = {}
    with selectors.DefaultSelector() as selector:
        try:
            while waiting or children:
                while waiting and len(children) < processes:
                    child = _fork(waiting.pop())
                    children[child.pipe] = child
                    selector.register(child.pipe, selectors.EVENT_READ)
                for key, _ in selector.select():
                    child = children[key.fd]
                    if not _listen(child, progress):
                        selector.unregister(child.pipe)
                        del children[child.pipe]
                        os.close(child.pipe)
                        os.waitpid(child.pid, 0)
                        progress.advance(1)
        finally:
            for child in children.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)
                os.waitpid(child.pid, 0)
                os.close(child.pipe)


def _listen(child: _Child, progress: Progress) -> bool:
    """Passes on what a child says; False when it has ended."""
    heard = os.read(child.pipe, 1 << 16)
    child.said += heard
    *lines, rest = bytes(child.said).split(b"\n")
    child.said = bytearray(rest)
    for line in lines:
        progress.note(json.loads(line))
    return bool(heard)


def _fork(job: Job) -> _Child:
    here, there = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        os.close(there)
        return _Child(pid, here)
    code = 1
    try:
        os.close(here)
        _die_with(parent)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are the parent's
        job(_Told(there))
        code = 0
    except BaseException:  # noqa: BLE001 - the parent meets it again when it does the work itself
        code = 1
    finally:
        os._exit(code)  # no exit handlers, no buffers: those are the parent's


def _die_with(parent: int) -> None:
    """A child whose parent is killed goes too."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
