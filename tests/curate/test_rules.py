"""Bounds, repetition and refusals: the number and the bound in every reason."""

import pytest

from tutelage.curate.rules import judge, sentences
from tutelage.curate.spec import Length, Refusal, Repetition, Rule, StripBoilerplate
from tutelage.records import Conversation, Origin, Turn, Verdict


def talk(*said: str, **last: str) -> Conversation:
    turns = [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(said[:-1])]
    turns.append(Turn("assistant", said[-1], **last))  # type: ignore[arg-type]
    return Conversation(Origin("s", "f.jsonl", 1), tuple(turns), "t", "MIT", "human")


def reasons(conversation: Conversation, *rules: Rule) -> list[str]:
    return [verdict.reason for verdict in judge(conversation, 0, rules)]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (("q", "w " * 1204), "1,204 words in the answer; at most 1,000"),
        (("q", "w " * 600, "q", "w " * 401), "1,001 words in the answer; at most 1,000"),
        (("q", " \n"), "0 words in the answer; at least 1"),
        (("", "a"), "0 words in the request; at least 1"),
    ],
)
def test_a_length_outside_its_bounds_names_the_number_and_the_bound(said: tuple[str, ...], reason: str) -> None:
    """Kills a rule that looks at one turn only, counts characters, or gives a reason without numbers."""
    assert reasons(talk(*said), Length()) == [reason]


def test_bounds_are_inclusive() -> None:
    """Kills an off-by-one at either bound."""
    rule = Length(min_instruction_words=2, min_response_words=2, max_response_words=3)
    assert [reasons(talk("a b", "w " * n), rule) == [] for n in (1, 2, 3, 4)] == [False, True, True, False]


def test_a_turn_that_only_calls_a_tool_is_an_answer() -> None:
    """Kills a length rule that reads nothing but `content`."""
    assert reasons(talk("weather?", "", tool_calls='[{"name": "weather"}]'), Length()) == []


def test_repeated_sentences_are_counted_against_all_sentences() -> None:
    """Kills a share of distinct over repeated, and a comparison that case, spacing or list numbers defeat."""
    answer = "I like green tea. You like tea.\n1. I like  green tea.\n2. i like green tea!"
    assert reasons(talk("q", answer), Repetition()) == ["2 of 4 sentences repeat an earlier one (50%); at most 30%"]
    assert reasons(talk("q", answer), Repetition(max_share=0.5)) == []
    assert reasons(talk("q", answer), Repetition(min_sentences=5)) == []


@pytest.mark.parametrize(
    "answer",
    [
        "```\n" + "do this thing.\n" * 9 + "```",
        "    return the same thing\n" * 9,
        "x = f(a) + g(b)\n" * 9,
        "1. Odd\n2. Even\n3. Odd\n4. Odd\n5. Odd",
        "| a | b | c |\n" * 9,
        "[0 0 0]\n" * 9,
        "Verse 1:\nwe sail the sea\n" + "Chorus:\nrow row row your boat\n" * 5,
    ],
)
def test_what_repeats_by_nature_is_not_judged(answer: str) -> None:
    """Kills a splitter that takes code, labels, tables or the chorus of a song for prose."""
    assert reasons(talk("q", answer), Repetition()) == []


def test_turns_are_judged_one_by_one() -> None:
    """Kills pooling: a clerk who says the same polite sentence in every turn does not repeat himself."""
    assert reasons(talk(*["q", "Thank you very much. How are you?"] * 5), Repetition(min_sentences=2)) == []


def test_abbreviations_and_initials_end_no_sentence() -> None:
    """Kills splitting at every full stop."""
    assert sentences("Dr. No met J. Smith, e.g. in Bern. They had tea!") == ["dr. no met j. smith, e.g. in bern", "they had tea"]


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I am sorry, but as an AI assistant I don't have access to real-time information.",
        "As an AI language model, I cannot taste.",
        "I don’t have access to the news.",
        "Unfortunately, I am unable to generate images.",
        "I cannot assist with this.",
        "I'm not able to browse the web.",
    ],
)
def test_a_refusal_is_flagged_and_kept_unless_told_to_drop(answer: str) -> None:
    """Kills a rule that drops by default, or that knows one spelling of the apostrophe."""
    (flag,) = judge(talk("q", answer), 3, [Refusal()])
    assert (flag.source, flag.row, flag.rule, flag.keep) == ("s", 3, "refusal", True)
    (drop,) = judge(talk("q", answer), 3, [Refusal(action="drop")])
    assert not drop.keep


@pytest.mark.parametrize(
    "answer",
    [
        "I cannot help but smile.",
        "I can't wait for summer.",
        "Sorry is a hard word to say.",
        "The robot said: I'm sorry, but I can't help.",
        "I don't have personal experience, but the trains in Hungary are good.",
        "Unfortunately, the ship sank.",
    ],
)
def test_other_sentences_with_the_same_words_are_no_refusal(answer: str) -> None:
    """Kills patterns that are not anchored to the opening or stop before the verb."""
    assert reasons(talk("q", answer), Refusal()) == []


def test_judging_stops_at_the_first_drop_and_keeps_flags_before_it() -> None:
    """Kills double counting: a record dropped for two reasons would break in = out + dropped."""
    rules: list[Rule] = [StripBoilerplate(), Refusal(), Length(max_response_words=2), Length(max_response_words=1)]
    said = list(judge(talk("q", "I cannot help you."), 0, rules))
    assert said == [
        Verdict("s", 0, "refusal", True, "the answer opens with “I cannot help”"),
        Verdict("s", 0, "length", False, "4 words in the answer; at most 2"),
    ]
