"""Tokens that cover two kinds, family by family: they belong to the side that the model would have to produce."""

from __future__ import annotations

import pytest

from render.styles import CHATML, opened, talk
from tutelage.records import Kind
from tutelage.render.examples import Renderer
from tutelage.render.spec import RenderSpec

PLAIN_STOP = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'Q: ' + m.content + '\n\n' }}"
    "{% else %}{{ 'A: ' + m.content + '\n###\n\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)
BRACKETS = "{% for m in messages %}{{ '<s>' + m.content if m.role == 'user' else '<|start|>' + m.content + '</s>' }}{% endfor %}"


def _tokens(kind: str, template: str, question: str, answer: str, eos: str = "<|im_end|>") -> list[tuple[str, str]]:
    """The tokens of the answer's turn and the one before them, as text, each with its kind."""
    tokenizer = opened(kind, template, eos)
    (made,) = Renderer(tokenizer, RenderSpec()).render([talk(("user", question), ("assistant", answer))])
    first = int((made.turns == 1).argmax())
    ids, kinds = made.ids[first - 1 :].tolist(), made.kinds[first - 1 :].tolist()
    return [(tokenizer.backend.id_to_token(i), Kind(k).name) for i, k in zip(ids, kinds, strict=True)]


def test_gpt2_cuts_between_the_header_s_line_end_and_the_answer_s():
    """Kills an answer that begins a token early."""
    assert _tokens("gpt2", CHATML, "q", "\nhi")[:3] == [("Ċ", "SCAFFOLD"), ("Ċ", "ASSISTANT"), ("hi", "ASSISTANT")]


@pytest.mark.parametrize(("kind", "both"), [("tiktoken", "ĊĊ"), ("bytes", "ĊĊ")])
def test_a_line_end_of_the_header_and_one_of_the_answer_are_the_answer_s(kind, both):
    """Kills `the header ends with its last character`: the model has to write this token."""
    assert _tokens(kind, CHATML, "q", "\nhi")[1:3] == [(both, "ASSISTANT"), ("hi", "ASSISTANT")]


def test_a_full_stop_and_the_line_end_behind_it_are_the_answer_s_and_the_stop_begins_later():
    """Kills an answer without its last character, and a stop that takes it."""
    found = _tokens("bytes", PLAIN_STOP, "q", "h.")
    assert [kind for token, kind in found if token == ".Ċ"] == ["ASSISTANT"]
    stop = [token for token, kind in found if kind == "STOP"]
    assert "".join(stop) == "###"


def test_the_dummy_space_behind_a_special_token_is_the_answer_s():
    """Kills positions that count a space which no text has: all later kinds would be one character off."""
    found = _tokens("pieces", BRACKETS, "q", "hi", "</s>")
    assert found == [("<|start|>", "SCAFFOLD"), ("▁hi", "ASSISTANT"), ("</s>", "STOP")]


def test_without_a_dummy_space_there_is_none_to_count():
    """Kills a dummy space taken for granted."""
    found = _tokens("whole", BRACKETS, "q", "hi", "</s>")
    assert found == [("<|start|>", "SCAFFOLD"), ("hi", "ASSISTANT"), ("</s>", "STOP")]


def test_metaspace_puts_its_space_where_sentencepiece_does():
    """Kills a family without byte spelling that is sent down the wrong way: its own offsets serve."""
    found = _tokens("metaspace", BRACKETS, "q", "hi", "</s>")
    assert [kind for _, kind in found] == ["SCAFFOLD", "ASSISTANT", "STOP"]
