"""The box `audit`: measures every planned example, and names what would make training wrong.

audit.json         per finding and source: how many of how many, the first ids; supervised shares, system turns, template
findings.parquet   one line per finding and example, all of them
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tutelage.audit.findings import MAX_LISTED, SEVERITIES, Finding, judge, refusal
from tutelage.audit.ledger import Ledger
from tutelage.audit.rendered import TokenFacts, measure_set
from tutelage.audit.spec import AuditSpec
from tutelage.audit.texts import RecordNames, content_keys, first_of_equal, scan_turns
from tutelage.audit.tokens import KIND_NAMES, PROMPT_KINDS, Weigh
from tutelage.audit.vocabulary import Added, template_facts, vocabulary
from tutelage.errors import AuditError
from tutelage.records import Flag, Int64, Kind
from tutelage.store import Artefact, Counts, Json, Outcome, Progress, Stage, write_atomic
from tutelage.tables import DROPPED, PLANNED, RenderedSet, read_table, write_table

FACTS_FILE, FINDINGS_FILE = "audit.json", "findings.parquet"
_SHARDS = ("render", "rerender")
_QUANTILES, _NUM_BINS = (5, 25, 50, 75, 95), 20
_NO_LOSS_WEIGHT, _OVERLONG = "no_loss_weight", "overlong"  # reasons of the plan and of rendering
_RECORD_WEIGHT_0 = "the record's own weight is 0"  # the plan's word for a record that the data itself leaves out
_FLAGS = {Flag.SYSTEM_HIDDEN: "hidden_system", Flag.TURN_HIDDEN: "hidden_turn", Flag.FORGED: "forged_text"}
_WITH_TOKEN = ("wrong_stop", "forged_turn")


@dataclass(frozen=True)
class AuditInputs:
    """The boxes that the audit reads; dictionaries by source name. Sources without rewrites lack a rerender."""

    plan: Stage
    reads: Mapping[str, Stage]
    renders: Mapping[str, Stage]
    rerenders: Mapping[str, Stage]
    tokenizer: Stage

    def by_name(self) -> dict[str, Stage]:
        """`read NAME`, `render NAME`, `rerender NAME`, `plan`, `tokenizer`."""
        kinds = {"read": self.reads, "render": self.renders, "rerender": self.rerenders}
        named = {f"{kind} {name}": stage for kind, stages in kinds.items() for name, stage in stages.items()}
        return named | {"plan": self.plan, "tokenizer": self.tokenizer}


@dataclass(frozen=True)
class Rule:
    """What the recipe asks for, as far as the audit must know; all of it is in the keys of the plan and of the renderings.

    `asks_scaffold`: the loss rule itself weighs scaffold. `leaves_stop_out`: it gives stops weight 0 in so many words.
    `has_own_template`: the tokenizer's own. `silent_sources` have weight 0 in the recipe.
    """

    weigh: Weigh
    asks_scaffold: bool = False
    leaves_stop_out: bool = False
    has_own_template: bool = True
    silent_sources: frozenset[str] = frozenset()


def audit_stage(inputs: AuditInputs, *, rule: Rule) -> Stage:
    """The box `audit`. It measures and knows no threshold; `check_audit` judges."""

    def build(folder: Path, artefacts: Mapping[str, Artefact], progress: Progress) -> Outcome:
        audit = _Audit(artefacts, rule, sorted(inputs.reads))
        progress.start("audit", len(audit.names), "sources")
        for name in audit.names:
            audit.source(name)
            progress.advance(text=name)
        audit.duplicates()
        return audit.write(folder)

    return Stage("audit", 1, {}, build, inputs=inputs.by_name())


@dataclass(frozen=True)
class Audit:
    """A finished audit under a recipe's thresholds: findings, the gravest first; what was measured; the table of all ids."""

    findings: tuple[Finding, ...]
    facts: Mapping[str, Json]
    table: Path

    @property
    def passes(self) -> bool:
        """No finding would make training wrong."""
        return all(finding.severity != "error" for finding in self.findings)

    @property
    def verdict(self) -> str:
        """One line."""
        counts = Counter(finding.severity for finding in self.findings)
        told = ", ".join(f"{counts[name]} {name}{'s' * (counts[name] != 1)}" for name in SEVERITIES)
        num = sum(source["num_examples"] for source in self.facts["sources"].values())
        return f"audit of {num:,} examples {'passes' if self.passes else 'does not pass'}: {told}; all ids: {self.table}"

    def as_json(self) -> dict[str, Json]:
        """Plain values: what was found, and what was measured of sources, tasks and the template."""
        measured = {name: self.facts[name] for name in ("sources", "tasks", "template")}
        return {"passes": self.passes, "findings": [f.as_json() for f in self.findings], **measured, "table": str(self.table)}


def read_audit(artefact: Artefact, spec: AuditSpec) -> Audit:
    """What a finished audit found."""
    facts = json.loads(artefact.file(FACTS_FILE).read_text(encoding="utf-8"))
    return Audit(judge(facts, spec), facts, artefact.file(FINDINGS_FILE))


def check_audit(artefact: Artefact, spec: AuditSpec) -> None:
    """AuditError when a finding would make training wrong: all of them, with counts by source, first ids and remedy."""
    audit = read_audit(artefact, spec)
    if not audit.passes:
        raise AuditError(refusal(audit.findings, table=str(audit.table)))


class _Audit:
    """One build: a ledger being filled, a source at a time."""

    def __init__(self, artefacts: Mapping[str, Artefact], rule: Rule, names: list[str]) -> None:
        self.artefacts, self.rule, self.names = artefacts, rule, names
        self.planned = _by_source(read_table(artefacts["plan"].file("planned.parquet"), PLANNED))
        self.undrawn = _by_source(read_table(artefacts["plan"].file("dropped.parquet"), DROPPED))
        self.tokenizer = artefacts["tokenizer"].path
        self.render_facts = [a.facts for label, a in artefacts.items() if label.startswith(tuple(f"{s} " for s in _SHARDS))]
        self.added = Added.read(self.tokenizer)
        self.vocabulary = vocabulary(self.tokenizer, self.added, self.render_facts)
        self.paths = {name: artefacts[f"read {name}"].file("conversations.parquet") for name in names}
        self.ledger = Ledger({name: RecordNames(path, name) for name, path in self.paths.items()})
        self.facts: dict[str, dict[str, Json]] = {}
        self.tasks: dict[str, Counter[str]] = {"num_records": Counter(), "num_with_system": Counter()}
        self.rows: dict[str, Int64] = {}

    def source(self, name: str) -> None:
        """Everything that one source tells by itself."""
        planned = self.planned.get(name, PLANNED.empty_table())
        self.rows[name], first = np.unique(planned["row"].to_numpy(), return_index=True)
        self.facts[name] = {"num_examples": len(planned), "num_records": len(self.rows[name])}
        self._tokens(name, planned)
        self._turns(name, planned["task"].cast(pa.string()).take(pa.array(first)))
        self._without_weight(name)
        self._losses(name)

    def _tokens(self, name: str, planned: pa.Table) -> None:
        """What kinds, turns and weights tell, over both renderings."""
        sets = []
        for shard in _SHARDS:
            chosen = np.sort(planned.filter(pc.equal(planned["shard"].cast(pa.string()), shard))["index"].to_numpy())
            if len(chosen):
                folder = self.artefacts[f"{shard} {name}"].path
                sets.append(measure_set(folder, chosen, weigh=self.rule.weigh, vocabulary=self.vocabulary))
        for facts in sets:
            self._faults(name, facts, of=len(planned))
        if sets:
            self._supervision(name, sets)

    def _faults(self, name: str, facts: TokenFacts, *, of: int) -> None:
        is_window = (facts.flags & Flag.WINDOW) > 0
        for finding, hits in facts.faults.items():
            at, details = hits.by_example(self._token if finding in _WITH_TOKEN else None)
            told = np.where(is_window[at], "cut_by_window", finding) if finding == "cut_answer" else np.full(len(at), finding)
            for each in np.unique(told).tolist():
                mine = np.flatnonzero(told == each)
                some = [details[i] for i in mine.tolist()]
                self.ledger.add(each, name, facts.row[at[mine]], of=of, part=facts.part[at[mine]], details=some)
        is_forged = np.isin(np.arange(len(facts.row)), facts.faults["forged_turn"].example)
        for flag, finding in _FLAGS.items():
            at = np.flatnonzero((facts.flags & flag > 0) & ~(is_forged & (flag == Flag.FORGED)))
            self.ledger.add(finding, name, facts.row[at], of=of, part=facts.part[at])

    def _token(self, token: int) -> str:
        return self.added.texts.get(token, f"token {token}")

    def _supervision(self, name: str, sets: list[TokenFacts]) -> None:
        """How much is learned of what is read, and which kinds of tokens."""
        shares = np.concatenate([facts.shares for facts in sets])
        lengths = np.concatenate([facts.num_tokens for facts in sets])
        row = np.concatenate([facts.row for facts in sets])
        by_kind = np.sum([facts.targets.sum(axis=0, dtype=np.int64) for facts in sets], axis=0)
        num_tokens, num_targets = int(lengths.sum()), int(by_kind.sum())
        lowest = np.argsort(shares, kind="stable")[:MAX_LISTED]
        self.ledger.tell(
            "low_supervision",
            name,
            num=num_targets,
            of=num_tokens,
            records=self.ledger.names[name].of(row[lowest]).to_pylist(),
            details=[f"{100 * shares[i]:.2f} % of {lengths[i]:,} tokens" for i in lowest],
        )
        for finding, kinds in (("trained_scaffold", [Kind.SCAFFOLD]), ("trained_prompt", list(PROMPT_KINDS))):
            if num := int(by_kind[kinds].sum()):
                self.ledger.tell(finding, name, num=num, of=num_targets)
                for facts in sets:
                    at = np.flatnonzero(facts.targets[:, kinds].any(axis=1))
                    self.ledger.put(finding, name, facts.row[at], part=facts.part[at])
        if num_wrong := sum(len(facts.faults["wrong_stop"].example) for facts in sets):
            self.ledger.tell("wrong_stop", name, num=0, of=0, num_right=sum(facts.num_stops for facts in sets) - num_wrong)
        self.facts[name] |= {
            "num_tokens": num_tokens,
            "num_targets": num_targets,
            "targets_by_kind": dict(zip(KIND_NAMES, by_kind.tolist(), strict=True)),
            "supervised_share": _distribution(shares) | {"total": num_targets / max(num_tokens, 1)},
        }

    def _turns(self, name: str, tasks: pa.Array) -> None:
        """System turns and answers that break off, among the planned records; `tasks` has one entry for each of them."""
        rows = self.rows[name]
        has_system, is_cut = (flags[rows] for flags in scan_turns(self.paths[name]))
        num_with = int(has_system.sum())
        self.facts[name]["num_with_system"] = num_with
        self.tasks["num_records"].update(tasks.to_pylist())
        self.tasks["num_with_system"].update(tasks.filter(pa.array(has_system)).to_pylist())
        if 0 < num_with < len(rows):
            fewer = has_system if 2 * num_with <= len(rows) else ~has_system
            word = "has a system turn" if 2 * num_with <= len(rows) else "has no system turn"
            self.ledger.add("mixed_system", name, rows[fewer], of=len(rows), details=[word] * int(fewer.sum()))
        self.ledger.add("unfinished_answer", name, rows[is_cut], of=len(rows))

    def _without_weight(self, name: str) -> None:
        """Records that the plan left out because no token of theirs would count, though nobody gave them weight 0."""
        if name in self.undrawn and name not in self.rule.silent_sources:
            table = self.undrawn[name]
            is_silent = pc.equal(table["reason"].cast(pa.string()), _NO_LOSS_WEIGHT)
            is_silent = pc.and_(is_silent, pc.not_equal(table["detail"], _RECORD_WEIGHT_0))
            silent = table.filter(is_silent)["row"].to_numpy()
            self.ledger.add("zero_weight", name, silent, of=len(self.rows[name]) + len(silent))

    def _losses(self, name: str) -> None:
        """Records that rendering refused, overlong ones apart."""
        refused = _refused(self.artefacts, name)
        num_in = self.artefacts[f"render {name}"].manifest["counts"]["in"]
        is_long = pc.equal(refused["reason"].cast(pa.string()), _OVERLONG)
        for finding, lost in (("overlong", refused.filter(is_long)), ("render_losses", refused.filter(pc.invert(is_long)))):
            reason, detail = (lost[column].cast(pa.string()).to_pylist() for column in ("reason", "detail"))
            details = [f"{why}: {more}" if more else why for why, more in zip(reason, detail, strict=True)]
            self.ledger.add(finding, name, lost["row"].to_numpy(), of=num_in, details=details)
            if len(lost):
                more = {"num_left": num_in - len(refused), "reasons": dict(Counter(reason).most_common())}
                self.ledger.tell(finding, name, num=0, of=num_in, **more)

    def duplicates(self) -> None:
        """Planned records that repeat an earlier one, of their own or of another source."""
        sizes = [len(self.rows[name]) for name in self.names]
        source, row = np.repeat(np.arange(len(self.names)), sizes), np.concatenate([self.rows[name] for name in self.names])
        first = first_of_equal(np.concatenate([content_keys(self.paths[name], self.rows[name]) for name in self.names]))
        again = np.flatnonzero(first != np.arange(len(first)))
        original = np.full(len(first), "", object)
        for code, name in enumerate(self.names):
            theirs = np.unique(first[again[source[first[again]] == code]])
            original[theirs] = self.ledger.names[name].of(row[theirs]).to_pylist()
        for code, name in enumerate(self.names):
            mine = again[source[again] == code]
            details = [f"equal to {original[i]}" for i in first[mine].tolist()]
            self.ledger.add("duplicate", name, row[mine], of=sizes[code], details=details)

    def _template(self) -> dict[str, Json]:
        """What is to be said of the template as a whole."""
        facts = template_facts(self.tokenizer, self.render_facts)
        num = sum(fact["num_examples"] for fact in self.facts.values())
        told = {
            "split_markers": [repr(marker) for marker in facts["split_markers"]],
            "text_stop": [repr(stop) for stop in facts["text_stops"]],
            "prefix_lost": [] if facts["keeps_prefix"] is not False else ["every record of several turns"],
            "header_appended": ["every record"] if facts["appends_header"] else [],
            "pad_is_end": ["every record"] if facts["pad_is_end"] else [],
        }
        for finding, details in told.items():
            if details:
                self.ledger.tell(finding, "", num=num, of=num, details=details)
        return facts

    def write(self, folder: Path) -> Outcome:
        """Both files, and the account."""
        template = self._template()
        table = self.ledger.close()
        write_table(folder / FINDINGS_FILE, table)
        lines = Counter(table["finding"].cast(pa.string()).to_pylist())
        tasks = {
            task: {"num_records": num, "num_with_system": self.tasks["num_with_system"][task]}
            for task, num in sorted(self.tasks["num_records"].items())
        }
        names = ("asks_scaffold", "leaves_stop_out", "has_own_template")
        facts = {
            "rule": {name: getattr(self.rule, name) for name in names},
            "template": template,
            "sources": self.facts,
            "tasks": tasks,
            "findings": self.ledger.found,
        }
        write_atomic(folder / FACTS_FILE, json.dumps(facts, indent=1, ensure_ascii=False).encode("utf-8", "replace"))
        num = sum(fact["num_examples"] for fact in self.facts.values())
        return Outcome(Counts(num, num), {"num_lines": dict(sorted(lines.items()))})


def _by_source(table: pa.Table) -> dict[str, pa.Table]:
    """A table cut up by its column `source`."""
    source = table["source"].cast(pa.string())
    return {name: table.filter(pc.equal(source, name)) for name in pc.unique(source).to_pylist()}


def _refused(artefacts: Mapping[str, Artefact], name: str) -> pa.Table:
    """The records that have no example: what the second rendering says of a rewritten record counts."""
    refused = read_table(artefacts[f"render {name}"].file("dropped.parquet"), DROPPED)
    if f"rerender {name}" not in artefacts:
        return refused
    again = artefacts[f"rerender {name}"]
    refused_again = read_table(again.file("dropped.parquet"), DROPPED)
    renewed = pa.concat_arrays([c for t in (RenderedSet(again.path).examples, refused_again) for c in t["row"].chunks])
    kept = refused.filter(pc.invert(pc.is_in(refused["row"], renewed)))
    return pa.concat_tables([kept, refused_again]).unify_dictionaries()


def _distribution(shares: np.ndarray) -> dict[str, Json]:
    """Mean, quantiles and histogram of supervised shares, over examples."""
    histogram = np.histogram(shares, bins=_NUM_BINS, range=(0.0, 1.0))[0]
    quantiles = np.quantile(shares, [q / 100 for q in _QUANTILES])
    return {
        "mean": float(shares.mean()),
        "quantiles": {str(q): float(value) for q, value in zip(_QUANTILES, quantiles, strict=True)},
        "histogram": histogram.tolist(),
    }
