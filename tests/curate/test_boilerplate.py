"""Preambles and closings: what is cut, what is left alone, and that the rest is exact."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.curate.boilerplate import rewrites_of, strip_boilerplate
from tutelage.curate.spec import StripBoilerplate
from tutelage.records import Conversation, Origin, Turn
from tutelage.tables import apply_rewrites

CUT = {
    "Sure! Paris.": "Paris.",
    "Sure thing!\n\nParis.": "Paris.",
    "Certainly, here is a short list of towns:\n\n- Bern": "- Bern",
    "Sure! Here’s one: Why did the hen cross?": "Why did the hen cross?",
    "Of course! I'd be happy to help. Bern is the capital.": "Bern is the capital.",
    "As an AI language model, I have no taste.": "I have no taste.",
    "Bern. I hope this helps!": "Bern.",
    "- Bern\n- Basel\n\nLet me know if you have any other questions.": "- Bern\n- Basel",
    "Bern.\n\nI hope that helps! Feel free to ask if you need more. 😊": "Bern.",
    "Bern. If you have any more questions or need help, feel free to ask!": "Bern.",
    "Sure, here is the code:\n\n    x = 1\n    y = 2": "    x = 1\n    y = 2",
    "```\nx\n```\n\nHope this helps!": "```\nx\n```",
}
LEFT = [
    "Sure!",
    "Of course! Dogs may eat carrots.",  # the answer to a yes/no question
    "Sure, I can.",
    "sure! lower case goes on",
    "Surely! Not.",
    "Sure, here are the two kinds: red and blue.",
    'Sure, here is a title, "The Owl: Its Nest".',
    "Here is the list:\n- Bern",
    "As an AI language model, it is hard to say.",
    "As an artist, I paint.",
    "I hope this helps!",
    "He wrote: I hope this helps",
    "print('I hope this helps!')",
    "```\necho a.\nI hope this helps!",  # the block is still open
    "if x:\n    I hope this helps!",
    "Dear Ann,\nthe cat is well.\nLet me know if you miss her.",
    "Agent: It is fixed. Let me know if you need more.",
    "Welcome to our family. Do not hesitate to reach out if we can help.",
    "Bern is nice, and I hope this helps you to decide.",
]


@pytest.mark.parametrize("text", CUT)
def test_a_phrase_of_its_own_at_either_end_is_cut(text: str) -> None:
    """Kills a rule that knows only the words of its own examples, eats indentation, or stops after one phrase."""
    assert strip_boilerplate(text) == CUT[text]


@pytest.mark.parametrize("text", LEFT)
def test_what_may_be_meant_is_left_alone(text: str) -> None:
    """Kills unanchored patterns and rules that empty an answer, cut inside code, letters, quotations or sentences."""
    assert strip_boilerplate(text) == text


def test_only_what_is_asked_for_is_stripped() -> None:
    """Kills a rule that ignores its two switches."""
    text = "Sure! Bern. I hope this helps!"
    assert strip_boilerplate(text, closings=False) == "Bern. I hope this helps!"
    assert strip_boilerplate(text, preambles=False) == "Sure! Bern."


BITS = ["Sure! ", "Certainly! ", " I hope this helps!", "\n\n", " ", "```\n", "    ", "As an AI, ", "I", "x", "."]
PIECES = st.lists(
    st.sampled_from([*CUT, *LEFT, *BITS]),
    max_size=6,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.one_of(PIECES, st.text(max_size=60)))
def test_stripping_leaves_a_slice_is_idempotent_and_never_empties(text: str) -> None:
    """Kills a rule that re-spaces or re-capitalises, that needs a second run, or that leaves nothing."""
    once = strip_boilerplate(text)
    assert once in text
    assert strip_boilerplate(once) == once
    assert bool(once.strip()) == bool(text.strip())


def test_only_assistant_turns_are_rewritten_and_the_rewrites_apply() -> None:
    """Kills a rule that edits requests or reasoning, or whose `before` does not fit the turn."""
    turns = (
        Turn("user", "Sure! Go on."),
        Turn("assistant", "Sure! Bern.", reasoning="Sure! Hm."),
        Turn("user", "More"),
        Turn("assistant", "Basel. Hope this helps!"),
    )
    conversation = Conversation(Origin("s", "f", 1), turns, "t", "MIT", "human")
    rules = (StripBoilerplate(closings=False), StripBoilerplate())
    rewritten = apply_rewrites(conversation, list(rewrites_of(conversation, 0, rules)))
    assert [turn.content for turn in rewritten.turns] == ["Sure! Go on.", "Bern.", "More", "Basel."]
    assert rewritten.turns[1].reasoning == "Sure! Hm."
