"""Engines: a faster one is used where it gives the ids of `tokenizers`, and nowhere else."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from render.styles import CHATML, opened, talk
from tutelage.errors import TemplateError
from tutelage.render import engines
from tutelage.render.engines import ByDigits, Chosen, EngineDiffers, Reference, Texts, choose_engine
from tutelage.render.examples import Renderer, render_conversations
from tutelage.render.spec import RenderSpec
from tutelage.render.tokenizer import OpenTokenizer
from tutelage.render.tokens import ByteTable, _differing, _walk_arrays, _walk_compiled

TEXTS = st.lists(
    st.lists(st.sampled_from([*"ab 17\n\té½²٣Ⅷ一☃😀'", "don't", "  ", "1,000", "\x04", "\u0378", "<|im_end|>"]), max_size=9).map(
        "".join
    ),
    min_size=1,
    max_size=6,
)
LACKING = "Ą"  # the letter of byte 0x04


class _Lying(Reference):
    """The reference, but for texts that hold a word."""

    def __init__(self, backend: Tokenizer, word: str) -> None:
        super().__init__(backend, "lying")
        self.word = word

    def encode(self, batch: Texts):
        ids, counts = super().encode(batch)
        for i, (a, b) in enumerate(pairwise([0, *np.cumsum(counts).tolist()])):
            if self.word in batch.texts[i]:
                ids[a:b] = ids[a:b][::-1]
        return ids, counts


def _digits_apart() -> OpenTokenizer:
    """Like SmolLM2's: every digit apart, then byte level; the vocabulary cannot write byte 4."""
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {LACKING})
    merges = [("Ġ", "a"), ("a", "b"), ("Ġ", "Ġ"), ("Ã", "©"), ("1", "7"), ("o", "n")]
    words = [*alphabet, *(a + b for a, b in merges), "<|im_end|>"]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_end|>"])
    return OpenTokenizer(backend, {"eos_token": "<|im_end|>"}, ("<|im_end|>",), {"default": CHATML}, "made here")


@pytest.fixture(scope="module")
def digits() -> OpenTokenizer:
    pytest.importorskip("gigatoken")
    return _digits_apart()


@settings(max_examples=150, deadline=None)
@given(texts=TEXTS)
def test_digits_set_apart_give_the_reference_s_ids(digits, texts):
    """Kills a merge over a digit, a number beyond ASCII left inside a stretch, and an id that the vocabulary has not."""
    chosen = choose_engine(digits)
    assert isinstance(chosen.engine, ByDigits)
    ids, counts = chosen.engine.encode(Texts.of(texts))
    expected, expected_counts = chosen.reference.encode(Texts.of(texts))
    assert counts.tolist() == expected_counts.tolist()
    assert ids.tolist() == expected.tolist()


def test_the_engine_for_bytes_is_the_fast_one():
    """Kills a choice that always falls back."""
    pytest.importorskip("gigatoken")
    chosen = choose_engine(opened("pieces", CHATML, "<|im_end|>"))
    assert chosen.facts()["name"].startswith(("gigatoken", "tokenizers"))
    assert chosen.is_fast or "gigatoken" in chosen.why or "other ids" in chosen.why


def test_a_tokenizer_that_it_cannot_read_keeps_the_reference():
    """Kills a refusal in Rust that ends the run, and a forced engine that is silently another."""
    pytest.importorskip("gigatoken")
    chosen = choose_engine(opened("characters", CHATML, "<|im_end|>"))
    assert not chosen.is_fast
    assert "gigatoken refuses this tokenizer" in chosen.why
    with pytest.raises(TemplateError, match="not exact for this tokenizer"):
        choose_engine(opened("characters", CHATML, "<|im_end|>"), wanted="gigatoken")


def _lying(word: str) -> tuple[OpenTokenizer, Chosen]:
    tokenizer = opened("bytes", CHATML, "<|im_end|>")
    return tokenizer, Chosen(_Lying(tokenizer.backend, word), Reference(tokenizer.backend), "for a test")


def test_an_engine_that_lies_on_difficult_texts_is_not_taken(monkeypatch):
    """Kills a choice by name alone."""
    tokenizer, chosen = _lying("don't")
    monkeypatch.setattr(engines, "_fast", lambda layout, reference: chosen.engine)
    engines._proved.cache_clear()
    try:
        found = choose_engine(tokenizer)
    finally:
        engines._proved.cache_clear()
    assert not found.is_fast
    assert found.why.startswith("lying: other ids for")


def test_the_first_difference_in_the_data_is_found_and_everything_done_again(monkeypatch):
    """Kills a comparison with no consequence, and batches of the wrong engine that stay."""
    tokenizer, chosen = _lying("quark")
    with pytest.raises(EngineDiffers):
        chosen.encode(Texts.of(["plain", "a quark"]))
    monkeypatch.setattr("tutelage.render.examples.choose_engine", lambda *_, **__: chosen)
    chats = [talk(("user", "a quark"), ("assistant", "hi"))]
    (made,) = render_conversations(chats, tokenizer=tokenizer)
    (right,) = Renderer(tokenizer, RenderSpec(), engine=Chosen(chosen.reference, chosen.reference, "")).render(chats)
    assert made.ids.tolist() == right.ids.tolist()


def test_every_batch_is_compared_somewhere():
    """Kills a comparison of the first batch only."""
    _, chosen = _lying("quark")
    batch = Texts.of(["plain"] * 600)
    for _ in range(5):
        chosen.encode(batch)
    before = chosen.num_compared
    assert before > 64
    with pytest.raises(EngineDiffers):
        chosen.encode(Texts.of(["a quark"] * 600))


WORDS = [b"a", b"bc", b"12345678", b"123456789", b"x" * 16, b"y" * 17, b"z" * 40, b"", b"\x00"]


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, len(WORDS) - 1), min_size=1, max_size=12), flip=st.integers(0, 200))
def test_bytes_are_compared_to_the_last(ids, flip):
    """Kills a comparison of the first eight or sixteen bytes, and a mask that hides a byte."""
    table = ByteTable(WORDS, np.array([len(word) for word in WORDS]), np.zeros(len(WORDS), bool), False)
    right = b"".join(WORDS[i] for i in ids)
    lengths = table.lengths[ids]
    starts = np.cumsum(lengths) - lengths
    data = bytearray(right)
    if data:
        data[flip % len(data)] ^= 1
    expected = [k for k, i in enumerate(ids) if bytes(data[starts[k] : starts[k] + lengths[k]]) != WORDS[i]]
    assert _differing(table, np.array(ids), starts, lengths, bytes(data)).tolist() == expected
    assert _differing(table, np.array(ids), starts, lengths, right).tolist() == []


@settings(max_examples=200, deadline=None)
@given(
    examples=st.lists(st.lists(st.integers(0, len(WORDS) - 1), max_size=6), min_size=1, max_size=5),
    flip=st.integers(0, 200),
    cut=st.integers(0, 3),
)
def test_the_compiled_walk_is_the_walk_of_arrays(examples, flip, cut):
    """Kills a compiled loop that reads into its neighbour, misses a byte, or moves examples behind a wrong one."""
    table = ByteTable(WORDS, np.array([len(word) for word in WORDS]), np.zeros(len(WORDS), bool), False)
    raw = [bytearray(b"".join(WORDS[i] for i in example)) for example in examples]
    raw[0] = raw[0][: max(len(raw[0]) - cut, 0)]
    if raw[-1]:
        raw[-1][flip % len(raw[-1])] ^= 1
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in raw])]).astype(np.int64)
    batch = Texts([""] * len(raw), b"".join(raw), offsets)
    first = np.concatenate([[0], np.cumsum([len(example) for example in examples])]).astype(np.int64)
    ids = np.array([i for example in examples for i in example], np.int32)
    left, right = _walk_arrays(ids, first, table, batch), _walk_compiled(ids, first, table, batch)
    for one, other in zip(left, right, strict=True):
        assert one.tolist() == other.tolist()
    expected = [bytes(each) == b"".join(WORDS[i] for i in example) for each, example in zip(raw, examples, strict=True)]
    assert left[2].tolist() == expected
