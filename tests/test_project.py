"""Promises of the project itself: light imports, a true map, a true `__all__`, up-to-date pages, words that stay out."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import tutelage

ROOT = Path(__file__).parents[1]
TRACKED = ("src", "tests", "docs", "benchmarks", "recipes")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.mark.parametrize("action", ["import tutelage", "import tutelage.pipeline", "import tutelage.cli; tutelage.cli.main()"])
def test_import_and_help_load_neither_torch_nor_transformers(action: str) -> None:
    """Kills a heavy import at the top of a module: newcomers would wait seconds for --help."""
    code = f"import sys; sys.argv = ['tutelage', '--help']\ntry:\n    {action}\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr


def test_help_takes_less_than_half_a_second_of_cpu() -> None:
    """Kills a command line that imports its rooms before it knows the verb. CPU time, so that a busy machine is no failure."""
    code = "import sys, time; sys.argv = ['tutelage', '--help']\nfrom tutelage.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    done = python("-c", code + "sys.stderr.write(str(time.process_time()))")
    assert float(done.stderr) < 0.5


def test_every_public_name_exists_and_is_no_subpackage() -> None:
    """Kills a stale `__all__`, and a public function that hides a room of the same name."""
    rooms = {path.parent.name for path in (ROOT / "src/tutelage").glob("*/__init__.py")}
    assert sorted(tutelage.__all__) == tutelage.__all__
    for name in tutelage.__all__:
        assert callable(getattr(tutelage, name))
        assert name not in rooms
    with pytest.raises(AttributeError):
        tutelage.nothing  # noqa: B018


def test_the_map_in_the_readme_names_every_module_once() -> None:
    """Kills a map that a new file is not added to, or that names a file which is gone."""
    text = (ROOT / "README.md").read_text()
    section = text.split("## The map")[1].split("\n## ")[0]
    mapped = re.findall(r"^ *([\w/.]+\.(?:py|j2|css|js)) ", section, re.MULTILINE)
    files = (ROOT / "src/tutelage").rglob("*")
    real = [p.relative_to(ROOT / "src/tutelage").as_posix() for p in files if p.suffix in (".py", ".j2", ".css", ".js")]
    real = [name for name in real if not name.endswith("__init__.py")]
    assert sorted(mapped) == sorted(real)


def test_generated_pages_are_up_to_date() -> None:
    """Kills a recipe page that no longer says what recipes hold."""
    done = python("docs/build.py", "--check")
    assert done.returncode == 0, done.stderr


def test_every_verb_of_the_command_line_is_in_the_readme() -> None:
    """Kills a verb nobody can find."""
    text = (ROOT / "README.md").read_text()
    for verb in ("new", "check", "explain", "look", "run", "plan", "export", "train", "eval", "report", "chat", "gc"):
        assert f"tutelage {verb}" in text, verb


def test_links_in_the_documents_lead_somewhere() -> None:
    """Kills a link to a page that was moved."""
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_pin_of_torch_is_the_same_everywhere() -> None:
    """Kills an environment that quietly differs between the Makefile and the constraints."""
    assert "torch==2.13.0" in (ROOT / "Makefile").read_text()
    constraints = (ROOT / "constraints.txt").read_text()
    assert re.search(r"^torch==2\.13\.0$", constraints, re.MULTILINE)


def test_every_test_says_which_wrong_program_it_kills() -> None:
    """Kills a test without a purpose."""
    silent = []
    for path in (ROOT / "tests").rglob("test_*.py"):
        for name, body in re.findall(
            r"^def (test_\w+)\(.*?\) -> None:\n(.*?)(?=^\S|\Z)", path.read_text(), re.MULTILINE | re.DOTALL
        ):
            if '"""' not in body.split("\n", 1)[0]:
                silent.append(f"{path.name}::{name}")
    assert not silent
