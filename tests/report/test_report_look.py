import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.records import Rendered
from tutelage.report.look import chunks, runs, shortened, token_texts, visible

BYTES = list(range(256))


def _decode_bytes(ids):
    return bytes(ids).decode("utf-8", "replace")


def _rendered(kinds):
    num = len(kinds)
    return Rendered(np.arange(num, dtype=np.int32), np.array(kinds, np.uint8), np.zeros(num, np.int16), np.ones(1, np.float32))


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=30))
@settings(max_examples=80, deadline=None)
def test_token_texts_join_to_the_whole_even_when_a_token_is_one_byte(text):
    """Kills: each token decoded alone, which turns every accent and every emoji into replacement characters."""
    texts = token_texts(list(text.encode()), _decode_bytes)
    assert "".join(texts) == text and len(texts) == len(text.encode())


def test_a_tokenizer_that_drops_the_space_of_a_lone_token_keeps_it_here():
    """Kills: decoding token by token where the decoder strips the first space."""
    words = {1: " the", 2: " cat", 3: " sat"}
    assert token_texts([1, 2, 3], lambda ids: "".join(words[i] for i in ids).removeprefix(" ")) == ["the", " cat", " sat"]


def test_broken_bytes_do_not_swallow_the_rest():
    """Kills: waiting for the end of a character that never comes."""
    texts = token_texts([0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 65, 66], _decode_bytes)
    assert "".join(texts).endswith("AB") and texts[-1] == "B"


@given(st.lists(st.tuples(st.integers(0, 7), st.sampled_from([0.0, 0.5, 1.0])), max_size=40))
@settings(max_examples=80, deadline=None)
def test_runs_cover_every_token_once_and_never_mix_kinds_or_weights(tokens):
    """Kills: merging over a change of weight; losing the last run; a run of length 0."""
    kinds, weights = [kind for kind, _ in tokens], np.array([weight for _, weight in tokens], np.float32)
    found = runs(_rendered(kinds), weights, [str(i) for i in range(len(tokens))])
    assert [i for run in found for i in run.ids] == list(range(len(tokens)))
    assert [run.weight for run in found for _ in run.ids] == weights.tolist()
    assert all((a.kind, a.weight) != (b.kind, b.weight) for a, b in itertools.pairwise(found))


@given(st.integers(1, 60), st.integers(0, 20), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_a_shortened_example_keeps_both_ends_and_counts_what_it_left_out(num, head, tail):
    """Kills: a cut that loses the answer's end, or an off-by-one in the number that it states."""
    parts = runs(_rendered([i // 7 % 3 for i in range(num)]), np.zeros(num, np.float32), ["x"] * num)
    kept = [i for run in shortened(parts, head=head, tail=tail) for i in run.ids]
    left_out = max(num - head - tail, 0)
    assert kept == [i for i in range(num) if i < head or i >= head + left_out]
    notes = [run.text for run in shortened(parts, head=head, tail=tail) if run.kind == "left_out"]
    assert notes == ([f" … {left_out:,} tokens left out … "] if left_out else [])


def test_chunks_of_a_run_join_to_the_run():
    """Kills: the last, short chunk lost."""
    (run,) = runs(_rendered([3] * 29), np.ones(29, np.float32), [chr(97 + i % 26) for i in range(29)])
    assert "".join(chunk.text for chunk in chunks(run, 12)) == run.text


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_visible_text_has_nothing_that_hides_or_reorders(text):
    """Kills: a direction override or a NUL that reaches the page; a lone surrogate that cannot be written as UTF-8."""
    shown = visible(text + "\u202e\u2067\u200f\x00\x9b\ud800\x7f")
    assert not {"\u202e", "\u2067", "\u200f", "\x00", "\x9b", "\x7f"} & set(shown)
    shown.encode("utf-8")
