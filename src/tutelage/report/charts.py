"""Charts as SVG text, drawn offline by Altair through vl-convert; equal data give equal bytes.

Every colour is one of `PALETTE`; the page's style sheet restyles exactly these for the dark. Panels are small and stand in
a grid, so that no text shrinks on a narrow screen.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from types import ModuleType
from typing import Any

from tutelage.errors import MissingExtra
from tutelage.report.data import ALL_TASKS, Change, Curve
from tutelage.report.look import visible
from tutelage.report.tables import interval, write

INK, QUIET, RULE = "#1b1f24", "#5c6670", "#d9dde2"
TRAIN, HELD_OUT, GOOD, BAD, NEUTRAL, BAR = "#1f5f8b", "#a8541a", "#24704a", "#a6322b", "#7b848d", "#9dbbd2"
MORE_COLOURS = ("#7a4fa3", "#8a6d0b", "#1e7f86", "#b0457c", "#5b6fc0")
PALETTE = (INK, QUIET, RULE, TRAIN, HELD_OUT, GOOD, BAD, NEUTRAL, BAR, *MORE_COLOURS)

OUTCOME_COLOURS = {"better": GOOD, "worse": BAD, "unclear": NEUTRAL}
OUTCOME_SHAPES = {"better": "circle", "worse": "square", "unclear": "diamond"}

_PANEL_PX = 270
_ROW_PX = 24
_LETTER_PX = 7.2  # the widest common sans-serif at 11 px: the browser's font is not known when the axis is laid out
_NUMBERS_PX = 44  # room for the numbers of an axis, the same in every panel, so that panels line up


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing: its heading, what it shows in words, and the SVG."""

    title: str
    alt: str
    svg: str


def loss_charts(curves: Sequence[Curve]) -> list[Chart]:
    """One panel per task, the total first: loss by step, in training and held out."""
    tasks = sorted({curve.task for curve in curves}, key=lambda task: (task != ALL_TASKS, task))
    return [_loss_chart(task, [curve for curve in curves if curve.task == task]) for task in tasks]


def _loss_chart(task: str, curves: Sequence[Curve]) -> Chart:
    alt = _altair()
    rows = [
        {"step": step, "loss": value, "part": curve.part}
        for curve in curves
        for step, value in zip(curve.steps, curve.values, strict=True)
        if math.isfinite(value)
    ]
    x = alt.X("step:Q", title="step", axis=alt.Axis(format="d", tickMinStep=1, tickCount=5), scale=alt.Scale(nice=False))
    y = alt.Y("loss:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=4, minExtent=_NUMBERS_PX))
    line = alt.Chart(_values(rows)).transform_filter("datum.part === 'train'").mark_line(color=TRAIN, strokeWidth=1.3)
    points = alt.Chart(_values(rows)).transform_filter("datum.part !== 'train'")
    layers = [line.encode(x=x, y=y)]
    layers.append(points.mark_line(color=HELD_OUT, strokeWidth=1.6, strokeDash=[5, 3]).encode(x=x, y=y))
    layers.append(points.mark_point(color=HELD_OUT, filled=True, opacity=1, size=34).encode(x=x, y=y))
    chart = alt.layer(*layers).properties(width=_PANEL_PX, height=150)
    title = _label(task) or "all tasks"
    said = "; ".join(_said(curve) for curve in curves if curve.values)
    return Chart(title, f"Loss by step, {title}: {said}.", _svg(chart, f"loss of {title} by step: {said}"))


def _said(curve: Curve) -> str:
    return f"{curve.part} from {write(curve.values[0], 'loss')} to {write(curve.values[-1], 'loss')}"


def learning_rate_chart(rates: Sequence[tuple[int, float]]) -> Chart:
    """The learning rate by step, small."""
    alt = _altair()
    rows = [{"step": step, "rate": rate} for step, rate in rates]
    x = alt.X("step:Q", title="step", axis=alt.Axis(format="d", tickMinStep=1, tickCount=5), scale=alt.Scale(nice=False))
    y = alt.Y("rate:Q", title=None, axis=alt.Axis(format=".1e", tickCount=3, minExtent=_NUMBERS_PX))
    chart = alt.Chart(_values(rows)).mark_line(color=QUIET, strokeWidth=1.6).encode(x=x, y=y)
    peak = max(rate for _, rate in rates)
    said = f"Learning rate by step: peak {peak:.2g}, last {rates[-1][1]:.2g}."
    return Chart("learning rate", said, _svg(chart.properties(width=_PANEL_PX, height=90), said))


def mixture_charts(shares: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """One panel per unit: each task's share as planned (bar) and as training saw it (tick)."""
    units = list(dict.fromkeys(row["unit"] for row in shares))
    top = max((row[part] or 0.0 for row in shares for part in ("planned", "realised")), default=1.0)
    return [_mixture_chart(unit, [row for row in shares if row["unit"] == unit], top) for unit in units]


def _mixture_chart(unit: str, shares: Sequence[Mapping[str, Any]], top: float) -> Chart:
    alt = _altair()
    rows = [{**row, "task": _label(row["task"])} for row in shares]
    y = _task_axis(alt, [row["task"] for row in rows], grid=False)
    axis = alt.Axis(format=".0%", tickCount=4)
    scale = alt.Scale(domain=[0, top * 1.04], nice=False)
    base = alt.Chart(_values(rows)).encode(y=y)
    bars = base.mark_bar(color=BAR, opacity=1, height=11).encode(x=alt.X("planned:Q", title=None, axis=axis, scale=scale))
    layers = [bars]
    if any(row["realised"] is not None for row in rows):
        layers.append(base.mark_tick(color=HELD_OUT, thickness=3, size=18, opacity=1).encode(x=alt.X("realised:Q", title=None)))
    chart = alt.layer(*layers).properties(width=_PANEL_PX - 70, height=_ROW_PX * len(rows))
    said = "; ".join(f"{r['task']} {write(r['planned'], 'share')} planned" + _realised(r) for r in rows)
    return Chart(f"share of {unit}", f"Share of {unit} by task: {said}.", _svg(chart, f"share of {unit} by task: {said}"))


def _realised(row: Mapping[str, Any]) -> str:
    return "" if row["realised"] is None else f", {write(row['realised'], 'share')} realised"


def change_charts(changes: Sequence[Change]) -> list[Chart]:
    """Two panels by task: the loss before and after, and its change with the paired interval."""
    ordered = sorted(changes, key=lambda c: (c.task != ALL_TASKS, c.change))
    return [_before_after(ordered), _intervals(ordered)] if ordered else []


def _task_axis(alt: ModuleType, tasks: Sequence[str], *, grid: bool = True) -> Any:
    """The vertical axis of task names, with room for the longest."""
    extent = min(max(map(len, tasks), default=0) * _LETTER_PX, 125) + 10
    axis = alt.Axis(ticks=False, domain=False, grid=grid, labelLimit=100, gridDash=[1, 3], minExtent=extent)
    return alt.Y("task:N", title=None, sort=None, axis=axis)


def _before_after(changes: Sequence[Change]) -> Chart:
    alt = _altair()
    rows: list[dict[str, Any]] = [{"task": _label(c.task) or "all", "before": c.before, "after": c.after} for c in changes]
    base = alt.Chart(_values(rows)).encode(y=_task_axis(alt, [row["task"] for row in rows]))
    x = alt.X("before:Q", title="nats per token", scale=alt.Scale(zero=False, padding=9), axis=alt.Axis(tickCount=5))
    layers = [
        base.mark_rule(color=QUIET, strokeWidth=1.4).encode(x=x, x2="after:Q"),
        base.mark_point(color=QUIET, filled=False, opacity=1, size=48, strokeWidth=1.6).encode(x=x),
        base.mark_point(color=TRAIN, filled=True, opacity=1, size=58).encode(x=alt.X("after:Q")),
    ]
    chart = alt.layer(*layers).properties(width=_PANEL_PX - 60, height=_ROW_PX * len(rows))
    said = "; ".join(f"{c.task or 'all'} {write(c.before, 'loss')} to {write(c.after, 'loss')}" for c in changes)
    return Chart(
        "loss before (ring) and after (dot)", f"Held-out loss: {said}.", _svg(chart, f"held-out loss before and after: {said}")
    )


def _intervals(changes: Sequence[Change]) -> Chart:
    alt = _altair()
    rows: list[dict[str, Any]] = [
        {"task": _label(c.task) or "all", "change": c.change, "low": c.low, "high": c.high, "outcome": c.outcome} for c in changes
    ]
    known = [row for row in rows if math.isfinite(row["low"]) and math.isfinite(row["high"])]
    names = list(OUTCOME_COLOURS)
    colour = alt.Color("outcome:N", legend=None, scale=alt.Scale(domain=names, range=list(OUTCOME_COLOURS.values())))
    shape = alt.Shape("outcome:N", legend=None, scale=alt.Scale(domain=names, range=list(OUTCOME_SHAPES.values())))
    y = _task_axis(alt, [row["task"] for row in rows])
    x_title = "change in nats per token"
    zero = alt.Chart(_values([{"zero": 0}])).mark_rule(color=INK, strokeWidth=1).encode(x="zero:Q")
    bars = alt.Chart(_values(known)).mark_rule(strokeWidth=2.2)
    dots = alt.Chart(_values(rows)).mark_point(filled=True, opacity=1, size=58)
    layers = [
        zero,
        bars.encode(
            y=y,
            x=alt.X("low:Q", title=x_title, axis=alt.Axis(tickCount=4), scale=alt.Scale(padding=9)),
            x2="high:Q",
            color=colour,
        ),
        dots.encode(y=y, x=alt.X("change:Q", title=x_title), color=colour, shape=shape),
    ]
    chart = alt.layer(*layers).properties(width=_PANEL_PX - 60, height=_ROW_PX * len(rows))
    said = "; ".join(f"{c.task or 'all'} {write(c.change, 'change')} ({interval(c.low, c.high)})" for c in changes)
    return Chart(
        "change with paired 95 % interval", f"Change of held-out loss: {said}.", _svg(chart, f"change of held-out loss: {said}")
    )


def require_charts() -> None:
    """MissingExtra where charts cannot be drawn."""
    _altair()


def _altair() -> ModuleType:
    try:
        import altair
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise MissingExtra("altair", "report") from error
    module: ModuleType = altair
    return module


def _values(rows: Sequence[Mapping[str, Any]]) -> Any:
    return _altair().InlineData(values=[dict(row) for row in rows])


def _label(name: str) -> str:
    return visible(name).replace("\n", " ").replace("\t", " ")


def _svg(chart: Any, alt_text: str) -> str:
    buffer = io.StringIO()
    _configured(chart).save(buffer, format="svg")
    return _portable(buffer.getvalue(), alt_text)


def _configured(chart: Any) -> Any:
    axis = {
        "labelColor": QUIET,
        "titleColor": QUIET,
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "gridColor": RULE,
        "domainColor": RULE,
        "tickColor": RULE,
        "labelFlush": False,
        "labelPadding": 5,
        "labelOverlap": "greedy",
        "labelSeparation": 10,  # again for wider fonts than the one it is laid out with
    }
    chart = chart.configure(
        background="transparent", aria=False, font="sans-serif", padding={"left": 2, "right": 10, "top": 6, "bottom": 2}
    )
    return chart.configure_axis(**axis).configure_view(stroke=None).configure_axisY(domain=False, ticks=False)


def _portable(svg: str, alt_text: str) -> str:
    """The SVG as a scalable, named picture: its own size dropped, clip names (a counter of the process) numbered afresh."""
    svg = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', _opening(alt_text), svg, count=1)
    clips = list(dict.fromkeys(re.findall(r'id="(clip\d+)"', svg)))
    prefix = f"c{abs(hash_text(alt_text)):x}"
    for index, clip in enumerate(clips):
        svg = re.sub(rf"\b{clip}\b", f"{prefix}-{index}", svg)
    return svg


def _opening(alt_text: str) -> Any:
    label = escape(_label(alt_text), quote=True)
    return lambda match: (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{match[1]}" data-width="{match[1].split()[2]}" '
        f'role="img" aria-label="{label}">'
    )


def hash_text(text: str) -> int:
    """A stable 32-bit number of a text (Python's own `hash` changes from process to process)."""
    import zlib

    return zlib.crc32(text.encode("utf-8", "replace"))
