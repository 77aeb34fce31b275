"""The page of `tutelage look --html`: examples to browse, their tokens by kind and weight, the loss policy switched live.

The page holds facts (`packed.py`) and one small table per policy; weights are computed in the browser by the rule of
`plan/weights.py`. Like the report it loads nothing and sends nothing. All data travels as base64 of deflated bytes, so no
string of it can be read as markup; the script writes text nodes only.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

import jinja2
from markupsafe import Markup

import tutelage
from tutelage.report.look import visible
from tutelage.report.packed import PlannedExample, Policy, Vocabulary, pack
from tutelage.report.page import content_policy, package_file

SORTS = ("plan", "worst", "longest")
"""Ways to order the list: as planned, least supervised share first, longest first."""


def render_browse(
    examples: Sequence[PlannedExample],
    policies: Sequence[Policy],
    vocabulary: Vocabulary,
    *,
    title: str,
    num_planned: int,
    sort: str = "plan",
) -> str:
    """The whole page. The first policy is the recipe's own; `sort` (one of SORTS) is how the list begins."""
    assert sort in SORTS, f"{sort} is no way to sort"
    template, css, js = (package_file(f"browse.{name}") for name in ("html.j2", "css", "js"))
    data = base64.b64encode(pack(examples, policies, vocabulary, {"num_planned": num_planned, "sort": sort})).decode()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(
        title=visible(title),
        policy=content_policy(css, js),
        css=Markup(css),
        js=Markup(js),
        data=data,
        version=tutelage.__version__,
    )
