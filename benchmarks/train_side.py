"""What every contestant of `train.py` shares, in whatever environment it runs: the documents, the clock, the common measure."""

from __future__ import annotations

import json
import time
from hashlib import md5
from pathlib import Path
from typing import Any

from peer_meter import own_peak_bytes

IGNORED = -100
Document = tuple[list[int], list[int]]
"""Token ids, and labels that are not shifted: a token that is trained, or -100. A document's first token is never a target."""


class Job:
    """What a contestant is to do: the numbers of job.json, and its documents."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: dict[str, Any] = json.loads((folder / "job.json").read_text())
        self.device: str = self.said["device"]
        self.precision: str = self.said["precision"]
        self.num_steps: int = self.said["steps"]

    def rows(self) -> list[list[Document]]:
        """Documents by packed row, in the order of our plan; `held_out` is not among them."""
        return [row for step in self.said["rows"] for row in step]

    def documents(self) -> list[Document]:
        return [document for row in self.rows() for document in row]


def digest(documents: list[Document]) -> str:
    """One name for all ids and trained tokens, in whatever order they come."""
    each = sorted(md5(json.dumps(document).encode()).hexdigest() for document in documents)
    return md5("".join(each).encode()).hexdigest()


def num_supervised(documents: list[Document]) -> int:
    return sum(label != IGNORED for _, labels in documents for label in labels)


def warm_up_steps(num_steps: int) -> int:
    """Steps that no rate counts: the first of several, in which memory is taken and kernels meet their shapes.

    >>> warm_up_steps(1), warm_up_steps(3)
    (0, 1)
    """
    return 1 if num_steps > 1 else 0


class Clock:
    """Seconds and peak memory of the steps, and what they held."""

    def __init__(self, device: str) -> None:
        self.device, self.useful, self.supervised, self.started = device, 0, 0, 0.0
        self.seconds: list[float] = []
        self.counts: list[tuple[int, int]] = []
        """Useful and supervised tokens of each step."""
        self.peak_bytes = 0

    def start(self) -> None:
        self.started = self._now()

    def lap(self) -> None:
        """A step is done."""
        now = self._now()
        self.seconds.append(now - self.started)
        if len(self.counts) < len(self.seconds):  # counted on the way
            self.counts.append((self.useful, self.supervised))
            self.useful = self.supervised = 0
        self.started = now
        self.peak_bytes = self._peak()

    def count(self, num_tokens: int, num_targets: int) -> None:
        self.useful += num_tokens
        self.supervised += num_targets

    def told(self) -> dict[str, Any]:
        first = warm_up_steps(len(self.seconds))
        total = sum(self.seconds[first:])
        useful, supervised = (sum(column) for column in zip(*self.counts[first:], strict=True))
        return {
            "seconds": total,
            "step_seconds": self.seconds,
            "useful_tokens": useful,
            "supervised_tokens": supervised,
            "useful_per_second": useful / total,
            "supervised_per_second": supervised / total,
            "peak_bytes": self.peak_bytes,
        }

    def _now(self) -> float:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def _peak(self) -> int:
        if self.device == "cuda":
            import torch

            return int(torch.cuda.max_memory_allocated())
        return own_peak_bytes()


def warm_up(model: Any) -> None:
    """Starts threads and kernels on one short row; weights and gradients are left as they were."""
    import torch

    ids = torch.arange(64, device=next(model.parameters()).device)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)


def held_out_loss(model: Any, job: Job) -> float:
    """The mean loss on the trained tokens of the held-out documents, each alone, with weights and arithmetic in float32.

    Plain code on an ordinary model that takes over the trained weights: trainers leave autocast and kernels on theirs.
    """
    import torch
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(job.said["model"], dtype=torch.float32)
    merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    plain.load_state_dict({name: value.float().cpu() for name, value in merged.state_dict().items()})
    plain.to(job.device).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, labels in job.said["held_out"]:
            logits_TV = plain(input_ids=torch.tensor([ids], device=job.device), use_cache=False).logits[0, :-1]
            targets_T = torch.tensor(labels[1:], device=job.device)
            total += torch.nn.functional.cross_entropy(logits_TV, targets_T, reduction="sum", ignore_index=IGNORED).item()
            count += int((targets_T != IGNORED).sum())
    return total / count


def states_of(model: Any, optimizer: Any) -> dict[str, list[str]]:
    """The types of the weights that are trained and of what the optimizer remembers of them."""
    states = [value for state in optimizer.state.values() for value in state.values() if getattr(value, "ndim", 0) > 0]
    names = {"weights": [p for p in model.parameters() if p.requires_grad], "optimizer": states}
    return {name: sorted({str(value.dtype).removeprefix("torch.") for value in values}) for name, values in names.items()}
