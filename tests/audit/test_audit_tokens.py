"""Faults in kinds, turns and weights, against a reference that walks token by token, and one by one by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from audit_planted import END, START, cut, rendered, stopless, weigher, with_id, without
from audit_reference import faults
from hypothesis import given
from hypothesis import strategies as st

from tutelage.audit.tokens import KIND_NAMES, MARK, Marks, Stretch, Vocabulary, mark
from tutelage.plan.spec import FullLoss, KindWeights, LastResponse, LossRule, ResponseLoss
from tutelage.records import Kind, Rendered

VOCABULARY = Vocabulary.of([START, END], ends=[END])
TALK = (("system", "s."), ("user", "why?"), ("assistant", "so."), ("user", "and?"), ("assistant", "no."))


def stretch_of(examples: list[Rendered]) -> Stretch:
    def offsets(lengths: list[int]) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def flat(name: str) -> np.ndarray:
        return np.concatenate([getattr(example, name) for example in examples])

    lengths = offsets([len(e.ids) for e in examples]), offsets([len(e.turn_weights) for e in examples])
    return Stretch(flat("ids"), flat("kinds"), flat("turns"), flat("turn_weights"), *lengths)


def marks_of(examples: list[Rendered], *, loss: LossRule | None = None, vocabulary: Vocabulary = VOCABULARY) -> Marks:
    stretch = stretch_of(examples)
    return mark(stretch, weigher(loss or ResponseLoss())(stretch), vocabulary)


def found(marks: Marks) -> dict[str, list[tuple[int, int]]]:
    return {
        name: list(zip(hits.example.tolist(), hits.turn.tolist(), strict=True))
        for name, hits in marks.faults.items()
        if len(hits.turn)
    }


@st.composite
def damaged(draw: st.DrawFn) -> Rendered:
    """A real talk that lost some of its tokens, and whose turns weigh anything."""
    turns = draw(st.lists(st.sampled_from(TALK), min_size=1, max_size=5))
    whole = rendered(turns, weights=draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=len(turns), max_size=len(turns))))
    first, last = draw(st.integers(0, len(whole.ids))), draw(st.integers(0, 4))
    at = np.arange(len(whole.ids))
    return without(whole, ((at >= first) & (at < first + draw(st.integers(0, 4)))) | (at >= len(at) - last))


@st.composite
def examples(draw: st.DrawFn) -> Rendered:
    """An example of up to four turns whose kinds, turns, ids and turn weights are anything that rendering could get wrong."""
    num_turns = draw(st.integers(1, 4))
    runs = draw(st.lists(st.tuples(st.sampled_from(list(Kind)), st.integers(-1, num_turns - 1), st.integers(1, 3)), max_size=8))
    kinds = [int(kind) for kind, _, length in runs for _ in range(length)]
    turns = [turn for _, turn, length in runs for _ in range(length)]
    ids = draw(st.lists(st.sampled_from([65, START, END, 900]), min_size=len(kinds), max_size=len(kinds)))
    weights = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=num_turns, max_size=num_turns))
    arrays = (np.array(ids, np.int32), np.array(kinds, np.uint8), np.array(turns, np.int16), np.array(weights, np.float32))
    return Rendered(*arrays)


@given(st.lists(examples() | damaged(), min_size=1, max_size=4), st.sampled_from([ResponseLoss(), LastResponse(), FullLoss()]))
def test_every_fault_is_found_where_a_walk_token_by_token_finds_it(some: list[Rendered], loss: LossRule) -> None:
    """Kills an index that slips at an example's border, a turn number taken over the whole set, an empty example skipped."""
    stretch = stretch_of(some)
    weights = weigher(loss)(stretch)
    targets, num_stops, places = faults(stretch, weights.tolist(), special={START, END}, ends={END})
    marks = mark(stretch, weights, VOCABULARY)
    assert [{name: num for name, num in zip(KIND_NAMES, row, strict=True) if num} for row in marks.targets.tolist()] == [
        dict(each) for each in targets
    ]
    assert marks.num_stops.tolist() == num_stops
    mine = found(marks)
    for name, expected in places.items():
        assert sorted(mine.get(name, [])) == sorted(expected), name


def test_a_clean_talk_has_no_fault() -> None:
    """Kills a check that takes what rendering always writes for a fault."""
    marks = marks_of([rendered(TALK), rendered(TALK[1:3])])
    assert found(marks) == {}
    assert marks.targets.sum(axis=1).tolist() == [8, 4] and marks.num_stops.tolist() == [2, 1]


def test_a_missing_stop_and_a_cut_answer_are_told_apart() -> None:
    """Kills a cut counted twice, and a stop that is missing at the end taken for one in the middle."""
    whole = rendered(TALK)
    broken = [stopless(whole, 2), cut(whole, 2), stopless(cut(whole, 1), 2), whole]
    assert found(marks_of(broken)) == {"no_stop": [(0, 2), (2, 2)], "cut_answer": [(1, 4), (2, 4)]}


def test_turns_that_are_not_learned_need_no_stop() -> None:
    """Kills a fault reported where the data or the rule trains nothing."""
    quiet = stopless(rendered(TALK, weights=[1, 1, 0, 1, 1]), 2)
    assert found(marks_of([quiet])) == {}
    assert found(marks_of([stopless(rendered(TALK), 2)], loss=LastResponse())) == {}


def test_a_stop_without_weight_is_found_in_every_learned_turn() -> None:
    """Kills a rule that trains answers and forgets their stops, the fault that makes a model talk on for ever."""
    marks = marks_of([rendered(TALK)], loss=KindWeights(weights={"assistant": 1.0}))
    assert found(marks) == {"stop_untrained": [(0, 2), (0, 4)]}


def test_a_stop_is_judged_by_its_last_token() -> None:
    """Kills a check of the first token of a stop that has several."""
    example = rendered(TALK[1:3])
    double = rendered(TALK[1:3])
    double.kinds[-1], double.turns[-1] = Kind.STOP, 1
    marks = marks_of([double, example])
    assert found(marks) == {"wrong_stop": [(0, 1)]}
    assert marks.faults["wrong_stop"].token.tolist() == [10] and marks.num_stops.tolist() == [1, 1]


@pytest.mark.parametrize("kind", [Kind.USER, Kind.SYSTEM, Kind.ASSISTANT])
def test_a_special_token_inside_a_message_is_found_and_named(kind: Kind) -> None:
    """Kills a search that looks at user turns only."""
    marks = marks_of([rendered(TALK), with_id(rendered(TALK), kind, START)])
    (place,) = found(marks)["forged_turn"]
    assert place[0] == 1 and TALK[place[1]][0] == kind.name.lower()
    assert marks.faults["forged_turn"].token.tolist() == [START]


def test_a_special_token_that_swallowed_a_space_at_a_border_is_no_forgery() -> None:
    """Kills a false alarm for every message that begins with white space, in tokenizers whose markers swallow it."""
    greedy = Vocabulary.of([START, END], greedy=[START], ends=[END])
    at_border = rendered(TALK[1:3])
    at_border.kinds[:2], at_border.turns[:2] = Kind.USER, 0
    assert found(marks_of([at_border])) == {"forged_turn": [(0, 0)]}
    assert found(marks_of([at_border], vocabulary=greedy)) == {}
    inside = with_id(rendered((("user", "abc"), ("assistant", "d"))), Kind.USER, 99)
    inside.ids[3] = START
    assert found(marks_of([inside], vocabulary=greedy)) == {"forged_turn": [(0, 0)]}


def test_scaffold_of_a_turn_is_a_mark_that_the_model_writes() -> None:
    """Kills marks around reasoning counted as trained scaffold, and an answer that ends in one taken for finished."""
    example = rendered(TALK[1:3])
    kinds = example.kinds.copy()
    kinds[np.flatnonzero(kinds == Kind.ASSISTANT)[0]] = Kind.SCAFFOLD
    marks = marks_of([dataclasses.replace(example, kinds=kinds)])
    assert marks.targets[0, MARK] == 1 and marks.targets[0, Kind.SCAFFOLD] == 0
    only_mark = cut(dataclasses.replace(example, kinds=np.where(kinds == Kind.ASSISTANT, Kind.SCAFFOLD, kinds)), 1)
    assert found(marks_of([only_mark])) == {"cut_answer": [(0, 1)]}


def test_faults_of_one_example_do_not_touch_its_neighbours() -> None:
    """Kills an answer at an example's end joined with the stop of the next."""
    broken, whole = cut(rendered(TALK[1:3]), 1), rendered(TALK[1:3])
    assert found(marks_of([broken, whole])) == {"cut_answer": [(0, 1)]}
    assert found(marks_of([whole, broken])) == {"cut_answer": [(1, 1)]}
