"""One run killed with SIGKILL again and again, each time as a process of its own: `python -m killed_training FOLDER STEPS`.

Loading torch takes seconds, so one process loads it and forks every try: what is killed is a real process, and nothing of it
but its files is there for the next. Prints JSON: how each try ended, every batch that any of them trained on, and the weights
at the end, beside those of a run that nobody killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tiny_training import measure_with, run_tiny, trained_weights
from tutelage.store import Silent

IN_CHECKPOINTS = {
    4: "checkpoint:write",
    9: "checkpoint:manifest",
    14: "checkpoint:rename",
    19: "checkpoint:done",
    24: "checkpoint:write",
}
"""Tries that die inside the writing of a checkpoint, and where."""
NUM_KILLS = 30


class Teller(Silent):
    """Writes a byte into a pipe for every step that was taken."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def advance(self, amount: int = 1, text: str = "") -> None:
        if text:
            os.write(self.pipe, b".")


def train_here(folder: Path, num_steps: int, progress: Any = None) -> str:
    """The digest of the final weights of the run in this folder, begun or gone on with."""
    falling = measure_with(lambda step: 3.0 - step / 100)
    more = {"every_steps": 7, "checkpoint_every_steps": 2, "keep_checkpoints": 2}
    _, model = run_tiny(folder, num_steps, measure=falling, progress=progress, **more)
    digest = blake2b()
    for name, value in sorted(trained_weights(model).items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """(process, pipe to read from) of `work(pipe to write to)` in a process of its own."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.close(read)
            work(write)
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    return child, read


def one_try(folder: Path, num_steps: int, *, point: str = "", after_steps: int = 0) -> int:
    """The exit status of a try: killed at a named point, or from outside once it took so many steps, wherever it then is."""

    def work(pipe: int) -> None:
        if point:
            os.environ["TUTELAGE_KILL_AT"] = point
        (folder / "digest").write_text(train_here(folder, num_steps, Teller(pipe)))

    child, pipe = forked(work)
    with os.fdopen(pipe, "rb", buffering=0) as told:
        for _ in range(after_steps):
            told.read(1)
        if after_steps:
            os.kill(child, signal.SIGKILL)
        while told.read(4096):  # or the other side waits for room
            pass
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def trained_last(folder: Path) -> list[tuple[int, str]]:
    """(step, digest of its batch) of the steps that the last try took."""
    lines = (folder / "events.jsonl").read_text().splitlines(keepends=True)
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    first = max((i for i, event in enumerate(events) if event["event"] in ("start", "resume")), default=0)
    return [(event["step"], event["batch_key"]) for event in events[first:] if event["event"] == "step"]


def main(folder: Path, num_steps: int) -> dict[str, Any]:
    """What happened."""
    calm, rough = folder / "calm", folder / "rough"
    for place in (calm, rough):
        place.mkdir()
    codes = [one_try(calm, num_steps)]
    expected = trained_last(calm)
    tries = []
    for number in range(NUM_KILLS):
        point = IN_CHECKPOINTS.get(number, "")
        codes.append(one_try(rough, num_steps, point=point, after_steps=0 if point else 1 + number % 3))
        tries.append(trained_last(rough))
    codes.append(one_try(rough, num_steps))
    tries.append(trained_last(rough))
    digests = [(place / "digest").read_text() for place in (calm, rough)]
    return {"codes": codes, "expected": expected, "tries": tries, "digests": digests}


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    train_here(Path(sys.argv[1]) / "warm", 1)  # loads what is loaded late, and starts no thread
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))) + "\n")
