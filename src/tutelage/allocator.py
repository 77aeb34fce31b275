"""Memory that a process keeps for its next arrays instead of giving it back, and when it looks for garbage."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_KEEP_BYTES = 1 << 30


def keep_memory() -> None:
    """Nothing; from here on the C library reuses freed blocks of up to a gibibyte. Elsewhere than on glibc nothing happens.

    Every block that is given back is zeroed page by page when it is taken again: 13 % of the processor time of a
    training step of a 135M model were spent on that.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _KEEP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES)


COLLECT_AFTER = 50_000
"""New objects between two looks for garbage, where records come and go by tens of thousands and hardly any is in a cycle."""
_as_usual: list[tuple[int, int, int]] = []


@contextlib.contextmanager
def collecting_rarely() -> Iterator[None]:
    """Inside, Python looks for garbage once in `COLLECT_AFTER` new objects.

    What it looks through are mostly the modules of torch and transformers: a tenth of a second each time, and more in a
    process that has just been forked, whose memory is copied page by page when it is touched.
    """
    before = gc.get_threshold()
    _as_usual.append(before)
    gc.set_threshold(COLLECT_AFTER, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*_as_usual.pop())


@contextlib.contextmanager
def collecting_as_usual() -> Iterator[None]:
    """Inside, as outside `collecting_rarely`: where tensors may be left behind in cycles, their memory is missed."""
    now = gc.get_threshold()
    gc.set_threshold(*(_as_usual[0] if _as_usual else now))
    try:
        yield
    finally:
        gc.set_threshold(*now)
