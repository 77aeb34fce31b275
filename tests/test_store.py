"""The store: content keys, atomic commits, locks, explanations, garbage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.errors import StoreError
from tutelage.store import Artefact, Counts, Outcome, Progress, Silent, Stage, Store, canonical_json, digest_json


def stage(value: object = 1, *, name: str = "read", slot: str = "a", **more: object) -> Stage:
    def build(folder: Path, inputs: Mapping[str, Artefact], progress: Progress) -> Outcome:
        (folder / "data.txt").write_text(f"{value}")
        return Outcome(Counts(3, 2, {"empty": 1}), {"value": value})

    return Stage(name, 1, {"value": value}, build, slot=slot, **more)  # type: ignore[arg-type]


def test_a_second_request_is_a_hit_and_builds_nothing(tmp_path: Path) -> None:
    """Kills a store that builds every time."""
    store = Store(tmp_path)
    assert not store.produce(stage(), {}).is_hit
    again = store.produce(stage(), {})
    assert again.is_hit
    assert again.file("data.txt").read_text() == "1"
    assert again.manifest["counts"] == {"in": 3, "out": 2, "dropped": {"empty": 1}}


def test_every_ingredient_and_input_changes_the_key() -> None:
    """Kills a key that forgets the stage version, an upstream key, or the stage's name."""
    base = stage()
    keys = {
        base.key,
        stage(2).key,
        stage(name="other").key,
        stage(inputs={"up": stage(2)}).key,
        stage(inputs={"up": stage(3)}).key,
        stage(packages=("numpy",)).key,
        Stage("read", 2, base.ingredients, base.build).key,
    }
    assert len(keys) == 7
    assert stage(slot="b").key == base.key, "the slot is a name for people"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), json_values, max_size=4))
def test_the_key_does_not_depend_on_the_order_of_keys(value: dict[str, object]) -> None:
    """Kills a digest of unsorted JSON, under which equal recipes miss."""
    assert digest_json(value) == digest_json(dict(reversed(value.items())))
    assert json.loads(canonical_json(value)) == value


def test_an_account_that_does_not_add_up_is_never_committed(tmp_path: Path) -> None:
    """Kills a stage that loses a record in silence."""
    with pytest.raises(AssertionError, match="unaccounted"):
        Counts(3, 1, {"empty": 1})


def test_a_failed_build_leaves_no_artefact(tmp_path: Path) -> None:
    """Kills a store that commits what an exception interrupted."""

    def build(folder: Path, inputs: Mapping[str, Artefact], progress: Progress) -> Outcome:
        (folder / "half.txt").write_text("half")
        raise RuntimeError("disk full")

    broken = Stage("read", 1, {}, build)
    store = Store(tmp_path)
    with pytest.raises(RuntimeError):
        store.produce(broken, {})
    assert store.find(broken) is None


def test_an_earlier_half_is_wiped_unless_the_stage_can_resume(tmp_path: Path) -> None:
    """Kills a rebuild that mixes the files of a killed build into the new one."""
    seen: list[list[str]] = []

    def build(folder: Path, inputs: Mapping[str, Artefact], progress: Progress) -> Outcome:
        seen.append(sorted(path.name for path in folder.iterdir()))
        (folder / "part.txt").write_text("x")
        if len(seen) in (1, 3):
            raise RuntimeError
        return Outcome(Counts(0, 0))

    store = Store(tmp_path)
    for resumable in (False, True):
        wanted = Stage("train", 1, {"resumable": resumable}, build, resumable=resumable)
        with pytest.raises(RuntimeError):
            store.produce(wanted, {})
        store.produce(wanted, {})
    assert seen == [[], [], [], ["part.txt"]]


CHILD = """
    import sys, time
    from pathlib import Path
    from tutelage.store import Counts, Outcome, Stage, Store
    def build(folder, inputs, progress):
        with Path(sys.argv[2]).open("a") as log:
            log.write("built\\n")
        print("building", flush=True)
        time.sleep(float(sys.argv[3]))
        (folder / "data.txt").write_text("x")
        return Outcome(Counts(1, 1))
    Store(sys.argv[1]).produce(Stage("slow", 1, {}, build), {})
"""


def child(tmp_path: Path, seconds: float, **env: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path / "store"), str(tmp_path / "log"), str(seconds)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=os.environ | env)


def test_two_processes_build_once(tmp_path: Path) -> None:
    """Kills a store without locks: both would build, one over the other."""
    with child(tmp_path, 0.5) as first:
        assert first.stdout is not None
        first.stdout.readline()
        with child(tmp_path, 0.0) as second:
            assert (first.wait(), second.wait()) == (0, 0)
    assert (tmp_path / "log").read_text() == "built\n"


def test_an_artefact_begun_is_seen_when_it_is_committed_and_not_built_twice(tmp_path: Path) -> None:
    """Kills a lock freed before the commit, a folder named before it is durable, and a commit for each request."""
    store = Store(tmp_path)
    commit = store.begin(stage(), {})
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(Store(tmp_path).produce, stage(), {})
        with pytest.raises(TimeoutError):
            other.result(timeout=0.3)
        assert store.find(stage()) is None and (store.work_folder(stage()) / "data.txt").exists()
        assert not pool.submit(commit).result().is_hit
        assert other.result(timeout=30).is_hit
    assert store.begin(stage(), {})().is_hit and len(list(store.artefacts())) == 1


def test_a_remembered_digest_that_was_cut_off_is_made_anew(tmp_path: Path) -> None:
    """Kills a run that ends at what a power failure left of a file nobody waited for."""
    store, data = Store(tmp_path / "store"), tmp_path / "data.jsonl"
    data.write_text("{}")
    os.utime(data, (1e9, 1e9))
    digest = store.file_digest(data)
    (memo,) = (tmp_path / "store" / "digests").iterdir()
    for left in (b"", memo.read_bytes()[:9], bytes(40)):
        memo.write_bytes(left)
        assert store.file_digest(data) == digest
        assert json.loads(memo.read_text())["xxh3"] == digest


def test_the_lock_of_a_killed_owner_is_free(tmp_path: Path) -> None:
    """Kills a lock file whose presence is the lock: it would outlive its owner for ever."""
    with child(tmp_path, 60) as first:
        assert first.stdout is not None
        first.stdout.readline()
        first.kill()
    with child(tmp_path, 0.0) as second:
        assert second.wait(timeout=30) == 0


@pytest.mark.parametrize("point", ["build:slow", "commit:slow:start", "commit:slow:manifest", "commit:slow:renamed"])
def test_a_process_killed_anywhere_in_a_build_leaves_a_miss_or_a_whole_artefact(tmp_path: Path, point: str) -> None:
    """Kills a commit that renames before the manifest is durable, or writes in place."""
    with child(tmp_path, 0.0, TUTELAGE_KILL_AT=point) as killed:
        assert killed.wait() == -signal.SIGKILL
    with child(tmp_path, 0.0) as second:
        assert second.wait() == 0
    (whole,) = list(Store(tmp_path / "store").artefacts())
    assert whole.file("data.txt").read_text() == "x"
    assert (tmp_path / "log").read_text().count("built") == (1 if point in ("build:slow", "commit:slow:renamed") else 2)


def test_a_miss_names_what_changed_against_the_nearest_artefact(tmp_path: Path) -> None:
    """Kills an explanation that compares with another source's artefact or says only `miss`."""
    store = Store(tmp_path)
    old = Stage("read", 1, {"spec": {"path": "a", "shape": "auto"}, "files": {"x": "1"}}, stage().build, slot="a")
    other = Stage("read", 1, {"spec": {"path": "b", "shape": "auto"}, "files": {"x": "2"}}, stage().build, slot="b")
    store.produce(old, {})
    store.produce(other, {})
    new = Stage("read", 1, {"spec": {"path": "a", "shape": "auto"}, "files": {"x": "2"}}, stage().build, slot="a")
    assert store.why_missing(new) == ["files.x"]
    assert store.why_missing(stage(name="never")) == ["never run"]


def test_a_file_digest_follows_the_content(tmp_path: Path) -> None:
    """Kills a digest of path, size and mtime: one byte changed within a second must change it."""
    store = Store(tmp_path / "store")
    path = tmp_path / "data"
    path.write_bytes(b"aaaa")
    os.utime(path, ns=(10**18, 10**18))
    first = store.file_digest(path)
    assert store.file_digest(path) == first
    path.write_bytes(b"aaab")
    assert store.file_digest(path) != first


def test_gc_keeps_what_living_runs_and_named_recipes_refer_to(tmp_path: Path) -> None:
    """Kills a collector that frees a run's artefacts, or keeps those of a deleted run."""
    store = Store(tmp_path / "store")
    kept, named, lost = (store.produce(stage(value), {}) for value in (1, 2, 3))
    run = tmp_path / "run"
    run.mkdir()
    store.remember_run(run, {f"read/{kept.key}": "read a"})
    (store.root / "work" / "train-dead").mkdir(parents=True)
    doomed = store.garbage([f"read/{named.key}"])
    assert {path.name for path, _ in doomed} == {lost.key, "train-dead"}
    store.collect([path for path, _ in doomed])
    assert {a.key for a in store.artefacts()} == {kept.key, named.key}
    run.rmdir()
    assert {path.name for path, _ in store.garbage()} == {kept.key, named.key}


def test_gc_refuses_while_a_run_uses_the_store(tmp_path: Path) -> None:
    """Kills a collector that pulls artefacts from under a run."""
    store = Store(tmp_path)
    store.produce(stage(), {}, Silent())
    with store.in_use(), pytest.raises(StoreError, match="using this store"):
        store.collect([path for path, _ in store.garbage()])
