"""Preview: a source of which a sample was rendered, made up to its full size, so that the plan runs on it as on any other.

    eligible records --by task, by length--> sample --rendered--> each record borrows the rendering of the one that stands for it

The plan stage then joins, mixes, weighs and packs the borrowed renderings by its own code. What that may be off by comes from
the sample's design (`sample.py`), and is carried through the mixture by planning again with totals drawn from their error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tutelage.errors import PlanError
from tutelage.plan.mixtures import at_start, plan_mixture
from tutelage.plan.rates import Supply, allocate
from tutelage.plan.sample import Chosen, Estimate, Totals, add_totals, choose, estimate_totals
from tutelage.plan.spec import LossRule, MixSpec
from tutelage.plan.tally import Tally
from tutelage.plan.tally_stage import read_tally, write_tally
from tutelage.plan.weights import weigh_tally
from tutelage.records import Float64, Int64
from tutelage.store import Artefact, Silent
from tutelage.tables import DROPPED, EXAMPLES, RenderedSet, read_table, write_table

MEASURES = ("examples", "tokens", "supervised")
MIN_PER_TASK = 30
"""A task is estimated from so many records at least, or from all that it has."""
_NUM_DRAWS = 200
_NOT_MET = "not_met_in_the_sample"


@dataclass(frozen=True)
class Stratum:
    """The eligible records of one task in one source: `rows` in the source, and those chosen of them."""

    task: str
    rows: Int64
    chosen: Chosen


@dataclass(frozen=True)
class SampledSource:
    """A source's strata. `rows` are the rows drawn, in order: line i of the sample is row `rows[i]` of the source."""

    name: str
    strata: tuple[Stratum, ...]
    rows: Int64

    @property
    def num_records(self) -> int:
        """Eligible records."""
        return sum(len(stratum.rows) for stratum in self.strata)

    def lines(self, stratum: Stratum) -> Int64:
        """The sample's line of each record chosen in a stratum."""
        return np.searchsorted(self.rows, stratum.rows[stratum.chosen.index])


def draw_source(
    name: str, *, rows: Int64, tasks: Sequence[str] | np.ndarray, lengths: np.ndarray, num: int, seed: int
) -> SampledSource:
    """A sample of about `num` of a source's eligible records, spread evenly over its tasks; a pure function of (seed, names).

    `rows`, `tasks` and `lengths` (of the text, in any unit) have one entry per eligible record. A task with fewer records than
    its part gives all of them, and the others take the rest; every task gives 30 where it has them.
    """
    encoded = pa.array(tasks, pa.string()).dictionary_encode()
    codes = encoded.indices.to_numpy()
    counts = np.bincount(codes, minlength=len(encoded.dictionary))
    sizes = dict(zip(encoded.dictionary.to_pylist(), counts.tolist(), strict=True))
    wanted = min(max(num, MIN_PER_TASK * len(sizes)), len(rows))
    parts = allocate(dict.fromkeys(sizes, 1), wanted, caps=sizes).counts if sizes else {}
    strata = []
    for code, task in enumerate(sizes):
        mine = np.flatnonzero(codes == code)
        chosen = choose(np.asarray(lengths)[mine], num=parts[task], seed=seed, name=f"{name}\0{task}")
        strata.append(Stratum(task, rows[mine], chosen))
    drawn = [stratum.rows[stratum.chosen.index] for stratum in strata]
    return SampledSource(name, tuple(strata), np.sort(np.concatenate([np.zeros(0, np.int64), *drawn])))


@dataclass(frozen=True)
class Measured:
    """What each line of a sample came to: `measures` (n, 3) as MEASURES, and why it was refused ("" = it was not)."""

    measures: Float64
    refused: np.ndarray


def measure_sample(rendered: Path, tally: Artefact, *, num_lines: int, loss: LossRule) -> Measured:
    """The measures of a rendered sample under a loss rule. Examples without a target to learn count for nothing."""
    table = RenderedSet(rendered).examples
    weighed = weigh_tally(read_tally(tally), loss=loss)
    ones = np.ones(len(table))
    counts = weighed.totals(ones) > 0
    per_example = np.stack([counts, counts * table["num_tokens"].to_numpy(), counts * weighed.supervised(ones)], axis=1)
    measures = np.zeros((num_lines, len(MEASURES)))
    np.add.at(measures, table["row"].to_numpy(), per_example)
    refused = np.full(num_lines, "", object)
    dropped = read_table(rendered / "dropped.parquet", DROPPED)
    refused[dropped["row"].to_numpy()] = dropped["reason"].to_pylist()
    return Measured(measures, refused)


def impute(sampled: SampledSource, rendered: Path, tally: Artefact, *, into: Path, tally_into: Path) -> None:
    """Writes what the plan reads of a rendered set and of its tally, for all eligible records, each borrowing its donor's.

    Token files are not written: a plan is made of lengths and tallies, and this one is not to be trained on.
    """
    none = np.zeros(0, np.int64)
    rows = np.concatenate([none, *(s.rows[s.chosen.members] for s in sampled.strata)])
    lines = np.concatenate([none, *(sampled.lines(s)[s.chosen.donors] for s in sampled.strata)])
    by_row = np.argsort(rows, kind="stable")
    rows, lines = rows[by_row], lines[by_row]
    table = RenderedSet(rendered).examples
    of_line = table["row"].to_numpy()
    where, examples = _spread(of_line, lines, num_lines=len(sampled.rows))
    borrowed = table.take(pa.array(examples))
    borrowed = borrowed.set_column(borrowed.column_names.index("row"), "row", pa.array(rows[where]))
    write_table(into / "examples.parquet", borrowed.cast(EXAMPLES))
    dropped = read_table(rendered / "dropped.parquet", DROPPED)
    where, refusals = _spread(dropped["row"].to_numpy(), lines, num_lines=len(sampled.rows))
    again = dropped.take(pa.array(refusals))
    write_table(
        into / "dropped.parquet", again.set_column(again.column_names.index("row"), "row", pa.array(rows[where])).cast(DROPPED)
    )
    write_tally(tally_into, [_borrowed_tally(read_tally(tally), examples)], borrowed, Silent())


def _spread(of_line: Int64, lines: Int64, *, num_lines: int) -> tuple[Int64, Int64]:
    """For items that belong to lines (sorted by them), and records that borrow a line each: (record, item) of every loan.

    >>> record, item = _spread(np.array([0, 0, 2]), np.array([2, 0, 1, 0]), num_lines=3)
    >>> record.tolist(), item.tolist()
    ([0, 1, 1, 3, 3], [2, 0, 1, 0, 1])
    """
    order = np.argsort(of_line, kind="stable")
    per_line = np.bincount(of_line, minlength=num_lines)
    first = np.cumsum(per_line) - per_line
    each = per_line[lines]
    record = np.repeat(np.arange(len(lines)), each)
    inside = np.arange(len(record)) - np.repeat(np.cumsum(each) - each, each)
    return record, order[first[lines][record] + inside]


def _borrowed_tally(tally: Tally, examples: Int64) -> Tally:
    """The tally of a set whose example i is example `examples[i]` of another."""
    example, entry = _spread(tally.example.astype(np.int64), examples, num_lines=len(tally))
    requests = tally.num_requests[examples]
    return Tally(example.astype(np.int32), tally.cell[entry], tally.turn_weight[entry], tally.count[entry], requests)


def estimate_strata(sampled: SampledSource, measured: Measured) -> Iterator[tuple[str, Totals]]:
    """The totals of each stratum, by task. What no spread shows: see `hidden`."""
    for stratum in sampled.strata:
        yield stratum.task, estimate_totals(stratum.chosen, measured.measures[sampled.lines(stratum)])


def hidden(sampled: SampledSource, measured: Measured) -> Iterator[tuple[str, Hidden]]:
    """By task, what records that were not drawn may come to although no spread shows it.

    Where some block holds a refused and a kept one, its spread does, and nothing is hidden. Else the rule of three: of the
    blocks whose drawn records were kept, three in so many as were drawn may be refused all the same, and the other way round.
    Whoever is kept beside refused ones counts as much as the most of the stratum: what is refused for its length is long.
    """
    for stratum in sampled.strata:
        lines = sampled.lines(stratum)
        is_refused = measured.refused[lines] != ""
        block, size = stratum.chosen.block, stratum.chosen.size
        drawn, refused = np.bincount(block, minlength=len(size)), np.bincount(block[is_refused], minlength=len(size))
        agree = bool(((refused == 0) | (refused == drawn)).all())
        fewer, more = (_unseen(drawn[one], size[one]) if agree else 0.0 for one in (refused == 0, refused > 0))
        yield stratum.task, Hidden(fewer, more * measured.measures[lines].max(axis=0, initial=0.0))


@dataclass(frozen=True)
class Hidden:
    """How many examples there may be fewer, and how much more (3,) of MEASURES, than the spread of a sample tells."""

    fewer: float
    more: Float64

    def __add__(self, other: Hidden) -> Hidden:
        return Hidden(self.fewer + other.fewer, self.more + other.more)


def _unseen(drawn: Int64, size: Int64) -> float:
    """How many of the rest of blocks may differ from all their drawn records, at 95 %."""
    num_drawn, num_rest = int(drawn.sum()), int((size - drawn).sum())
    return min(3.0 * num_rest / num_drawn, num_rest) if num_drawn else 0.0


def estimate_drops(sampled: Mapping[str, tuple[SampledSource, Measured]], exact: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Records that rendering sets aside, by reason, with 95 % intervals; `exact` counts those of sources already rendered.

    Where no spread shows them there may be some all the same: `not_met_in_the_sample`.
    """
    reasons = sorted({str(reason) for _, measured in sampled.values() for reason in measured.refused} - {""} | set(exact))
    out = {}
    for reason in reasons:
        parts = [
            estimate_totals(stratum.chosen, (measured.refused[source.lines(stratum)] == reason).astype(float)[:, None])
            for source, measured in sampled.values()
            for stratum in source.strata
        ]
        known = exact.get(reason, 0)
        found = add_totals(parts).estimate(0) if parts else Estimate(0.0, 0.0, 0.0)
        out[reason] = {"value": round(found.value) + known, "low": round(found.low) + known, "high": round(found.high) + known}
    most = sum(found.fewer for source, measured in sampled.values() for _, found in hidden(source, measured))
    return out | ({_NOT_MET: {"value": 0, "low": 0, "high": math.ceil(most)}} if most else {})


def task_intervals(
    mixture: Sequence[Mapping[str, Any]], totals: Mapping[str, Totals], hides: Mapping[str, Hidden]
) -> dict[str, dict[str, dict[str, int]]]:
    """What each task has, with its 95 % intervals, in all three units; tasks without `totals` are known exactly.

    `hides` widens them by what the spread of the sample does not tell.
    """
    out: dict[str, dict[str, dict[str, int]]] = {}
    for line in mixture:
        out[line["task"]] = {}
        for k, unit in enumerate(MEASURES):
            value = int(line[f"available_{unit}"])
            half = 0.0
            if line["task"] in totals:
                found = totals[line["task"]].estimate(k)
                half = found.high - found.value
            unseen = hides.get(line["task"], Hidden(0.0, np.zeros(len(MEASURES))))
            low = value - half - (unseen.fewer if unit == "examples" else 0.0)
            high = value + half + float(unseen.more[k])
            out[line["task"]][unit] = {"value": value, "low": max(int(low), 0), "high": math.ceil(high)}
    return out


def plan_intervals(
    strata: Sequence[Mapping[str, Any]],
    totals: Mapping[str, Totals],
    *,
    mix: MixSpec,
    num_steps: int,
    spread: Mapping[str, Float64],
    seed: int,
) -> dict[str, dict[str, int]]:
    """95 % intervals of what the run takes: `examples`, `tokens` and `supervised` planned, and `steps`.

    The mixture is worked out again for 200 sets of sizes drawn from the estimates' error (normal, with their covariance), and
    the lengths of its part passes drawn from `spread`, the standard deviations (3,) of one example's measures; steps go with
    the tokens. Sizes under which the mixture is impossible are left out. `totals` and `spread` go by what rates name.
    """
    draws = np.random.default_rng(seed)
    planned = np.array([sum(line[f"planned_{unit}"] for line in strata) for unit in MEASURES], float)
    is_fixed = mix.total_steps is not None  # that many steps hold so many tokens
    mix = mix.model_copy(update={"total_steps": None, "total_tokens": int(planned[1])}) if is_fixed else mix
    found = [planned]
    for _ in range(_NUM_DRAWS if any(part.covariance.any() for part in totals.values()) else 0):
        supplies = {line["name"]: _drawn(line, totals.get(line["name"]), draws) for line in strata}
        try:
            counts = plan_mixture(supplies, at_start(mix)).counts
        except PlanError:
            continue
        found.append(np.sum([_planned(supplies[n], counts[n], spread[n], draws) for n in supplies], axis=0))
    low, high = np.quantile(found, (0.025, 0.975), axis=0)
    ends = {unit: {"low": int(low[k]), "high": math.ceil(high[k])} for k, unit in enumerate(MEASURES)}
    if is_fixed:
        return ends | {"steps": {"low": num_steps, "high": num_steps}}
    per_token = num_steps / max(planned[1], 1.0)
    return ends | {"steps": {"low": int(low[1] * per_token), "high": math.ceil(high[1] * per_token - 1e-9)}}


def _planned(supply: Supply, count: int, spread: Float64, draws: np.random.Generator) -> Float64:
    """What `count` visits come to: whole passes exactly, a part pass with the spread of drawing without replacement."""
    size = max(supply.num_examples, 1)
    part = count % size
    means = np.array([supply.num_examples, supply.num_tokens, supply.num_supervised]) / size
    drawn: Float64 = means * count + draws.normal() * spread * math.sqrt(part * (1 - part / size))
    return drawn


def _drawn(line: Mapping[str, Any], totals: Totals | None, draws: np.random.Generator) -> Supply:
    sizes = np.array([line[f"available_{unit}"] for unit in MEASURES], float)
    if totals is not None and totals.covariance.any():
        sizes = draws.multivariate_normal(sizes, totals.covariance, method="eigh")
    examples, tokens, supervised = (max(round(size), 1 if line["available_examples"] else 0) for size in sizes)
    return Supply(examples, max(tokens, examples), min(max(supervised, 1 if examples else 0), tokens))


def relative_error(tasks: Mapping[str, Mapping[str, Mapping[str, int]]], totals: Mapping[str, Totals]) -> float:
    """Half the 95 % interval of all tokens over the tokens: the one number to say of a preview."""
    value = sum(measures["tokens"]["value"] for measures in tasks.values())
    if not totals or not value:
        return 0.0
    found = add_totals(list(totals.values())).estimate(MEASURES.index("tokens"))
    return (found.high - found.value) / value
