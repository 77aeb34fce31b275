"""`micro_batch_rows: auto`: the most rows of a forward pass that fit into memory, found before the first step.

On CUDA passes are tried, with room kept for the optimizer's memory. On a CPU nothing can be tried, since a system that is out
of memory ends processes: there the memory of passes over one and two rows is measured and the rest is a straight line.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tutelage.errors import TrainError
from tutelage.records import Batch
from tutelage.train.batching import default_rows_per_pass, fit_rows
from tutelage.train.loop import Mixing
from tutelage.train.step import step_gradients

MARGIN_SHARE = 0.2
"""Of the memory that is free, so much is left so: batches differ, allocators round up, others live on the machine too."""
NUM_LOOKED_AT = 64
"""Steps whose rows are looked at for the dearest one."""
RowsOf = Callable[[int], int]


def find_rows(
    model: Any,
    batches: Sequence[Batch],
    *,
    num_devices: int = 1,
    limit_bytes: int | None = None,
    rise_of: RowsOf | None = None,
) -> tuple[int, str]:
    """(rows per pass, why): the fewest passes for the longest step looked at that fit into memory.

    Passes are over the dearest row found, repeated. `limit_bytes` is what a pass may take, by default what is free less
    `MARGIN_SHARE`; `rise_of(rows)` is what one takes in bytes, by default measured. Weights, gradients and random states are
    left as they were. Raises `TrainError` when not even one row fits.
    """
    device = next(model.parameters()).device
    row, most = _dearest(batches)
    most = -(-most // num_devices)
    with _untouched(model, device):
        if device.type == "cuda" and limit_bytes is None and rise_of is None:
            fits, how = _tried(model, row, device), "tried on the device"
        else:
            measure = rise_of or (lambda n: measured_rise(model, repeated(row, n)))
            if measure(1) < 0:
                return default_rows_per_pass(row.inputs.shape[1]), "memory cannot be measured on this system; 2,048 slots"
            limit = limit_bytes if limit_bytes is not None else _free_bytes(model)
            fits, how = _estimated(measure, limit), f"estimated from passes of 1 and 2 rows for {limit / 1e9:.3g} GB"
        if not fits(1):
            raise TrainError(
                f"train.micro_batch_rows: not even one row of {row.inputs.shape[1]:,} slots fits into memory ({how}); lower "
                "render.max_tokens, or take an adapter or bfloat16"
            )
        found = largest_that_fits(most, fits)
    return fit_rows(most, found), how


def largest_that_fits(most: int, fits: Callable[[int], bool]) -> int:
    """The largest n of 1 ... `most` that fits, where less fits whenever more does; 1 is taken for granted.

    >>> tried = []
    >>> largest_that_fits(16, lambda n: tried.append(n) or n <= 5), tried
    (5, [2, 4, 8, 6, 5])
    """
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def repeated(row: Batch, num_rows: int) -> Batch:
    """A step of `num_rows` times the one row of `row`."""
    documents = [dataclasses.replace(d, row=i) for i in range(num_rows) for d in row.documents]
    return dataclasses.replace(
        row,
        **_arrays(row, lambda values: np.repeat(values, num_rows, axis=0)),
        documents=tuple(documents),
        total_weight=num_rows * row.total_weight,
    )


def measured_rise(model: Any, batch: Batch) -> int:
    """Bytes that one pass over `batch`, backward included, needed at its height beyond what was held; -1 where unknown.

    Linux only: it is the height of the process's resident memory, put back to zero before.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return -1
    _give_back_freed_memory()
    try:
        reset.write_text("5")
    except OSError:
        return -1
    before = _kilobytes(status, "VmRSS")
    step_gradients(model, batch, micro_batch_rows=batch.num_rows)
    return 1024 * (_kilobytes(status, "VmHWM") - before)


def _give_back_freed_memory() -> None:
    """Nothing; what the process freed and the allocator kept would be used again, and be missing from the rise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _dearest(batches: Sequence[Batch]) -> tuple[Batch, int]:
    """(the row with the most real and then the most trained tokens, as a step of its own; the most rows of a step)."""
    best, cost, most = None, (-1, -1), 1
    known = 1 if isinstance(batches, Mixing) else len(batches)  # an online mixture makes its later steps on the way
    for index in np.unique(np.linspace(0, known - 1, min(known, NUM_LOOKED_AT)).astype(int)).tolist():
        batch = batches[index]
        most = max(most, batch.num_rows)
        costs = [(int(r), int(t)) for r, t in zip((batch.segments > 0).sum(1), (batch.weights > 0).sum(1), strict=True)]
        row = max(range(batch.num_rows), key=lambda i: (costs[i][1] > 0, costs[i]))
        if costs[row] > cost and costs[row][1] > 0:
            best, cost = _row(batch, row), costs[row]
    assert best is not None, "a plan has a row that is trained"
    return best, most


def _row(batch: Batch, row: int) -> Batch:
    here = slice(row, row + 1)
    return dataclasses.replace(
        batch,
        **_arrays(batch, lambda values: values[here]),
        documents=tuple(dataclasses.replace(d, row=0) for d in batch.documents if d.row == row),
        total_weight=float(batch.weights[here].sum(dtype=np.float64)),
    )


def _arrays(batch: Batch, change: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
    """The arrays of a batch, each changed so."""
    names = ("inputs", "targets", "weights", "positions", "segments", "tasks", "sources", "kinds")
    return {name: change(getattr(batch, name)) for name in names}


def _estimated(rise_of: RowsOf, limit: int) -> Callable[[int], bool]:
    one, two = rise_of(1), rise_of(2)
    by_row = max(two - one, 0)
    return lambda n: max(one, two if n > 1 else 0) + max(n - 2, 0) * by_row <= limit


def _tried(model: Any, row: Batch, device: torch.device) -> Callable[[int], bool]:
    """Whether a pass of n rows runs, beside what the optimizer will hold and a margin."""
    size = _to_come(model) + int(MARGIN_SHARE * torch.cuda.mem_get_info(device)[0])

    def fits(num_rows: int) -> bool:
        held = None
        try:
            held = torch.empty(size, dtype=torch.uint8, device=device)
            step_gradients(model, repeated(row, num_rows), micro_batch_rows=num_rows)
        except torch.OutOfMemoryError:
            return False
        finally:
            del held
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return True

    return fits


def _to_come(model: Any) -> int:
    """Bytes that the optimizer will hold beside weights and gradients: two moments, and wide copies of narrow weights."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return sum(p.numel() * ((8 + 8) if p.element_size() < 4 else 2 * p.element_size()) for p in trained)


def _free_bytes(model: Any) -> int:
    """What passes may take on this machine's CPU: free memory, of the container where it is bounded, less what is to come."""
    free = 1024 * _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    bound, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if bound.is_file() and used.is_file() and bound.read_text().strip().isdecimal():
        free = min(free, int(bound.read_text()) - int(used.read_text()))
    return int((1 - MARGIN_SHARE) * free) - _to_come(model)


def _kilobytes(path: Path, name: str) -> int:
    """The number behind `name:` in a file of /proc."""
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


@contextmanager
def _untouched(model: Any, device: torch.device) -> Iterator[None]:
    """Nothing; inside, `model` is in training mode. After it mode, gradients and random states are as they were."""
    was_training = model.training
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.train()
            yield
        finally:
            model.train(was_training)
            model.zero_grad(set_to_none=True)
