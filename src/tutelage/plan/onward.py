"""Onward: what the earlier parts of a run have drawn, so that an extension goes on where they stopped.

A plan for twice the budget does not begin with the plan for once: the last window of a run holds what is left of it, caps
and remainders depend on the whole. So an extension has a plan of its own, by the same rates, in which

    passes go on                no record is seen a third time before all were seen twice, over both parts
    caps count both parts       mix.max_visits, mix.min_examples and max_epochs are of the run as a whole
    what was dropped is first   a run that keeps its best checkpoint forgets the steps after it: their draws come again first
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tutelage.errors import PlanError
from tutelage.plan.assemble import Candidates, members_of
from tutelage.plan.join import SHARDS, Joined
from tutelage.plan.order import Behind, pass_keys, permute
from tutelage.records import Int32, Int64
from tutelage.store import Artefact, Stage
from tutelage.tables import PLACEMENTS, PLAN_STEPS, PLANNED, read_table

Bool = NDArray[np.bool_]


@dataclass(frozen=True)
class Part:
    """The boxes of an earlier part of a run."""

    plan: Stage
    train: Stage


@dataclass(frozen=True)
class WhatIsBehind:
    """What earlier parts drew, by stratum, and their steps whose weights the next one starts from."""

    draws: Mapping[str, Behind] = field(default_factory=dict)
    num_steps: int = 0
    most_visits: int = 0

    def facts(self) -> dict[str, Any]:
        """What the plan of an extension tells of it; nothing where this is no extension."""
        if not self.draws:
            return {}
        draws = {name: {"draws": b.num_drawn, "drawn_again": len(b.missed)} for name, b in self.draws.items()}
        return {"extends": {"num_steps": self.num_steps, "most_visits": self.most_visits, "strata": draws}}

    def notes(self) -> list[str]:
        """What people should know of it."""
        if not self.draws:
            return []
        drawn, missed = (sum(values) for values in zip(*((b.num_drawn, len(b.missed)) for b in self.draws.values()), strict=True))
        first = f"; {missed:,} draws of steps that it dropped come first" if missed else ""
        return [
            f"extends a run of {self.num_steps:,} steps: {drawn:,} draws are behind it, records were seen up to "
            f"{self.most_visits} times, and passes and caps go on from there{first}"
        ]


def earlier_by_name(earlier: Sequence[Part]) -> dict[str, Stage]:
    """`earlier plan 1`, `earlier train 1` and so on."""
    return {f"earlier {stage.name} {i}": stage for i, part in enumerate(earlier, 1) for stage in (part.plan, part.train)}


def what_is_behind(joined: Joined, artefacts: Mapping[str, Artefact], *, num_parts: int, seed: int) -> WhatIsBehind:
    """The draws of the earlier parts among `artefacts`. Raises `PlanError` for a part that drew what is no candidate now."""
    if not num_parts:
        return WhatIsBehind()
    candidates = joined.candidates
    parts = [_draws(joined, artefacts[f"earlier plan {i}"], artefacts[f"earlier train {i}"]) for i in range(1, num_parts + 1)]
    example, visit = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    steps = sum(int(artefacts[f"earlier train {i}"].facts["final_step"]) for i in range(1, num_parts + 1))
    return WhatIsBehind(draws_behind(candidates, example, visit, seed=seed), steps, int(visit.max(initial=-1)) + 1)


def draws_behind(candidates: Candidates, example: Int64, visit: Int64, *, seed: int) -> dict[str, Behind]:
    """What was drawn of each stratum, from the candidate and the visit of each draw that was trained on.

    >>> from tutelage.plan.assemble import make_plan
    >>> candidates = Candidates(("a",), np.zeros(3, np.int32), np.full(3, 5, np.int32), np.full(3, 4), np.full(3, 4.0))
    >>> draws_behind(candidates, np.array([0, 1, 2, 1]), np.array([0, 0, 0, 1]), seed=0)["a"].num_drawn
    4
    """
    strata = candidates.strata
    members, begins = members_of(strata.code, len(strata.names))
    place = np.empty(len(members), np.int64)
    place[members] = np.arange(len(members)) - begins[strata.code[members]]
    out = {}
    for i, name in enumerate(strata.names):
        mine = strata.code[example] == i
        if size := int(strata.sizes[i]):
            out[name] = _behind(place[example[mine]], visit[mine], size=size, seed=seed, name=name)
    return out


def _behind(index: Int64, visit: Int64, *, size: int, seed: int, name: str) -> Behind:
    """The draws of one stratum: their number in the order of all its passes is read off the permutations of those passes."""
    is_drawn = np.zeros((int(visit.max(initial=-1)) + 1, size), bool)
    is_drawn[visit, index] = True
    in_order = [_in_order(row, seed=seed, name=name, number=number) for number, row in enumerate(is_drawn)]
    drawn = np.flatnonzero(np.concatenate([np.zeros(0, bool), *in_order]))
    end = int(drawn[-1]) + 1 if len(drawn) else 0
    return Behind(end, np.setdiff1d(np.arange(end), drawn, assume_unique=True))


def _in_order(is_drawn: Bool, *, seed: int, name: str, number: int) -> Bool:
    """Whether each draw of a pass was made; `is_drawn` says it of each record."""
    if is_drawn.all():
        return is_drawn
    size = len(is_drawn)
    keys = pass_keys(seed, name, np.full(size, number, np.int64))
    out: Bool = is_drawn[permute(np.arange(size), size=size, keys=keys)]
    return out


def _draws(joined: Joined, plan: Artefact, train: Artefact) -> tuple[Int64, Int64]:
    """(candidate, visit) of every draw in the steps whose weights the part ended with."""
    steps = read_table(plan.file("steps.parquet"), PLAN_STEPS).slice(0, int(train.facts["final_step"]))
    end = int(np.max(steps["first_row"].to_numpy() + steps["num_rows"].to_numpy(), initial=0))
    placements = read_table(plan.file("placements.parquet"), PLACEMENTS)
    is_met = placements["row"].to_numpy() < end
    number = _candidates_of(joined, plan)
    return number[placements["example"].to_numpy()[is_met]], placements["visit"].to_numpy()[is_met].astype(np.int64)


def _candidates_of(joined: Joined, plan: Artefact) -> Int64:
    """The candidate that each line of a plan's planned.parquet stands for."""
    table = read_table(plan.file("planned.parquet"), PLANNED)
    sources = {name: i for i, name in enumerate(joined.names)}
    source = np.array([sources.get(name, -1) for name in table["source"].to_pylist()], np.int32)
    shard = np.array([SHARDS.index(name) for name in table["shard"].to_pylist()], np.int32)
    wanted = _names(source, shard, table["index"].to_numpy())
    known = _names(joined.source, joined.column("shard"), joined.column("index"))
    order = np.argsort(known, kind="stable")
    at = np.minimum(np.searchsorted(known[order], wanted), len(known) - 1)
    found: Int64 = order[at]
    if not np.array_equal(known[found], wanted):
        raise PlanError("extend: the finished run drew records that this recipe does not have; extend it with the same data")
    return found


def _names(source: Int32, shard: Int32, index: Int64) -> Int64:
    """One number for each example that was rendered."""
    return source.astype(np.int64) << 44 | shard.astype(np.int64) << 40 | index
