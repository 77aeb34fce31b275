"""Faults of published tutorial code that touch rendering, each as a wrong program that must fail here."""

from __future__ import annotations

import numpy as np

from render.styles import CHATML, opened, talk
from tutelage.records import Kind
from tutelage.render.examples import Renderer
from tutelage.render.spec import RenderSpec


def _render(*turns):
    tokenizer = opened("bytes", CHATML, "<|im_end|>")  # pad token = end token, as many tokenizers have it
    (made,) = Renderer(tokenizer, RenderSpec()).render([talk(*turns)])
    return made, tokenizer


def test_only_text_before_the_first_assistant_header_is_left_out():
    """The fault: everything after the first assistant header is trained, later user turns too."""
    made, tokenizer = _render(("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))
    learned = np.isin(made.kinds, [Kind.ASSISTANT, Kind.STOP])
    assert tokenizer.backend.decode(made.ids[learned].tolist(), skip_special_tokens=False) == "two<|im_end|>four<|im_end|>"
    assert tokenizer.backend.decode(made.ids[made.kinds == Kind.USER].tolist()) == "onethree"


def test_pad_equals_end_and_the_real_end_is_left_out():
    """The fault: targets equal to the pad id are ignored, so the model never learns to stop."""
    made, tokenizer = _render(("user", "one"), ("assistant", "two"))
    end = tokenizer.id_of("<|im_end|>")
    assert tokenizer.special_tokens["pad_token"] == tokenizer.special_tokens["eos_token"]
    assert made.kinds[made.ids == end].tolist() == [Kind.SCAFFOLD, Kind.STOP]
