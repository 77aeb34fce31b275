"""Arrays on disk: .npy files written piece by piece, and read as memory maps."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.disk import EarlyWriteback


class ArrayWriter:
    """Writes one-dimensional arrays `FOLDER/NAME.npy`, piece by piece; `close()` makes them readable.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     writer = ArrayWriter(Path(folder), {"ids": np.int32})
    ...     writer.write(ids=np.array([5, 6])), writer.write(ids=np.array([7]))
    ...     writer.close()
    ...     map_array(Path(folder) / "ids.npy").tolist()
    (None, None)
    [5, 6, 7]

    A .npy header states the length, so it is written last, over a placeholder of the same size.
    """

    def __init__(self, folder: Path, dtypes: Mapping[str, Any]) -> None:
        self._dtypes = dict(dtypes)
        self._files = {name: (folder / f"{name}.npy").open("w+b") for name in self._dtypes}
        self._lengths = dict.fromkeys(self._files, 0)
        self._writeback = {name: EarlyWriteback(folder / f"{name}.npy") for name in self._files}
        for name in self._dtypes:
            self._write_header(name)

    def write(self, **pieces: np.ndarray) -> None:
        """Appends a piece to every array."""
        for name, dtype in self._dtypes.items():
            piece = np.ascontiguousarray(pieces[name], dtype)
            self._files[name].write(piece.data)
            self._lengths[name] += len(piece)
            self._writeback[name].begin()

    def close(self) -> None:
        """Fills in the lengths."""
        for name, file in self._files.items():
            self._write_header(name)
            file.close()

    def _write_header(self, name: str) -> None:
        file = self._files[name]
        file.seek(0)
        descr = np.lib.format.dtype_to_descr(np.dtype(self._dtypes[name]))
        # numpy pads this header so that a first axis of up to 21 digits fits in place
        header = {"descr": descr, "fortran_order": False, "shape": (self._lengths[name],)}
        np.lib.format.write_array_header_1_0(file, header)


def map_array(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped into memory."""
    with _one_at_a_time:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


_one_at_a_time = threading.RLock()
"""numpy reads a header through `ast`, which two threads must not enter at once in Python 3.11: once in thousands of times that
ends in a SystemError ("AST constructor recursion depth mismatch"), when a look for garbage lets the other thread in."""
