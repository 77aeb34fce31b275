"""What a run came to, in a sentence that claims no more than was measured. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tutelage.report.data import NO_DROPS, Change, ReportData
from tutelage.report.tables import interval, plural, spoken, write


def headline(data: ReportData) -> str:
    """One sentence: held-out loss before and after with the paired interval of the change, or how far the run has come."""
    total = data.total
    if total is None:
        return _before_training(data)
    numbers = f"from {write(total.before, 'loss')} to {write(total.after, 'loss')} nats per token"
    if math.isnan(total.low) or math.isnan(total.high):
        return f"Held-out loss went {numbers}; too few held-out records to say how certain that is."
    bounds = f"{write(total.change, 'change')}, paired 95 % interval {interval(total.low, total.high)}"
    match total.outcome:
        case "better":
            return f"Held-out loss fell {numbers} ({bounds})."
        case "worse":
            return f"Held-out loss rose {numbers} ({bounds}): the tuned model is worse than the one it started from."
        case _:
            return f"No clear change: held-out loss went {numbers} ({bounds}). The interval includes 0."


def by_task(changes: Sequence[Change]) -> list[str]:
    """Sentences on who gained, who lost, and where the measurement cannot tell."""
    groups = {name: [c for c in changes if c.outcome == name] for name in ("worse", "better", "unclear")}
    out = []
    if groups["worse"]:
        out.append(f"Worse: {_listed(groups['worse'])}.")
    elif groups["better"] and not groups["unclear"]:
        out.append(f"{'Every task' if len(changes) > 1 else 'The one task'} got better.")
    if groups["better"] and (groups["worse"] or groups["unclear"]):
        out.append(f"Better: {_listed(groups['better'])}.")
    elif groups["better"] and len(changes) > 1:
        best = min(groups["better"], key=lambda c: c.change)
        out.append(f"The largest gain is {_named(best)}.")
    if groups["unclear"]:
        out.append(f"Cannot be told from chance: {_listed(groups['unclear'])}.")
    unseen = [c for c in changes if not c.is_trained]
    if unseen:
        out.append(f"Never trained on: {', '.join(c.task for c in unseen)}.")
    return out


def _listed(changes: Sequence[Change]) -> str:
    return ", ".join(_named(c) for c in sorted(changes, key=lambda c: -abs(c.change)))


def _named(change: Change) -> str:
    return f"{change.task} {write(change.change, 'change')}"


def _before_training(data: ReportData) -> str:
    num_read = sum(flow.num_read for flow in data.flows)
    num_planned = sum(flow.fates.get("planned", 0) for flow in data.flows)
    steps = data.plan_facts.get("num_steps")
    tail = f" in {plural(steps, 'step')}" if isinstance(steps, int) else ""
    return (
        f"Nothing is trained yet: of {plural(num_read, 'record')} from {plural(len(data.flows), 'source')}, "
        f"{write(num_planned, 'count')} are planned{tail}."
    )


def extension_sentence(data: ReportData) -> str:
    """What an extension has to say of itself, in one sentence; nothing for a run of its own."""
    extends = data.train_facts.get("extends")
    if not isinstance(extends, dict):
        return ""
    return (
        f"This run extends run {str(extends['run'])[:12]} by {plural(data.train_facts['steps_done'], 'step')}: it began with "
        f"that run's weights after {plural(extends['steps_before'], 'step')} in all, its optimizer {extends['optimizer']}, with "
        "a plan and a learning rate schedule of its own; it is not what one longer run would have been."
    )


def figures(data: ReportData) -> list[tuple[str, str]]:
    """The few numbers that stand above everything else, as (label, value)."""
    out = []
    if data.total is not None:
        out.append(
            ("held-out loss", f"{write(data.total.before, 'loss')} \N{RIGHTWARDS ARROW} {write(data.total.after, 'loss')}")
        )
    num_read = sum(flow.num_read for flow in data.flows)
    num_planned = sum(flow.fates.get("planned", 0) for flow in data.flows)
    if num_read:
        out.append(("records trained on", f"{write(num_planned, 'count')} of {write(num_read, 'count')}"))
    tokens = sum((task.realised or task.planned).tokens for task in data.mixture)
    if tokens:
        out.append(("tokens seen" if data.curves else "tokens planned", write(tokens, "count")))
    seconds = sum(account.seconds for account in data.accounts)
    if seconds:
        out.append(("time, all stages", write(seconds, "seconds")))
    return out


def drop_sentence(data: ReportData) -> str:
    """How many records were set aside and for which reasons, most frequent first."""
    totals: dict[str, int] = {}
    for group in data.dropped:
        if group.reason not in NO_DROPS:
            totals[group.reason] = totals.get(group.reason, 0) + group.total
    if not totals:
        return "No record was dropped."
    ordered = sorted(totals.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{spoken(reason)} ({num:,})" for reason, num in ordered)
    return f"{plural(sum(totals.values()), 'record')} {'was' if sum(totals.values()) == 1 else 'were'} dropped: {named}."
