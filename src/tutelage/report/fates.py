"""Where every record went: the fates of each source, the records set aside, edits, licences. Reads artefacts only."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tutelage.records import Dropped
from tutelage.report.data import NO_DROPS, PLANNED, DroppedGroup, SourceFlow
from tutelage.store import Artefact
from tutelage.tables import DROPPED, read_table, records_at

Inputs = Mapping[str, Artefact]
"""A run's artefacts by the label of their stage."""

_EXCERPT_CHARS = 400


def of_stage(inputs: Inputs, stage: str) -> dict[str, Artefact]:
    """The artefacts of one stage by the name of their source."""
    return {label.removeprefix(f"{stage} "): a for label, a in inputs.items() if label.startswith(f"{stage} ")}


def flows(inputs: Inputs, planned: pa.Table) -> tuple[SourceFlow, ...]:
    """Per source, what was read and what became of it; every record has one fate."""
    dropped = read_table(inputs["plan"].file("dropped.parquet"), DROPPED)
    fates: dict[str, Counter[str]] = defaultdict(Counter)
    grouped = pa.table({"source": dropped["source"].cast(pa.string()), "reason": dropped["reason"].cast(pa.string())})
    for line in grouped.group_by(["source", "reason"]).aggregate([([], "count_all")]).to_pylist():
        fates[line["source"]][line["reason"]] += line["count_all"]
    out = []
    for source, read in of_stage(inputs, "read").items():
        counts = read.manifest["counts"]
        of_source = planned.filter(pc.equal(planned["source"].cast(pa.string()), source))
        num_planned = len(pc.unique(of_source["row"]))
        all_fates = Counter({PLANNED: num_planned}) + fates[source] + Counter(counts["dropped"])
        out.append(SourceFlow(source, counts["in"], dict(all_fates)))
    return tuple(out)


def dropped_groups(inputs: Inputs, num_shown: int) -> tuple[DroppedGroup, ...]:
    """Per source and reason, a spread of the records set aside: those that reading refused and those that the plan left out."""
    groups = [*_groups_of_reads(inputs, num_shown), *_groups_of_plan(inputs, num_shown)]
    order = list(of_stage(inputs, "read"))
    return tuple(sorted(groups, key=lambda g: (order.index(g.source), g.reason in NO_DROPS, -g.total, g.reason)))


def _groups_of_reads(inputs: Inputs, num_shown: int) -> Iterator[DroppedGroup]:
    for source, read in of_stage(inputs, "read").items():
        if (read.path / "dropped.parquet").exists():
            for (_, reason), table in _grouped(read_table(read.file("dropped.parquet"), DROPPED)):
                yield DroppedGroup(source, reason, table.num_rows, tuple(_spread(table, num_shown)))


def _groups_of_plan(inputs: Inputs, num_shown: int) -> Iterator[DroppedGroup]:
    """The plan knows which records and why; the stages that judged them know more, and reading knows where they stood."""
    known = _judged(inputs)
    for (source, reason), table in _grouped(read_table(inputs["plan"].file("dropped.parquet"), DROPPED)):
        shown = [_fuller(drop, known) for drop in _spread(table, num_shown)]
        yield DroppedGroup(source, reason, table.num_rows, tuple(_placed(shown, of_stage(inputs, "read")[source])))


def _grouped(table: pa.Table) -> Iterator[tuple[tuple[str, str], pa.Table]]:
    keys = pa.table({name: table[name].cast(pa.string()) for name in ("source", "reason")})
    for line in keys.group_by(["source", "reason"], use_threads=False).aggregate([]).to_pylist():
        chosen = pc.and_(pc.equal(keys["source"], line["source"]), pc.equal(keys["reason"], line["reason"]))
        yield (line["source"], line["reason"]), table.filter(chosen)


def _spread(table: pa.Table, num_shown: int) -> Iterator[Dropped]:
    """At most `num_shown` records, evenly over the whole table and never just its first."""
    total = table.num_rows
    take = [i * total // num_shown for i in range(num_shown)] if total > num_shown else list(range(total))
    for line in table.take(pa.array(take, pa.int64())).to_pylist():
        yield Dropped(**line)


def _judged(inputs: Inputs) -> dict[tuple[str, int, str], Dropped]:
    """What screens, copies and renderings wrote about the records that they dropped."""
    out: dict[tuple[str, int, str], Dropped] = {}
    for label, artefact in inputs.items():
        path = artefact.path / "dropped.parquet"
        if label.split(" ")[0] in ("screen", "copies", "render", "rerender") and path.exists():
            for line in read_table(path, DROPPED).to_pylist():
                out[line["source"], line["row"], line["reason"]] = Dropped(**line)
    return out


def _fuller(drop: Dropped, known: Mapping[tuple[str, int, str], Dropped]) -> Dropped:
    """The drop with what an earlier stage wrote of it where the plan's own line is silent."""
    more = known.get((drop.source, drop.row, drop.reason))
    if more is None:
        return drop
    return dataclasses.replace(
        drop,
        file=drop.file or more.file,
        line=drop.line or more.line,
        detail=drop.detail or more.detail,
        excerpt=drop.excerpt or more.excerpt,
    )


def _placed(drops: Sequence[Dropped], read: Artefact) -> Iterator[Dropped]:
    """The drops with file, line and the opening of the record filled in from the records as read."""
    missing = sorted({drop.row for drop in drops if drop.row >= 0 and not (drop.file and drop.excerpt)})
    found = records_at(read.file("conversations.parquet"), missing)
    for drop in drops:
        record = found.get(drop.row)
        if record is None:
            yield drop
            continue
        said = " \N{RIGHTWARDS ARROW} ".join(turn["content"] for turn in record["turns"])
        yield dataclasses.replace(
            drop,
            file=drop.file or record["file"],
            line=drop.line or record["line"],
            excerpt=drop.excerpt or said[:_EXCERPT_CHARS],
        )


def rewritten(inputs: Inputs) -> dict[str, int]:
    """How many turns each rewriting rule edited."""
    out: Counter[str] = Counter()
    for artefact in of_stage(inputs, "rewrite").values():
        rules = pq.read_table(artefact.file("rewrites.parquet"), columns=["rule"])["rule"].cast(pa.string())
        out.update({line["values"]: line["counts"] for line in pc.value_counts(rules).to_pylist()})
    return dict(out)


def labels(inputs: Inputs, planned: pa.Table, column: str) -> dict[str, int]:
    """Licences or origins of the planned records, with their number, the most frequent first."""
    out: Counter[str] = Counter()
    for source, read in of_stage(inputs, "read").items():
        rows = pc.unique(planned.filter(pc.equal(planned["source"].cast(pa.string()), source))["row"])
        labels = pq.read_table(read.file("conversations.parquet"), columns=[column])[column].cast(pa.string()).take(rows)
        out.update({line["values"]: line["counts"] for line in pc.value_counts(labels).to_pylist()})
    return dict(out.most_common())
