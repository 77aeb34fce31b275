import base64
import hashlib
import itertools
import re
from html.parser import HTMLParser

import pytest
from report_fakes import HOSTILE, fake_report, hostile_report, planned_only

from tutelage.errors import MissingExtra
from tutelage.report import charts, page
from tutelage.report.data import ReportData
from tutelage.report.flow import flow_svg
from tutelage.report.look import visible

VOID = {"meta", "link", "br", "img", "input"}


class Outline(HTMLParser):
    """Elements, attributes and text of a page; asserts that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def full() -> str:
    return page.render_page(fake_report())


@pytest.fixture(scope="module")
def hostile() -> str:
    return page.render_page(hostile_report())


def test_hostile_data_adds_no_element_and_no_attribute(hostile):
    """Kills: one string that skipped the escaping, anywhere: markup, SVG, attributes, tooltips."""
    tame = Outline(hostile)
    assert tame.all("img") == [] and len(tame.all("script")) == 1 and len(tame.all("style")) == 1
    assert not any(name.startswith("on") or name == "style" for _, attrs in tame.elements for name in attrs)
    assert "\x00" not in hostile and "\u202e" not in hostile and "\u200f" not in hostile
    hostile.encode("utf-8")


def test_hostile_data_is_shown_as_it_is_and_not_evaluated(hostile):
    """Kills: stripping what looks dangerous; a second round through the template engine."""
    text = "".join(Outline(hostile).texts)
    assert visible(HOSTILE) in text and "{{ 7*7 }}" in text


def test_the_policy_allows_exactly_the_two_inline_texts(full):
    """Kills: a policy whose digests are not those of the text between the tags; `unsafe-inline`."""
    policy = next(m["content"] for m in Outline(full).all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    for tag in ("style", "script"):
        body = re.search(rf"<{tag}>(.*?)</{tag}>", full, re.S).group(1)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_page_names_no_address_outside_itself(full):
    """Kills: a font, a script or a picture from elsewhere."""
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\((?!#)|@import|//cdn", full)
    for tag, attrs in Outline(full).elements:
        for name in ("src", "href", "xlink:href"):
            value = attrs.get(name)
            assert value is None or value.startswith("#") or value == "data:,", (tag, value)


def test_sections_come_in_the_order_in_which_questions_arise(full):
    """Kills: a page that buries the verdict."""
    ids = [attrs["id"] for attrs in Outline(full).all("section")]
    assert ids == ["verdict", "data", "mixture", "audit", "training", "samples", "examples", "provenance"]


def test_headings_captions_and_pictures_serve_those_who_do_not_see(full):
    """Kills: a skipped heading level, a table without a caption, a picture without words, an id used twice."""
    outline = Outline(full)
    levels = [int(tag[1]) for tag, _ in outline.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert len(outline.all("caption")) == len(outline.all("table"))
    assert all(svg["role"] == "img" and len(svg["aria-label"]) > 20 for svg in outline.all("svg"))
    ids = [attrs["id"] for _, attrs in outline.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert all(th.get("scope") for th in outline.all("th"))


def test_everything_is_in_the_text_without_scripts(full):
    """Kills: content that only a script writes."""
    data, text = fake_report(), "".join(Outline(full.split("<script>")[0] + "</body></html>").texts)
    for task in data.mixture:
        assert task.task in text
    assert data.dropped[0].shown[0].excerpt in text and data.recipe_text in text
    assert data.samples[0].after.output in text
    assert "warning, unfinished answer: it breaks off." in text and "maths/data/maths.jsonl:17" in text
    assert "".join(run.text for run in data.examples[-1].runs if run.kind == "assistant") in text


def test_a_run_that_is_only_planned_makes_a_page_without_empty_sections():
    """Kills: headings over nothing; a verdict about a training that never was."""
    text = page.render_page(planned_only())
    ids = [attrs["id"] for attrs in Outline(text).all("section")]
    assert ids == ["verdict", "data", "mixture", "audit", "examples", "provenance"]
    assert "Nothing is trained yet" in text and "realised in training" not in text


def test_an_empty_report_still_is_a_page():
    """Kills: max() of nothing, a division by no records."""
    Outline(page.render_page(ReportData(title="empty", recipe_name="e", recipe_text="")))


def test_equal_data_give_equal_bytes(full):
    """Kills: names from a counter of the process, a clock, an unordered set."""
    assert page.render_page(fake_report()) == full


def test_charts_use_only_colours_that_the_style_sheet_turns_dark(full):
    """Kills: a colour added to a chart that vanishes on a dark page."""
    css = page.package_file("page.css")
    svgs = "".join(re.findall(r"<svg.*?</svg>", full, re.S))
    used = set(re.findall(r'(?:fill|stroke)="(#[0-9a-f]+|[a-z]+)"', svgs)) - {"none", "transparent"}
    assert used <= set(charts.PALETTE)
    for colour in charts.PALETTE:
        assert f'svg [fill="{colour}"]' in css and f'svg [stroke="{colour}"]' in css


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: str, b: str) -> float:
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("is_dark", [False, True])
def test_every_text_colour_reaches_4_5_to_1_on_every_ground_it_stands_on(is_dark):
    """Kills: a pleasant grey that nobody over fifty can read."""
    css = page.package_file("page.css")
    blocks = re.findall(r":root \{(.*?)\}", css, re.S)
    names: dict[str, str] = {}
    for block in blocks if is_dark else [b for i, b in enumerate(blocks) if i in (0, 2)]:
        names |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
    if is_dark:
        names |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", blocks[1])) | dict(
            re.findall(r"--([\w-]+): (#[0-9a-f]{6});", blocks[3])
        )
    for ground in ("paper", "panel"):
        for text in ("ink", "quiet", "train", "good", "bad", "held"):
            assert _contrast(names[text], names[ground]) >= 4.5, (text, ground)
    for tint in [name for name in names if name.startswith("k-")]:
        assert _contrast(names["ink"], names[tint]) >= 4.5, tint
        assert _contrast(names["quiet-on-tint"], names[tint]) >= 4.5, tint


def test_a_missing_chart_package_names_the_extra(monkeypatch):
    """Kills: a bare ImportError from inside a stage."""
    monkeypatch.setitem(__import__("sys").modules, "altair", None)
    with pytest.raises(MissingExtra, match=r"tutelage\[report\]"):
        charts.loss_charts(fake_report().curves)


def test_the_flow_picture_joins_rare_reasons_and_loses_none():
    """Kills: a tenth reason that falls out of the picture, and its records with it."""
    from tutelage.report.data import SourceFlow

    fates = {"planned": 100, **{f"reason_{i}": i + 1 for i in range(14)}}
    svg = flow_svg([SourceFlow("s", sum(fates.values()), fates)], width_px=860)
    shown = [int(n) for n in re.findall(r"(?:planned|reason \d+|other reasons) (\d+)</text>", svg)]
    assert "other reasons" in svg and sum(shown) == sum(fates.values())
