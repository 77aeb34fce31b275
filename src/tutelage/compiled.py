"""Loops over arrays, compiled by numba: every one has a counterpart in Python or NumPy that tests compare it with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def kernel(function: Callable[..., Any]) -> Any:
    """A function of plain loops, compiled on first use for the types that it meets; from disk where a folder can be written."""
    import numba

    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder that can be written: compile in every process
        return numba.njit(nogil=True)(function)
