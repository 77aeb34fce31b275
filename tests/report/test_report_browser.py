"""The page in a real browser. Skipped only where no Chromium is installed."""

import json
import subprocess

import pytest
from report_browser import Browser, find_browser
from report_fakes import fake_report, hostile_report

from tutelage.report.page import render_page

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium found on PATH: the page is not opened for real")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, data in (("full", fake_report()), ("hostile", hostile_report())):
        (folder / f"{name}.html").write_text(render_page(data), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "no scripts"])
@pytest.mark.parametrize("name", ["full", "hostile"])
def test_the_page_opens_without_a_complaint_and_asks_for_nothing(browser, pages, name, scripts):
    """Kills: a digest that does not fit its text, an inline style that the policy refuses, anything fetched."""
    page = browser.open(pages / f"{name}.html", scripts=scripts)
    assert page.problems == []
    assert page.requests == [(pages / f"{name}.html").as_uri()]
    assert page.evaluate("getComputedStyle(document.body).maxWidth") == "1216px"  # the style sheet was let in
    assert (page.evaluate("document.querySelectorAll('button').length") > 0) == (scripts and name == "full")


@pytest.mark.parametrize("width", [320, 400, 1000, 1600])
def test_no_page_is_wider_than_the_window_with_everything_open(browser, pages, width):
    """Kills: a table, a long word or a picture that makes the whole page scroll sideways."""
    for name in ("full", "hostile"):
        page = browser.open(pages / f"{name}.html", width=width)
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name


def test_every_fold_opens_without_scripts_from_the_keyboard(browser, pages):
    """Kills: a fold that only a pointer or a script can open."""
    page = browser.open(pages / "full.html", scripts=False)
    page.evaluate("document.querySelector('details:not([open]) > summary').focus()")
    page.press("Enter")
    assert page.evaluate("document.activeElement.parentElement.open") is True


def test_the_button_opens_all_folds_of_its_section(browser, pages):
    """Kills: a script that the policy lets in and that does nothing."""
    page = browser.open(pages / "full.html")
    page.evaluate("document.querySelector('#examples button').click()")
    assert page.evaluate("document.querySelectorAll('#examples > details:not([open])').length") == 0
    assert page.evaluate("document.querySelector('#data > details').open") is False


def test_the_page_turns_dark_and_its_charts_with_it(browser, pages):
    """Kills: black axis labels on a dark page."""
    ground, text = "document.body", "document.querySelector('.panels svg text')"
    asked = f"[getComputedStyle({ground}).backgroundColor, getComputedStyle({text}).fill].join()"
    light, dark = (browser.open(pages / "full.html", dark=dark).evaluate(asked) for dark in (False, True))
    assert light == "rgb(253, 253, 252),rgb(92, 102, 112)"
    assert dark == "rgb(21, 24, 28),rgb(163, 173, 183)"


def test_no_text_of_a_chart_is_cut_off(browser, pages):
    """Kills: axis labels that a wider font pushes out of the picture."""
    asked = """JSON.stringify([...document.querySelectorAll('.panels svg text, .flow svg text')].filter(t => {
        const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect();
        return a.width && (a.left < b.left - 0.5 || a.right > b.right + 0.5);
    }).map(t => t.textContent))"""
    for width in (400, 1000, 1600):
        assert json.loads(browser.open(pages / "full.html", width=width).evaluate(asked)) == []


def test_folded_text_is_printed(browser, pages, tmp_path):
    """Kills: a print of headlines without the records under them."""
    open_all = "document.querySelectorAll('details').forEach(d => d.open = true)"
    page = browser.open(pages / "full.html")
    folded = page.pdf()
    page.evaluate(open_all)
    unfolded = page.pdf()
    assert folded.startswith(b"%PDF") and abs(folded.count(b"/Type /Page\n") - unfolded.count(b"/Type /Page\n")) <= 1


def test_nothing_of_the_browser_is_left_running():
    """Kills: a test helper that leaks processes."""
    with Browser() as opened:
        pid = opened._process.pid
    assert subprocess.run(["ps", "-p", str(pid)], capture_output=True, check=False).returncode == 1
