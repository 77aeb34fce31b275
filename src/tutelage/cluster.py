"""What must hold on every machine before several processes train together, asked of each of them: `check RECIPE --cluster`.

    torchrun --nnodes 2 --nproc-per-node 8 ... -m tutelage check recipe.yaml --cluster

Each rank looks at its own machine and the ranks compare what they found, so that a mistake is told with its rank, host and
remedy, minutes before a run would meet it, or hours before it would silently train on something else.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tutelage.errors import TrainError
from tutelage.pipeline import Pipeline, build_pipeline
from tutelage.recipe import RecipeFile
from tutelage.store import Store, canonical_json, digest_json, package_version, write_atomic
from tutelage.together import odd_stage, upstream_of
from tutelage.world import World, differing, entered, meet, num_started

PACKAGES = ("tutelage", "torch", "transformers", "peft", "numpy")
MAX_SKEW_SECONDS = 2.0
"""Clocks further apart than this make the times in logs, and on files of a shared folder, useless."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `problem` is "" where all is well, else who has what and what to do."""

    check: str
    told: str
    problem: str = ""

    @property
    def is_well(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problem


@dataclass(frozen=True)
class ClusterReport:
    """All findings, the same on every rank; `ranks` are their hosts."""

    findings: tuple[Finding, ...]
    hosts: tuple[str, ...]

    @property
    def passes(self) -> bool:
        """Whether a run may begin."""
        return all(finding.is_well for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"passes": self.passes, "hosts": list(self.hosts), "findings": [asdict(finding) for finding in self.findings]}

    def lines(self) -> list[str]:
        """For people, a line each."""
        ranks = f"{len(self.hosts)} rank{'s' * (len(self.hosts) > 1)} on {len(set(self.hosts))} machine(s)"
        told = [f"{'ok   ' if f.is_well else 'WRONG'} {f.check}: {f.told if f.is_well else f.problem}" for f in self.findings]
        num_wrong = sum(not finding.is_well for finding in self.findings)
        return [*told, f"{ranks}: " + ("ready to train" if self.passes else f"{num_wrong} thing(s) wrong; nothing was trained")]


def check_cluster(file: RecipeFile, *, store: Store | Path | str = ".tutelage") -> ClusterReport:
    """The report of all processes that torchrun started; each calls it with the recipe. Writes two small files, and removes them.

    Raises `TrainError` in a process that torchrun did not start.
    """
    if num_started() < 2:
        raise TrainError(
            "check --cluster: asks several processes, and there is one; start it as the run will be: "
            "torchrun --nproc-per-node N -m tutelage check RECIPE --cluster"
        )
    place = store if isinstance(store, Store) else Store(store)
    began = time.monotonic()
    with entered(meet(), name="check") as world:
        seconds = max(world.gather(time.monotonic() - began))
        met = Finding(
            "rendezvous", f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}, all there in {seconds:.1f} s"
        )
        asked = (_packages, _threads, _clocks, lambda w: _recipe(w, file), lambda w: _keys(w, file, place))
        findings = [met, *(ask(world) for ask in asked), _shared_folder(world, place.root)]
        findings.append(_prepared(world, file, place))
        return ClusterReport(tuple(findings), tuple(world.gather(socket.gethostname())))


def _packages(world: World) -> Finding:
    mine = {name: package_version(name) or "missing" for name in PACKAGES} | {"python": platform.python_version()}
    told = world.gather(mine)
    wrong = [f"{name} is {odd}" for name in mine if (odd := differing([one[name] for one in told]))]
    remedy = "; install the same on every machine: pip install --constraint constraints.txt tutelage[all]"
    return Finding("packages", ", ".join(f"{n} {v}" for n, v in mine.items()), "; ".join(wrong) + remedy if wrong else "")


def _threads(world: World) -> Finding:
    """Cores over the processes of each machine."""
    cores, local = os.cpu_count() or 1, max(1, world.local_size)
    asked = int(os.environ.get("OMP_NUM_THREADS", "0"))
    found = world.gather({"host": socket.gethostname(), "cores": cores, "ranks": local, "asked": asked})
    crowded = [
        f"rank {rank} on {one['host']}: {one['ranks']} processes want {one['asked']} threads each of {one['cores']} cores"
        for rank, one in enumerate(found)
        if one["asked"] * one["ranks"] > one["cores"]
    ]
    remedy = "; set OMP_NUM_THREADS to cores / processes, or leave it out"
    told = ", ".join(sorted({f"{one['host']}: {one['cores']} cores for {one['ranks']}" for one in found}))
    return Finding("threads", told, "; ".join(crowded) + remedy if crowded else "")


def _clocks(world: World) -> Finding:
    """Each rank reads its clock between two barriers: skews are known up to the time between them."""
    world.barrier()
    began, mine = time.monotonic(), time.time()
    world.barrier()
    told = world.gather([mine, time.monotonic() - began])
    slack = max(one[1] for one in told)
    skew = max(one[0] for one in told) - min(one[0] for one in told)
    late = ", ".join(f"rank {rank} {one[0] - told[0][0]:+.1f} s" for rank, one in enumerate(told))
    problem = (
        f"clocks are {skew:.1f} s apart ({late}; at most {MAX_SKEW_SECONDS:g} s): start an NTP service (chrony) on every machine"
    )
    return Finding(
        "clocks", f"at most {skew:.3f} s apart, known to {slack:.3f} s", problem if skew - slack > MAX_SKEW_SECONDS else ""
    )


def _recipe(world: World, file: RecipeFile) -> Finding:
    key = digest_json(canonical_json(file.recipe.model_dump(mode="json")))
    odd = differing(world.gather(key[:12]))
    return Finding(
        "recipe", f"key {key[:12]}", f"{file.path} is {odd}; copy one recipe to every machine, with the same --set" if odd else ""
    )


def _keys(world: World, file: RecipeFile, store: Store) -> Finding:
    """The keys of all stages up to training, made by every rank from the recipe and the data files that it sees."""
    found = _attempt(lambda: build_pipeline(file, store=store))
    failed = _failures(world, found)
    if failed:
        return Finding("data and plan", "", f"{failed}; every machine needs the recipe's data files and model at the same paths")
    assert isinstance(found, Pipeline)
    stages = upstream_of(found.stages, "train")
    odd = odd_stage(world, stages)
    plan = stages["plan"].key[:12] if "plan" in stages else ""
    remedy = "; the machines see other files: share them, or copy the same ones to the same paths"
    return Finding("data and plan", f"{len(stages)} stages with the same keys, plan {plan}", odd + remedy if odd else "")


def _shared_folder(world: World, root: Path) -> Finding:
    """Each rank writes a file that every other must see."""
    folder = root / "work"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    mine = folder / f".cluster-{world.rank}-{world.first(os.getpid())}"
    failed = _failures(world, _attempt(lambda: write_atomic(mine, b"here")))
    seen = world.gather(
        [(folder / f"{mine.name.replace(f'-{world.rank}-', f'-{rank}-', 1)}").exists() for rank in range(world.size)]
    )
    world.barrier()
    mine.unlink(missing_ok=True)
    blind = [
        f"rank {reader} does not see the file of rank{'s' * (row.count(False) > 1)} "
        + ", ".join(str(writer) for writer, is_seen in enumerate(row) if not is_seen)
        for reader, row in enumerate(seen)
        if not all(row)
    ]
    problem = failed or "; ".join(blind)
    remedy = "; give every machine the same shared folder (NFS, Lustre, ...): --store /shared/.tutelage"
    return Finding("checkpoint folder", f"{folder.resolve()} is written and seen by all", problem + remedy if problem else "")


def _prepared(world: World, file: RecipeFile, store: Store) -> Finding:
    """Which of the stages that training reads are in the store: all, or on all ranks none that another has."""
    found = _attempt(lambda: build_pipeline(file, store=store))
    if not isinstance(found, Pipeline):
        return Finding("prepared data", "unknown")
    needed = found.stages["train"].inputs.values() if "train" in found.stages else ()
    mine = sorted(stage.label for stage in needed if store.find(stage) is None)
    odd = differing(world.gather(", ".join(mine) or "none"))
    told = "all of it is in the store" if not mine else f"rank 0 will prepare: {', '.join(mine)}"
    remedy = "; the store is not one folder: share it, or copy it whole after `tutelage run RECIPE --until audit`"
    return Finding("prepared data", told, f"missing are {odd}{remedy}" if odd else "")


def _attempt(call: Callable[[], Any]) -> Any:
    """What it returned, or the message of what it raised: a rank that fails must still answer the others."""
    try:
        return call()
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def _failures(world: World, found: Any) -> str:
    """The messages of ranks whose attempt failed, "" when none did."""
    told = world.gather([socket.gethostname(), found if isinstance(found, str) else None])
    return "; ".join(f"rank {rank} on {host}: {message}" for rank, (host, message) in enumerate(told) if message is not None)
