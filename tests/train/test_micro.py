"""Padding goes, nothing else does; sums by task, source and kind are those of the tokens."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_training import SOURCES, TASKS, Doc, make_batch, make_docs
from tutelage.errors import TrainError
from tutelage.records import Batch, Kind, Tally
from tutelage.train.micro import Names, Pass, check_weight, cut_pass, flatten, not_finite, rows_in_pass, tally

NAMES = Names(TASKS, SOURCES)


def two_rows() -> Batch:
    first, second = Doc((5, 6), (1.0,), example=7), Doc((7, 8, 9), (0.0, 0.5), task=1, example=8)
    return make_batch([[first, second], [Doc((3, 4), (2.0,), task=2, source=1, example=9)], []], capacity=6)


def test_flattening_takes_out_padding_and_keeps_order() -> None:
    """Kills a flatten that goes column by column, or one that joins the last document of a row to the next row's first."""
    flat = flatten(two_rows())
    assert flat.inputs.tolist() == [5, 6, 7, 8, 9, 3, 4]
    assert flat.positions.tolist() == [0, 1, 0, 1, 2, 0, 1]
    assert flat.weights.tolist() == [1.0, 0.0, 0.0, 0.5, 0.0, 2.0, 0.0]
    assert flat.targets.tolist() == [6, -100, 8, 9, -100, 4, -100]
    assert (flat.lengths.tolist(), flat.rows.tolist()) == ([2, 3, 2], [0, 0, 1])
    assert [document.example for document in flat.documents] == [7, 8, 9]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(1, 8))
def test_passes_cover_every_token_once_in_order(docs_per_row: list[int], rows_per_pass: int) -> None:
    """Kills a cut that loses the last rows when their number does not divide, and passes of nothing but padding."""
    docs = iter(make_docs(sum(docs_per_row), seed=3, longest=8))
    flat = flatten(make_batch([[next(docs) for _ in range(n)] for n in docs_per_row]))
    passes = flat.passes(rows_per_pass)
    assert [p.start for p in passes] == [0, *(p.stop for p in passes)][: len(passes)]
    assert (passes[-1].stop if passes else 0) == len(flat.inputs)
    assert [n for p in passes for n in p.lengths] == flat.lengths.tolist()
    assert all(sum(p.lengths) == p.stop - p.start > 0 for p in passes)
    assert len(passes) <= -(-len(docs_per_row) // rows_per_pass)


def test_a_pass_has_about_two_thousand_slots_unless_stated() -> None:
    """Kills a default that puts a whole step of a hundred thousand slots into memory."""
    assert [rows_in_pass(2048, None), rows_in_pass(512, None), rows_in_pass(100_000, None)] == [1, 4, 1]
    assert rows_in_pass(2048, 16) == 16


def test_tallies_add_up_and_fall_apart_by_hand() -> None:
    """Kills tallies of unweighted losses, and ones that count tokens of weight 0."""
    flat = flatten(two_rows())
    nll = np.array([1.0, 9.0, 9.0, 4.0, 9.0, 3.0, 9.0])
    sums = tally(flat, nll, NAMES)
    assert sums.loss == Tally(9.0, 3.5, 3)
    assert sums.by_task == {"maths": Tally(1.0, 1.0, 1), "chat": Tally(2.0, 0.5, 1), "code": Tally(6.0, 2.0, 1)}
    assert sums.by_source == {"left": Tally(3.0, 1.5, 2), "right": Tally(6.0, 2.0, 1)}
    assert sums.by_kind == {"assistant": Tally(9.0, 3.5, 3)}


def test_the_kind_of_a_tally_is_the_kind_of_the_target() -> None:
    """Kills a tally by the kind of the input, which books every stop token under `assistant`."""
    batch = make_batch([[Doc((1, 2, 3), (1.0, 1.0))]], capacity=8)
    kinds = batch.kinds.copy()
    kinds[0, :2] = [Kind.ASSISTANT, Kind.STOP]
    sums = tally(flatten(dataclasses.replace(batch, kinds=kinds)), np.array([1.0, 2.0, 0.0]), NAMES)
    assert sums.by_kind == {"assistant": Tally(1.0, 1.0, 1), "stop": Tally(2.0, 1.0, 1)}


def test_a_batch_that_is_not_what_the_plan_divides_by_is_refused() -> None:
    """Kills a loop that divides by whatever the batch happens to hold."""
    batch = dataclasses.replace(two_rows(), total_weight=3.6)
    with pytest.raises(TrainError, match=r"step 0: its weights add up to 3\.5 but the plan divides by 3\.6"):
        check_weight(batch, flatten(batch))


def test_a_step_without_weight_is_refused_and_its_examples_named() -> None:
    """Kills a division by zero that trains on NaN, and a step that silently does nothing."""
    batch = make_batch([[Doc((1, 2), (0.0,), example=41)], [Doc((1, 2), (0.0,), example=42)]], step=3)
    with pytest.raises(TrainError, match=r"step 3: every target has weight 0.*41, 42"):
        check_weight(batch, flatten(batch))


def test_documents_that_are_not_the_segments_are_refused() -> None:
    """Kills naming the wrong record in every later message."""
    batch = two_rows()
    with pytest.raises(TrainError, match="2 documents are named but the rows hold 3 segments"):
        flatten(dataclasses.replace(batch, documents=batch.documents[:2]))


def test_documents_with_a_loss_that_is_no_number_are_found() -> None:
    """Kills a check of the sum alone, which cannot say where."""
    nll = np.array([1.0, 0.0, 0.0, np.inf, 0.0, np.nan, 0.0])
    assert [document.example for document in not_finite(flatten(two_rows()), nll)] == [8, 9]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 40))
def test_passes_of_few_tokens_hold_every_document_once_in_order(lengths: list[int], most: int) -> None:
    """Kills: a document cut in two or left out where a pass ends, or a pass that takes one document too many."""
    parts = cut_pass(Pass(5, 5 + sum(lengths), tuple(lengths)), most)
    assert [n for part in parts for n in part.lengths] == lengths
    assert [part.stop - part.start for part in parts] == [sum(part.lengths) for part in parts]
    assert parts[0].start == 5 and all(a.stop == b.start for a, b in pairwise(parts))
    assert all(sum(part.lengths) <= most or len(part.lengths) == 1 for part in parts)
    assert all(sum(a.lengths) + b.lengths[0] > most for a, b in pairwise(parts))
