"""Which way a run's documents go through its model: packed where it keeps them apart, else one per padded row."""

from __future__ import annotations

from typing import Any

from tutelage.errors import ModelError
from tutelage.model import require_isolation, require_unpacked
from tutelage.store import Progress


def prove_documents(model: Any, *, is_packed: bool, progress: Progress) -> None:
    """Nothing; the model at hand was proved to give each document what it gives it alone, and knows how it is to be run.

    A model that cannot keep packed documents apart runs right-padded rows, which is said; `is_packed` plans are refused
    for it (`ModelError` with the reason): packed rows were planned for another cost than they would have.
    """
    try:
        require_isolation(model)
    except ModelError as error:
        if is_packed:
            raise
        rows = require_unpacked(model)
        reason = str(error).partition(";")[0]
        progress.note(f"one document per row{', padding masked' if rows == 'masked' else ', padded on the right'}: {reason}")
