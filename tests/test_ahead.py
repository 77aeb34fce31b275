"""Work done beside one another: results are the same, failures are met again, and a killed parent leaves nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from small_recipe import write_small
from tutelage import pipeline
from tutelage.ahead import do_ahead, num_processes
from tutelage.errors import TutelageError
from tutelage.recipe import load_recipe
from tutelage.store import Silent, Store

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked on Linux only")


class _Heard(Silent):
    def __init__(self):
        self.notes, self.ended = [], 0

    def advance(self, amount=1, text=""):
        self.ended += amount

    def note(self, text):
        self.notes.append(text)


def test_every_job_is_done_and_what_it_says_is_heard(tmp_path):
    """Kills jobs left over, and notes that stay in the child."""

    def job(number):
        def work(told):
            (tmp_path / str(number)).write_text(str(os.getpid()))
            told.note(f"job {number}\nin two lines")

        return work

    heard = _Heard()
    do_ahead([job(number) for number in range(7)], processes=3, progress=heard)
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(number) for number in range(7)]
    assert str(os.getpid()) not in {path.read_text() for path in tmp_path.iterdir()}
    assert sorted(heard.notes) == [f"job {number}\nin two lines" for number in range(7)]
    assert heard.ended == 7


def test_jobs_run_beside_one_another(tmp_path):
    """Kills one after the other: each of two jobs waits for the other's sign."""

    def job(mine, other):
        def work(told):
            (tmp_path / mine).touch()
            (tmp_path / f"{mine} met").write_text(str(_appears(tmp_path / other)))

        return work

    do_ahead([job("a", "b"), job("b", "a")], processes=2, progress=Silent())
    assert (tmp_path / "a met").read_text() == (tmp_path / "b met").read_text() == "True"


def test_the_rest_of_a_job_is_done_beside_the_next(tmp_path):
    """Kills a process that waits for the disk before it goes on, in both phases: each rest waits for the next job's sign."""

    def job(name, number):
        def rest():
            (tmp_path / f"{name} {number} met").write_text(str(_appears(tmp_path / f"{name} {number + 1}")))

        def work(told):
            (tmp_path / f"{name} {number}").touch()
            return rest if number == 0 else None

        return work

    heard = _Heard()
    do_ahead([job("a", n) for n in range(2)], processes=1, progress=heard, then=[job("b", n) for n in range(2)])
    assert [(tmp_path / f"{name} 0 met").read_text() for name in "ab"] == ["True", "True"]
    assert heard.ended == 4


def _appears(path):
    deadline = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return path.exists()


def test_a_child_that_fails_or_dies_is_no_error_here(tmp_path):
    """Kills a run that ends without saying where the fault is: the work is done again where it can be told."""

    def fails(told):
        raise ValueError("no")

    def dies(told):
        os.kill(os.getpid(), signal.SIGKILL)

    def works(told):
        (tmp_path / "done").touch()

    do_ahead([fails, dies, works, lambda told: lambda: fails(told)], processes=2, progress=Silent())
    assert (tmp_path / "done").exists()


def test_a_killed_parent_takes_its_children_along(tmp_path):
    """Kills orphans that go on writing."""
    script = textwrap.dedent(f"""
        import os, time
        from pathlib import Path
        from tutelage.ahead import do_ahead
        from tutelage.store import Silent
        def work(told):
            Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
            time.sleep(60)
        do_ahead([work], processes=1, progress=Silent())
    """)
    parent = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 30
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    child = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    while time.monotonic() < deadline and _is_alive(child):
        time.sleep(0.02)
    assert not _is_alive(child)


def _is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_number_of_processes_can_be_said(monkeypatch):
    """Kills a setting that nobody reads."""
    monkeypatch.setenv("TUTELAGE_PROCESSES", "1")
    assert num_processes() == 1
    monkeypatch.delenv("TUTELAGE_PROCESSES")
    assert 1 <= num_processes() <= 8


def _prepared(file, folder, monkeypatch, *, processes):
    monkeypatch.setenv("TUTELAGE_PROCESSES", str(processes))
    monkeypatch.setattr(pipeline, "WORTH_PROCESSES", 0)
    store = Store(folder / "store")
    done = pipeline.run(file, until="render", store=store, runs=folder / "runs")
    return {label: (a.key, a.manifest["counts"], _digests(a)) for label, a in done.artefacts.items()}, done


def _digests(artefact):
    return {name: said["digest"] for name, said in artefact.manifest["files"].items()}


def test_a_run_on_all_cores_leaves_what_a_run_on_one_leaves(tmp_path, monkeypatch):
    """Kills stages that depend on where they were built, and built ones that are told as found."""
    file = load_recipe(write_small(tmp_path / "data"))
    one, done_one = _prepared(file, tmp_path / "one", monkeypatch, processes=1)
    many, done_many = _prepared(file, tmp_path / "many", monkeypatch, processes=3)
    assert one == many
    assert done_one.num_built == done_many.num_built
    assert any(label.startswith("render") and not a.is_hit for label, a in done_many.artefacts.items())


def test_an_error_in_a_child_is_told_by_the_parent(tmp_path, monkeypatch):
    """Kills an error that stays in the child."""
    path = write_small(tmp_path / "data")
    (tmp_path / "data" / "bad.jinja").write_text("{{ broken")
    broken = load_recipe(path, overrides=["render.template=bad.jinja"])
    with pytest.raises(TutelageError, match="not valid Jinja"):
        _prepared(broken, tmp_path / "bad", monkeypatch, processes=2)


@pytest.mark.parametrize("is_opened_meanwhile", [False, True])
def test_jobs_that_follow_begin_when_the_ones_before_them_have_ended(tmp_path, is_opened_meanwhile):
    """Kills one that follows before all is done of the one before, one left over, and new children where old ones could go on."""

    def first(number):
        def rest():
            time.sleep(0.01 * (number % 3))
            (tmp_path / f"first {number}").write_text(str(os.getpid()))

        return lambda told: rest

    def following(number):
        def work(told):
            assert (tmp_path / f"first {number}").exists()
            (tmp_path / f"then {number}").write_text(str(os.getpid()))

        return work

    heard, more = _Heard(), {"meanwhile": lambda: None} if is_opened_meanwhile else {}
    do_ahead([first(n) for n in range(9)], processes=2, progress=heard, then=[following(n) for n in range(9)], **more)
    of = {kind: {path.read_text() for path in tmp_path.glob(f"{kind} *")} for kind in ("first", "then")}
    assert len(list(tmp_path.iterdir())) == heard.ended == 18
    assert of["then"].isdisjoint(of["first"]) if is_opened_meanwhile else of["then"] <= of["first"] | of["then"]
    assert len(of["first"] | of["then"]) <= (4 if is_opened_meanwhile else 2)
