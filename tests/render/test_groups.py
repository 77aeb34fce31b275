"""Records filled together, and the loops that do it: the same as one by one, the same as plain Python."""

from __future__ import annotations

import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from render.styles import CHATML, opened, talk
from render.test_skeleton import TEMPLATES
from tutelage.compiled import kernel
from tutelage.errors import TemplateError
from tutelage.records import LEARNED_KINDS, Kind, Turn
from tutelage.render import groups
from tutelage.render.engines import Texts
from tutelage.render.examples import Renderer
from tutelage.render.finish import Block
from tutelage.render.forms import columns_of
from tutelage.render.groups import Letters, arrow_texts, lay_together
from tutelage.render.kernels import copy_stretches, count_learned, find_ids, label_cells, trim
from tutelage.render.sheet import Sheet, sheet_of
from tutelage.render.skeleton import Edit
from tutelage.render.spec import RenderSpec
from tutelage.render.stage import num_learned
from tutelage.render.tokens import ByteTable, Encoded, _walk_arrays, _walk_compiled, label_arrays, priorities

SPACES = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()]
TEXTS = st.lists(st.sampled_from([*"ab", "é", "☃", "\u200b", "</think>", "<|im_end|>", *SPACES]), max_size=5).map("".join)


def _renderer(template: str) -> Renderer:
    return Renderer(opened("bytes", template, "<|im_end|>"), RenderSpec(tokenizer_engine="tokenizers", append_eos=True))


@st.composite
def _chats(draw):
    turns = [Turn("system", draw(TEXTS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 2))):
        reasoning = draw(st.sampled_from([None, None, None, "", "hm"]))
        turns += [Turn("user", draw(TEXTS)), Turn("assistant", draw(TEXTS), reasoning=reasoning)]
    return talk(*turns)


def _same(one: Sheet, other: Sheet) -> None:
    for name in ("records", "flags", "offsets", "ends", "kinds", "turns", "from_data"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist(), name
    assert (one.texts.data, one.texts.offsets.tolist()) == (other.texts.data, other.texts.offsets.tolist())
    assert [(r, str(why)) for r, _, why in one.refusals] == [(r, str(why)) for r, _, why in other.refusals]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@settings(max_examples=8, deadline=None)
@given(chats=st.lists(_chats(), min_size=1, max_size=12))
def test_records_laid_out_together_are_those_laid_out_one_by_one(name, chats):
    """Kills a lost strip, a word looked for in another turn, blank texts filled in, records out of order, turns mixed up."""
    try:
        renderer = _renderer(TEMPLATES[name])
    except TemplateError:
        return  # refused as a whole
    columns = columns_of(chats)
    texts = arrow_texts(columns.content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "SMALLEST", 1)
        together = lay_together(renderer._layer, columns, texts)
    one_by_one = sheet_of(_renderer(TEMPLATES[name])._layer.lay(columns))
    _same(together, one_by_one)
    assert [together.pieces(i) for i in range(len(together))] == [one_by_one.pieces(i) for i in range(len(one_by_one))]


def test_large_batches_are_laid_out_together(monkeypatch):
    """Kills a fast way that is never taken, and one that is taken for records it cannot do."""
    renderer = _renderer(CHATML)
    plain = [talk(("user", f"q{i}"), ("assistant", f"a{i}")) for i in range(300)]
    odd = [talk(("user", "q"), ("assistant", " ")), talk(("user", "q"), Turn("assistant", "", tool_calls='[{"name": "f"}]'))]
    seen = []
    lay = renderer._layer.lay

    def one_by_one(columns, jobs=None, *, records=None):
        seen.extend(range(len(columns)) if records is None else records)
        return lay(columns, jobs, records=records)

    monkeypatch.setattr(renderer._layer, "lay", one_by_one)
    sheet = renderer.lay(columns_of([*plain[:150], *odd, *plain[150:]]))
    assert seen == [150, 151]
    assert sheet.texts.texts[0].count("q0") == 1
    assert sheet.texts.texts[-1].count("a299") == 1


def test_the_first_record_of_a_form_and_one_in_so_many_are_rendered_too(monkeypatch):
    """Kills skeletons that are trusted without proof."""
    renderer = _renderer(CHATML)
    checked = []
    monkeypatch.setattr(groups, "EVERY", 512)
    check = renderer._layer.check
    monkeypatch.setattr(
        renderer._layer,
        "check",
        lambda columns, turns, filler, pieces: (checked.append(list(turns)), check(columns, turns, filler, pieces)),
    )
    chats = [talk(("user", f"q{i}"), ("assistant", f"a{i}")) for i in range(300)]
    for _ in range(4):
        renderer.lay(columns_of(chats))
    assert checked == [[0, 1], [2 * (512 - 300), 2 * (512 - 300) + 1], [2 * (1024 - 900), 2 * (1024 - 900) + 1]]


def test_a_skeleton_that_differs_from_its_template_stops_everything(monkeypatch):
    """Kills a check whose result nobody looks at."""
    renderer = _renderer(CHATML)
    columns = columns_of([talk(("user", "q"), ("assistant", "a"))] * 300)
    renderer.lay(columns)
    filler = renderer._layer.filler(columns.role[:2].tobytes())
    filler.pieces[0] = filler.pieces[0].replace("user", "User")
    filler.num_filled = 0
    with pytest.raises(TemplateError, match="differs"):
        renderer.lay(columns)


@given(
    st.lists(st.text(st.sampled_from([*"ab\0", "é", "\u2007", "\u180e", "\u1690", "\uff00", *SPACES])), min_size=1),
    st.sampled_from(["strip", "lstrip", "rstrip"]),
    st.sampled_from([None, "\n", " \n", "ab"]),
)
def test_trimming_bytes_is_trimming_text(texts, side, characters):
    """Kills white space forgotten, characters taken apart, and the wrong side trimmed."""
    letters = Letters.of(pa.array(texts))
    edit = Edit(side, characters)
    first, last = letters.trimmed(letters.first, letters.last, edit)
    found = [letters.data[a:b].tobytes().decode() for a, b in zip(first, last, strict=True)]
    assert found == [getattr(text, side)(characters) for text in texts]


def test_every_white_space_is_trimmed_and_nothing_else():
    """Kills a list of white space with one missing."""
    table = np.array([chr(code).isspace() for code in range(128)] + [False] * 128)
    for space in [*SPACES, "\u200b", "\u2060", "\ufeff", "\u180e", "\u009f", "\u2029x"]:
        data = np.frombuffer(f"{space}x{space}".encode(), np.uint8)
        first, last = np.array([0]), np.array([len(data)])
        trim(data, table, True, True, True, first, last)
        assert data[first[0] : last[0]].tobytes().decode() == f"{space}x{space}".strip(), repr(space)


@st.composite
def _cut_texts(draw):
    """Tokens that partition bytes, some empty, and cells that do too."""
    lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=12))
    ends = np.cumsum(lengths)
    borders = sorted(draw(st.lists(st.integers(0, int(ends[-1])), max_size=8)))
    cell_ends = np.array([*borders, ends[-1]], np.int64)
    kinds = np.array([draw(st.integers(0, 7)) for _ in cell_ends], np.uint8)
    turns = np.array([draw(st.integers(-1, 3)) for _ in cell_ends], np.int16)
    return ends - lengths, ends, cell_ends, kinds, turns


@given(_cut_texts())
@settings(max_examples=400)
def test_tokens_are_labelled_alike_by_loops_and_by_arrays(cut):
    """Kills a token given to the cell where it ends, ties that change sides, empty cells that take or lose tokens."""
    starts, ends, cell_ends, cell_kinds, cell_turns = cut
    encoded = Encoded(np.arange(len(ends)), starts, ends, np.array([len(ends)]), ends[-1:], np.array([True]))
    expected = label_arrays(encoded, cell_ends, cell_kinds, cell_turns)
    kinds, turns, cell = np.empty(len(ends), np.uint8), np.empty(len(ends), np.int16), np.empty(len(ends), np.int64)
    counts = np.zeros(len(cell_ends), np.int64)
    rank = priorities(cell_kinds, cell_turns)
    label_cells(starts, ends, cell_ends, cell_kinds, cell_turns, rank, kinds, turns, cell, counts)
    assert (kinds.tolist(), turns.tolist()) == (expected.kinds.tolist(), expected.turns.tolist())
    assert (cell.tolist(), counts.tolist()) == (expected.cell.tolist(), expected.tokens_per_cell.tolist())


@given(st.data())
def test_learned_tokens_are_counted_per_example(data):
    """Kills counting the first token, turns of weight 0, scaffold of no turn, and turns of the example before."""
    sizes = data.draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3)), min_size=1, max_size=4))
    kinds, turns, weights, expected = [], [], [], []
    for num_tokens, num_turns in sizes:
        own = [data.draw(st.sampled_from([0.0, 0.5, 1.0])) for _ in range(num_turns)]
        tokens = [(data.draw(st.sampled_from(list(Kind))), data.draw(st.integers(-1, num_turns - 1))) for _ in range(num_tokens)]
        counts = [
            (kind in LEARNED_KINDS or (kind == Kind.SCAFFOLD and turn >= 0)) and (turn < 0 or own[turn] > 0)
            for kind, turn in tokens
        ]
        expected.append(sum(counts[1:]))
        weights += own
        kinds += [int(kind) for kind, _ in tokens]
        turns += [turn for _, turn in tokens]
    num_tokens, num_turns = (np.array(each) for each in zip(*sizes, strict=True))
    none = np.zeros(len(sizes), np.int32)
    flat = (np.zeros(len(kinds), np.int32), np.array(kinds, np.uint8), np.array(turns, np.int16), np.array(weights, np.float32))
    block = Block(np.arange(len(sizes)), none, none, num_tokens, num_turns, *flat)
    assert num_learned(block).tolist() == expected


def test_kernels_do_what_their_loops_say():
    """Kills a compiled loop that differs from the one that is read and tested."""
    rng = np.random.default_rng(0)
    source = rng.integers(0, 255, 5_000).astype(np.uint8)
    starts = rng.integers(0, 4_000, 500)
    lengths = rng.integers(0, 900, 500)
    plain, compiled = (np.zeros(lengths.sum(), np.uint8) for _ in range(2))
    copy_stretches(source, starts, lengths, plain)
    kernel(copy_stretches)(source, starts, lengths, compiled)
    assert (plain == compiled).all()
    assert plain.tobytes() == b"".join(source[a : a + n].tobytes() for a, n in zip(starts, lengths, strict=True))

    ends = np.cumsum(rng.integers(0, 5, 4_000))
    begins = np.concatenate([[0], ends[:-1]])
    cell_ends = np.unique(rng.integers(1, ends[-1] + 1, 900))
    cell_ends[-1] = ends[-1]
    cells = rng.integers(0, 8, len(cell_ends)).astype(np.uint8), rng.integers(-1, 4, len(cell_ends)).astype(np.int16)
    made = []
    for how in (label_cells, kernel(label_cells)):
        out = (
            np.zeros(4_000, np.uint8),
            np.zeros(4_000, np.int16),
            np.zeros(4_000, np.int64),
            np.zeros(len(cell_ends), np.int64),
        )
        how(begins, ends, cell_ends, *cells, priorities(*cells), *out)
        made.append([each.tolist() for each in out])
    assert made[0] == made[1]

    kinds, turns = rng.integers(0, 8, 4_000).astype(np.uint8), rng.integers(-1, 2, 4_000).astype(np.int16)
    weights, is_learned = rng.integers(0, 2, 80).astype(np.float32), np.uint32(sum(1 << kind for kind in LEARNED_KINDS))
    counts = []
    for how in (count_learned, kernel(count_learned)):
        counts.append(np.zeros(40, np.int64))
        how(kinds, turns, np.arange(41) * 100, np.arange(41) * 2, weights, is_learned, counts[-1])
    assert counts[0].tolist() == counts[1].tolist()
    assert counts[0].sum() > 0

    ids, is_special = rng.integers(0, 50, 4_000).astype(np.int32), np.isin(np.arange(50), [7, 9, 30])
    expected = np.flatnonzero(is_special[ids])
    for how in (find_ids, kernel(find_ids)):
        places = np.zeros(100, np.int64)
        assert how(ids, 7, 30, is_special, places) == len(expected) > 100  # more than there is room for
        assert places.tolist() == expected[:100].tolist()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=9), st.booleans(), st.booleans())
@settings(max_examples=200)
def test_walking_over_tokens_is_the_same_by_loops_and_by_arrays(chosen, is_cut, is_other):
    """Kills a token compared with fewer bytes than it has, one that reads on behind its text, and lengths cut to a byte."""
    words = [
        b"a",
        b"bc",
        b"12345678",
        b"123456789",
        b"0123456789abcdef",
        b"0123456789abcdefg",
        b"x" * 254,
        b"y" * 255,
        b"z" * 700,
    ]
    table = ByteTable([*words, b""], np.array([*map(len, words), 0]), np.zeros(10, bool), False)
    ids = np.array([i for i, _ in chosen], np.int32)
    texts = [words[i].decode() if i < 9 else "" for i in ids.tolist()]
    if texts and is_cut:
        texts[-1] = texts[-1][:-1]
    if texts and is_other:
        texts[len(texts) // 2] = texts[len(texts) // 2][:-1] + "!"
    half = len(ids) // 2
    batch = Texts.of(["".join(texts[:half]), "".join(texts[half:])])
    first = np.array([0, half, len(ids)])
    starts, ends, is_proved = _walk_arrays(ids, first, table, batch)
    again = _walk_compiled(ids, first, table, batch)
    assert again[2].tolist() == is_proved.tolist()
    if is_proved.all():
        assert (again[0].tolist(), again[1].tolist()) == (starts.tolist(), ends.tolist())
