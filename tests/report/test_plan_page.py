"""The plan's page: what it says is what the plan says, and a real browser shows it. Browser tests need a Chromium on PATH."""

from __future__ import annotations

import json
import re

import pytest
from plan_fakes import BOOK, CAPPED, MIX, OFTEN, fake_estimate, fake_view, hostile_view
from report_browser import Browser, find_browser
from report_fakes import HOSTILE

from tutelage.errors import MissingExtra
from tutelage.plan.spec import MixSpec
from tutelage.report import charts, plan_charts, plan_tables
from tutelage.report.page import package_file
from tutelage.report.plan_page import render_plan
from tutelage.report.plan_view import cover
from tutelage.report.spec import CoverageSpec
from tutelage.report.tables import write

needs_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium found on PATH: the page is not opened for real")
MANY = {f"task-{i:02}": 20 + 9 * i for i in range(40)}


def page_of(view, **more):
    return render_plan(view, title="book", recipe_text="name: book\n", **more)


def views():
    plain = fake_view()
    return {
        "plain": plain,
        "capped": fake_view(mix=CAPPED),
        "often": fake_view(mix=OFTEN),
        "many": fake_view(MANY, MixSpec(total_examples=3000)),
        "one": fake_view({"only": 30}, MixSpec()),
        "estimated": fake_view(estimate=fake_estimate(plain)),
        "hostile": hostile_view(HOSTILE),
    }


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    for name, view in views().items():
        (folder / f"{name}.html").write_bytes(page_of(view).encode("utf-8", "replace"))
    return folder


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@needs_browser
@pytest.mark.parametrize("name", list(views()))
def test_the_page_opens_without_a_complaint_and_asks_for_nothing(browser, pages, name):
    """Kills: a digest that does not fit its text, a style that the policy refuses, anything fetched, a name read as markup."""
    page = browser.open(pages / f"{name}.html")
    assert page.problems == []
    assert page.requests == [(pages / f"{name}.html").as_uri()]
    assert page.evaluate("document.images.length") == 0
    assert page.evaluate("getComputedStyle(document.body).maxWidth") == "1216px"


@needs_browser
def test_the_five_pictures_and_the_others_are_drawn(browser, pages):
    """Kills: a picture left out, an empty one, one without a legend or without words for those who do not see it."""
    page = browser.open(pages / "plain.html")
    asked = """JSON.stringify([...document.querySelectorAll('figure')].map(f => ({
        title: f.querySelector('figcaption').textContent, marks: f.querySelectorAll('svg path, svg rect, svg line').length,
        words: f.querySelector('svg').getAttribute('aria-label').length, width: f.querySelector('svg').getBoundingClientRect().width,
        keys: f.querySelectorAll('.keys li').length})))"""
    figures = json.loads(page.evaluate(asked))
    titles = [figure["title"] for figure in figures]
    assert titles[:7] == [
        "share of examples by temperature",
        "the smaller tasks over the temperature",
        "boost over proportional",
        "visits per record, needed and planned",
        "final composition beside what is available",
        "mixture over training",
        "share of the gradient's weight by kind of token",
    ]
    assert [title.split(":")[0] for title in titles[7:]] == sorted(BOOK)
    assert all(figure["marks"] > 5 and figure["words"] > 40 and figure["width"] > 150 for figure in figures)
    assert all(figure["keys"] >= 2 for figure in figures[:7])


@needs_browser
def test_the_numbers_on_the_page_are_those_of_the_plan(browser, pages):
    """Kills: a table of another plan, columns swapped, shares of the wrong unit, numbers rounded by a rule of their own."""
    page, facts = browser.open(pages / "capped.html"), fake_view(mix=CAPPED).facts
    asked = "JSON.stringify([...document.querySelectorAll('table')].map(t => [t.caption.textContent, [...t.tBodies[0].rows].map(r => [...r.cells].map(c => c.textContent))]))"
    tables = dict(json.loads(page.evaluate(asked)))
    shown = {row[0]: row for row in tables["Mixture as planned, by task"]}
    promised = {row[0]: row for name, rows in tables.items() if name.startswith("Promised and realised") for row in rows}
    for line in facts["mixture"]:
        assert shown[line["task"]][1:4] == [
            write(line["available_examples"], "count"),
            write(line["planned_examples"], "count"),
            write(line["visits_per_record"], "ratio"),
        ]
        realised = [write(line[f"share_{unit}"], "share") for unit in ("examples", "tokens", "supervised")]
        assert promised[line["task"]][2:7:2] == realised
        assert promised[line["task"]][1] == write(line["promised_share"], "share")
    text = page.evaluate("document.body.textContent")
    assert f"{facts['num_steps']:,} steps" in text and f"{facts['total']['planned_tokens']:,} tokens" in text


@needs_browser
@pytest.mark.parametrize("width", [320, 400, 1000, 1600])
def test_no_page_is_wider_than_the_window_and_no_label_is_cut_off(browser, pages, width):
    """Kills: a legend, a table or a long name that makes the page scroll sideways; axis labels outside their picture."""
    cut = """JSON.stringify([...document.querySelectorAll('figure svg text')].filter(t => {
        const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect();
        return a.width && (a.left < b.left - 0.5 || a.right > b.right + 0.5);
    }).map(t => t.textContent))"""
    for name in ("plain", "many", "estimated", "hostile"):
        page = browser.open(pages / f"{name}.html", width=width)
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        if name != "hostile":
            assert json.loads(page.evaluate(cut)) == [], name


@needs_browser
def test_the_page_turns_dark_and_its_pictures_with_it(browser, pages):
    """Kills: a picture or a legend that keeps its light colours on a dark ground."""
    asked = "[document.body, document.querySelector('.key.task-4'), document.querySelector('figure svg [fill=\"#7a4fa3\"]')].map(e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).fill].join()).join('|')"
    light, dark = (browser.open(pages / "plain.html", dark=dark).evaluate(asked) for dark in (False, True))
    assert light.startswith("rgb(253, 253, 252)") and dark.startswith("rgb(21, 24, 28)")
    assert "rgb(122, 79, 163)" in light and "rgb(185, 151, 221)" in dark and "rgb(122, 79, 163)" not in dark


def test_the_pictures_use_only_colours_that_the_style_sheet_turns_dark():
    """Kills: a colour added to a picture that vanishes on a dark page; a legend whose key has no style."""
    css = package_file("page.css")
    drawn = plan_charts.pictures(fake_view())
    every = [*drawn["book"], drawn["kinds"], drawn["progress"], *drawn["lengths"]]
    svgs = "".join(picture.chart.svg for picture in every)
    assert set(re.findall(r'(?:fill|stroke)="(#[0-9a-f]+|[a-z]+)"', svgs)) - {"none", "transparent"} <= set(charts.PALETTE)
    keys = {key for picture in every for classes, _ in picture.legend for key in classes.split()}
    assert all(f".{key}" in css for key in keys)


def test_of_many_tasks_a_picture_shows_both_ends_and_a_legend_ends():
    """Kills: forty lines in one picture, a legend of forty colours, the rest left out in silence."""
    view = fake_view(MANY, MixSpec(total_examples=3000))
    shares, _, _, visits, composition = plan_charts.pictures(view)["book"]
    assert "the 12 largest and 12 smallest of 40 tasks" in shares.chart.title and "task-39" in shares.chart.alt
    assert len(view.pictures["tasks"]) == 24 and "task-20" not in visits.chart.alt
    assert [label for _, label in composition.legend][-1] == "others" and len(composition.legend) == 8
    assert len(plan_charts.pictures(view)["lengths"]) == 12


def test_equal_plans_give_equal_bytes():
    """Kills: names from a counter of the process, a clock, an unordered set."""
    assert page_of(fake_view()) == page_of(fake_view())


def test_an_estimate_says_so_everywhere_and_states_its_error():
    """Kills: a preview that can be taken for the plan."""
    text = page_of(fake_view(estimate=fake_estimate(fake_view())))
    for said in (
        "tutelage plan, estimated",
        "About ",
        "Estimated from 700 records of 3,480",
        "± 2 %",
        "What there is, estimated",
    ):
        assert said in text
    assert "stimated" not in page_of(fake_view())


def test_records_seen_often_are_counted_by_task():
    """Kills: tasks instead of records, four visits taken for more than four, a warning where there is none."""
    view = fake_view(mix=OFTEN)
    lines = plan_tables.warnings(view)
    by_task = {line["task"]: line for line in view.facts["mixture"]}
    assert [p.task for p in view.placed if p.num_often] == [task for task, line in by_task.items() if line["most_visits"] > 4]
    math = by_task["math"]
    assert any(line.startswith(f"task math: 80 records seen more than 4 times, the most {math['most_visits']}") for line in lines)
    assert plan_tables.warnings(fake_view(mix=MixSpec(epochs=4.0))) == []


def test_what_lies_in_the_rows_is_what_the_counts_say():
    """Kills: a page that repeats the promise instead of reading the rows."""
    view = fake_view(mix=MIX)
    for line, place in zip(view.facts["mixture"], view.placed, strict=True):
        assert (place.task, place.examples, place.tokens) == (line["task"], line["planned_examples"], line["planned_tokens"])
    assert sum(sum(lengths.counts) for lengths in view.lengths) == view.facts["total"]["available_examples"]
    for tenth in view.progress:
        assert sum(tenth["realised"].values()) == pytest.approx(1.0)


def test_coverage_names_what_is_missing():
    """Kills: a target that is met by tasks without records, pillars asked of tasks that are not labelled so."""
    mixture = [{"task": "reasoning", "available_examples": 700}, {"task": "coding", "available_examples": 20}]
    found = cover(mixture, CoverageSpec(min_tasks=2))
    assert found.small == (("coding", 20),) and not found.is_met
    assert found.missing_pillars == ("extraction", "generation", "conversation", "classification")
    assert plan_tables.coverage_line(found).startswith(
        "coverage: 2 tasks of 2 wanted; fewer than 500 examples in coding 20; no task for"
    )
    assert cover(mixture[:1], CoverageSpec(min_tasks=1)).is_met


def test_without_the_chart_package_the_extra_is_named(monkeypatch):
    """Kills: a bare ImportError."""
    monkeypatch.setitem(__import__("sys").modules, "altair", None)
    with pytest.raises(MissingExtra, match=r"tutelage\[report\]"):
        page_of(fake_view())
