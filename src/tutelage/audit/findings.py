"""The catalogue of findings, and the judging: what was measured and the recipe's thresholds -> errors, warnings, notes. Pure.

error    training would go wrong: the run stops
warning  worth a look before paying for training
note     a fact that explains itself
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from tutelage.audit.spec import AuditSpec

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
MAX_LISTED = 20
"""Ids per finding and source that the facts carry; the table of findings has all."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a finding means and what to do; `unit` is what it counts.

    `threshold` names a field of AuditSpec: a larger share is `above`, else `below`. Without one any occurrence is `above`.
    """

    means: str
    remedy: str
    above: Severity
    below: Severity = "warning"
    threshold: str = ""
    unit: str = "example"


CATALOGUE: Mapping[str, Meaning] = {
    "zero_weight": Meaning(
        "no token of the example has a loss weight, so nothing is learned from it",
        "mend the turns' `weight` in the data or the recipe's `loss`, drop the records, or raise audit.max_zero_weight_share",
        "error",
        threshold="max_zero_weight_share",
        unit="record",
    ),
    "no_stop": Meaning(
        "a learned turn has no stop, so the model learns to go on after it",
        "mend the chat template, or set render.append_eos; look at the turn with `tutelage look --row`",
        "error",
        threshold="max_no_stop_share",
    ),
    "cut_answer": Meaning(
        "the example ends inside a learned turn: the answer was cut off",
        "raise render.max_tokens, or let render.overlong drop such records",
        "error",
        threshold="max_cut_answer_share",
    ),
    "cut_by_window": Meaning(
        "a window of a longer record ends inside a learned turn, as render.overlong asks for",
        "nothing to do; render.max_tokens makes windows longer",
        "note",
    ),
    "stop_untrained": Meaning(
        "the stop of a learned turn has weight 0, so the model never learns to stop",
        "give `stop` a weight in `loss.weights`, or write `stop: 0` there if that is meant",
        "error",
    ),
    "wrong_stop": Meaning(
        "the stop of a learned turn does not end with a token that ends answers",
        "name the template that belongs to the model in render.template; generation would run past such stops",
        "warning",
    ),
    "text_stop": Meaning(
        "answers end with ordinary text, not with one of the model's end tokens: generation will not stop by itself",
        "set render.append_eos, or use a template whose stop is a token of this model",
        "warning",
    ),
    "trained_scaffold": Meaning(
        "tokens that the template writes around turns are trained",
        "use a `loss` that gives scaffold no weight",
        "error",
        unit="token",
    ),
    "trained_prompt": Meaning(
        "tokens of user, system or tool turns are trained, as the recipe's loss asks for",
        "nothing to do",
        "note",
        unit="token",
    ),
    "low_supervision": Meaning(
        "hardly any token of the source is trained, so most of the time goes into reading",
        "look at its longest prompts, or lower audit.min_supervised_share",
        "warning",
        unit="token",
    ),
    "mixed_system": Meaning(
        "some records of the source have a system turn and some have none; the ids are of the fewer",
        "give all of them one, or none, so that the model learns when to expect it",
        "warning",
        unit="record",
    ),
    "hidden_system": Meaning(
        "the template leaves the system turn out, so the model never sees it",
        "name a template that shows system turns in render.template, or drop them from the data",
        "warning",
    ),
    "hidden_turn": Meaning(
        "the template leaves out a turn that the answer may depend on",
        "name a template that shows every turn in render.template",
        "warning",
    ),
    "duplicate": Meaning(
        "the record repeats an earlier one, so it is seen more often than the plan says",
        "set `curate.exact_duplicates: drop`, or raise audit.max_duplicate_share",
        "error",
        threshold="max_duplicate_share",
        unit="record",
    ),
    "forged_text": Meaning(
        "a message spells a special token; it was encoded as ordinary text and can do no harm",
        "look whether the data was scraped from transcripts; curate such records if so",
        "warning",
    ),
    "forged_turn": Meaning(
        "a message holds a real special token, so data can forge the border of a turn",
        "set `render.special_tokens_in_content: text`, or raise audit.max_forged_share",
        "error",
        threshold="max_forged_share",
    ),
    "split_markers": Meaning(
        "the template's markers are not single tokens of this tokenizer: it is the template of another model family",
        "name the model's own template in render.template, give the model its markers as tokens with model.new_tokens, or "
        "add split_markers to audit.ignore",
        "error",
    ),
    "prefix_lost": Meaning(
        "the template does not keep prefixes: earlier turns look different once later turns follow",
        "see render.history; a single-turn set is not affected",
        "note",
    ),
    "header_appended": Meaning(
        "the template always appends the header of another answer; it is scaffold and is not trained",
        "nothing to do",
        "note",
    ),
    "pad_is_end": Meaning(
        "the tokenizer pads with an end token; that is harmless here, padding is told by position and never by id",
        "nothing to do",
        "note",
    ),
    "render_losses": Meaning(
        "rendering refused records of the source",
        "see why in the details, name another template in render.template, or raise audit.max_render_loss_share",
        "error",
        below="note",
        threshold="max_render_loss_share",
        unit="record",
    ),
    "overlong": Meaning(
        "records are longer than render.max_tokens and were dropped",
        "raise render.max_tokens, or set render.overlong",
        "warning",
        below="note",
        threshold="max_render_loss_share",
        unit="record",
    ),
    "unfinished_answer": Meaning(
        "an answer breaks off in mid-sentence or inside a code block: what wrote it was cut off (a guess from its last line)",
        "drop such records or have them written again; audit.max_unfinished_share makes it stop the run",
        "error",
        threshold="max_unfinished_share",
        unit="record",
    ),
}


@dataclass(frozen=True, slots=True)
class InSource:
    """A finding in one source ("" = all): `num` of `of` in the finding's unit, the first ids, and what stands beside each id."""

    source: str
    num: int
    of: int
    severity: Severity
    records: tuple[str, ...] = ()
    details: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """`num` of `of`."""
        return self.num / self.of if self.of else 0.0


@dataclass(frozen=True, slots=True)
class Finding:
    """A finding over all sources; its severity is the gravest of them, its unit `example`, `record` or `token`."""

    name: str
    severity: Severity
    unit: str
    means: str
    remedy: str
    sources: tuple[InSource, ...]

    @property
    def num(self) -> int:
        """Over all sources."""
        return sum(source.num for source in self.sources)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        sources = [
            {
                "source": each.source,
                "severity": each.severity,
                "num": each.num,
                "of": each.of,
                "share": each.share,
                "records": list(each.records),
                "details": list(each.details),
            }
            for each in self.sources
        ]
        return {
            "finding": self.name,
            "severity": self.severity,
            "unit": self.unit,
            "num": self.num,
            "means": self.means,
            "remedy": self.remedy,
            "sources": sources,
        }


def judge(facts: Mapping[str, Any], spec: AuditSpec) -> tuple[Finding, ...]:
    """The findings in what the stage measured (`audit.json`), the gravest first, those that the recipe ignores left out.

    >>> from tutelage.audit.spec import AuditSpec
    >>> facts = {"findings": {"no_stop": {"chat": {"num": 1, "of": 4, "records": ["chat/a.jsonl:3"], "details": ["turn 1"]}}}}
    >>> [(f.name, f.severity, f.num) for f in judge(facts, AuditSpec())]
    [('no_stop', 'error', 1)]
    >>> [f.severity for f in judge(facts, AuditSpec(max_no_stop_share=0.25))]
    ['warning']
    """
    found = []
    for name, meaning in CATALOGUE.items():
        by_source = facts["findings"].get(name, {}) if name not in spec.ignore else {}
        severity_of = _SPECIAL.get(name, _by_threshold)
        judged = [(source, part, severity_of(part, facts, spec, meaning)) for source, part in by_source.items()]
        sources = tuple(_in_source(source, part, severity, spec) for source, part, severity in judged if severity is not None)
        if sources:
            gravest = min((each.severity for each in sources), key=SEVERITIES.index)
            found.append(Finding(name, gravest, meaning.unit, meaning.means, meaning.remedy, sources))
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def _in_source(source: str, part: Mapping[str, Any], severity: Severity, spec: AuditSpec) -> InSource:
    records, details = (tuple(part.get(name, ())[: spec.num_shown]) for name in ("records", "details"))
    return InSource(source, part["num"], part["of"], severity, records, details)


Part = Mapping[str, Any]
"""One finding in one source as measured: num, of, and the first records with their details."""

Judged = Callable[[Part, Mapping[str, Any], "AuditSpec", Meaning], Severity | None]


def _share(part: Part) -> float:
    return float(part["num"] / part["of"]) if part["of"] else 0.0


def _by_threshold(part: Part, facts: Mapping[str, Any], spec: AuditSpec, meaning: Meaning) -> Severity | None:
    if not part["num"]:
        return None
    bound = getattr(spec, meaning.threshold) if meaning.threshold else 0.0
    return meaning.above if not meaning.threshold or _share(part) > bound else meaning.below


def _lost(part: Part, facts: Mapping[str, Any], spec: AuditSpec, meaning: Meaning) -> Severity | None:
    return "error" if part["num"] and part["num_left"] == 0 else _by_threshold(part, facts, spec, meaning)


def _stop_untrained(part: Part, facts: Mapping[str, Any], spec: AuditSpec, meaning: Meaning) -> Severity | None:
    return "note" if facts["rule"]["leaves_stop_out"] else meaning.above


def _trained_scaffold(part: Part, facts: Mapping[str, Any], spec: AuditSpec, meaning: Meaning) -> Severity | None:
    return "note" if facts["rule"]["asks_scaffold"] else meaning.above


def _wrong_stop(part: Part, facts: Mapping[str, Any], spec: AuditSpec, meaning: Meaning) -> Severity | None:
    return "error" if part["num_right"] == 0 else "warning"


def _split_markers(part: Part, facts: Mapping[str, Any], spec: AuditSpec, meaning: Meaning) -> Severity | None:
    return "warning" if facts["rule"]["has_own_template"] else meaning.above


def _low_supervision(part: Part, facts: Mapping[str, Any], spec: AuditSpec, meaning: Meaning) -> Severity | None:
    return meaning.above if _share(part) < spec.min_supervised_share else None


def _mixed_system(part: Part, facts: Mapping[str, Any], spec: AuditSpec, meaning: Meaning) -> Severity | None:
    return meaning.above if _share(part) > spec.mixed_system_share else None


_SPECIAL: Mapping[str, Judged] = {
    "render_losses": _lost,
    "overlong": _lost,
    "stop_untrained": _stop_untrained,
    "trained_scaffold": _trained_scaffold,
    "wrong_stop": _wrong_stop,
    "split_markers": _split_markers,
    "low_supervision": _low_supervision,
    "mixed_system": _mixed_system,
}


def refusal(findings: Sequence[Finding], *, table: str) -> str:
    """The message of a gate that stays shut: every error with counts by source, first ids and the remedy.

    `table` is where all ids stand.
    """
    errors = [finding for finding in findings if finding.severity == "error"]
    lines = [f"audit: {len(errors)} finding{'s' * (len(errors) != 1)} would make training wrong; nothing was trained."]
    for finding in errors:
        lines.append(f"{finding.name}: {finding.means}")
        lines += [f"  {_line(each, finding.unit)}" for each in finding.sources if each.severity == "error"]
        lines.append(f"  -> {finding.remedy}")
    return "\n".join([*lines, f"all ids: {table}; all findings: tutelage check RECIPE --data"])


def _line(each: InSource, unit: str) -> str:
    pairs = zip(each.records, each.details, strict=False)  # no records: the details say it all
    named = [f"{record} ({detail})" if detail else record for record, detail in pairs]
    told = ", ".join(named or each.details)
    counted = f"{each.source or 'all sources'}: {each.num:,} of {each.of:,} {unit}s"
    return f"{counted}: {told}{', ...' if named and each.num > len(named) else ''}" if told else counted
