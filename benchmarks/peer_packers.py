"""Packers on the same lengths in the same order, each in its own environment: ours, TRL's, axolotl's, LLaMA-Factory's.

TRL packs token lists, so it gets some (one byte per token) and moves them; the others get lengths alone, as ours does.
Defaults throughout: TRL and LLaMA-Factory pack batches of 1,000 examples, axolotl groups of 100,000 with at most 200
documents per row, in one process; its trainer repeats that up to four times to learn how many batches there are, which is
not counted here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from peer_meter import Meter, own_peak_bytes

Job = dict[str, Any]
EXAMPLES_AT_ONCE = 1000


def pack(name: str, job: Job, folder: Path) -> Job:
    """Seconds, memory, rows and how full they are."""
    lengths = np.load(Path(job["set"]) / "shuffled.npy")[: job["num_examples"]]
    packer, meter = PACKERS[name](lengths, job["capacity"]), Meter()
    with meter:
        num_rows, num_tokens = packer()
    assert num_tokens == lengths.sum(), f"{name} placed {num_tokens} of {lengths.sum()} tokens"
    filled = num_tokens / (num_rows * job["capacity"])
    return meter.spent | {"peak_bytes": own_peak_bytes(), "num_rows": num_rows, "efficiency": filled}


Packer = Callable[[], tuple[int, int]]


def _ours(lengths: np.ndarray, capacity: int) -> Packer:
    from tutelage.plan.spec import BatchSpec
    from tutelage.plan.windows import cut_windows, step_shape

    shape = step_shape(BatchSpec(capacity=capacity), max_tokens=capacity)
    cut_windows(lengths[:100], shape=shape)

    def packer() -> tuple[int, int]:
        layout = cut_windows(lengths, shape=shape)
        return int(layout.row.max()) + 1, int(lengths[layout.row >= 0].sum())

    return packer


def _trl(lengths: np.ndarray, capacity: int) -> Packer:
    import pyarrow as pa
    from datasets import Dataset
    from trl import pack_dataset

    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    tokens = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(np.ones(offsets[-1], np.int8)))
    dataset = Dataset(pa.table({"input_ids": tokens}))

    def packer() -> tuple[int, int]:
        packed = pack_dataset(dataset, capacity, "bfd")
        return len(packed), sum(len(row) for row in packed.data.column("input_ids"))

    return packer


def _axolotl(lengths: np.ndarray, capacity: int) -> Packer:
    from axolotl.utils.samplers.multipack import MultipackBatchSampler
    from torch.utils.data import SequentialSampler

    def sampler(sizes: np.ndarray) -> Any:
        at_once = {"batch_size": 1, "bin_size": 200, "group_size": 100_000, "drop_last": False}
        return MultipackBatchSampler(SequentialSampler(sizes), batch_max_len=capacity, lengths=sizes, **at_once)

    sampler(lengths[:100]).generate_batches()

    def packer() -> tuple[int, int]:
        rows = [row for batch in sampler(lengths).generate_batches() for row in batch]
        return len(rows), sum(int(lengths[row].sum()) for row in rows)

    return packer


def _llamafactory(lengths: np.ndarray, capacity: int) -> Packer:
    from peer_llamafactory import stand_in

    stand_in("torchaudio")
    from llamafactory.data.processor.processor_utils import greedy_knapsack

    def packer() -> tuple[int, int]:
        parts = [lengths[i : i + EXAMPLES_AT_ONCE].tolist() for i in range(0, len(lengths), EXAMPLES_AT_ONCE)]
        rows = [row for part in parts for row in greedy_knapsack(part, capacity)]
        return len(rows), sum(map(sum, rows))

    return packer


PACKERS: dict[str, Callable[[np.ndarray, int], Packer]] = {
    "ours": _ours,
    "trl": _trl,
    "axolotl": _axolotl,
    "llamafactory": _llamafactory,
}
