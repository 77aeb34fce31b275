"""The box `audit` through a real store: faults planted in known records come back with their counts and ids, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from audit_planted import CLEAN_CHAT, END, START, Source, audited, clean, cut, rendered, stopless, with_id

from tutelage.audit import rendered as rendered_module
from tutelage.audit.spec import AuditSpec
from tutelage.audit.stage import Audit, check_audit
from tutelage.errors import AuditError
from tutelage.plan.spec import FullLoss, InstructionModelling, KindWeights, LossRule
from tutelage.records import Flag, Kind
from tutelage.store import Artefact
from tutelage.tables import FINDINGS, read_table


def ids(audit: Audit) -> dict[str, dict[str, list[str]]]:
    """Finding -> source -> all record ids, from the table."""
    out: dict[str, dict[str, list[str]]] = {}
    for line in read_table(audit.table, FINDINGS).to_pylist():
        out.setdefault(line["finding"], {}).setdefault(line["source"], []).append(line["record"])
    return out


def severities(audit: Audit) -> dict[str, str]:
    return {finding.name: finding.severity for finding in audit.findings}


def test_a_clean_set_passes_without_a_finding(tmp_path: Path) -> None:
    """Kills an audit that cries wolf."""
    audit = audited(tmp_path, {"chat": Source(clean(20)), "maths": Source(clean(9, "sum"))})
    assert audit.findings == () and audit.passes and ids(audit) == {}
    facts = audit.facts["sources"]["chat"]
    assert facts["num_examples"] == 20 and facts["targets_by_kind"]["stop"] == 20
    assert facts["num_targets"] == facts["targets_by_kind"]["assistant"] + 20


def test_every_planted_fault_is_found_in_its_records_and_in_no_others(tmp_path: Path) -> None:
    """Kills counts by record number in the rendered set instead of the source, ids of the neighbour, findings of another source."""
    said = clean(40)
    said[30] = said[4]
    said[31] = said[4]
    chat = Source(
        said,
        examples={
            3: stopless(rendered(said[3]), 1),
            7: cut(rendered(said[7]), 2),
            11: with_id(rendered(said[11]), Kind.STOP, 10),
            12: with_id(rendered(said[12]), Kind.USER, START),
            13: with_id(rendered(said[13]), Kind.ASSISTANT, END),
        },
        flags={12: Flag.FORGED, 20: Flag.FORGED, 21: Flag.FORGED | Flag.SYSTEM_HIDDEN, 22: Flag.TURN_HIDDEN},
        refused={0: ("no_stop", "turn 1: nothing"), 1: ("overlong", "too many")},
        undrawn={25: "no_loss_weight", 26: "no_loss_weight", 27: "not_drawn", 28: "held_out"},
        part_of_line={7: 2},
    )
    maths = Source(clean(8, "sum"), examples={5: stopless(rendered(clean(8, "sum")[5]), 1)})
    maths.said[2] = said[4]
    audit = audited(tmp_path, {"chat": chat, "maths": maths})

    def named(*rows: int) -> list[str]:
        return [f"chat/chat.jsonl:{row + 1}" + ("#2" if row == 7 else "") for row in rows]

    assert ids(audit) == {
        "no_stop": {"chat": named(3), "maths": ["maths/maths.jsonl:6"]},
        "cut_answer": {"chat": named(7)},
        "wrong_stop": {"chat": named(11)},
        "forged_turn": {"chat": named(12, 13)},
        "forged_text": {"chat": named(20, 21)},
        "hidden_system": {"chat": named(21)},
        "hidden_turn": {"chat": named(22)},
        "render_losses": {"chat": named(0)},
        "overlong": {"chat": named(1)},
        "zero_weight": {"chat": named(25, 26)},
        "duplicate": {"chat": named(30, 31), "maths": ["maths/maths.jsonl:3"]},
    }
    found = {finding.name: finding for finding in audit.findings}
    assert {
        name: [(s.source, s.num, s.of) for s in f.sources] for name, f in found.items() if name in ("no_stop", "zero_weight")
    } == {
        "no_stop": [("chat", 1, 34), ("maths", 1, 8)],
        "zero_weight": [("chat", 2, 36)],
    }
    assert found["duplicate"].sources[1].details == ("equal to chat/chat.jsonl:5",)
    assert found["forged_turn"].sources[0].details == ("turn 0: <|im_start|>", "turn 1: <|im_end|>")
    assert found["render_losses"].sources[0].details == ("no_stop: turn 1: nothing",)
    assert {name for name, severity in severities(audit).items() if severity == "error"} == {
        "no_stop", "cut_answer", "forged_turn", "zero_weight",
    }  # fmt: skip


def test_a_rewritten_record_is_judged_by_its_second_rendering(tmp_path: Path) -> None:
    """Kills faults of a text that is not trained, and rows of the second set taken for rows of the source."""
    said = clean(12)
    source = Source(
        said,
        examples={5: stopless(rendered(said[5]), 1)},
        again={5: rendered(said[5]), 9: stopless(rendered(said[9]), 1), 2: rendered(said[2])},
        refused={2: ("empty_answer", "")},
    )
    audit = audited(tmp_path, {"chat": source})
    assert ids(audit) == {"no_stop": {"chat": ["chat/chat.jsonl:10"]}}
    assert audit.facts["sources"]["chat"]["num_examples"] == 12


def test_examples_that_are_not_planned_are_not_audited(tmp_path: Path) -> None:
    """Kills an audit of held-out and undrawn records, whose faults training never meets."""
    said = clean(6)
    source = Source(said, examples={2: cut(rendered(said[2]), 1)}, undrawn={2: "held_out"})
    assert audited(tmp_path, {"chat": source}).findings == ()


def test_cuts_at_windows_are_the_recipes_own(tmp_path: Path) -> None:
    """Kills a gate that stops the run for what render.overlong was told to do."""
    said = clean(4)
    broken = {row: cut(rendered(said[row]), 1) for row in (1, 2)}
    audit = audited(tmp_path, {"chat": Source(said, examples=broken, flags={1: Flag.WINDOW})})
    assert ids(audit) == {"cut_answer": {"chat": ["chat/chat.jsonl:3"]}, "cut_by_window": {"chat": ["chat/chat.jsonl:2"]}}


@pytest.mark.parametrize("chunk", [1, 30, 100, 1 << 20])
def test_the_result_is_the_same_whatever_is_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Kills a stretch that loses its last example, or places counted from the stretch's start."""
    monkeypatch.setattr(rendered_module, "_CHUNK_TOKENS", chunk)
    said = clean(30)
    broken = {row: stopless(rendered(said[row]), 1) for row in (0, 9, 10, 29)}
    undrawn = dict.fromkeys((2, 3, 4, 5, 6, 28), "not_drawn")
    audit = audited(tmp_path, {"chat": Source(said, examples=broken, undrawn=undrawn)})
    assert ids(audit) == {"no_stop": {"chat": [f"chat/chat.jsonl:{row + 1}" for row in (0, 9, 10, 29)]}}
    assert audit.facts["sources"]["chat"]["targets_by_kind"]["stop"] == 20


@pytest.mark.parametrize(
    ("loss", "rule", "expected"),
    [
        (FullLoss(), {"asks_scaffold": True}, {"trained_scaffold": "note", "trained_prompt": "note"}),
        (FullLoss(), {}, {"trained_scaffold": "error", "trained_prompt": "note"}),
        (InstructionModelling(), {}, {"trained_prompt": "note"}),
        (KindWeights(weights={"assistant": 1.0}), {}, {"stop_untrained": "error"}),
        (KindWeights(weights={"assistant": 1.0, "stop": 0.0}), {"leaves_stop_out": True}, {"stop_untrained": "note"}),
    ],
)
def test_loss_rules_are_audited_by_what_they_train(
    tmp_path: Path, loss: LossRule, rule: dict[str, bool], expected: dict[str, str]
) -> None:
    """Kills an audit of kinds instead of weights."""
    audit = audited(tmp_path, {"chat": Source([CLEAN_CHAT])}, loss=loss, **rule)
    assert severities(audit) == expected
    if "trained_prompt" in expected:
        (prompt,) = (f for f in audit.findings if f.name == "trained_prompt")
        assert prompt.unit == "token" and prompt.num == len("why one?")


def test_system_turns_are_counted_by_source_and_by_task_and_mixed_use_warns(tmp_path: Path) -> None:
    """Kills a share over all sources, in which one source with system turns and one without look mixed."""
    with_system = [(("system", "be brief"), *said) for said in clean(10, "s")]
    sources = {"all": Source(with_system), "none": Source(clean(10)), "some": Source([*with_system[:3], *clean(7, "m")])}
    audit = audited(tmp_path, sources, spec=AuditSpec(ignore=("duplicate",)))
    assert severities(audit) == {"mixed_system": "warning"}
    assert ids(audit)["mixed_system"] == {"some": [f"some/some.jsonl:{row + 1}" for row in range(3)]}
    assert audit.facts["tasks"]["task of some"] == {"num_records": 10, "num_with_system": 3}
    assert {name: facts["num_with_system"] for name, facts in audit.facts["sources"].items()} == {"all": 10, "none": 0, "some": 3}


def test_supervised_shares_have_their_total_and_distribution(tmp_path: Path) -> None:
    """Kills a mean of shares shown as the share of the whole, and a warning that names the best examples."""
    said = [(("user", "u" * 200), ("assistant", "a")), (("user", "u"), ("assistant", "a" * 93))]
    audit = audited(tmp_path, {"chat": Source(said)}, spec=AuditSpec(min_supervised_share=0.5))
    share = audit.facts["sources"]["chat"]["supervised_share"]
    lengths, learned = [len(rendered(one).ids) for one in said], (2, 94)
    each = [num / length for num, length in zip(learned, lengths, strict=True)]
    assert share["mean"] == pytest.approx(sum(each) / 2) and share["total"] == pytest.approx(96 / sum(lengths))
    assert share["quantiles"]["50"] == pytest.approx(sum(each) / 2) and sum(share["histogram"]) == 2
    assert share["histogram"][0] == 1 and share["histogram"][18] == 1
    (low,) = audit.findings
    assert low.sources[0].records[0] == "chat/chat.jsonl:1" and (low.sources[0].num, low.sources[0].of) == (96, sum(lengths))


def test_a_source_silenced_by_the_recipe_is_no_fault(tmp_path: Path) -> None:
    """Kills a gate that stops a run because a source has weight 0 on purpose."""
    silent = Source(clean(5, "s"), undrawn=dict.fromkeys(range(5), "no_loss_weight"))
    sources = {"chat": Source(clean(4)), "silent": silent}
    assert audited(tmp_path / "a", sources, silent_sources=frozenset(["silent"])).passes
    assert severities(audited(tmp_path / "b", sources)) == {"zero_weight": "error"}


def test_what_rendering_says_of_the_template_is_told(tmp_path: Path) -> None:
    """Kills an audit that leaves out the template because no single record shows its faults."""
    template = {"keeps_prefix": False, "appends_header": True, "split_markers": ["<|eot_id|>"]}
    facts = {"template": template, "pad_is_end": True}
    audit = audited(tmp_path / "a", {"chat": Source(clean(3))}, facts=facts, has_own_template=False)
    assert severities(audit) == {"split_markers": "error", "prefix_lost": "note", "header_appended": "note", "pad_is_end": "note"}
    assert audit.findings[0].sources[0].details == ("'<|eot_id|>'",)


def test_markers_are_looked_for_where_rendering_says_nothing_of_them(tmp_path: Path) -> None:
    """Kills a wrong template that passes because nobody described it; the toy tokenizer knows <|im_start|> and no <|turn|>."""
    headers = {"known": "<|im_start|>assistant\n", "unknown": "<|turn|>assistant\n"}
    for name, header in headers.items():
        audit = audited(tmp_path / name, {"chat": Source(clean(3))}, facts={"generation_prompt": header}, has_own_template=False)
        assert severities(audit) == ({} if name == "known" else {"split_markers": "error"})


def test_stops_of_ordinary_text_are_told_and_judged_by_their_text(tmp_path: Path) -> None:
    """Kills a list of stop ids, empty for such templates, that makes every stop wrong or every stop right."""
    said = clean(6)
    source = Source(said, examples={row: with_id(rendered(said[row]), Kind.STOP, ord("#")) for row in (0, 1, 2, 3, 5)})
    audit = audited(tmp_path, {"chat": source}, facts={"stop_ids": [], "stop_text": "\n##"})
    assert severities(audit) == {"wrong_stop": "warning", "text_stop": "warning"}
    assert ids(audit) == {"wrong_stop": {"chat": ["chat/chat.jsonl:5"]}}


def test_a_source_without_a_planned_example_is_no_error(tmp_path: Path) -> None:
    """Kills an empty array where a source gave nothing."""
    empty = Source(clean(3, "h"), undrawn=dict.fromkeys(range(3), "held_out"))
    audit = audited(tmp_path, {"chat": Source(clean(2)), "hidden": empty})
    assert audit.findings == () and audit.facts["sources"]["hidden"]["num_examples"] == 0


def test_the_gate_raises_with_everything_that_fails(tmp_path: Path) -> None:
    """Kills a gate that raises for a warning, or names the first fault only."""
    said = clean(9)
    source = Source(said, examples={1: stopless(rendered(said[1]), 1), 2: cut(rendered(said[2]), 1)}, flags={3: Flag.FORGED})
    audit = audited(tmp_path, {"chat": source})
    artefact = Artefact("audit", "", audit.table.parent, {})
    with pytest.raises(AuditError) as raised:
        check_audit(artefact, AuditSpec())
    assert "no_stop" in str(raised.value) and "cut_answer" in str(raised.value) and "forged_text" not in str(raised.value)
    check_audit(artefact, AuditSpec(max_no_stop_share=0.2, ignore=("cut_answer",)))


def test_the_table_holds_every_id_and_the_facts_the_first(tmp_path: Path) -> None:
    """Kills a table that is cut like the list on the screen."""
    said = clean(60)
    source = Source(said, examples={row: stopless(rendered(said[row]), 1) for row in range(60)})
    audit = audited(tmp_path, {"chat": source}, spec=AuditSpec(num_shown=3))
    assert len(ids(audit)["no_stop"]["chat"]) == 60
    (found,) = audit.findings
    assert found.num == 60 and found.sources[0].records == tuple(f"chat/chat.jsonl:{i}" for i in (1, 2, 3))
    assert len(json.loads((audit.table.parent / "audit.json").read_text())["findings"]["no_stop"]["chat"]["records"]) == 20
    assert pa.types.is_dictionary(read_table(audit.table, FINDINGS)["finding"].type)
