"""Arrays on disk, and files that the disk begins with before they are whole."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tutelage import arrays
from tutelage.arrays import ArrayWriter, map_array
from tutelage.disk import EarlyWriteback

MEGABYTE = 1 << 20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="advice that Linux takes")
def test_the_disk_is_told_of_whole_pages_once_there_are_megabytes(tmp_path):
    """Kills advice for each small piece, and for the last page, which would hold up the next piece."""
    path = tmp_path / "file"
    told, said = EarlyWriteback(path), []
    with path.open("wb", buffering=0) as file:
        for size in (7 * MEGABYTE, 2 * MEGABYTE + 5, 3 * MEGABYTE, 6 * MEGABYTE):
            file.write(bytes(size))
            told.begin()
            said.append(told.num_begun)
    assert said == [0, 9 * MEGABYTE, 9 * MEGABYTE, 18 * MEGABYTE]


def test_arrays_are_whole_whatever_the_disk_was_told(tmp_path):
    """Kills a writer that loses what is being written back, or the header that is filled in last."""
    pieces = [np.arange(start, start + 1_500_000, dtype=np.int32) for start in (0, 5, 9)]
    writer = ArrayWriter(tmp_path, {"ids": np.int32})
    for piece in pieces:
        writer.write(ids=piece)
    writer.close()
    assert np.array_equal(map_array(tmp_path / "ids.npy"), np.concatenate(pieces))


def test_headers_are_read_by_one_thread_at_a_time(tmp_path, monkeypatch):
    """Kills headers read side by side: in Python 3.11 that ends in a SystemError once in thousands of times."""
    np.save(tmp_path / "a.npy", np.arange(3))
    load, inside = np.load, threading.Semaphore(1)

    def slowly(*args, **more):
        assert inside.acquire(blocking=False), "two threads at once"
        time.sleep(0.01)
        inside.release()
        return load(*args, **more)

    monkeypatch.setattr(arrays.np, "load", slowly)
    with ThreadPoolExecutor(4) as pool:
        assert [a.tolist() for a in pool.map(map_array, [tmp_path / "a.npy"] * 8)] == [[0, 1, 2]] * 8
