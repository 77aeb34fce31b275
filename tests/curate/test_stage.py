"""The three boxes: their files, their accounts, and what re-does what."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from tutelage.curate.spec import CurateSpec, Length, NearSpec, Refusal, Rule, StripBoilerplate
from tutelage.curate.stage import copies_stage, rewrite_stage, screen_stage
from tutelage.records import Conversation, Origin, Turn
from tutelage.store import Artefact, Counts, Outcome, Progress, Stage, Store
from tutelage.tables import (
    SPLIT,
    ConversationColumns,
    read_dropped,
    read_rewrites,
    read_verdicts,
    write_table,
)

import pyarrow as pa  # isort: skip

Texts = dict[str, list[tuple[str, str]]]
TEXTS: Texts = {
    "b": [("Hi there", "Sure! Bern is old."), ("Bye now", "w " * 30), ("Why so", "I cannot help you.")],
    "a": [("Hi there", "Bern is old."), ("Ask me", "Anything else, then."), ("Held", "A test of one.")],
}
RULES: tuple[Rule, ...] = (StripBoilerplate(), Length(max_response_words=20), Refusal())


def reads(texts: Texts) -> dict[str, Stage]:
    return {name: read(name, pairs) for name, pairs in texts.items()}


def read(name: str, pairs: list[tuple[str, str]]) -> Stage:
    def build(folder: Path, inputs: Mapping[str, Artefact], progress: Progress) -> Outcome:
        columns = ConversationColumns()
        for line, (user, answer) in enumerate(pairs, 1):
            turns = (Turn("user", user), Turn("assistant", answer))
            columns.append(
                Conversation(Origin(name, "f", line), turns, name, "MIT", "human", None, b"c" * 16, user.ljust(16)[:16].encode())
            )
        write_table(folder / "conversations.parquet", columns.table())
        return Outcome(Counts(len(pairs), len(pairs)))

    return Stage("read", 1, {"pairs": pairs}, build, slot=name)


def split(held_out: dict[str, int], texts: Texts = TEXTS) -> Stage:
    def build(folder: Path, inputs: Mapping[str, Artefact], progress: Progress) -> Outcome:
        rows = [(name, row, held_out.get(name) == row) for name, pairs in texts.items() for row in range(len(pairs))]
        source, row, is_held_out = zip(*rows, strict=True)
        write_table(folder / "split.parquet", pa.table([pa.array(source), row, is_held_out], names=SPLIT.names).cast(SPLIT))
        return Outcome(Counts(len(rows), len(rows)))

    return Stage("split", 1, {"held_out": held_out}, build)


def curate(texts: Texts = TEXTS, held_out: dict[str, int] | None = None, spec: CurateSpec | None = None) -> dict[str, Stage]:
    spec = spec or CurateSpec(rules=RULES)
    boxes = reads(texts)
    rewrites = {name: box for name, r in boxes.items() if (box := rewrite_stage(r, rules=spec.rules))}
    screens = {name: screen_stage(r, rewrite=rewrites.get(name), rules=spec.rules) for name, r in boxes.items()}
    copies = copies_stage(boxes, rewrites=rewrites, screens=screens, split=split(held_out or {}, texts), spec=spec)
    return {"copies": copies} | {stage.label: stage for group in (boxes, rewrites, screens) for stage in group.values()}


def make(store: Store, stage: Stage) -> Artefact:
    return store.produce(stage, {name: make(store, needed) for name, needed in stage.inputs.items()})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_rewrites_are_kept_beside_the_text_as_read(store: Store) -> None:
    """Kills editing the table in place, and a count of rewrites that drops records."""
    made = make(store, curate()["rewrite b"])
    (rewrite,) = read_rewrites(made.file("rewrites.parquet"))
    assert (rewrite.source, rewrite.row, rewrite.turn, rewrite.before, rewrite.after) == (
        "b",
        0,
        1,
        "Sure! Bern is old.",
        "Bern is old.",
    )
    assert made.manifest["counts"] == {"in": 3, "out": 3, "dropped": {}}
    assert made.facts == {"num_rewritten": {"strip_boilerplate": 1}}


def test_there_is_no_rewrite_stage_without_a_rewriting_rule() -> None:
    """Kills a box that renders every record a second time for nothing."""
    assert rewrite_stage(read("a", []), rules=[Length()]) is None


def test_a_screen_lists_drops_and_flags_and_its_account_is_whole(store: Store) -> None:
    """Kills counting a flag as a drop, and drops that cannot be found again."""
    made = make(store, curate()["screen b"])
    assert [(v.row, v.rule, v.keep) for v in read_verdicts(made.file("verdicts.parquet"))] == [
        (1, "length", False),
        (2, "refusal", True),
    ]
    (dropped,) = read_dropped(made.file("dropped.parquet"))
    assert (dropped.source, dropped.file, dropped.line, dropped.row) == ("b", "f", 2, 1)
    assert dropped.detail == "30 words in the answer; at most 20"
    assert dropped.excerpt.startswith("Bye now → w w")
    assert made.manifest["counts"] == {"in": 3, "out": 2, "dropped": {"length": 1}}
    assert made.facts == {"num_flagged": {"refusal": 1}}


def test_a_screen_judges_the_rewritten_text(store: Store) -> None:
    """Kills judging the text as read."""
    spec = CurateSpec(rules=(StripBoilerplate(), Length(max_response_words=3)))
    assert [v.row for v in read_verdicts(make(store, curate(spec=spec)["screen b"]).file("verdicts.parquet"))] == [1, 2]


def test_copies_are_equal_after_rewriting_and_the_first_source_of_the_recipe_wins(store: Store) -> None:
    """Kills keys of the text as read, and sources taken in alphabetical order."""
    made = make(store, curate()["copies"])
    (verdict,) = read_verdicts(made.file("verdicts.parquet"))
    assert (verdict.source, verdict.row, verdict.rule, verdict.keep) == ("a", 0, "exact_duplicate", False)
    assert verdict.reason == "the same turns as b/f:1, which is kept"
    assert made.manifest["counts"] == {"in": 5, "out": 4, "dropped": {"exact_duplicate": 1}}
    assert [d.reason for d in read_dropped(made.file("dropped.parquet"))] == ["exact_duplicate"]


def test_where_all_copies_may_stay_the_account_is_that_of_comparing_them(store: Store) -> None:
    """Kills a short cut that forgets what the screens dropped, or that is taken although a held-out record could leak."""
    spec = CurateSpec(rules=RULES, exact_duplicates="keep", near_duplicates=None)
    made = make(store, curate(spec=spec)["copies"])
    assert made.manifest["counts"] == {"in": 5, "out": 5, "dropped": {}}
    assert read_verdicts(made.file("verdicts.parquet")) == []
    leak = make(store, curate(spec=spec, held_out={"b": 0})["copies"])
    assert leak.manifest["counts"] == {"in": 5, "out": 4, "dropped": {"leak": 1}}


def test_a_screen_without_rules_lets_all_through(store: Store) -> None:
    """Kills a short cut that counts no record in."""
    made = make(store, curate(spec=CurateSpec(rules=()))["screen b"])
    assert made.manifest["counts"] == {"in": 3, "out": 3, "dropped": {}}


def test_what_a_screen_dropped_does_not_shadow_a_good_copy(store: Store) -> None:
    """Kills dropping both copies: one by its screen, the other as its duplicate."""
    texts: Texts = {"b": [("Hi", "one two three")], "a": [("Hi", "one two three")]}
    boxes = reads(texts)
    screens = {"b": screen_stage(boxes["b"], rewrite=None, rules=[Length(max_response_words=2)])}
    screens["a"] = screen_stage(boxes["a"], rewrite=None, rules=[])
    copies = copies_stage(boxes, rewrites={}, screens=screens, split=split({}, texts), spec=CurateSpec())
    assert make(store, copies).manifest["counts"] == {"in": 1, "out": 1, "dropped": {}}


def test_the_copy_of_a_held_out_record_leaves_training(store: Store) -> None:
    """Kills a copies stage that does not read the split."""
    made = make(store, curate(held_out={"a": 0})["copies"])
    (verdict,) = read_verdicts(made.file("verdicts.parquet"))
    assert (verdict.source, verdict.row, verdict.rule) == ("b", 0, "leak")
    assert verdict.reason == "the same turns as a/f:1, which is held out"


def changed(before: dict[str, Stage], after: dict[str, Stage]) -> set[str]:
    return {label for label in before if before[label].key != after[label].key}


def test_a_change_redoes_only_what_depends_on_it() -> None:
    """Kills ingredients that hold the whole section: a new bound would redo the rewrites, and with them the rendering."""
    base = curate()
    screens = {"screen a", "screen b", "copies"}
    bound = CurateSpec(rules=(StripBoilerplate(), Length(max_response_words=21), Refusal()))
    assert changed(base, curate(spec=bound)) == screens
    assert changed(base, curate(spec=CurateSpec(rules=RULES, near_duplicates=NearSpec(threshold=0.9)))) == {"copies"}
    assert changed(base, curate(spec=CurateSpec(rules=RULES, near_duplicates=None))) == {"copies"}
    closings = CurateSpec(rules=(StripBoilerplate(closings=False), *RULES[1:]))
    assert changed(base, curate(spec=closings)) == screens | {"rewrite a", "rewrite b"}
    assert changed(base, curate(dict(reversed(TEXTS.items())))) == {"copies"}
    one = {**TEXTS, "a": TEXTS["a"][:2]}
    assert changed(base, curate(one)) >= {"read a", "rewrite a", "screen a", "copies"}
    assert not changed(base, curate(one)) & {"read b", "rewrite b", "screen b"}


def test_the_same_file_under_two_names_makes_two_artefacts() -> None:
    """Kills verdicts of one source read as another's: they carry its name."""
    boxes = curate({"a": TEXTS["a"], "b": TEXTS["a"]})
    assert boxes["read a"].key == boxes["read b"].key
    assert boxes["screen a"].key != boxes["screen b"].key
    assert boxes["rewrite a"].key != boxes["rewrite b"].key
