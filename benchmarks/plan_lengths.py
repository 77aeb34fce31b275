"""Lengths to plan with: those of real conversations, drawn as often as a benchmark needs them."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Pools = dict[str, NDArray[np.int32]]


def measure_lengths(patterns: Sequence[str]) -> Pools:
    """Tokens of each conversation, by file: the bundled tokenizer's, between the marks of its template."""
    from peer_data import bundled_folder, plain_turns
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(bundled_folder() / "tokenizer.json"))
    found = {}
    for path in sorted(Path(name) for pattern in patterns for name in glob.glob(pattern)):
        texts = [
            "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns) for turns in plain_turns(path)
        ]
        if texts:
            found[path.name.partition(".")[0]] = np.array([len(one) for one in tokenizer.encode_batch_fast(texts)], np.int32)
    if not found:
        raise SystemExit(f"--data {' '.join(patterns)}: no conversations there; give globs of JSONL files")
    return found


def write_set(pools: Pools, folder: Path, *, num_examples: int, num_tasks: int, capacity: int) -> None:
    """`sizes.npy` (num_tasks,), `lengths.npy` (num_examples,) task after task, and the latter `shuffled.npy`.

    Task i draws from pool i, turn about, with replacement; what is longer than a row is left out of the pools.
    """
    random, folder_pools = np.random.default_rng(0), [pool[pool <= capacity] for pool in pools.values()]
    weights = 10 ** random.uniform(0, 3, num_tasks)
    sizes = np.maximum(weights / weights.sum() * num_examples, 1).astype(np.int64)
    sizes[sizes.argmax()] += num_examples - sizes.sum()
    drawn = [random.choice(folder_pools[i % len(folder_pools)], size) for i, size in enumerate(sizes.tolist())]
    folder.mkdir()
    lengths = np.concatenate(drawn)
    np.save(folder / "sizes.npy", sizes)
    np.save(folder / "lengths.npy", lengths)
    np.save(folder / "shuffled.npy", random.permutation(lengths))
