"""The plan as tables and sentences: promised against realised in three units, what is learned, warnings, coverage. Pure.

The terminal, the page and `--json` say the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tutelage.report.plan_view import FEW_VISITS, Coverage, Placed, PlanView
from tutelage.report.tables import Column, Format, Table, plural, spoken

UNITS = ("examples", "tokens", "supervised")
UNIT_LABELS = {"examples": "examples", "tokens": "tokens", "supervised": "learned tokens"}
_COUNTED = {"examples": "examples", "tokens": "tokens", "supervised_tokens": "supervised"}
MULTI_TURN_ADVICE = (0.10, 0.15)
_SAME = 1e-6


def promises(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line per task and unit: the share that the rule promises, the share that the counts give, and the share realised.

    `promised` is the rule's share carried into the unit through the task's mean length; `counted` is that of the exact counts,
    after caps and refill, were every example of mean length; `realised` is of the visits that lie in the rows.

    >>> line = {"task": "a", "promised_share": 1.0, "is_capped": False}
    >>> line |= {f"available_{u}": n for u, n in (("examples", 4), ("tokens", 40), ("supervised", 20))}
    >>> line |= {f"planned_{u}": n for u, n in (("examples", 4), ("tokens", 40), ("supervised", 20))}
    >>> [(p["unit"], p["promised"], p["counted"], p["realised"]) for p in promises({"count": "tokens", "mixture": [line]})]
    [('examples', 1.0, 1.0, 1.0), ('tokens', 1.0, 1.0, 1.0), ('supervised', 1.0, 1.0, 1.0)]
    """
    mixture, counted = facts["mixture"], _COUNTED[facts["count"]]
    out = []
    for unit in UNITS:
        promised = _normalised([_scaled(line, "promised_share", unit, counted) for line in mixture])
        given = _normalised([_scaled(line, "planned_examples", unit, "examples") for line in mixture])
        realised = _normalised([float(line[f"planned_{unit}"]) for line in mixture])
        rows = zip(mixture, promised, given, realised, strict=True)
        out += [
            {"task": line["task"], "unit": unit, "promised": p, "counted": c, "realised": r, "is_counted": unit == counted}
            for line, p, c, r in rows
        ]
    return out


def _scaled(line: Mapping[str, Any], amount: str, unit: str, given_in: str) -> float:
    """An amount stated in one unit, in another."""
    size = line[f"available_{given_in}"]
    return line[amount] * line[f"available_{unit}"] / size if size else 0.0


def _normalised(values: Sequence[float]) -> list[float]:
    total = sum(values)
    return [value / total if total else math.nan for value in values]


def promise_table(facts: Mapping[str, Any]) -> Table:
    """Promised and realised shares of each task in three units, and what keeps them apart."""
    columns = [Column("task", "task", "name")]
    for unit in UNITS:
        columns += [
            Column(f"promised_{unit}", f"{UNIT_LABELS[unit]} promised", "share"),
            Column(f"realised_{unit}", "realised", "share"),
        ]
    columns.append(Column("because", "they differ by"))
    by_task: dict[str, dict[str, dict[str, Any]]] = {}
    for line in promises(facts):
        by_task.setdefault(line["task"], {})[line["unit"]] = line
    because = _reasons(facts, by_task)
    rows = []
    for task, lines in by_task.items():
        shares = [lines[unit][part] for unit in UNITS for part in ("promised", "realised")]
        rows.append((task, *shares, because[task]))
    counted = UNIT_LABELS[_COUNTED[facts["count"]]]
    caption = f"Promised and realised, after drops, truncation and packing; rates count {counted}"
    return Table(caption, tuple(columns), tuple(rows))


def _reasons(facts: Mapping[str, Any], by_task: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, str]:
    """Why a task's realised share is not its promised one, in the unit that rates count."""
    counted, mixture = _COUNTED[facts["count"]], facts["mixture"]
    sizes = {line["task"]: line[f"available_{counted}"] / max(line["available_examples"], 1) for line in mixture}
    total = sum(line[f"planned_{counted}"] for line in mixture)
    is_any_capped = any(line["is_capped"] for line in mixture)
    out = {}
    for line in mixture:
        task, size = line["task"], sizes[line["task"]]
        shares = by_task[task][counted]
        said, rounding = [], size + max(sizes.values())
        if line["is_capped"]:
            said.append("its cap")
        elif abs(shares["counted"] - shares["promised"]) * total > rounding:
            said.append("freed by caps" if is_any_capped else "the budget's limits")
        if abs(line[f"planned_{counted}"] - line["planned_examples"] * size) > size:
            said.append("lengths drawn")
        elif not said and abs(shares["realised"] - shares["promised"]) * total > rounding:
            said.append("lengths drawn of others")
        out[task] = ", ".join(said) or ("rounding" if shares["realised"] != shares["promised"] else "nothing")
    return out


_LEARNED: tuple[tuple[str, str, Format], ...] = (
    ("supervised_share", "learned share", "share"),
    ("length_ratio", "request per answer", "ratio"),
    ("multi_turn_share", "with several turns", "share"),
)


def learned_table(facts: Mapping[str, Any]) -> Table:
    """How much of each task is learned, its request-to-answer length ratio, its multi-turn share; empty where not known."""
    known = [part for part in _LEARNED if any(part[0] in line for line in facts["mixture"])]
    columns = (Column("task", "task", "name"), *(Column(key, label, style) for key, label, style in known))
    rows = tuple((line["task"], *(line.get(key) for key, _, _ in known)) for line in facts["mixture"]) if known else ()
    return Table("What is learned of each task", columns, rows)


def tenths_table(view: PlanView) -> Table:
    """The realised share of each task in every tenth of training; empty where the promise is the same throughout."""
    promised = [tenth["promised"] for tenth in view.progress]
    columns = [Column("task", "task", "name")]
    columns += [
        Column(f"tenth_{i + 1}", f"{100 * tenth['from']:.0f}-{100 * tenth['to']:.0f} %", "share")
        for i, tenth in enumerate(view.progress)
    ]
    is_constant = all(abs(shares[task] - promised[0].get(task, 0.0)) < _SAME for shares in promised for task in shares)
    tasks = () if is_constant else [line["task"] for line in view.facts["mixture"]]
    rows = tuple((task, *(tenth["realised"].get(task, 0.0) for tenth in view.progress)) for task in tasks)
    return Table("Realised share in each tenth of training", tuple(columns), rows)


def often_table(placed: Sequence[Placed]) -> Table:
    """Tasks whose records are seen more than four times; empty where none is."""
    columns = (
        Column("task", "task", "name"),
        Column("num_often", f"records seen more than {FEW_VISITS} times", "count"),
        Column("most_visits", "most visits", "count"),
    )
    rows = tuple((p.task, p.num_often, p.most_visits) for p in placed if p.num_often)
    return Table("Records seen often", columns, rows)


def coverage_table(coverage: Coverage) -> Table:
    """Tasks with fewer examples than the target asks for; empty where none is."""
    columns = (Column("task", "task", "name"), Column("examples", "examples", "count"), Column("missing", "missing", "count"))
    rows = tuple((task, size, coverage.target.min_examples - size) for task, size in coverage.small)
    return Table(f"Tasks under {coverage.target.min_examples:,} examples", columns, rows)


def coverage_line(coverage: Coverage) -> str:
    """The coverage in one sentence."""
    target = coverage.target
    parts = [f"{plural(coverage.num_tasks, 'task')} of {target.min_tasks} wanted"]
    if coverage.small:
        named = ", ".join(f"{task} {size:,}" for task, size in coverage.small[:5])
        more = f" and {len(coverage.small) - 5} more" if len(coverage.small) > 5 else ""
        parts.append(f"fewer than {target.min_examples:,} examples in {named}{more}")
    else:
        parts.append(f"each with {target.min_examples:,} examples or more")
    if coverage.missing_pillars:
        parts.append(f"no task for {', '.join(coverage.missing_pillars)}")
    return f"coverage: {'; '.join(parts)} (report.coverage)"


def warnings(view: PlanView) -> list[str]:
    """What to think about before training: records that are seen too often."""
    out = []
    for place in view.placed:
        if place.num_often:
            out.append(
                f"task {place.task}: {plural(place.num_often, 'record')} seen more than {FEW_VISITS} times, the most "
                f"{place.most_visits}; beyond about four visits repetition stops paying (arXiv 2305.16264)"
            )
    return out


def multi_turn_share(facts: Mapping[str, Any]) -> float | None:
    """The share of planned examples with several turns; None where the plan does not say."""
    lines = [line for line in facts["mixture"] if line.get("multi_turn_share") is not None]
    total = sum(line["planned_examples"] for line in lines)
    return sum(line["multi_turn_share"] * line["planned_examples"] for line in lines) / total if total else None


def budget_line(facts: Mapping[str, Any]) -> str:
    """What of the budget caps freed and where it went, in one sentence; empty when no cap binds."""
    capped = [line["task"] for line in facts["mixture"] if line["is_capped"]]
    unfilled = facts["total"].get("num_unfilled", 0)
    if not capped:
        return ""
    fate = (
        f"{plural(unfilled, 'example')} of the budget stay unused" if unfilled else "the budget that they free went to the others"
    )
    return f"at their cap: {', '.join(capped)}; {fate}"


def estimate_line(estimate: Mapping[str, Any]) -> str:
    """What an estimate rests on, in one sentence; empty for an exact plan."""
    if not estimate:
        return ""
    error = estimate["relative_error"]
    return (
        f"estimated from {plural(estimate['num_sampled'], 'record')} of {estimate['num_records']:,}: available tokens "
        f"± {100 * error:.2g} %, steps {estimate['steps']['low']:,} to {estimate['steps']['high']:,} (95 % intervals)"
    )


def estimate_table(estimate: Mapping[str, Any]) -> Table:
    """What there is of each task as estimated, with 95 % intervals; empty for an exact plan."""
    columns = [Column("task", "task", "name")]
    for unit in UNITS:
        columns += [
            Column(unit, UNIT_LABELS[unit], "count"),
            Column(f"{unit}_low", "95 % low", "count"),
            Column(f"{unit}_high", "95 % high", "count"),
        ]
    rows = []
    for task, measures in estimate.get("tasks", {}).items():
        ends = [measures[unit][part] for unit in UNITS for part in ("value", "low", "high")]
        rows.append((task, *ends))
    return Table("What there is, estimated", tuple(columns), tuple(rows))


def drop_table(estimate: Mapping[str, Any]) -> Table:
    """Records that rendering is expected to set aside, by reason; empty for an exact plan or where none is."""
    columns = (
        Column("reason", "reason"),
        Column("value", "records", "count"),
        Column("low", "95 % low", "count"),
        Column("high", "95 % high", "count"),
    )
    lines = estimate.get("dropped", {})
    rows = tuple((spoken(reason), line["value"], line["low"], line["high"]) for reason, line in lines.items())
    return Table("Records that rendering will set aside, estimated", columns, rows)


def advice_lines(facts: Mapping[str, Any]) -> list[str]:
    """The plan's advice, a line each: what it is about, what to think of, and what was measured.

    >>> advice_lines({"advice": [{"about": "task qa", "text": "outputs are short", "evidence": "arXiv 2401.13586"}]})
    ['advice, task qa: outputs are short. Evidence: arXiv 2401.13586']
    """
    return [f"advice, {piece['about']}: {piece['text']}. Evidence: {piece['evidence']}" for piece in facts.get("advice", ())]


def plan_json(view: PlanView) -> dict[str, Any]:
    """The view as plain values."""
    return {
        "facts": dict(view.facts),
        "promised_and_realised": promise_table(view.facts).as_json(),
        "pictures": dict(view.pictures),
        "deciles": list(view.progress),
        "placed": [{"task": p.task, "examples": p.examples, "tokens": p.tokens, "num_often": p.num_often} for p in view.placed],
        "coverage": {
            "num_tasks": view.coverage.num_tasks,
            "is_met": view.coverage.is_met,
            "small": dict(view.coverage.small),
            "missing_pillars": list(view.coverage.missing_pillars),
        },
        "warnings": warnings(view),
        "estimate": dict(view.estimate),
    }
