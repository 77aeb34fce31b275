"""Big files go to the disk while they are being written, so that committing them leaves little to wait for."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

_STEP_BYTES, _PAGE_BYTES = 8 << 20, 4096
_WRITE = 2  # SYNC_FILE_RANGE_WRITE of <linux/fs.h>: begins, and waits for nothing


def _found() -> Any:
    if sys.platform != "linux":
        return None
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return call


_sync_file_range = _found()


class EarlyWriteback:
    """A file that grows: `begin()` makes the disk start with what has been written since, once it is some megabytes.

    It is advice only: what must be durable is synced all the same. Elsewhere than on Linux nothing happens.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.num_begun = 0
        """Bytes that the disk has been told of."""

    def begin(self) -> None:
        """Returns at once. The last page is left out: while the disk has it, nothing can be added to it."""
        if _sync_file_range is None:
            return
        end = self._path.stat().st_size // _PAGE_BYTES * _PAGE_BYTES
        if end - self.num_begun >= _STEP_BYTES:
            with self._path.open("rb") as file:
                _sync_file_range(file.fileno(), self.num_begun, end - self.num_begun, _WRITE)
            self.num_begun = end
