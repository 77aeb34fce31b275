"""The pictures of a plan, each with its legend: drawn from plain numbers, by the means of `charts.py`.

Legends are text of the page, not of the SVG, so that they wrap, scale and turn dark with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.report import charts
from tutelage.report.charts import BAD, BAR, GOOD, HELD_OUT, INK, NEUTRAL, QUIET, TRAIN, Chart
from tutelage.report.plan_tables import UNIT_LABELS
from tutelage.report.plan_view import Lengths, PlanView
from tutelage.report.tables import spoken, write

TASK_COLOURS = (TRAIN, HELD_OUT, GOOD, *charts.MORE_COLOURS)
"""Told apart in light and dark; a ninth task and all after it share `NEUTRAL`."""
_OTHERS = "others"
_NUM_PANELS = 12
_PLOT_PX, _LINE_PX = 290, 190
_POLICIES = {"recipe": "this recipe"}
_BOOSTS = tuple(power * step for power in (0.01, 0.1, 1, 10, 100, 1000) for step in (1, 2, 5))
_RULES = {
    "1": ("proportional, T = 1", QUIET, "circle", False, "ring"),
    "2": ("T = 2", TRAIN, "circle", True, "dot"),
    "5": ("T = 5", GOOD, "square", True, "square"),
    "inf": ("equal, T = \N{INFINITY}", NEUTRAL, "diamond", True, "diamond"),
}
"""Temperature to its label, colour, shape, whether it is filled, and the legend's key."""

Legend = tuple[tuple[str, str], ...]
"""(key class of the style sheet, label) in the order drawn."""


@dataclass(frozen=True)
class Picture:
    """A chart, its legend, and a sentence that says what to look for."""

    chart: Chart
    legend: Legend = ()
    note: str = ""


def pictures(view: PlanView) -> dict[str, Any]:
    """All pictures of a plan by name: `book` (the five of the book), `kinds`, `progress`, `lengths`; None for what is unknown."""
    data = view.pictures
    book = [shares_picture(data), minority_picture(data), boost_picture(data), visits_picture(data), composition_picture(data)]
    order = {task: rank for rank, task in enumerate(data["tasks"])}
    return {
        "book": [picture for picture in book if picture is not None],
        "kinds": kinds_picture(view.facts.get("kind_weight_by_policy", {})),
        "progress": progress_picture(view.progress, order),
        "lengths": length_panels(view.lengths),
    }


def _rule_legend(rules: Sequence[str], own: str | None) -> Legend:
    known = tuple((_RULES[rule][4], _RULES[rule][0]) for rule in _RULES if rule in rules)
    temperature = "" if own is None else ", T = " + own.replace("inf", "\N{INFINITY}")
    return (*known, ("tick", f"this recipe{temperature}"))


def _dots(data: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], measure: str, **x: Any) -> Any:
    """One line per task, one mark per rule, the recipe's own as a tick."""
    alt = charts._altair()
    named = [{**row, "task": charts._label(row["task"])} for row in rows]
    y = charts._task_axis(alt, [charts._label(task) for task in data["tasks"]])
    position = alt.X(f"{measure}:Q", title=None, **x)
    layers = []
    own = [row for row in named if row["rule"] == "recipe"]
    layers.append(
        alt.Chart(charts._values(own)).mark_tick(color=HELD_OUT, thickness=3, size=17, opacity=1).encode(x=position, y=y)
    )
    for rule, (_, colour, shape, is_filled, _) in _RULES.items():
        some = [row for row in named if row["rule"] == rule]
        if some:
            mark = alt.Chart(charts._values(some)).mark_point(
                color=colour, shape=shape, filled=is_filled, opacity=1, size=42, strokeWidth=1.5
            )
            layers.append(mark.encode(x=position, y=y))
    return alt.layer(*layers), len(data["tasks"])


def _of_all(data: Mapping[str, Any]) -> str:
    num, drawn = data["num_tasks"], len(data["tasks"])
    return "" if drawn == num else f", the {drawn // 2} largest and {drawn // 2} smallest of {num:,} tasks"


def shares_picture(data: Mapping[str, Any]) -> Picture:
    """Each task's share at T = 1, 2, 5 and infinity, and as the recipe promises it."""
    alt = charts._altair()
    chart, num = _dots(data, data["shares"], "share", axis=alt.Axis(format=".0%", tickCount=5), scale=alt.Scale(zero=True))
    said = _said(data["shares"], "share", "share")
    title = f"share of {spoken(data['unit'])} by temperature{_of_all(data)}"
    return Picture(_chart(chart, num, title, said), _rule_legend(list(_RULES), data["temperature"]))


def boost_picture(data: Mapping[str, Any]) -> Picture:
    """How many times its proportional share each task is given; a logarithmic axis, so that half and double lie equally far."""
    alt = charts._altair()
    rows = [row for row in data["boosts"] if row["boost"] > 0]
    low, high = min(row["boost"] for row in rows) / 1.15, max(row["boost"] for row in rows) * 1.15
    axis = alt.Axis(format="~g", values=[value for value in _BOOSTS if low <= value <= high])
    chart, num = _dots(data, rows, "boost", axis=axis, scale=alt.Scale(type="log", domain=[low, high], nice=False))
    one = alt.Chart(charts._values([{"one": 1}])).mark_rule(color=INK, strokeWidth=1).encode(x="one:Q")
    said = _said(rows, "boost", "ratio")
    legend = _rule_legend(["2", "5", "inf"], data["temperature"])
    note = "1 is the proportional share; to the right a task is seen more often than its size gives it."
    return Picture(_chart(alt.layer(one, chart), num, f"boost over proportional{_of_all(data)}", said), legend, note)


def minority_picture(data: Mapping[str, Any]) -> Picture | None:
    """The shares of the smaller tasks as the temperature rises; None with one task."""
    alt = charts._altair()
    rows = [{**row, "task": charts._label(row["task"])} for row in data["minority"]]
    if not rows:
        return None
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    every = [charts._label(task) for task in data["tasks"]]
    names = every if len(every) <= len(TASK_COLOURS) else tasks  # the colour that a task has in the other pictures
    colour = _task_colour(alt, names)
    x = alt.X(
        "temperature:Q", title="temperature", axis=alt.Axis(tickCount=6, grid=False), scale=alt.Scale(zero=False, nice=False)
    )
    y = alt.Y("share:Q", title=None, axis=alt.Axis(format=".1~%", tickCount=5, minExtent=44))
    layers = [alt.Chart(charts._values(rows)).mark_line(strokeWidth=1.8).encode(x=x, y=y, color=colour)]
    own = data["temperature"]
    legend = tuple(key for key in _task_legend(names) if key[1] in tasks)
    if own is not None and own != "inf":
        rule = alt.Chart(charts._values([{"own": float(own)}])).mark_rule(color=QUIET, strokeWidth=1.2, strokeDash=[4, 3])
        layers.append(rule.encode(x="own:Q"))
        legend = (*legend, ("dashed quiet-line", f"this recipe, T = {own}"))
    ends = [
        (task, next(r for r in rows if r["task"] == task), next(r for r in reversed(rows) if r["task"] == task)) for task in tasks
    ]
    said = "; ".join(f"{t} {write(a['share'], 'share')} to {write(b['share'], 'share')}" for t, a, b in ends)
    chart = alt.layer(*layers).properties(width=_PLOT_PX + 40, height=190)
    title = "the smaller tasks over the temperature"
    return Picture(Chart(title, f"{title}: {said}.", charts._svg(chart, f"{title}: {said}")), legend)


def visits_picture(data: Mapping[str, Any]) -> Picture:
    """How often a task's records would be seen without a cap, how often they are, and the cap."""
    alt = charts._altair()
    rows = [{**row, "task": charts._label(row["task"])} for row in data["visits"]]
    y = charts._task_axis(alt, [row["task"] for row in rows], grid=False)
    x = alt.X("planned:Q", title=None, axis=alt.Axis(tickCount=5), scale=alt.Scale(nice=False, padding=6))
    base = alt.Chart(charts._values(rows)).encode(y=y)
    layers = [
        base.mark_bar(color=BAR, opacity=1, height=11).encode(x=x),
        base.mark_point(color=TRAIN, filled=False, opacity=1, size=52, strokeWidth=1.7).encode(x=alt.X("needed:Q")),
    ]
    legend: Legend = (("bar", "planned"), ("ring train-line", "needed for the promised share"))
    capped = [row for row in rows if row["cap"] is not None]
    if capped:
        ticks = alt.Chart(charts._values(capped)).mark_tick(color=BAD, thickness=2, size=18, opacity=1)
        layers.append(ticks.encode(y=y, x=alt.X("cap:Q")))
        legend = (*legend, ("tick bad-bar", "cap"))
    said = "; ".join(
        f"{r['task']} needs {write(r['needed'], 'ratio')}, is planned {write(r['planned'], 'ratio')}"
        + ("" if r["cap"] is None else f", at most {r['cap']:g}")
        for r in rows
    )
    title = f"visits per record, needed and planned{_of_all(data)}"
    return Picture(_chart(alt.layer(*layers), len(rows), title, said), legend)


def composition_picture(data: Mapping[str, Any]) -> Picture:
    """What there is and what is planned, by task, in each unit: the final composition."""
    lines = [{"line": f"{UNIT_LABELS[row['unit']]}, {row['part']}", **row} for row in data["composition"]]
    return _stacked("final composition beside what is available", lines, "line", "task", data["tasks"])


def kinds_picture(by_policy: Mapping[str, Mapping[str, float]]) -> Picture | None:
    """Where the gradient weight lies, by kind of token, under the recipe's loss and others; None where the plan does not say."""
    if not by_policy:
        return None
    ordered = sorted(by_policy, key=lambda policy: (policy not in _POLICIES, policy != "response", policy == "full", policy))
    lines = [
        {"line": _POLICIES.get(policy, spoken(policy)), "kind": spoken(kind), "share": share}
        for policy in ordered
        for kind, share in by_policy[policy].items()
        if share > 0
    ]
    return _stacked("share of the gradient's weight by kind of token", lines, "line", "kind")


def _stacked(title: str, lines: Sequence[Mapping[str, Any]], line: str, part: str, order: Sequence[str] = ()) -> Picture:
    """Bars of length 1, one per line, cut by part: in this order, then by size; of nine and more, all after seven are joined."""
    alt = charts._altair()
    sizes: dict[str, float] = {}
    for row in lines:
        sizes[row[part]] = sizes.get(row[part], 0.0) + row["share"]
    rank = {name: i for i, name in enumerate(order)}
    by_rank = sorted(sizes, key=lambda name: (rank.get(name, len(rank)), -sizes[name], name))
    ordered = [name for name in by_rank if sizes[name] > 0]
    kept = ordered if len(ordered) <= len(TASK_COLOURS) else ordered[: len(TASK_COLOURS) - 1]
    joined: dict[tuple[str, str], float] = {}
    for row in lines:
        name = charts._label(row[part]) if row[part] in kept else _OTHERS
        joined[row[line], name] = joined.get((row[line], name), 0.0) + row["share"]
    names = [charts._label(name) for name in kept] + ([_OTHERS] if len(kept) < len(ordered) else [])
    rows = [
        {"line": of, "part": name, "share": share, "rank": names.index(name)} for (of, name), share in joined.items() if share
    ]
    of_lines = list(dict.fromkeys(line for line, _ in joined))
    chart = alt.Chart(charts._values(rows)).mark_bar(height=15, opacity=1)
    extent = min(max(map(len, of_lines), default=0) * charts._LETTER_PX, _LINE_PX) + 10
    axis = alt.Axis(ticks=False, domain=False, grid=False, labelLimit=_LINE_PX, minExtent=extent)
    chart = chart.properties(width=_PLOT_PX, height=charts._ROW_PX * len(of_lines)).encode(
        y=alt.Y("line:N", title=None, sort=None, axis=axis),
        x=alt.X("share:Q", title=None, stack="zero", axis=alt.Axis(format=".0%", tickCount=5), scale=alt.Scale(domain=[0, 1])),
        color=_task_colour(alt, names, field="part"),
        order=alt.Order("rank:Q"),
    )
    said = "; ".join(f"{of} {name} {write(share, 'share')}" for (of, name), share in joined.items() if share)
    return Picture(_chart(chart, len(of_lines), title, said), _task_legend(names))


def progress_picture(progress: Sequence[Mapping[str, Any]], order: Mapping[str, int]) -> Picture | None:
    """The share of each task in every tenth of training: realised as a line, promised dashed; None for no tenths.

    Tasks are coloured in this order, which the other pictures have too.
    """
    if not progress:
        return None
    alt = charts._altair()
    mean: dict[str, float] = {}
    for tenth in progress:
        for task, share in tenth["realised"].items():
            mean[task] = mean.get(task, 0.0) + share / len(progress)
    tasks = sorted(mean, key=lambda task: (order.get(task, len(order)), -mean[task], task))[: len(TASK_COLOURS)]
    rows = [
        {"task": charts._label(task), "at": (tenth["from"] + tenth["to"]) / 2, "share": tenth[part].get(task, 0.0), "part": part}
        for task in tasks
        for tenth in progress
        for part in ("promised", "realised")
    ]
    colour = _task_colour(alt, [charts._label(task) for task in tasks])
    x = alt.X(
        "at:Q", title="part of training", axis=alt.Axis(format=".0%", tickCount=5, grid=False), scale=alt.Scale(domain=[0, 1])
    )
    y = alt.Y("share:Q", title=None, axis=alt.Axis(format=".0%", tickCount=5, minExtent=44))
    of = {part: alt.Chart(charts._values([row for row in rows if row["part"] == part])) for part in ("promised", "realised")}
    layers = [
        of["promised"].mark_line(strokeWidth=1.2, strokeDash=[4, 3]).encode(x=x, y=y, color=colour),
        of["realised"].mark_line(strokeWidth=1.8, point=False).encode(x=x, y=y, color=colour),
        of["realised"].mark_point(filled=True, opacity=1, size=26).encode(x=x, y=y, color=colour),
    ]
    chart = alt.layer(*layers).properties(width=_PLOT_PX + 40, height=190)
    first, last = progress[0]["realised"], progress[-1]["realised"]
    said = "; ".join(f"{t} {write(first.get(t, 0.0), 'share')} first, {write(last.get(t, 0.0), 'share')} last" for t in tasks)
    more = f", the {len(tasks)} largest of {len(mean):,} tasks" if len(tasks) < len(mean) else ""
    title = f"mixture over training{more}"
    legend = (*_task_legend([charts._label(task) for task in tasks]), ("dashed quiet-line", "promised"))
    return Picture(Chart(title, f"{title}: {said}.", charts._svg(chart, f"{title}: {said}")), legend)


def length_panels(lengths: Sequence[Lengths]) -> list[Picture]:
    """A histogram of lengths for each of the twelve tasks with the most examples."""
    chosen = sorted(lengths, key=lambda task: (-sum(task.counts), task.task))[:_NUM_PANELS]
    return [_length_panel(task) for task in sorted(chosen, key=lambda task: task.task)]


def _length_panel(task: Lengths) -> Picture:
    alt = charts._altair()
    rows = [{"from": a, "to": b, "examples": n} for a, b, n in zip(task.edges, task.edges[1:], task.counts, strict=False) if n]
    axis = alt.Axis(format=",d", tickCount=4, grid=False)
    x = alt.X("from:Q", title="tokens", axis=axis, scale=alt.Scale(domain=[1, task.edges[-1]], nice=False))
    y = alt.Y("examples:Q", title=None, axis=alt.Axis(tickCount=3, format=",d", tickMinStep=1, minExtent=charts._NUMBERS_PX))
    chart = alt.Chart(charts._values(rows)).mark_rect(color=BAR, opacity=1).encode(x=x, x2="to:Q", y=y, y2=alt.datum(0))
    middle = alt.Chart(charts._values([{"median": task.median}])).mark_rule(color=HELD_OUT, strokeWidth=1.6).encode(x="median:Q")
    name = charts._label(task.task)
    said = f"median {task.median:,.0f}, longest {task.longest:,}"
    drawn = alt.layer(chart, middle).properties(width=charts._PANEL_PX, height=90)
    label = f"lengths of {name}: {sum(task.counts):,} examples, {said} tokens"
    return Picture(Chart(f"{name}: {said}", f"{label}.", charts._svg(drawn, label)))


def _chart(chart: Any, num_rows: int, title: str, said: str) -> Chart:
    """A chart of so many lines under one another, with its words."""
    drawn = chart.properties(width=_PLOT_PX, height=charts._ROW_PX * max(num_rows, 1))
    return Chart(title, f"{title}: {said}.", charts._svg(drawn, f"{title}: {said}"))


def _said(rows: Sequence[Mapping[str, Any]], measure: str, style: Any) -> str:
    by_task: dict[str, list[str]] = {}
    for row in rows:
        by_task.setdefault(charts._label(row["task"]), []).append(f"{_rule(row['rule'])} {write(row[measure], style)}")
    return "; ".join(f"{task} {', '.join(parts)}" for task, parts in by_task.items())


def _rule(rule: str) -> str:
    return "recipe" if rule == "recipe" else f"T={rule}"


def _task_colour(alt: Any, names: Sequence[str], *, field: str = "task") -> Any:
    colours = [_colour(i, name) for i, name in enumerate(names)]
    return alt.Color(f"{field}:N", legend=None, scale=alt.Scale(domain=list(names), range=colours))


def _colour(index: int, name: str) -> str:
    return NEUTRAL if name == _OTHERS or index >= len(TASK_COLOURS) else TASK_COLOURS[index]


def _task_legend(names: Sequence[str]) -> Legend:
    def key(index: int, name: str) -> str:
        return "swatch neutral" if _colour(index, name) == NEUTRAL else f"swatch task-{index + 1}"

    return tuple((key(i, name), name) for i, name in enumerate(names))
