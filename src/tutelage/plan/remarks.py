"""Remarks: what a reader of a mixture should not have to work out, such as who was held, and who got what that freed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tutelage.plan.budget import Supply
from tutelage.plan.rates_spec import bound_of
from tutelage.plan.rules import Share
from tutelage.plan.spec import MixSpec

_FEW_VISITS = 4  # beyond about four visits repeated records stop paying (arXiv 2305.16264)


@dataclass(frozen=True)
class TaskShare:
    """One line of a mixture: a task, or a source where rates are over sources.

    `promised_share` is of the unit that rates count; `num_promised` is what the rates alone would give in examples,
    `num_planned` what caps, minima and refill made of it, `num_unfilled` what a cap took and nobody got.
    """

    task: str
    supply: Supply
    promised_share: float
    num_promised: int
    num_planned: int
    num_unfilled: int
    is_capped: bool


def of_mixture(shares: Sequence[TaskShare], tree: Share, mix: MixSpec, *, caps: str) -> Iterator[str]:
    """The notes on a mixture; `caps` names the caps as the recipe does."""
    noun = mix.over[:-1]
    for share in shares:
        yield from _of_one(share, noun)
    capped = [f"{share.task} at {share.num_planned:,}" for share in shares if share.is_capped]
    if capped:
        yield f"held at {caps}: {', '.join(capped)} examples"
    raised = [s for s in shares if s.num_promised < s.num_planned == bound_of(mix.min_examples, s.task)]
    if raised:
        yield f"raised to mix.min_examples: {', '.join(f'{s.task} from {s.num_promised:,} to {s.num_planned:,}' for s in raised)}"
    moved = [s for s in shares if s.num_promised != s.num_planned]
    if any(s.num_planned > s.num_promised for s in moved):
        lines = [f"{s.task} {s.num_promised:,} -> {s.num_planned:,}" for s in moved]
        yield f"refilled, examples by the rates alone -> planned: {', '.join(lines)}"
        yield from _of_groups(tree, {share.task: share for share in shares})
    unfilled = [s for s in shares if s.num_unfilled]
    if unfilled:
        lines = [f"{s.task} {s.num_unfilled:,}" for s in unfilled]
        yield f"unfilled (mix.refill: none): {sum(s.num_unfilled for s in unfilled):,} examples stay unused: {', '.join(lines)}"


def _of_one(share: TaskShare, noun: str) -> Iterator[str]:
    if share.promised_share > 0 and share.num_planned == 0:
        yield f"{noun} {share.task}: its share of {share.promised_share:.2%} rounds to no example"
    if share.promised_share == 0:
        why = f" ({share.supply.lost})" if share.supply.lost else ""
        yield f"{noun} {share.task}: no share, so none of its {share.supply.num_examples:,} examples is planned{why}"
    most = -(-share.num_planned // share.supply.num_examples) if share.num_planned else 0
    if most > _FEW_VISITS:
        yield f"{noun} {share.task}: records are seen up to {most} times; mix.max_visits sets a bound"


def _of_groups(tree: Share, by_name: Mapping[str, TaskShare]) -> Iterator[str]:
    """The groups that could not keep what the rates gave them."""
    for part in tree.parts:
        members = [by_name[leaf.name] for leaf in part.leaves()]
        promised, planned = sum(s.num_promised for s in members), sum(s.num_planned for s in members)
        if part.parts and planned < promised and all(s.is_capped for s in members):
            yield f"group {part.name} holds no more than {planned:,} of its {promised:,} examples; the rest went to other groups"
        yield from _of_groups(part, by_name)
