"""Kernels: the compiled loops give the numbers of plain NumPy."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tutelage.compiled import kernel
from tutelage.plan import kernels
from tutelage.plan.order import Tree, huffman_tree, interleave, pass_keys, permute

UInt64 = NDArray[np.uint64]


def walked_by_numpy(tree: Tree, positions: np.ndarray) -> tuple[list[int], list[int]]:
    """A node at a time, all of its positions at once."""
    task, occurrence = np.empty(len(positions), np.int32), np.empty(len(positions), np.int64)
    pending: list[tuple[Tree, np.ndarray, np.ndarray]] = [(tree, np.arange(len(positions)), positions)]
    while pending:
        node, where, local = pending.pop()
        if isinstance(node, int):
            task[where], occurrence[where] = node, local
            continue
        before, rest = np.divmod(local * (2 * node.num_left) + node.num, 2 * node.num)
        is_left = rest >= 2 * (node.num - node.num_left)
        pending.append((node.left, where[is_left], before[is_left]))
        pending.append((node.right, where[~is_left], (local - before)[~is_left]))
    return task.tolist(), occurrence.tolist()


def mixed(x: UInt64) -> UInt64:
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = x ^ (x >> np.uint64(27))
    x = x * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permuted_by_numpy(index: np.ndarray, *, size: int, keys: UInt64) -> list[int]:
    """Rounds over whole arrays, and again over what landed outside."""
    half = max(((size - 1).bit_length() + 1) // 2, 3)
    shift, low = np.uint64(half), np.uint64((1 << half) - 1)
    value = index.astype(np.uint64)
    outside = np.arange(len(value))
    while len(outside):
        left, right = value[outside] >> shift, value[outside] & low
        for number in range(4 if half > 6 else 10):
            salt = np.uint64((number + 1) * 0xD1B54A32D192ED03 & 0xFFFFFFFFFFFFFFFF)
            left, right = right, (mixed((right * np.uint64(0x9E3779B97F4A7C15) + salt) ^ keys[outside]) & low) ^ left
        value[outside] = (left << shift) | right
        outside = outside[value[outside] >= size]
    return value.astype(np.int64).tolist()


@given(st.lists(st.integers(1, 10_000_000), min_size=1, max_size=40), st.data())
def test_a_walk_gives_what_numpy_gives_anywhere_in_the_run(counts: list[int], data: st.DataObject) -> None:
    """Kills rounding towards zero instead of down, products that leave 64 bits, and a walk that needs its start."""
    tree, num = huffman_tree(counts), sum(counts)
    positions = np.array(data.draw(st.lists(st.integers(0, num - 1), max_size=50)), np.int64)
    assert tuple(part.tolist() for part in interleave(tree, positions)) == walked_by_numpy(tree, positions)


@given(st.sampled_from([1, 2, 3, 63, 64, 65, 4096, 4097, 1 << 20, (1 << 29) + 1]), st.data())
def test_a_permutation_gives_what_numpy_gives(size: int, data: st.DataObject) -> None:
    """Kills signed shifts, 32-bit products, and a walk that stops outside."""
    index = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=50)), np.int64)
    keys = pass_keys(data.draw(st.integers(0, 9)), "maths", np.arange(len(index)) % 3)
    assert permute(index, size=size, keys=keys).tolist() == permuted_by_numpy(index, size=size, keys=keys)


@pytest.fixture
def no_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    compiled = numba.njit

    def refusing(*args: object, cache: bool = False, **options: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return compiled(*args, **options)

    monkeypatch.setattr(numba, "njit", refusing)
    kernel.cache_clear()


@pytest.mark.usefixtures("no_cache_folder")
def test_where_nothing_can_be_written_they_are_compiled_all_the_same() -> None:
    """Kills a failure in a read-only installation."""
    leaf, _ = kernels.walk_tree(np.array([[~0, ~1, 1, 2]]), np.arange(2))
    kernel.cache_clear()
    assert leaf.tolist() == [0, 1]


@given(st.lists(st.integers(0, 5), max_size=60))
def test_sorting_by_code_is_a_stable_sort(code: list[int]) -> None:
    """Kills equal codes in another order, and a code without entries that begins in the wrong place."""
    codes = np.array(code, np.int32)
    positions, begins = kernels.sort_by_code(codes, num_codes=7)
    assert positions.tolist() == np.argsort(codes, kind="stable").tolist()
    assert begins.tolist() == np.searchsorted(np.sort(codes), np.arange(7)).tolist()


@given(st.lists(st.lists(st.integers(0, 10_000), unique=True, max_size=80), max_size=5), st.randoms(use_true_random=False))
def test_documents_are_sorted_by_row_and_start(rows: list[list[int]], random: Random) -> None:
    """Kills rows that run into one another, and a gap that leaves the last documents of a long row unsorted."""
    places = [(row, start) for row, starts in enumerate(rows) for start in starts]
    random.shuffle(places)
    row, start = np.array(places, np.int64).reshape(-1, 2).T
    found = kernels.sort_by_place(row, start.astype(np.int32), num_rows=len(rows))
    assert [places[i] for i in found.tolist()] == sorted(places)
