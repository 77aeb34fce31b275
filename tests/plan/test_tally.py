"""The tally: any rule as a sum over a few entries, equal to weighing token by token."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_reference import LAYOUT, example
from test_weights import MARKED, RULES, TWO_TURNS

from tutelage.plan.batch import InMemory
from tutelage.plan.spec import LossRule, PromptWeight
from tutelage.plan.tally import KIND_NAMES, Tally, tally_examples
from tutelage.plan.weights import weigh_tally, weigh_tokens
from tutelage.records import Rendered


@st.composite
def examples(draw: st.DrawFn) -> Rendered:
    layout = draw(st.lists(st.text("".join(LAYOUT), max_size=6), min_size=1, max_size=5).filter(any))
    weights = draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 1.7]), min_size=len(layout), max_size=len(layout)))
    return example(" ".join(layout), turn_weights=weights)


def entries(tally: Tally, one: int) -> dict[tuple[str, bool, float], int]:
    """What a tally holds of one example."""
    columns = (tally.example, tally.cell, tally.turn_weight, tally.count)
    lines = zip(*(column.tolist() for column in columns), strict=True)
    return {(KIND_NAMES[c // 2], bool(c % 2), w): n for e, c, w, n in lines if e == one}


#                      y y s u s a e s u s r r a a e          s u s m r m a a e s u s a e s u s m r m e
def test_a_tally_by_hand() -> None:
    """Kills a first token counted as a target, marks taken for scaffold, and a last turn that is the last of all documents."""
    tally = tally_examples(InMemory([TWO_TURNS, MARKED]))
    assert entries(tally, 0) == {
        ("scaffold", False, 1.0): 4,
        ("system", False, 1.0): 1,
        ("user", False, 1.0): 2,
        ("assistant", False, 1.0): 1,
        ("stop", False, 1.0): 1,
        ("reasoning", True, 1.0): 2,
        ("assistant", True, 1.0): 2,
        ("stop", True, 1.0): 1,
    }
    assert entries(tally, 1)["mark", True, 1.0] == 2
    assert entries(tally, 1)["mark", False, 1.0] == 2
    assert tally.num_requests.tolist() == [2, 3]


@given(st.lists(examples(), min_size=1, max_size=6), st.sampled_from(RULES), st.integers(1, 12))
def test_a_rule_over_the_tally_is_the_rule_over_the_tokens(documents: list[Rendered], rule: LossRule, chunk: int) -> None:
    """Kills every cell that joins what some rule tells apart; chunks of a few tokens cut between all documents."""
    with mock.patch("tutelage.plan.tally.CHUNK_TOKENS", chunk):
        tally = tally_examples(InMemory(documents))
    multiplier = np.linspace(0.1, 3.0, len(documents))
    weighed = weigh_tally(tally, loss=rule)
    totals, supervised = weighed.totals(multiplier), weighed.supervised(multiplier)
    for i, one in enumerate(documents):
        weights = weigh_tokens(one.kinds, loss=rule, turns=one.turns, turn_weights=one.turn_weights)
        products = (weights * np.float32(multiplier[i]))[1:]
        assert totals[i] == pytest.approx(products.sum(dtype=np.float64), rel=1e-14)
        assert supervised[i] == (products > 0).sum()
        values = np.repeat(weighed.value[weighed.example == i], weighed.count[weighed.example == i])
        assert sorted(values.tolist()) == sorted(weights[1:].tolist())


@given(st.lists(examples(), min_size=1, max_size=6), st.integers(1, 12))
def test_chunks_change_nothing(documents: list[Rendered], chunk: int) -> None:
    """Kills an artefact that depends on how the set was cut."""
    whole = tally_examples(InMemory(documents))
    with mock.patch("tutelage.plan.tally.CHUNK_TOKENS", chunk):
        pieces = tally_examples(InMemory(documents))
    for name, values in vars(whole).items():
        assert values.tolist() == getattr(pieces, name).tolist()
        assert values.dtype == getattr(pieces, name).dtype


def test_many_different_turn_weights_take_no_more_memory_than_the_tokens() -> None:
    """Kills a table of documents x weights: 300 documents with weights of their own."""
    documents = [example("su sae", turn_weights=[1.0, 1 + i / 1000]) for i in range(300)]
    tally = tally_examples(InMemory(documents))
    totals = weigh_tally(tally, loss=PromptWeight(prompt_weight=0.5)).totals()
    assert totals == pytest.approx([0.5 + 2 * np.float32(1 + i / 1000) for i in range(300)], rel=1e-12)
