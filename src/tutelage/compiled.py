"""Loops over arrays, compiled by numba: every one has a counterpart in Python or NumPy that tests compare it with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def kernel(function: Callable[..., Any], fast: frozenset[str] = frozenset()) -> Any:
    """A function of plain loops, compiled on first use for the types that it meets; from disk where a folder can be written.

    `fast` names the freedoms of LLVM that float arithmetic may take (`reassoc`: sums in lanes); none when left out.
    """
    import numba

    freedoms = {"fastmath": set(fast)} if fast else {}
    try:
        return numba.njit(cache=True, nogil=True, **freedoms)(function)
    except RuntimeError:  # no folder that can be written: compile in every process
        return numba.njit(nogil=True, **freedoms)(function)
