"""The sandbox offers what apply_chat_template offers, and nothing else."""

from __future__ import annotations

import json

import pytest

from render.styles import MARKED, THINKING, reference
from tutelage.errors import TemplateError
from tutelage.render.template import ChatTemplate, choose_template, read_template, template_in

CHAT = [
    {"role": "user", "content": " <b>Hé</b> 'x' "},
    {"role": "assistant", "content": "ok\u2028 & so"},
]


@pytest.mark.parametrize("style", sorted(MARKED))
def test_a_template_renders_what_transformers_renders(style):
    """Kills an environment without trim_blocks, or with the special tokens missing."""
    text, eos = MARKED[style]
    theirs = reference("bytes", text, eos)
    ours = ChatTemplate(text, special_tokens=theirs.special_tokens_map)
    for prompt in (False, True):
        expected = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
        assert ours.render(CHAT, add_generation_prompt=prompt) == expected


def test_json_keeps_other_alphabets_and_angle_brackets():
    r"""Kills jinja's own tojson, which writes \u003c."""
    assert ChatTemplate("{{ messages | tojson }}").render([{"content": "<é>"}]) == '[{"content": "<é>"}]'


def test_the_day_is_a_setting_and_never_the_clock():
    """Kills datetime.now()."""
    text = "{{ strftime_now('%d %b %Y') }}"
    assert ChatTemplate(text, date="2024-02-29").render([]) == "29 Feb 2024"


def test_loop_controls_generation_blocks_and_reasoning_are_known():
    text = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{{ m.thinking }}{% endfor %}"
    )
    assert ChatTemplate(text).render([{"content": "a", "reasoning_content": "r"}, {"content": "b"}]) == "ar"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ raise_exception('no tools here') }}", "no tools here"),
        ("{% for", "line 1"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ 'x' * 10000000000 }}", "too long"),
        ("{{ 10 ** 100000 }}", "too large"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", "run away"),
        ("{% set ns = namespace(__init__=1) %}", "underscore"),
    ],
)
def test_a_template_that_misbehaves_is_a_template_error(text, said):
    """Kills an open sandbox, and a failure that surfaces as a Python traceback."""
    with pytest.raises(TemplateError, match=said):
        ChatTemplate(text).render([])


def test_templates_are_found_where_transformers_finds_them(tmp_path):
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    assert template_in(tmp_path, {"chat_template": named}) == {"default": "a", "tool_use": "b"}
    (tmp_path / "chat_template.jinja").write_text("c")
    assert template_in(tmp_path, {"chat_template": "a"}) == {"default": "c"}
    assert choose_template({"default": "a", "tool_use": "b"}, has_tools=True) == "b"


def test_a_tokenizer_without_a_template_says_what_to_do(tmp_path):
    with pytest.raises(TemplateError, match=r"render\.template"):
        choose_template({}, has_tools=False)
    with pytest.raises(TemplateError, match="is no file"):
        read_template("nowhere.jinja", base=tmp_path)


def test_thinking_template_agrees_on_tools():
    call = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    chat = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": call, "reasoning_content": "why"},
    ]
    theirs = reference("bytes", THINKING, "<|im_end|>").apply_chat_template(chat, tokenize=False)
    assert ChatTemplate(THINKING).render(json.loads(json.dumps(chat))) == theirs
