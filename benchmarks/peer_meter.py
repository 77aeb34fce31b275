"""Seconds, CPU seconds and memory of a preparation, and the machine that it ran on."""

from __future__ import annotations

import os
import platform
import resource
import time
from pathlib import Path
from typing import Any


class Meter:
    """Adds up the wall and CPU seconds of `with` blocks, those of finished child processes included."""

    def __init__(self) -> None:
        self.spent = {"seconds": 0.0, "cpu_seconds": 0.0}

    def __enter__(self) -> Meter:
        self.start = self.now()
        return self

    def __exit__(self, *_: object) -> None:
        for name, value in self.now().items():
            self.spent[name] += value - self.start[name]

    def now(self) -> dict[str, float]:
        return {"seconds": time.perf_counter(), "cpu_seconds": sum(sum(os.times()[i : i + 2]) for i in (0, 2))}


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": cpu, "cores": num_cores(), "GiB": round(memory), "system": platform.platform(), "load": os.getloadavg()[0]}


def tree_bytes(process: int) -> int:
    """The resident memory of a process and all below it, added up; pages that they share count in each. 0 without /proc."""
    total, waiting = 0, [process]
    while waiting:
        folder = Path("/proc") / str(waiting.pop())
        try:
            total += int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            for task in (folder / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (OSError, ValueError, IndexError):
            continue
    return total


def own_peak_bytes() -> int:
    """Peak resident memory of this process; /proc goes first, as ru_maxrss starts with the parent's size."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    known = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if known is None else known)
