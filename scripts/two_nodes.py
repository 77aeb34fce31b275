"""Two machines for real, on one: the same losses as one process, and the same weights after a machine dies.

    network namespace A, 10.88.0.1      one folder        network namespace B, 10.88.0.2
    ranks 0 and 1             <------ veth pair ------>   ranks 2 and 3

Each namespace has a network of its own, so all that passes between the two goes over the wire between them, as it would
between machines; the folder is shared, as a network file system would be. `torchrun` starts two processes in each, over
gloo. Runs a tiny model under DDP and FSDP2: once through, and once with a machine killed (SIGKILL to all of its processes)
in the middle of the run and both started again.

    python scripts/two_nodes.py [ddp] [fsdp]     about three minutes on two cores; needs root and iproute2

Prints a table. Exit codes: 0 all the same, 1 something differs, 2 namespaces cannot be made here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from small_recipe import write_small

PORT = 29517
TIMEOUT_SECONDS = 300
LOSS_TOLERANCE = 1e-4
"""Relative, in float32: sums over ranks are added up in another order, and sixty steps carry that on."""
SETTINGS = {
    "model.adapter": "full",
    "mix.epochs": 8,
    "mix.max_visits": 8,
    "train.learning_rate": 1e-3,
    "train.checkpoint_every_steps": 5,
    "evaluate.every_steps": 1000,
    "evaluate.keep_best": "false",
    "evaluate.samples": 0,
}


@dataclass(frozen=True)
class Node:
    """A namespace and its end of the wire."""

    name: str
    interface: str
    address: str


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    """What `ip` said."""
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two namespaces joined by a wire, and gone afterwards; exits with 2 where they cannot be made."""
    tag = os.getpid() % 100_000
    nodes = (Node(f"ttn{tag}a", f"tta{tag}", "10.88.0.1"), Node(f"ttn{tag}b", f"ttb{tag}", "10.88.0.2"))
    commands = [["netns", "add", node.name] for node in nodes]
    commands += [["link", "add", nodes[0].interface, "type", "veth", "peer", "name", nodes[1].interface]]
    for node in nodes:
        commands += [["link", "set", node.interface, "netns", node.name]]
        inside = ["-n", node.name]
        commands += [[*inside, "addr", "add", f"{node.address}/24", "dev", node.interface]]
        commands += [[*inside, "link", "set", node.interface, "up"], [*inside, "link", "set", "lo", "up"]]
    try:
        for command in commands:
            done = ip(*command) if shutil.which("ip") else None
            if done is None or done.returncode:
                why = "there is no `ip` command (apt-get install iproute2)" if done is None else done.stderr.strip()
                print(
                    f"two network namespaces cannot be made here: {why}; root and CAP_NET_ADMIN are needed. Nothing was tested."
                )
                raise SystemExit(2)
        yield nodes
    finally:
        for node in nodes:
            if shutil.which("ip"):
                kill(node)
                ip("netns", "del", node.name)


def kill(node: Node) -> None:
    """Nothing; no process of the node is left, and none could say goodbye."""
    for pid in ip("netns", "pids", node.name).stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def command_of(recipe: Path, store: Path, *, more: Sequence[str] = ()) -> list[str]:
    """`tutelage train` of the recipe into a store."""
    settings = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    return ["tutelage", "train", str(recipe), *settings, *more, "--store", str(store), "--runs", f"{store}-runs", "--quiet"]


def start(nodes: Sequence[Node], recipe: Path, store: Path, parallel: str) -> list[subprocess.Popen[bytes]]:
    """The processes of torchrun, one on each node."""
    started = []
    for rank, node in enumerate(nodes):
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            "2",
            "--node-rank",
            str(rank),
            "--nproc-per-node",
            "2",
        ]
        torchrun += ["--master-addr", nodes[0].address, "--master-port", str(PORT), "-m"]
        command = [*torchrun, *command_of(recipe, store, more=["--set", f"train.parallel={parallel}"])]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": node.interface, "OMP_NUM_THREADS": "1", "TUTELAGE_RANK_TIMEOUT": "60"}
        with Path(f"{store}-node{rank}.log").open("ab") as log:
            inside = ["ip", "netns", "exec", node.name, *command]
            started.append(subprocess.Popen(inside, env=environment, stdout=log, stderr=log, start_new_session=True))
    return started


def wait(started: Sequence[subprocess.Popen[bytes]], store: Path, *, must_work: bool) -> None:
    """Nothing; all have ended. Exits with 1 and their logs when they failed and should not have."""
    codes = [process.wait(timeout=TIMEOUT_SECONDS) for process in started]
    if must_work and any(codes):
        for log in sorted(store.parent.glob(f"{store.name}-node*.log")):
            print(f"--- {log.name}\n{log.read_text()[-4000:]}")
        print(f"the run ended with {codes}")
        raise SystemExit(1)


def wait_for_step(store: Path, step: int, started: Sequence[subprocess.Popen[bytes]]) -> int:
    """The last step that is written down, as soon as `step` is; the next one is under way then."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline and all(process.poll() is None for process in started):
        for events in store.glob("work/train-*/events.jsonl"):
            lines = [json.loads(line) for line in events.read_text().splitlines() if line.endswith("}")]
            steps = [line["step"] for line in lines if line["event"] == "step"]
            if steps and steps[-1] >= step:
                return int(steps[-1])
        time.sleep(0.005)
    print(f"step {step} never came")
    raise SystemExit(1)


@dataclass(frozen=True)
class Outcome:
    """What a finished run left."""

    losses: np.ndarray
    weights: dict[str, np.ndarray]


def outcome(store: Path) -> Outcome:
    """Read from the artefact."""
    (folder,) = store.glob("train/*")
    steps = [row for row in pq.read_table(folder / "steps.parquet").to_pylist() if row["part"] == "all"]
    losses = np.array([row["loss_sum"] / row["weight"] for row in steps])
    return Outcome(losses, load_file(folder / "model" / "model.safetensors"))


def furthest(one: Outcome, other: Outcome) -> tuple[float, float]:
    """(largest relative difference of a loss, largest difference of a weight)."""
    assert len(one.losses) == len(other.losses) and one.weights.keys() == other.weights.keys()
    losses = float(np.max(np.abs(other.losses / one.losses - 1)))
    return losses, max(float(np.max(np.abs(other.weights[name] - one.weights[name]))) for name in one.weights)


def main() -> int:
    """The exit code."""
    rows = []
    with two_nodes() as nodes, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = write_small(folder / "data")
        subprocess.run(
            [sys.executable, "-m", *command_of(recipe, folder / "one")], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        one = outcome(folder / "one")
        victims = {"ddp": 1, "fsdp": 0}
        for parallel, victim in ((name, victims[name]) for name in (sys.argv[1:] or victims)):
            whole, broken = (copy_prepared(folder / "one", folder / f"{parallel}-{what}") for what in ("whole", "killed"))
            wait(start(nodes, recipe, whole, parallel), whole, must_work=True)
            through = outcome(whole)
            losses, weights = furthest(one, through)
            rows.append((f"{parallel}, 2 nodes x 2", "one process", losses, weights, losses <= LOSS_TOLERANCE))
            started = start(nodes, recipe, broken, parallel)
            step = wait_for_step(broken, len(one.losses) // 2, started)
            kill(nodes[victim])
            wait(started, broken, must_work=False)
            wait(start(nodes, recipe, broken, parallel), broken, must_work=True)
            losses, weights = furthest(through, outcome(broken))
            what = f"{parallel}, node {victim} killed in step {step + 1} of {len(one.losses)}"
            rows.append((what, "not killed", losses, weights, losses == weights == 0.0))
    print(f"{'run':<44}{'against':<14}{'loss, relative':>15}{'weights':>12}")
    for what, against, losses, weights, is_well in rows:
        print(f"{what:<44}{against:<14}{losses:>15.2g}{weights:>12.2g}  {'ok' if is_well else 'DIFFERS'}")
    return 0 if all(row[-1] for row in rows) else 1


def copy_prepared(source: Path, target: Path) -> Path:
    """A copy of a store without what was trained."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "train")
    return target


if __name__ == "__main__":
    sys.exit(main())
