"""Shingles, similarity and copies: exact against brute force, and the same whatever the batch, order of hashing or company."""

import json
import os
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.curate import near
from tutelage.curate.copies import Copies
from tutelage.curate.spec import CurateSpec, NearSpec
from tutelage.records import Conversation, Origin, Turn, Verdict

PROMPT = "please tell me everything that you know about the old town of"


def record(source: str, row: int, user: str, answer: str, **turn: float) -> Conversation:
    turns = (Turn("user", user), Turn("assistant", answer, **turn))  # type: ignore[arg-type]
    return Conversation(Origin(source, "f", row + 1), turns, "t", "MIT", "human", prompt_key=user.casefold().encode())


def verdicts(records: list[Conversation], held_out: set[int] = frozenset(), **spec: object) -> dict[int, Verdict]:  # type: ignore[assignment]
    copies = Copies(CurateSpec(**spec), lambda source, row: records[row])  # type: ignore[arg-type]
    for row, conversation in enumerate(records):
        copies.add(conversation, row, is_held_out=row in held_out)
    return {verdict.row: verdict for verdict in copies.verdicts()}


def rules(found: dict[int, Verdict]) -> dict[int, str]:
    return {row: verdict.rule for row, verdict in found.items()}


def words(start: int, stop: int) -> str:
    return " ".join(f"w{i}" for i in range(start, stop))


def test_the_first_of_equal_records_is_kept_and_the_others_say_of_which() -> None:
    """Kills keeping the last, dropping all, and reasons without a record to look at."""
    found = verdicts([record("s", i, "Hi", "Hello there") for i in range(3)])
    assert {row: (v.rule, v.keep, v.reason) for row, v in found.items()} == dict.fromkeys(
        (1, 2), ("exact_duplicate", False, "the same turns as s/f:1, which is kept")
    )


def test_equal_text_with_other_learn_weights_is_another_record() -> None:
    """Kills a key over text alone: data that learns one turn per line would lose all lines but the first."""
    turns = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d e f")]
    both = []
    for learned in (1, 3):
        weighed = tuple(Turn(t.role, t.content, weight=float(i == learned)) for i, t in enumerate(turns))
        both.append(Conversation(Origin("s", "f", learned), weighed, "t", "MIT", "human", prompt_key=b"a"))
    assert verdicts(both) == {}


def test_two_word_answers_do_not_all_collide() -> None:
    """Kills empty shingle sets for short texts, which are all alike."""
    assert (
        verdicts([record("s", i, a, b) for i, (a, b) in enumerate([("Hi", "yes"), ("Ho", "yes"), ("Hi", "no"), ("", "")])]) == {}
    )


def test_a_near_copy_goes_and_names_its_similarity_and_the_threshold() -> None:
    """Kills rounding up at the bound, and a reason that nobody can check."""
    pair = [record("s", 0, PROMPT + " Bern", words(0, 100)), record("s", 1, PROMPT + " Bern", words(0, 99) + " x")]
    (verdict,) = verdicts(pair).values()
    assert verdict.reason == "0.98 alike to s/f:1, which is kept; copies from 0.8"
    assert verdict.row == 1
    assert verdicts(pair, near_duplicates=NearSpec(threshold=0.99)) == {}
    assert verdicts(pair, near_duplicates=None) == {}


def test_two_questions_about_one_long_passage_are_no_copies() -> None:
    """Kills a measure of the whole text only: question answering over passages would lose most of its records."""
    passage = words(0, 300)
    assert verdicts([record("s", 0, passage + " who was it", "Ada"), record("s", 1, passage + " when was it", "1843")]) == {}


def test_instances_of_one_long_task_definition_are_no_copies() -> None:
    """Kills counting template text: a classification task would shrink to one record per label."""
    definition = words(0, 200)
    many = [record("s", i, f"{definition} film {i} is a{i} b{i} c{i}", "good") for i in range(40)]
    assert verdicts(many) == {}
    with_copy = [*many, record("s", 40, f"{definition} film 7 is a7 b7 c7", "good")]
    assert rules(verdicts(with_copy)) == {40: "exact_duplicate"}


def test_a_chain_of_small_changes_does_not_swallow_its_far_end() -> None:
    """Kills union-find: only what is near to a record that stays may go."""
    chain = [record("s", i, "q", words(5 * i, 5 * i + 100)) for i in range(5)]
    assert rules(verdicts(chain)) == {1: "near_duplicate", 3: "near_duplicate"}


def test_the_held_out_side_always_wins() -> None:
    """Kills first-come-first-kept across the split: the training copy read first must still leave."""
    records = [
        record("s", 0, "the very same", "a b"),
        record("s", 1, PROMPT + " Bern", words(0, 100)),
        record("s", 2, "Asked twice", "one answer"),
        record("s", 3, "the very same", "a b"),
        record("s", 4, PROMPT + " Bern now", words(0, 100)),
        record("s", 5, "asked twice", "a wholly different answer"),
    ]
    for spec in ({}, {"exact_duplicates": "keep", "near_duplicates": None}):
        found = verdicts(records, {3, 4, 5}, **spec)
        assert rules(found) == {0: "leak", 1: "leak", 2: "leak"}
        assert found[0].reason == "the same turns as s/f:4, which is held out"
        assert found[2].reason == "the same request as s/f:6, which is held out"


def test_copies_inside_held_out_keep_the_first() -> None:
    """Kills a held-out side that counts one question twice, or that calls its own copies leaks."""
    records = [record("s", i, PROMPT + " Bern", words(0, 100) + end) for i, end in enumerate(["", " x", ""])]
    assert rules(verdicts(records, {0, 1, 2})) == {1: "near_duplicate", 2: "exact_duplicate"}


def test_kept_duplicates_stay_or_go_with_the_first_of_them() -> None:
    """Kills `exact_duplicates: keep` undone by the near search, where equal records are surely near."""
    text = record("s", 0, PROMPT + " Bern", words(0, 100)).turns
    records = [Conversation(Origin("s", "f", i + 1), text, "t", "MIT", "human", prompt_key=b"p") for i in range(3)]
    assert verdicts(records, exact_duplicates="keep") == {}
    other = record("s", 3, PROMPT + " Bern", words(0, 99) + " x")
    assert rules(verdicts([other, *records], exact_duplicates="keep")) == dict.fromkeys((1, 2, 3), "near_duplicate")


def test_keys_are_not_fooled_by_where_one_part_ends() -> None:
    """Kills hashing the parts one after the other without their lengths."""
    keys = {near.turns_key(record("s", 0, *pair)) for pair in [("ab", "c"), ("a", "bc"), ("", "abc")]}
    assert len(keys) == 3
    assert near.turns_key(record("s", 0, "a", "b")) == near.turns_key(record("other", 9, "a", "b"))


def test_chinese_and_japanese_are_compared_by_character() -> None:
    """Kills white-space words where there is no white space: a whole text would be one shingle."""
    assert len(near.shingles("東京は日本の首都です。", 5)) > 3


TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=9).map(lambda digits: " ".join(map(str, digits)))
RECORDS = st.lists(st.tuples(TEXTS, TEXTS, st.booleans()), max_size=14)
SMALL = NearSpec(threshold=0.5, shingle_words=1, num_permutations=64)


@settings(max_examples=60, deadline=None)
@given(RECORDS)
def test_exactly_one_of_equal_records_stays_unless_it_is_near_another(drawn: list[tuple[str, str, bool]]) -> None:
    """Kills losing all of a group, or keeping two."""
    records = [record("s", i, user, answer) for i, (user, answer, _) in enumerate(drawn)]
    gone = verdicts(records, near_duplicates=None)
    groups: dict[tuple[str, str], list[int]] = {}
    for i, (user, answer, _) in enumerate(drawn):
        groups.setdefault((user, answer), []).append(i)
    assert {i for group in groups.values() for i in group[1:]} == set(gone)


@settings(max_examples=60, deadline=None)
@given(RECORDS, st.data())
def test_unrelated_records_change_no_verdict(drawn: list[tuple[str, str, bool]], data: st.DataObject) -> None:
    """Kills thresholds, samples or buckets that depend on the company a record keeps."""
    records = [record("s", i, user, answer) for i, (user, answer, _) in enumerate(drawn)]
    held_out = {i for i, (_, _, is_held_out) in enumerate(drawn) if is_held_out}
    alone = verdicts(records, held_out, near_duplicates=SMALL)
    spots = data.draw(st.lists(st.integers(0, len(records)), max_size=5))
    mixed: list[tuple[int, Conversation]] = list(enumerate(records))
    for n, spot in enumerate(sorted(spots, reverse=True)):
        mixed.insert(spot, (-1, record("u", 0, f"unrelated{n} x{n}", f"stranger{n} y{n}")))
    moved = {new: old for new, (old, _) in enumerate(mixed)}
    found = verdicts([r for _, r in mixed], {new for new, old in moved.items() if old in held_out}, near_duplicates=SMALL)
    assert {moved[row]: (v.rule, v.reason) for row, v in found.items()} == {row: (v.rule, v.reason) for row, v in alone.items()}


@settings(max_examples=40, deadline=None)
@given(RECORDS, st.integers(1, 5))
def test_the_batch_size_changes_nothing(drawn: list[tuple[str, str, bool]], batch: int) -> None:
    """Kills comparisons that see only the batches before, or only the own one."""
    records = [record("s", i, user, answer) for i, (user, answer, _) in enumerate(drawn)]
    whole = verdicts(records, near_duplicates=SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tutelage.curate.near._BATCH", batch)
        patch.setattr("tutelage.curate.copies._BATCH", batch)
        assert verdicts(records, near_duplicates=SMALL) == whole


def test_what_is_found_is_what_brute_force_finds() -> None:
    """Kills banding that misses pairs at the threshold, and estimates that decide in place of the exact similarity."""
    rng = np.random.default_rng(7)
    base = [rng.integers(0, 10_000, 60) for _ in range(40)]
    texts = []
    for group in base:
        for changes in (0, 2, 6, 8, 12, 20):
            edited = group.copy()
            edited[rng.choice(60, changes, replace=False)] = rng.integers(0, 10_000, changes)
            texts.append(" ".join(map(str, edited)))
    spec = NearSpec(shingle_words=1)
    sets = near.ShingleSets(1)
    sets.add(texts)
    found = near.find_copies(near.Entrants(sets, lambda i: sets[i]), spec)
    kept: list[int] = []
    expected = {}
    for i, _ in enumerate(texts):
        of = next((j for j in kept if near.jaccard(sets[i], sets[j]) >= spec.threshold), None)
        if of is None:
            kept.append(i)
        else:
            expected[i] = near.Copy(of, near.jaccard(sets[i], sets[of]))
    assert found == expected
    assert 60 < len(found) < 200


def test_jaccard_is_shared_over_all() -> None:
    """Kills dividing by the smaller set (containment) or by the sum of sizes."""
    sets = [set("abc"), set("bcd"), set("abcdef"), set("x")]
    arrays = [np.array(sorted(map(ord, s)), np.uint64) for s in sets]
    for (a, x), (b, y) in combinations(zip(sets, arrays, strict=True), 2):
        assert near.jaccard(x, y) == len(a & b) / len(a | b) == near.jaccard(y, x)


def test_another_process_finds_the_same() -> None:
    """Kills Python's salted string hash in keys, shingles or the order of candidates."""
    code = (
        "import json, test_near as t\n"
        "r = [t.record('s', i, f'q {i // 2}', t.words(3 * i, 3 * i + 60)) for i in range(30)]\n"
        "v = t.verdicts(r, near_duplicates=t.NearSpec(threshold=0.5))\n"
        "print(json.dumps([[row, x.rule, x.reason] for row, x in v.items()]))"
    )
    folder = os.path.dirname(__file__)  # noqa: PTH120
    outputs = set()
    for salt in ("0", "1"):
        env = {**os.environ, "PYTHONHASHSEED": salt, "PYTHONPATH": os.pathsep.join([folder, *sys.path])}
        outputs.add(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout)
    assert len(outputs) == 1
    assert len(json.loads(outputs.pop())) > 5
