"""Who of several ranks writes logs: the first, as if it were alone; the others none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tutelage.train.log import EventLog, MeasureLog, StepLog
from tutelage.train.state import Position
from tutelage.world import World


class Mute:
    """A log that takes everything and keeps nothing."""

    def add(self, *args: Any, **fields: Any) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def sync(self) -> int:
        """No byte was written."""
        return 0

    def close(self) -> None:
        """Nothing."""


def open_logs(folder: Path, position: Position, world: World) -> tuple[EventLog | Mute, StepLog | Mute, MeasureLog | Mute]:
    """(events, steps, measurements), cut back to `position`; mute ones on every rank but the first."""
    if not world.is_first:
        return Mute(), Mute(), Mute()
    return (
        EventLog(folder / "events.jsonl", position.events_bytes),
        StepLog(folder / "steps.parquet", position.step),
        MeasureLog(folder, position.measured_step),
    )
