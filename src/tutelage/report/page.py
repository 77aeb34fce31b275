"""The report as one HTML page that loads nothing: text in, text out. Pure but for its own template.

Every string of the data goes through `visible` and Jinja's autoescape; the content policy allows this page's one style
sheet and one script by their digests and nothing else, so even a hole in the escaping could not run or fetch anything.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

import tutelage
from tutelage.records import Kind
from tutelage.report import charts, tables, verdict
from tutelage.report.data import ReportData, Run, SamplePair
from tutelage.report.flow import flow_svg
from tutelage.report.look import chunks, emphasis, visible
from tutelage.report.overfit import gap_table, overfit_table
from tutelage.report.plan_context import plan_context

_FILES = ("page.html.j2", "page.css", "page.js")
_PARTS = ("macros.html.j2", "plan_section.html.j2")
_HOVER_TOKENS = 12
_EXCERPT_CHARS = 600


def render_page(data: ReportData) -> str:
    """The whole page. Raises `MissingExtra` without Altair."""
    template, css, js = (package_file(name) for name in _FILES)
    page = environment().from_string(template)
    return page.render(
        data=data,
        policy=content_policy(css, js),
        css=Markup(css),
        js=Markup(js),
        version=tutelage.__version__,
        sections=list(_sections(data)),
        is_trained=any(task.realised for task in data.mixture),
        has_plan=data.plan is not None,
        kinds=[kind.name.lower() for kind in Kind],
        ended=_ended(data.samples),
        **_verdict(data),
        **_tables(data),
        **_charts(data),
        **(plan_context(data.plan) if data.plan is not None else {}),
    )


def page_digest() -> str:
    """Digest of template, style and script: a page made by another version of them is another page."""
    return hashlib.blake2b("\0".join(package_file(name) for name in (*_FILES, *_PARTS)).encode(), digest_size=16).hexdigest()


def package_file(name: str) -> str:
    """The text of a file that lies beside this module."""
    return resources.files("tutelage.report").joinpath(name).read_text(encoding="utf-8")


def content_policy(css: str, js: str) -> str:
    """The content policy of a page with exactly this style sheet and this script, and nothing fetched."""
    allowed = (
        "default-src 'none'",
        f"style-src {_source(css)}",
        f"script-src {_source(js)}",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    )
    return "; ".join(allowed)


def _source(text: str) -> str:
    """A content policy's name for exactly this inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def environment() -> jinja2.Environment:
    """Autoescape, the filters of our pages, and templates that lie beside this module."""
    loader = jinja2.FunctionLoader(package_file)
    made = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=_final, trim_blocks=True, loader=loader)
    made.filters |= {
        "write": tables.write,
        "spoken": tables.spoken,
        "plural": tables.plural,
        "drawn": Markup,  # our own SVG, escaped where it was made
        "emphasis": emphasis,
        "chunks": lambda run: chunks(run, _HOVER_TOKENS),
        "hover": _hover,
        "excerpt": lambda text: text if len(text) <= _EXCERPT_CHARS else text[:_EXCERPT_CHARS] + "…",
        "sentence": sentence,
    }
    return made


def sentence(text: str) -> str:
    """A remark as a sentence of the page.

    >>> sentence("coverage: 3 tasks")
    'Coverage: 3 tasks.'
    """
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _final(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _hover(run: Run) -> str:
    """What a tooltip says of a few tokens: kind, weight, texts and ids."""
    if not run.ids:
        return ""
    pieces = "\N{MIDDLE DOT}".join(piece.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}") for piece in run.pieces)
    return f"{tables.spoken(run.kind)}, weight {run.weight:g}\n{pieces}\n{' '.join(map(str, run.ids))}"


def _sections(data: ReportData) -> Iterator[tuple[str, str]]:
    parts = (
        ("verdict", "Verdict", True),
        ("data", "Data", data.flows),
        ("mixture", "Mixture", data.mixture),
        ("audit", "Audit", data.audit),
        ("training", "Training", data.curves),
        ("overfit", "Overfit", data.overfit),
        ("samples", "Samples", data.samples),
        ("examples", "Examples", data.examples),
        ("provenance", "Provenance", True),
    )
    return ((name, label) for name, label, is_there in parts if is_there)


def _ended(samples: tuple[SamplePair, ...]) -> str:
    """How many answers ended by themselves, before and after."""
    pairs = [(pair.before, pair.after) for pair in samples]
    both = [(before, after) for before, after in pairs if before is not None and after is not None]
    if not both:
        return ""
    before, after = sum(b.ended for b, _ in both), sum(a.ended for _, a in both)
    return f"Answers that ended by themselves: {before} of {len(both)} before, {after} of {len(both)} after."


def _verdict(data: ReportData) -> dict[str, Any]:
    return {
        "headline": verdict.headline(data),
        "verdicts": verdict.by_task(data.task_changes),
        "figures": verdict.figures(data),
        "drop_sentence": verdict.drop_sentence(data),
        "extension": verdict.extension_sentence(data),
    }


def _tables(data: ReportData) -> dict[str, Any]:
    packages: dict[str, str] = {}
    for account in data.accounts:
        packages |= account.packages
    return {
        "change_table": tables.change_table(data.changes),
        "flow_table": tables.flow_table(data.flows),
        "mixture_table": tables.mixture_table(data.mixture),
        "realised_table": tables.realised_table(data.mixture),
        "supervision_table": tables.supervision_table(data.audit.get("sources", {})),
        "finding_table": tables.finding_table(data.audit.get("findings", ())),
        "finding_lines": tables.finding_lines(data.audit.get("findings", ())),
        "accounting_table": tables.accounting_table(data.accounts),
        "overfit_table": overfit_table(data.overfit) if data.overfit is not None else None,
        "gap_table": gap_table(data.overfit) if data.overfit is not None and data.overfit.gaps else None,
        "steps": tables.steps_table(data.plan_facts).texts(),
        "train_facts": tables.fact_rows(data.train_facts),
        "packages": sorted(packages.items()),
    }


def _charts(data: ReportData) -> dict[str, Any]:
    return {
        "change_charts": charts.change_charts(data.changes),
        "mixture_charts": charts.mixture_charts(tables.unit_shares(data.mixture)),
        "loss_charts": charts.loss_charts(data.curves),
        "rate_chart": charts.learning_rate_chart(data.learning_rates) if data.learning_rates else None,
        "flow_wide": flow_svg(data.flows, width_px=860),
        "flow_narrow": flow_svg(data.flows, width_px=380),
    }
