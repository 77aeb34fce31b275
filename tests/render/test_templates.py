"""Every way in which public templates behave, one small template for each, on random conversations and two kinds of tokenizer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from render.template_sweep import conversations, draw_many, open_case, verify
from tutelage.errors import TemplateError

FOLDER = Path(__file__).parent / "templates"
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
UNUSABLE = {"hides_answers": "does not show a plain answer", "looks_at_length": "no placement of marks"}
REFUSED = {"hides_earlier": {"turn_hidden"}, "shows_twice": {"shown_twice"}}
USABLE = [name for name in TEMPLATES if name not in UNUSABLE]


def _allowed(name, facts):
    """The outcomes that this template's own behaviour explains."""
    causes = {
        "tool_call_hidden": facts["hides_tools"],
        "reasoning_hidden": facts["drops_reasoning"] or facts["drops_earlier_reasoning"],
        "template_refuses": facts["refuses_tools"] or facts["refuses_system"],
    }
    return {"proved"} | REFUSED.get(name, set()) | {outcome for outcome, explains in causes.items() if explains}


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("name", USABLE)
def test_every_promise_holds_for_every_behaviour(name, kind):
    """Kills ids other than apply_chat_template's, torn answers, missing or double stops, special tokens forged by content,
    and refusals that the template does not explain.
    """
    case = open_case(name, TEMPLATES[name], kind)
    allowed = _allowed(name, case.facts)

    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
    @given(conversations(case.facts["markers"]))
    def check(conversation):
        (outcome,) = verify(case, [conversation])
        assert outcome in allowed, f"{name}: {outcome}: {conversation.messages()}"

    check()


@pytest.mark.parametrize("name", USABLE)
def test_plain_conversations_are_proved_wherever_the_template_shows_them(name):
    """Kills a proof that gives up: without these, refusing everything would pass."""
    case = open_case(name, TEMPLATES[name], "bytes")
    outcomes = verify(case, draw_many(12, case.facts["markers"], random_seed=1, plain=True))
    assert set(outcomes) <= _allowed(name, case.facts) - {"tool_call_hidden", "reasoning_hidden"}
    assert outcomes.count("proved") >= (6 if name not in REFUSED else 1)


@pytest.mark.parametrize("name", sorted(UNUSABLE))
def test_a_template_that_cannot_be_proved_is_refused_with_its_cause(name):
    """Kills training on text of which nobody knows who wrote it."""
    with pytest.raises(TemplateError, match=UNUSABLE[name]):
        open_case(name, TEMPLATES[name], "bytes")


def test_every_template_says_what_it_stands_for():
    """Kills samples that nobody can tell apart."""
    assert len(TEMPLATES) >= 40
    sayings = [re.match(r"\{# (.+[.]) #\}\n", text) for text in TEMPLATES.values()]
    assert all(sayings) and len({match.group(1) for match in sayings if match}) == len(TEMPLATES)


@pytest.mark.parametrize("seed", range(3))
def test_the_sweep_draws_every_kind_of_conversation(seed):
    """Kills a sweep that never shows a tool, a thought or a marker."""
    chats = draw_many(60, ["<mark>"], random_seed=seed)
    turns = [turn for chat in chats for turn in chat.turns]
    assert (
        any(turn.tool_calls for turn in turns)
        and any(turn.reasoning for turn in turns)
        and any(turn.weight == 0 for turn in turns)
    )
    assert any("<mark>" in turn.content for turn in turns if turn.role == "assistant")
    assert {chat.turns[0].role for chat in chats} == {"system", "user"}
