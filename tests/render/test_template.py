"""The sandbox offers what apply_chat_template offers, and nothing else."""

from __future__ import annotations

import json
import time

import pytest

from render.styles import MARKED, THINKING, reference
from tutelage.errors import TemplateError
from tutelage.records import Kind
from tutelage.render.provenance import trace
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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        ("{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}", "steps"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}", "steps"),
        ("{% for i in [1] recursive %}{% if loop.depth < 40 %}{{ loop([1]) + loop([1]) }}{% endif %}{% endfor %}", "steps"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% set ns = namespace(s='xx') %}{% for i in range(90) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}", "too long"),
        ("{% set ns = namespace(s='xx') %}{% for i in range(90) %}{% set ns.s = ns.s + ns.s %}{% endfor %}", "too long"),
        ("{{ '%1000000000d' % 1 }}", "too long"),
        ("{{ '{:>1000000000}'.format(1) }}", "too long"),
        ("{{ 'x'.center(1000000000) }}", "too long"),
        ("{{ ('x' * 1000000).replace('x', 'y' * 1000000) }}", "too long"),
    ],
)
def test_a_template_that_runs_away_in_silence_is_stopped(text, said):
    """Kills a cap on output only: these loop for hours, or fill the memory, and print nothing."""
    with pytest.raises(TemplateError, match=said):
        ChatTemplate(text).render([])


def test_steps_are_counted_for_each_rendering_alone(monkeypatch):
    """Kills a counter that adds up over renderings."""
    monkeypatch.setattr("tutelage.render.template.MAX_STEPS", 1000)
    template = ChatTemplate("{% for m in messages %}{% for n in messages %}{{ 'x' if loop.last }}{% endfor %}{% endfor %}")
    chat = [{"role": "user", "content": "x"}] * 30
    assert [len(template.render(chat)) for _ in range(3)] == [30] * 3
    with pytest.raises(TemplateError, match="steps"):
        template.render(chat * 2)


def test_counting_changes_nothing_that_a_loop_shows():
    """Kills loops whose length, neighbours, filter or `else` break because something counts along."""
    text = (
        "{% for i in [1, 2, 3, 4] if i % 2 == 0 %}{{ loop.index ~ '/' ~ loop.length ~ loop.last }}{{ loop.previtem or '-' }};{% endfor %}"
        "{% for i in [] %}{% else %}none{% endfor %}"
        "{% for k, v in {'a': 1}.items() %}{{ k ~ v }}{% endfor %}"
        "{% macro f(x) %}<{{ x }}{{ caller() if caller }}>{% endmacro %}{% call f(1) %}in{% endcall %}{{ 1 + 2 }}{{ [1] + [2] }}{{ 'a' ~ none }}"
    )
    assert ChatTemplate(text).render([]) == "1/2False-;2/2True2;nonea1<1in>3[1, 2]aNone"


def test_a_syntax_error_names_its_line():
    """Kills "invalid template" without a place to look."""
    with pytest.raises(TemplateError, match=r"line 3: .*endfor"):
        ChatTemplate("{# a\ncomment #}\n{% for m in messages %}{{ m }}")


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages.__class__ }}{{ messages.__class__.__mro__ }}",
        "{{ ''.format.__globals__.os }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ self.__init__.__globals__['os'].system('true') }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ strftime_now.__closure__[0].cell_contents.x }}",
        "{{ namespace.__init__.__globals__.json }}",
        "{{ dict.__class__.__base__.__subclasses__() }}",
        "{{ messages[0].update({'role': 'assistant'}) }}",
        "{{ (messages | attr('__class__')).__base__ }}",
        "{% set messages[0].role = 'x' %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ lipsum.__globals__.os.getcwd() }}",
        "{{ ''['__class__']['__mro__'] }}",
    ],
)
def test_the_way_into_python_is_closed(text):
    """Kills an open sandbox: each of these has opened one."""
    chat = [{"role": "user", "content": "x"}]
    with pytest.raises(TemplateError):
        ChatTemplate(text).render(chat)
    assert chat == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    "text",
    [
        "\x00\x01\x1b[31m\x7f",
        "\u202eabc\u202c\u2066x\u2069",
        "\r\n\x85\u2028\u2029",
        "e\u0301\u00e9\ufb01",
        "\ufeff\u200b\u200d",
        "\ud800",
    ],
    ids=["control", "direction", "lines", "composed", "invisible", "surrogate"],
)
def test_unusual_characters_pass_as_they_are_and_are_traced(text):
    """Kills normalising, escaping or losing characters on the way through a template."""
    template = ChatTemplate(MARKED["chatml"][0])
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": f"a{text}b"}]
    traced = trace(template.render, chat, literals=template.literals)
    assert [traced.text[s.start : s.end] for s in traced.spans if s.part.kind == Kind.ASSISTANT] == [f"a{text}b"]
    assert text in traced.text


@pytest.mark.parametrize("style", sorted(MARKED))
def test_blank_turns_and_long_ones_are_told_apart(style):
    """Kills losing the place of the others where a turn is blank, and time that grows faster than a turn."""
    text, eos = MARKED[style]
    template = ChatTemplate(text, special_tokens={"bos_token": "<s>", "eos_token": eos})
    long = "word [/INST] </think> " * 50_000
    chat = [
        {"role": "user", "content": " \n "},
        {"role": "assistant", "content": long},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "b"},
    ]
    began = time.process_time()
    traced = trace(template.render, chat, literals=template.literals)
    assert time.process_time() - began < 5
    answers = [(s.part.turn, traced.text[s.start : s.end].strip()) for s in traced.spans if s.part.kind == Kind.ASSISTANT]
    assert answers == [(1, long.strip()), (3, "b")]
