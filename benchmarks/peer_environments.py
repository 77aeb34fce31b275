"""The peers' environments below `.peers`: each made once from PyPI, or a note of why that does not work here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PEERS = Path(__file__).resolve().parent / ".peers"
TORCH = "torch==2.13.0"
"""Installed first and alone, then held as a constraint: else pip chooses another build of several gigabytes."""
PACKAGES = {
    "trl": ["trl==1.16.0", "datasets==5.2.0", "transformers==5.23.0", "peft==0.21.0"],
    "axolotl": ["axolotl==0.19.0"],
    "llamafactory": ["llamafactory==0.9.5"],
}
ON_A_GPU = {
    "liger": ["liger-kernel==0.8.5", "transformers==5.23.0", "peft==0.21.0"],
    "unsloth": ["unsloth==2026.10.9"],
}
"""Peers of training that need a CUDA device."""
REMOVED = {"llamafactory": ["torchvision", "torchaudio"]}
"""They come built for another torch, and stop transformers from being imported; preparing text needs neither."""
MINUTES = 10
"""What an installation may take."""


def python_of(peer: str) -> Path:
    return PEERS / peer / "bin" / "python"


def make_peer(peer: str) -> str:
    """Why the environment is not there, "" when it is; a failure is remembered until the wanted versions change."""
    note, wanted = PEERS / peer / "installed.json", [TORCH, *(PACKAGES | ON_A_GPU)[peer]]
    if note.is_file() and (found := json.loads(note.read_text()))["wanted"] == wanted:
        return str(found["problem"])
    print(f"making {peer}'s environment in {note.parent}, once: some gigabytes, some minutes", flush=True)
    note.parent.mkdir(parents=True, exist_ok=True)
    (note.parent / "constraints.txt").write_text(TORCH)
    problem = _install(peer)
    note.write_text(json.dumps({"wanted": wanted, "problem": problem}))
    return problem


def _install(peer: str) -> str:
    pip = [str(python_of(peer)), "-m", "pip", "install", "--quiet"]
    constraint = ["--constraint", str(PEERS / peer / "constraints.txt")]
    commands = [
        [sys.executable, "-m", "venv", str(PEERS / peer)],
        [*pip, TORCH],
        [*pip, *constraint, *(PACKAGES | ON_A_GPU)[peer]],
    ]
    if peer in REMOVED:
        commands.append([*pip[:3], "uninstall", "--yes", *REMOVED[peer]])
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60 * MINUTES)
        except subprocess.TimeoutExpired:
            return f"pip took more than {MINUTES} minutes"
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            return f"pip failed: {lines[0][:300] if lines else done.returncode}"
    return ""
