"""What a recipe can say of history, system turns and long examples, and what each choice keeps."""

from __future__ import annotations

import numpy as np
import pytest

from render.styles import CHATML, THINKING, opened, talk
from tutelage.errors import DataError
from tutelage.records import Flag, Kind, Turn
from tutelage.render.examples import Block, Renderer
from tutelage.render.forms import columns_of
from tutelage.render.spec import RenderSpec

DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
LONG = talk(
    ("system", "s"), ("user", "one"), ("assistant", "1" * 9), ("user", "two"), ("assistant", "2" * 9), ("user", "three"),
    ("assistant", "3" * 9),
)  # fmt: skip


def _block(chat, template=CHATML, **spec) -> Block:
    tokenizer = opened("bytes", template, "<|im_end|>")
    return Renderer(tokenizer, RenderSpec(**spec)).render_columns(columns_of([chat]))


def _texts(block: Block, template=CHATML) -> list[str]:
    backend = opened("bytes", template, "<|im_end|>").backend
    edges = np.cumsum(block.num_tokens)[:-1]
    return [backend.decode(ids.tolist(), skip_special_tokens=False) for ids in np.split(block.ids, edges)]


@pytest.mark.parametrize(
    ("system", "template", "expected"),
    [
        ("keep", CHATML, "system\nmine"),
        ("default", CHATML, None),
        ("drop", CHATML, None),
        ("default", DEFAULT_SYSTEM, "system\nBe kind."),
        ("drop", DEFAULT_SYSTEM, "system\n<|im_end|>"),
    ],
)
def test_system_turns_stay_or_give_way_or_go(system, template, expected):
    """Kills `drop` that lets a default in, and `default` that keeps the record's own."""
    block = _block(talk(("system", "mine"), ("user", "q"), ("assistant", "a")), template, system=system)
    (text,) = _texts(block, template)
    assert (expected in text) if expected else ("system" not in text)
    assert ("mine" in text) == (system == "keep")
    assert block.turns[block.kinds == Kind.ASSISTANT].tolist() == [2]
    assert block.turns[block.kinds == Kind.SYSTEM].tolist() == ([0] * 4 if system == "keep" else [])


def test_expanded_examples_train_each_answer_once_and_show_what_inference_shows():
    """Kills an answer trained twice, and earlier reasoning that inference would not show."""
    chat = talk(("user", "q"), Turn("assistant", "a", reasoning="r"), ("user", "p"), Turn("assistant", "b", reasoning="t"))
    block = _block(chat, THINKING, history="expand")
    first, second = _texts(block, THINKING)
    assert first.endswith("<think>\nr\n</think>\n\na<|im_end|>\n")
    assert "<think>\nr" not in second
    assert second.endswith("<think>\nt\n</think>\n\nb<|im_end|>\n")
    assert block.parts.tolist() == [0, 1]
    assert block.turn_weights.tolist() == [1, 1, 1, 0, 1, 0, 1, 1]
    assert (block.flags & Flag.EXPANDED > 0).all()


def test_an_answer_without_weight_is_not_expanded():
    """Kills an example in which nothing is trained."""
    chat = talk(("user", "q"), Turn("assistant", "a", weight=0.0), ("user", "p"), ("assistant", "b"))
    block = _block(chat, history="expand")
    assert block.parts.tolist() == [0]
    assert block.turn_weights.tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("limit", [60, 95, 130, 200])
def test_windows_hold_whole_exchanges_and_every_answer_once(limit):
    """Kills windows that overlap, skip an exchange, cut an answer, or lose the system turn."""
    block = _block(LONG, max_tokens=limit, overlong="split")
    assert (block.num_tokens <= limit).all()
    assert block.parts.tolist() == list(range(len(block)))
    turns = [np.unique(part[part >= 0]).tolist() for part in np.split(block.turns, np.cumsum(block.num_tokens)[:-1])]
    assert [turn for some in turns for turn in some if turn] == [1, 2, 3, 4, 5, 6]
    assert all(some[0] == 0 for some in turns)
    assert "".join(_texts(block)).count("<|im_end|>") == 6 + len(block)
    assert not block.lost


def test_as_much_as_fits_goes_into_each_window():
    """Kills one exchange per window: three exchanges of which two fit together are two windows."""
    whole = int(_block(LONG).num_tokens[0])
    block = _block(LONG, max_tokens=whole - 1, overlong="split")
    turns = [np.unique(part[part > 0]).tolist() for part in np.split(block.turns, np.cumsum(block.num_tokens)[:-1])]
    assert turns == [[1, 2, 3, 4], [5, 6]]


def test_an_exchange_that_fits_nowhere_is_lost_and_listed():
    """Kills a long exchange that takes the record with it, or vanishes."""
    chat = talk(("user", "q"), ("assistant", "a" * 200), ("user", "p"), ("assistant", "b"))
    block = _block(chat, max_tokens=80, overlong="split")
    assert len(block) == 1
    assert not block.refusals
    ((record, refusal),) = block.lost
    assert (record, refusal.reason, refusal.turn) == (0, "overlong", 0)


def test_a_record_of_which_nothing_fits_is_dropped_once():
    """Kills an account that counts windows as records."""
    chat = talk(("user", "q"), ("assistant", "a" * 200), ("user", "p"), ("assistant", "b" * 200))
    block = _block(chat, max_tokens=80, overlong="split")
    assert len(block) == 0
    assert [refusal.reason for _, refusal in block.refusals] == ["overlong"]


def test_truncated_examples_keep_the_system_turn_the_last_answer_and_the_numbers_of_turns():
    """Kills a cut from the end, and turns renumbered after a cut."""
    block = _block(LONG, max_tokens=70, overlong="truncate")
    (text,) = _texts(block)
    assert text.startswith("<|im_start|>system\ns<|im_end|>")
    assert text.endswith("3" * 9 + "<|im_end|>\n")
    assert sorted(set(block.turns.tolist())) == [-1, 0, 5, 6]
    assert block.flags.tolist() == [Flag.TRUNCATED]


def test_error_names_the_record_and_the_other_choices():
    """Kills a run that goes on."""
    tokenizer = opened("bytes", CHATML, "<|im_end|>")
    with pytest.raises(DataError, match=r"s/f.jsonl:1: .* tokens, `render.max_tokens` is 40; .*`truncate` or `split`"):
        Renderer(tokenizer, RenderSpec(max_tokens=40, overlong="error")).render([LONG])
