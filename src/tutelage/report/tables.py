"""Facts as typed tables, and the one place where a number becomes text. Pure.

The same `Table` is printed in the terminal (`screen.py`), written into the page (`page.py`) and dumped by `--json`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tutelage.report.data import ALL_TASKS, NO_DROPS, Account, Amount, Change, SourceFlow, TaskMixture

Format = Literal["text", "count", "share", "loss", "change", "ratio", "seconds", "size", "name"]
MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"


@dataclass(frozen=True, slots=True)
class Column:
    """A column: `key` in JSON, `label` for people, and how its values are written."""

    key: str
    label: str
    format: Format = "text"

    @property
    def is_number(self) -> bool:
        """Numbers stand to the right, text to the left."""
        return self.format not in ("text", "name")


@dataclass(frozen=True, slots=True)
class Table:
    """A caption, columns and rows of plain values; a row whose first value is "" is the total."""

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), f"{self.caption}: a row does not fit its columns"

    def texts(self) -> list[list[str]]:
        """The rows as people read them."""
        return [[write(value, column.format) for value, column in zip(row, self.columns, strict=True)] for row in self.rows]

    def as_json(self) -> list[dict[str, Any]]:
        """The rows as `{key: value}`; nan and infinity, which JSON has not, become null."""
        keys = [column.key for column in self.columns]
        return [dict(zip(keys, map(_finite, row), strict=True)) for row in self.rows]


def write(value: Any, style: Format = "text") -> str:
    """A value as text: one way for the page, the terminal and the model card.

    >>> [write(12345, "count"), write(0.1234, "share"), write(2.31049, "loss"), write(-0.4, "change"), write(75.2, "seconds")]
    ['12,345', '12.3 %', '2.310', '−0.400', '1 min 15 s']
    >>> [write(None, "count"), write(float("nan"), "loss"), write(True), write("", "name")]
    ['–', '–', 'yes', 'all']
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return DASH
    return _WRITERS[style](value)


def _signed(value: float) -> str:
    size = f"{abs(value):.3f}"
    if float(size) == 0:
        return size
    return f"{'+' if value > 0 else MINUS}{size}"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e6 else f"{value:.3e}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def duration(seconds: float) -> str:
    """A time span in the two largest units that matter.

    >>> [duration(0.04), duration(3.2), duration(75.2), duration(7384)]
    ['0.04 s', '3.2 s', '1 min 15 s', '2 h 3 min']
    """
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(num_bytes: float) -> str:
    """Bytes in the unit that keeps the number short.

    >>> [size(812), size(12_345), size(4_200_000), size(1.5e9)]
    ['812 B', '12.3 kB', '4.2 MB', '1.5 GB']
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes:.0f} B"


_WRITERS: Mapping[Format, Callable[[Any], str]] = {
    "text": _plain,
    "name": lambda value: str(value) or "all",
    "count": lambda value: f"{value:,.0f}",
    "share": lambda value: f"{100 * value:.1f} %",
    "loss": lambda value: f"{value:.3f}",
    "change": _signed,
    "ratio": lambda value: f"{value:.2f}",
    "seconds": duration,
    "size": size,
}


def plural(num: int, noun: str) -> str:
    """A count with its noun.

    >>> [plural(1, "record"), plural(1200, "record"), plural(2, "copy")]
    ['1 record', '1,200 records', '2 copies']
    """
    if num == 1:
        return f"1 {noun}"
    return f"{num:,} {noun[:-1] + 'ies' if noun.endswith('y') else noun + 's'}"


def interval(low: float, high: float) -> str:
    """The two ends of an interval.

    >>> [interval(-0.5, -0.3), interval(float("nan"), 1.0)]
    ['−0.500 to −0.300', '–']
    """
    return DASH if math.isnan(low) or math.isnan(high) else f"{_signed(low)} to {_signed(high)}"


def change_table(changes: Sequence[Change]) -> Table:
    """Held-out loss by task before and after; the total comes last."""
    columns = (
        Column("task", "task", "name"),
        Column("num_items", "held-out records", "count"),
        Column("num_targets", "tokens", "count"),
        Column("before", "before", "loss"),
        Column("after", "after", "loss"),
        Column("change", "change", "change"),
        Column("low", "95 % low", "change"),
        Column("high", "95 % high", "change"),
        Column("outcome", "outcome"),
    )
    ordered = sorted(changes, key=lambda c: (c.task == ALL_TASKS, c.task))
    rows = [(c.task, c.num_items, c.num_targets, c.before, c.after, c.change, c.low, c.high, c.outcome) for c in ordered]
    return Table("Held-out loss before and after, nats per token (lower is better)", columns, tuple(rows))


def mixture_table(mixture: Sequence[TaskMixture]) -> Table:
    """The mixture by task: what there is, what is planned, its shares in three units, visits and caps; the total last."""
    columns = (
        Column("task", "task", "name"),
        Column("available_examples", "available", "count"),
        Column("planned_examples", "planned", "count"),
        Column("visits_per_record", "visits per record", "ratio"),
        Column("most_visits", "most visits", "count"),
        Column("promised_share", "promised", "share"),
        Column("share_examples", "examples", "share"),
        Column("share_tokens", "tokens", "share"),
        Column("share_supervised", "supervised", "share"),
        Column("is_capped", "cap reached"),
    )
    total = _sum([task.planned for task in mixture])
    rows = [_mixture_row(task, total) for task in mixture]
    if len(mixture) > 1:
        available = sum(task.available.examples for task in mixture)
        visits = total.examples / available if available else math.nan
        most = max(task.most_visits for task in mixture)
        promised = sum(task.promised_share for task in mixture)
        capped = any(task.is_capped for task in mixture)
        rows.append(("", available, total.examples, visits, most, promised, *_shares(total, total), capped))
    return Table("Mixture as planned, by task", columns, tuple(rows))


def _mixture_row(task: TaskMixture, total: Amount) -> tuple[Any, ...]:
    visits = (task.available.examples, task.planned.examples, task.visits_per_record, task.most_visits)
    return (task.task, *visits, task.promised_share, *_shares(task.planned, total), task.is_capped)


def realised_table(mixture: Sequence[TaskMixture]) -> Table:
    """Planned against what training saw, in three units; empty before training."""
    names = (("examples", "examples"), ("tokens", "tokens"), ("supervised", "supervised tokens"))
    columns = [Column("task", "task", "name")]
    for key, label in names:
        columns += [Column(f"planned_{key}", f"{label} planned", "count"), Column(f"realised_{key}", "realised", "count")]
    seen = [(task, task.realised) for task in mixture if task.realised is not None]
    pairs = [(task.task, task.planned, realised) for task, realised in seen]
    if len(pairs) > 1:
        pairs.append(("", _sum([p for _, p, _ in pairs]), _sum([r for _, _, r in pairs])))
    rows = [
        (name, plan.examples, real.examples, plan.tokens, real.tokens, plan.supervised, real.supervised)
        for name, plan, real in pairs
    ]
    return Table("Mixture planned and realised", tuple(columns), tuple(rows))


def unit_shares(mixture: Sequence[TaskMixture]) -> list[dict[str, Any]]:
    """Planned and realised share of every task in every unit, one dictionary each (what the mixture chart draws)."""
    planned = _sum([task.planned for task in mixture])
    realised = _sum([task.realised or Amount(0, 0, 0) for task in mixture])
    out = []
    for task in mixture:
        plan = _shares(task.planned, planned)
        real = _shares(task.realised, realised) if task.realised else (None, None, None)
        units = ("examples", "tokens", "supervised tokens")
        out += [
            {"task": task.task, "unit": unit, "planned": p, "realised": r} for unit, p, r in zip(units, plan, real, strict=True)
        ]
    return out


def _sum(amounts: Sequence[Amount]) -> Amount:
    return Amount(
        sum(amount.examples for amount in amounts),
        sum(amount.tokens for amount in amounts),
        sum(amount.supervised for amount in amounts),
    )


def _shares(part: Amount, whole: Amount) -> tuple[float, float, float]:
    return (
        part.examples / whole.examples if whole.examples else math.nan,
        part.tokens / whole.tokens if whole.tokens else math.nan,
        part.supervised / whole.supervised if whole.supervised else math.nan,
    )


def accounting_table(accounts: Sequence[Account]) -> Table:
    """What went into every stage, what came out, and what was dropped why: in = out + dropped."""
    columns = (
        Column("stage", "stage"),
        Column("in", "in", "count"),
        Column("out", "out", "count"),
        Column("dropped", "dropped", "count"),
        Column("reasons", "why"),
        Column("seconds", "time", "seconds"),
        Column("key", "key"),
    )
    rows = [(a.label, a.num_in, a.num_out, sum(a.dropped.values()), reasons(a.dropped), a.seconds, a.key[:12]) for a in accounts]
    return Table("Every stage: records in, out and dropped", columns, tuple(rows))


def explain_table(statuses: Sequence[Mapping[str, Any]]) -> Table:
    """Hit or miss of every stage with its account, from the lines of `explain --json`."""
    columns = (
        Column("label", "stage"),
        Column("status", "store"),
        Column("in", "in", "count"),
        Column("out", "out", "count"),
        Column("dropped", "dropped", "count"),
        Column("seconds", "time", "seconds"),
        Column("size_bytes", "size", "size"),
        Column("why", "why"),
    )
    rows = []
    for line in statuses:
        dropped = line["dropped"] or {}
        num_dropped = sum(dropped.values()) if line["in"] is not None else None
        why = ", ".join(line["why"]) if line["status"] == "miss" else reasons(dropped)
        rows.append(
            (line["label"], line["status"], line["in"], line["out"], num_dropped, line["seconds"], line["size_bytes"], why)
        )
    return Table("Stages", columns, tuple(rows))


def finding_table(findings: Sequence[Mapping[str, Any]]) -> Table:
    """What the audit found, one row per finding and source, the gravest first."""
    columns = (
        Column("severity", "severity"),
        Column("finding", "finding"),
        Column("source", "source", "name"),
        Column("num", "found", "count"),
        Column("of", "of", "count"),
        Column("unit", "counted in"),
        Column("share", "share", "share"),
        Column("records", "first"),
    )
    rows = [
        (part["severity"], spoken(finding["finding"]), part["source"], part["num"], part["of"], f"{finding['unit']}s",
         part["share"], ", ".join(part["records"] or part["details"]))
        for finding in findings
        for part in finding["sources"]
    ]  # fmt: skip
    return Table("Audit of the planned examples" if rows else "Audit: nothing was found", columns, tuple(rows))


def supervision_table(sources: Mapping[str, Mapping[str, Any]]) -> Table:
    """How much of each source is learned, and how it varies from example to example, from what the audit measured."""
    columns = (
        Column("source", "source", "name"),
        Column("num_examples", "examples", "count"),
        Column("num_tokens", "tokens", "count"),
        Column("learned", "learned", "share"),
        *(Column(f"q{q}", f"{q} % of examples below", "share") for q in (5, 50, 95)),
        Column("with_system", "with a system turn", "share"),
    )
    rows = []
    for name, facts in sources.items():
        shares = facts.get("supervised_share", {"quantiles": {}})
        quantiles = [shares["quantiles"].get(str(q)) for q in (5, 50, 95)]
        num = facts["num_records"]
        with_system = facts["num_with_system"] / num if num else None
        rows.append((name, facts["num_examples"], facts.get("num_tokens", 0), shares.get("total"), *quantiles, with_system))
    return Table("Share of tokens that are learned, by source", columns, tuple(rows))


def finding_lines(findings: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each finding means and what to do about it.

    >>> finding_lines([{"severity": "error", "finding": "no_stop", "means": "it never ends", "remedy": "mend it"}])
    ['error, no stop: it never ends. To do: mend it.']
    """
    return [f"{f['severity']}, {spoken(f['finding'])}: {f['means']}. To do: {f['remedy']}." for f in findings]


def garbage_table(folders: Sequence[tuple[Any, int]]) -> Table:
    """What `gc` would remove, the largest first; the total last."""
    columns = (Column("path", "folder", "name"), Column("size_bytes", "size", "size"))
    rows = [(str(path), size) for path, size in sorted(folders, key=lambda item: (-item[1], str(item[0])))]
    if len(rows) > 1:
        rows.append(("", sum(size for _, size in rows)))
    return Table("Not referred to by any run or named recipe" if rows else "Nothing to remove", columns, tuple(rows))


def reasons(dropped: Mapping[str, int]) -> str:
    """Reasons with their counts, the most frequent first.

    >>> reasons({"too_long": 2, "exact_duplicate": 31, "none": 0})
    'exact duplicate 31, too long 2'
    """
    ordered = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{spoken(reason)} {num:,}" for reason, num in ordered if num)


def spoken(name: str) -> str:
    """A rule's name as words.

    >>> spoken("near_duplicate")
    'near duplicate'
    """
    return name.replace("_", " ")


def flow_table(flows: Sequence[SourceFlow]) -> Table:
    """Where every source's records went, one column per fate; the total last."""
    fates = fate_order(flows)
    counted = [Column(fate, spoken(fate), "count") for fate in fates]
    rows: list[tuple[Any, ...]] = [(f.source, f.num_read, *(f.fates.get(fate, 0) for fate in fates)) for f in flows]
    if len(rows) > 1:
        rows.append(("", *(sum(row[i] for row in rows) for i in range(1, 2 + len(fates)))))
    columns = (Column("source", "source", "name"), Column("read", "read", "count"), *counted)
    return Table("Records by source and fate", columns, tuple(rows))


def fate_order(flows: Sequence[SourceFlow]) -> list[str]:
    """All fates: those that are no drop first, then the reasons of drops by size."""
    totals: dict[str, int] = {}
    for flow in flows:
        for fate, num in flow.fates.items():
            totals[fate] = totals.get(fate, 0) + num
    rest = sorted((fate for fate in totals if fate not in NO_DROPS), key=lambda fate: (-totals[fate], fate))
    return [fate for fate in (*NO_DROPS, *rest) if totals.get(fate)]


def steps_table(facts: Mapping[str, Any]) -> Table:
    """How the plan is cut into steps, from the plan's facts."""
    names: tuple[tuple[str, str, Format], ...] = (
        ("num_steps", "optimizer steps", "count"),
        ("capacity", "slots per row", "count"),
        ("slots_per_step", "slots per step", "count"),
        ("packing_efficiency", "packing efficiency", "share"),
    )
    rows = [(label, write(facts[key], style)) for key, label, style in names if facts.get(key) is not None]
    rows += [(_HELD_BY_STEPS[name], _spread(held, name)) for name, held in facts.get("steps", {}).items()]
    return Table("Steps", (Column("fact", "fact"), Column("value", "value")), tuple(rows))


_HELD_BY_STEPS = {
    "weight": "loss weight per step",
    "real_tokens": "real tokens per step",
    "examples": "examples per step",
    "padding_share": "padding per step",
}


def _spread(held: Mapping[str, float], name: str) -> str:
    least, median, most = (
        write(held[word], "share") if name == "padding_share" else f"{held[word]:,.0f}" for word in ("least", "median", "most")
    )
    return f"{least} to {most}, median {median}"


def fact_rows(facts: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The scalar facts of a stage as (name, text), in their order; nested ones are left to the manifest.

    >>> fact_rows({"num_threads": 2, "dtype": "float32", "losses": {"a": 1}})
    (('num threads', '2'), ('dtype', 'float32'))
    """
    scalars = [(name, value) for name, value in facts.items() if isinstance(value, str | int | float)]
    return tuple((spoken(name.removesuffix("_bytes")), write(value, _format_of(name, value))) for name, value in scalars)


def _format_of(name: str, value: Any) -> Format:
    """How a fact is written: its unit is the end of its name."""
    if isinstance(value, str):
        return "text"
    return "seconds" if name.endswith("_seconds") else "size" if name.endswith("_bytes") else "text"
