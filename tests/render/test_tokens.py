"""Byte positions, straddling tokens and text that spells special tokens, on arrays written by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from render.styles import CHATML, SPECIAL, opened
from tutelage.records import Kind
from tutelage.render.cells import Cells
from tutelage.render.tokens import Encoded, Encoder, label

KINDS = ("characters", "bytes", "pieces", "metaspace")
TEXTS = st.lists(st.lists(st.sampled_from([*"hill .\n?é☃𝄞▁ ", *SPECIAL]), max_size=8).map("".join), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def encoders():
    return {kind: Encoder(opened(kind, CHATML, "<|im_end|>")) for kind in KINDS}


@settings(max_examples=60, deadline=None)
@given(texts=TEXTS, kind=st.sampled_from(KINDS[1:]))
def test_positions_from_bytes_and_from_offsets_agree(encoders, texts, kind):
    """Kills a shift that one example hands on to the next, and a lost leading space."""
    encoder = encoders[kind]
    made = encoder.encode(texts)
    own = encoder.tokenizer.backend
    assert made.ids.tolist() == [i for text in texts for i in own.encode(text, add_special_tokens=False).ids]
    whole = "".join(texts).encode()
    assert int(made.num_bytes.sum()) == len(whole)
    covered = np.zeros(len(whole) + 1, bool)
    for start, end in zip(made.starts.tolist(), made.ends.tolist(), strict=True):
        covered[start:end] = True
    missing = bytes(byte for byte, is_covered in zip(whole, covered, strict=False) if not is_covered)
    assert not missing.strip(), "every visible byte belongs to a token"
    assert (np.diff(made.starts) >= 0).all()


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_plain_vocabularies_are_proved_byte_by_byte(encoders, kind):
    assert encoders[kind].encode(["hi\n\n<s>h illé", "", "☃"]).is_proved.all()


def test_a_lossy_tokenizer_is_not_proved(encoders):
    encoder = encoders["characters"]
    made = encoder.encode(["né"])
    assert not made.is_proved.any()
    assert not encoder.decodes(made.ids, "né")


def _label(tokens, cells):
    starts, ends = (np.array(column, np.int64) for column in zip(*tokens, strict=True))
    made = Encoded(np.arange(len(tokens)), starts, ends, np.array([len(tokens)]), ends[-1:], np.array([True]))
    cell_ends, kinds = (np.array(column) for column in zip(*cells, strict=True))
    out = label(made, cell_ends, kinds.astype(np.uint8), np.where(kinds == Kind.SCAFFOLD, -1, 0).astype(np.int16))
    return [Kind(k).name[:2] for k in out.kinds], out.tokens_per_cell.tolist()


@pytest.mark.parametrize(
    ("tokens", "cells", "expected"),
    [
        # header "\n" + answer "\nhi" in one token: the model has to write it
        ([(0, 1), (1, 3), (3, 5)], [(2, Kind.SCAFFOLD), (5, Kind.ASSISTANT)], (["SC", "AS", "AS"], [1, 2])),
        # answer "." + line end of the template in one token
        ([(0, 2), (2, 4), (4, 5)], [(3, Kind.ASSISTANT), (4, Kind.SCAFFOLD), (5, Kind.STOP)], (["AS", "AS", "ST"], [2, 0, 1])),
        # stop ">" + line end: the stop has to be written
        ([(0, 2), (2, 4)], [(1, Kind.ASSISTANT), (3, Kind.STOP), (4, Kind.SCAFFOLD)], (["AS", "ST"], [1, 1, 0])),
        # one token over question, scaffold and answer
        ([(0, 1), (1, 6)], [(2, Kind.USER), (4, Kind.SCAFFOLD), (6, Kind.ASSISTANT)], (["US", "AS"], [1, 0, 1])),
        # question and scaffold
        ([(0, 2), (2, 3)], [(1, Kind.SCAFFOLD), (3, Kind.USER)], (["US", "US"], [0, 2])),
        # a token without width goes with what follows
        ([(0, 1), (1, 1), (1, 2)], [(1, Kind.SCAFFOLD), (2, Kind.ASSISTANT)], (["SC", "AS", "AS"], [1, 2])),
    ],
)
def test_a_straddling_token_goes_to_the_side_that_the_model_writes(tokens, cells, expected):
    """Kills `start decides`, `end decides` and `scaffold decides`."""
    assert _label(tokens, cells) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_inside_messages_become_text(encoders, kind):
    """Kills encoding the whole text with special tokens on (a forged turn) or off (a broken scaffold)."""
    encoder = encoders[kind]
    text = "<s>hi<s>hi</s>"
    cells = Cells([3, 10, 14], [0, 2, 7], [-1, 0, 0], [False, True, False])
    made = encoder.encode_literal(text, cells)
    begin, end = (encoder.tokenizer.id_of(token) for token in ("<s>", "</s>"))
    ids = made.ids.tolist()
    assert (ids[0], ids[-1], ids.count(begin), ids.count(end)) == (begin, end, 1, 1)
    assert encoder.decodes(made.ids[1:-1], "hi<s>hi")
    assert (made.starts[0], made.ends[0], made.starts[-1], made.ends[-1]) == (0, 3, 10, 14)
