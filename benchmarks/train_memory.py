"""Peak memory of the loss, forward and backward, for small and large vocabularies and few and many tokens.

    python benchmarks/train_memory.py                  # 8K and 256K words, 2,048 and 16,384 tokens; about a minute on two cores
    python benchmarks/train_memory.py --quick          # fewer tokens
    python benchmarks/train_memory.py --check          # exit code 1 when a working memory is over the bar
    python benchmarks/train_memory.py --device cuda --json found.json

Each case is a process of its own, in which weights and inputs are made first. What the loss then needs is cut in two: the
gradients it must return, which are as large as head and hidden states, and everything else, its working memory. That must not
grow with vocabulary x tokens: the bar is `BAR` times the bytes of one chunk of logits, whatever the case. Beside it stands what
full logits and their gradient would take in float32, as the plain loss makes them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from peer_meter import machine, own_peak_bytes, tree_bytes  # noqa: E402

VOCABULARIES = (8_192, 262_144)
TOKENS, QUICK_TOKENS = (2_048, 16_384), (2_048, 8_192)
SIZE = 128
"""Of a hidden state; small, so that the gradients do not hide what is looked for."""
BAR = 3.0
"""Working memory over the bytes of one chunk: its logits, which become its slopes, and what products need beside them."""


def main() -> int:
    options = read_options()
    if options.case:
        print(json.dumps(loss_memory(options.case[0], options.case[1], device=options.device)))
        return 0
    found: dict[str, Any] = {"machine": machine(), "device": options.device, "cases": []}
    print(f"{'words':>9} {'tokens':>8} {'full logits':>12} {'gradients':>10} {'working memory':>15} {'seconds':>8}")
    for words in VOCABULARIES:
        for tokens in QUICK_TOKENS if options.quick else TOKENS:
            case = in_a_process(words, tokens, options.device)
            found["cases"].append(case)
            sizes = [f"{case[name] / 1e6:,.0f} MB" for name in ("full_bytes", "gradient_bytes", "working_bytes")]
            print(f"{words:>9,} {tokens:>8,} {sizes[0]:>12} {sizes[1]:>10} {sizes[2]:>15} {case['seconds']:>8.1f}", flush=True)
    found |= verdict(found["cases"])
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))
    print(found["said"])
    return 1 if options.check and not found["is_met"] else 0


def verdict(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether every case stays under the bar, and a sentence."""
    most = max(cases, key=lambda case: case["working_bytes"])
    bar = BAR * most["chunk_bytes"]
    largest = max(cases, key=lambda case: case["full_bytes"])
    said = (
        f"working memory at most {most['working_bytes'] / 1e6:,.0f} MB ({most['words']:,} words, {most['tokens']:,} tokens), bar "
        f"{bar / 1e6:,.0f} MB; full logits and their gradient would be up to {largest['full_bytes'] / 1e9:,.1f} GB"
    )
    return {"is_met": most["working_bytes"] <= bar, "said": said}


def in_a_process(words: int, tokens: int, device: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", str(words), str(tokens), "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{words} words, {tokens} tokens failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def loss_memory(words: int, tokens: int, *, size: int = SIZE, device: str = "cpu") -> dict[str, Any]:
    """Bytes and seconds of one forward and backward of the loss in bfloat16, every token supervised."""
    import time

    import torch

    from tutelage.model.chunks import CHUNK_BYTES
    from tutelage.model.loss import weighted_loss

    torch.manual_seed(0)
    head_VD, hidden_ND = (
        torch.randn(rows, size, dtype=torch.bfloat16, device=device).requires_grad_() for rows in (words, tokens)
    )
    targets_N, weights_N = torch.randint(0, words, (tokens,), device=device), torch.ones(tokens, device=device)

    def step(rows: slice) -> None:
        given = {"targets_N": targets_N[rows], "weights_N": weights_N[rows]}
        weighted_loss(hidden_ND[rows], head_VD, **given).loss_sum.backward()
        head_VD.grad = hidden_ND.grad = None

    step(slice(0, 64))  # compiled loops, libraries' own buffers
    before = _now(device)
    _forget_peak(device)
    started = time.perf_counter()
    step(slice(0, tokens))
    seconds = time.perf_counter() - started
    # Added up in float32 and handed over in bfloat16; hidden states once unscaled, once scaled.
    gradients = head_VD.numel() * (4 + 2) + hidden_ND.numel() * (2 + 2)
    return {
        "words": words,
        "tokens": tokens,
        "full_bytes": 2 * 4 * words * tokens,
        "gradient_bytes": gradients,
        "working_bytes": max(0, _peak(device) - before - gradients),
        "chunk_bytes": CHUNK_BYTES,
        "seconds": round(seconds, 2),
    }


def _now(device: str) -> int:
    import os

    import torch

    return torch.cuda.memory_allocated() if device == "cuda" else tree_bytes(os.getpid())


def _peak(device: str) -> int:
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else own_peak_bytes()


def _forget_peak(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif (switch := Path("/proc/self/clear_refs")).exists():
        switch.write_text("5")  # Linux: the high-water mark starts again from what is in use


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer tokens")
    parser.add_argument("--check", action="store_true", help="exit code 1 when the bar is missed")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", metavar="FILE", help="what was found")
    parser.add_argument("--case", nargs=2, type=int, metavar=("WORDS", "TOKENS"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
