"""Content-addressed artefacts: a stage's output lives under the digest of everything that could change it.

    <store>/<stage>/<key>/       data files, and manifest.json written last
    <store>/work/<stage>-<key>/  being built; a folder left by a killed process is wiped, or resumed where the stage can
    <store>/locks/               one flock file per artefact: the kernel frees it when its owner dies
    <store>/digests/             remembered content digests of input files, by path, size and mtime
    <store>/runs/                which artefacts each run folder refers to: the roots of `gc`

A reader opens only folders that carry a manifest, so a killed write is a miss and never a hit.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from xxhash import xxh3_128

import tutelage
from tutelage.errors import StoreError

MANIFEST = "manifest.json"
Json = Any


class Progress(Protocol):
    """Where a stage tells how far it is. The terminal and plain-line versions live in `report/screen.py`."""

    def start(self, label: str, total: int | None = None, unit: str = "") -> None:
        """Begin a bar; `total` None when unknown."""

    def advance(self, amount: int = 1, text: str = "") -> None:
        """Move the bar; `text` replaces what stands beside it."""

    def note(self, text: str) -> None:
        """A line that stays."""


class Silent:
    """A `Progress` that says nothing."""

    def start(self, label: str, total: int | None = None, unit: str = "") -> None:
        """Nothing."""

    def advance(self, amount: int = 1, text: str = "") -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Counts:
    """A stage's account: `num_in == num_out + sum(dropped.values())`, checked when the artefact is committed."""

    num_in: int
    num_out: int
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lost = self.num_in - self.num_out - sum(self.dropped.values())
        assert lost == 0, f"{lost} records are unaccounted for: {self}"

    def as_json(self) -> dict[str, Json]:
        """`{"in": ..., "out": ..., "dropped": {reason: count}}`."""
        return {"in": self.num_in, "out": self.num_out, "dropped": dict(sorted(self.dropped.items()))}


@dataclass(frozen=True)
class Outcome:
    """What a build returns beside its files: the account, and small facts that later stages and the report read."""

    counts: Counts
    facts: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class Artefact:
    """A finished, immutable folder."""

    stage: str
    key: str
    path: Path
    manifest: Mapping[str, Json]
    is_hit: bool = True

    @property
    def facts(self) -> Mapping[str, Json]:
        """The small facts its build returned."""
        facts: Mapping[str, Json] = self.manifest["facts"]
        return facts

    def file(self, name: str) -> Path:
        """The path of one of its data files; StoreError when it is not there."""
        path = self.path / name
        if not path.exists():
            raise StoreError(f"{self.path}: `{name}` is missing; delete the folder and run again")
        return path


Build = Callable[[Path, Mapping[str, Artefact], Progress], Outcome]


@dataclass(frozen=True, eq=False)
class Stage:
    """One box of the pipeline: what it depends on, and how to make it.

    `slot` tells boxes of the same stage apart for people (a source's name); it is no part of the key. `ingredients` are
    JSON values, `inputs` upstream boxes by name, `packages` those whose version can change the output. Raise `version`
    when the output of `build` changes. A `resumable` build finds its earlier files in the folder it is given.
    """

    name: str
    version: int
    ingredients: Mapping[str, Json]
    build: Build
    slot: str = ""
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    packages: Sequence[str] = ()
    resumable: bool = False

    @cached_property
    def all_ingredients(self) -> dict[str, Json]:
        """Everything that goes into the key, by name."""
        out: dict[str, Json] = {f"input {name}": stage.key for name, stage in self.inputs.items()}
        out |= {f"package {name}": package_version(name) for name in self.packages}
        out |= {"stage version": self.version, **self.ingredients}
        return out

    @cached_property
    def key(self) -> str:
        """32 hex digits: digest of the stage's name and ingredients."""
        return digest_json({"stage": self.name, **self.all_ingredients})

    @property
    def label(self) -> str:
        """`read maths`, or just `plan`."""
        return f"{self.name} {self.slot}".strip()


@cache
def package_version(name: str) -> str:
    """The installed version of a distribution, `""` when it is not installed."""
    try:
        text = metadata.distribution(name).read_text("METADATA") or ""
    except metadata.PackageNotFoundError:
        return ""
    said = re.search(r"^Version: *(\S+)", text, re.MULTILINE)  # metadata.version reads it as an e-mail with all its headers
    return said[1] if said else metadata.version(name)


def canonical_json(value: Json) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest_json(value: Json) -> str:
    """32 hex digits of the canonical JSON of `value`."""
    return hashlib.blake2b(canonical_json(value).encode(), digest_size=16).hexdigest()


def digest_bytes(path: Path) -> str:
    """32 hex digits of a file's content: XXH3, 128 bits, which tells files apart and finds damage, but guards against nobody."""
    digest, chunk = xxh3_128(), memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(chunk):
            digest.update(chunk[:size])
    return digest.hexdigest()


_CHUNK_BYTES = 1 << 20
"""Read at once: what stays in the cache."""


def fault_point(name: str) -> None:
    """Kills this process with SIGKILL when `TUTELAGE_KILL_AT` names this point: how crash tests reach inside commits."""
    if os.environ.get("TUTELAGE_KILL_AT") == name:
        os.kill(os.getpid(), signal.SIGKILL)


def write_atomic(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Writes a whole file or nothing: temporary name, fsync, rename, fsync of the folder.

    Not `durable`, it waits for no disk: after a power failure the file may be empty. For what is only remembered.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    temporary.replace(path)
    if durable:
        sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Makes a file's content durable, or the names inside a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Store:
    """The folder of artefacts; safe for several processes at once."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    def folder(self, stage: Stage) -> Path:
        """Where the stage's artefact is, or will be."""
        return self.root / stage.name / stage.key

    def work_folder(self, stage: Stage) -> Path:
        """Where the stage is being built, or would be."""
        return self.root / "work" / f"{stage.name}-{stage.key}"

    def find(self, stage: Stage) -> Artefact | None:
        """The finished artefact, or None."""
        return self._open(self.folder(stage), is_hit=True)

    def produce(self, stage: Stage, inputs: Mapping[str, Artefact], progress: Progress | None = None) -> Artefact:
        """The stage's artefact, built if it is not there; a second process waits for the first and then reads."""
        return self.begin(stage, inputs, progress)()

    def begin(self, stage: Stage, inputs: Mapping[str, Artefact], progress: Progress | None = None) -> Callable[[], Artefact]:
        """As `produce`, but what is returned commits the artefact when it is called: that is waiting for the disk, mostly.

        It may be called once, in any thread. Until then this process holds the stage's lock, and nobody sees the artefact.
        """
        if (found := self.find(stage)) is not None:
            return partial(_same, found)
        progress = progress or Silent()
        with contextlib.ExitStack() as stack:
            waiting = f"{stage.label}: waiting for process"
            stack.enter_context(self._locked(f"{stage.name}-{stage.key}", lambda owner: progress.note(f"{waiting} {owner}")))
            if (found := self.find(stage)) is not None:
                return partial(_same, found)
            commit = self._build(stage, inputs, progress)
            held = stack.pop_all()

        def committed() -> Artefact:
            with held:
                commit()
                made = self._open(self.folder(stage), is_hit=False)
            assert made is not None
            return made

        return committed

    def artefacts(self) -> Iterator[Artefact]:
        """Every finished artefact."""
        for manifest in sorted(self.root.glob(f"*/*/{MANIFEST}")):
            if manifest.parent.parent.name != "work":
                found = self._open(manifest.parent, is_hit=True)
                assert found is not None
                yield found

    def why_missing(self, stage: Stage) -> list[str]:
        """Which ingredients differ from the most similar artefact of the same stage and slot; `["never run"]` without one."""
        mine = stage.all_ingredients
        best: list[str] | None = None
        for manifest in sorted((self.root / stage.name).glob(f"*/{MANIFEST}")):
            found = self._open(manifest.parent, is_hit=True)
            if found is None or found.manifest["slot"] != stage.slot:
                continue
            theirs = found.manifest["ingredients"]
            changed = _differences(theirs, json.loads(canonical_json(mine)))
            if best is None or len(changed) < len(best):
                best = changed
        return ["never run"] if best is None else best

    def file_digest(self, path: Path) -> str:
        """The content digest of an input file; path, size and mtime only spare reading it again."""
        path = path.resolve()
        stat = path.stat()
        stamp = [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino]
        memo = self.root / "digests" / f"{digest_json(str(path))}.json"
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError, KeyError):
            known = json.loads(memo.read_text())
            if known["stamp"] == stamp:
                return str(known["xxh3"])
        digest = digest_bytes(path)
        # A file changed within the clock's resolution of its mtime could change again unseen: do not remember it.
        if time.time_ns() - stat.st_mtime_ns > 2_000_000_000:
            memo.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(memo, canonical_json({"stamp": stamp, "xxh3": digest}).encode(), durable=False)
        return digest

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Holds off `gc` while a run reads the store."""
        with self._flock("gc", fcntl.LOCK_SH):
            yield

    def remember_run(self, folder: Path, keys: Mapping[str, str]) -> None:
        """Makes the artefacts that a run folder refers to roots of `gc`: `{"stage/key": label}`."""
        record = self.root / "runs" / f"{digest_json(str(folder.resolve()))}.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(record, canonical_json({"folder": str(folder.resolve()), "artefacts": dict(keys)}).encode())

    def garbage(self, keep: Sequence[str] = ()) -> list[tuple[Path, int]]:
        """Folders that no living run and no name in `keep` (`stage/key`) refers to, with their size in bytes."""
        roots = set(keep)
        for record in (self.root / "runs").glob("*.json"):
            run = json.loads(record.read_text())
            if Path(run["folder"]).exists():
                roots |= set(run["artefacts"])
        doomed = [a.path for a in self.artefacts() if f"{a.stage}/{a.key}" not in roots]
        work = [path for path in (self.root / "work").glob("*") if path.name.replace("-", "/", 1) not in roots]
        return [(path, _folder_size(path)) for path in [*doomed, *work]]

    def collect(self, folders: Sequence[Path]) -> None:
        """Removes folders that `garbage` named; StoreError while a run is using the store."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._flock("gc", fcntl.LOCK_EX | fcntl.LOCK_NB))
            except BlockingIOError:
                raise StoreError(f"{self.root}: a run is using this store; wait until it is done") from None
            for folder in folders:
                (folder / MANIFEST).unlink(missing_ok=True)  # first: a half-removed folder must be a miss
                shutil.rmtree(folder)

    def _open(self, folder: Path, *, is_hit: bool) -> Artefact | None:
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
        except FileNotFoundError:
            return None
        return Artefact(folder.parent.name, folder.name, folder, manifest, is_hit)

    def _build(self, stage: Stage, inputs: Mapping[str, Artefact], progress: Progress) -> Callable[[], None]:
        work = self.work_folder(stage)
        if work.exists() and not stage.resumable:
            shutil.rmtree(work)
        work.mkdir(parents=True, exist_ok=True)
        started = time.time()
        fault_point(f"build:{stage.name}")
        outcome = stage.build(work, inputs, progress)
        return partial(self._commit, stage, work, outcome, seconds=time.time() - started)

    def _commit(self, stage: Stage, work: Path, outcome: Outcome, *, seconds: float) -> None:
        fault_point(f"commit:{stage.name}:start")
        manifest = {
            "stage": stage.name,
            "slot": stage.slot,
            "key": stage.key,
            "ingredients": stage.all_ingredients,
            "inputs": {name: f"{s.name}/{s.key}" for name, s in stage.inputs.items()},
            "counts": outcome.counts.as_json(),
            "facts": outcome.facts,
            "files": _listed(work),
            "seconds": round(seconds, 3),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "tutelage": tutelage.__version__,
        }
        (work / MANIFEST).write_bytes(json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False).encode())
        fault_point(f"commit:{stage.name}:manifest")
        _sync_all(work)  # nothing is looked at here before it has its name
        final = self.folder(stage)
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():  # no manifest in it, or `produce` would have found it: half of an interrupted removal
            shutil.rmtree(final)
        work.rename(final)
        sync_path(final.parent)
        fault_point(f"commit:{stage.name}:renamed")

    @contextlib.contextmanager
    def _locked(self, name: str, on_wait: Callable[[str], None]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self._flock(name, fcntl.LOCK_EX | fcntl.LOCK_NB))
            except BlockingIOError:
                on_wait((self.root / "locks" / name).read_text().strip() or "another")
                stack.enter_context(self._flock(name, fcntl.LOCK_EX))
            yield

    @contextlib.contextmanager
    def _flock(self, name: str, mode: int) -> Iterator[None]:
        path = self.root / "locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as file:
            fcntl.flock(file, mode)
            if mode & fcntl.LOCK_EX:
                file.truncate(0)
                file.write(f"{os.getpid()}\n")
                file.flush()
            yield


def _same(artefact: Artefact) -> Artefact:
    return artefact


def _differences(old: Mapping[str, Json], new: Mapping[str, Json], prefix: str = "") -> list[str]:
    """Dotted names of the values that differ between two nested dictionaries."""
    changed: list[str] = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            changed += _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            changed.append(f"{prefix}{name}")
    return changed


def _listed(folder: Path) -> dict[str, dict[str, Json]]:
    """Every file below `folder`, with size and `digest_bytes`."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {str(path.relative_to(folder)): {"size_bytes": path.stat().st_size, "digest": digest_bytes(path)} for path in paths}


def _sync_all(folder: Path) -> None:
    """Makes a folder and all below it durable, all at once: most of it is waiting for the disk, which writes them together."""
    list(_waiting_for_disk(os.getpid()).map(sync_path, [folder, *folder.rglob("*")]))


@cache
def _waiting_for_disk(_: int) -> ThreadPoolExecutor:
    """Threads of a process (a forked one has none of its parent's), as starting new ones for each commit is felt."""
    return ThreadPoolExecutor(8, "sync")


def _folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
