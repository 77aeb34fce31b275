"""Skeletons: what a template that only joins pieces gives for every conversation of a form, found by running it once."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from render.styles import CHATML, MARKED, THINKING, opened, talk
from tutelage.errors import TemplateError
from tutelage.records import Flag, Turn
from tutelage.render.examples import Renderer
from tutelage.render.forms import Laid, columns_of
from tutelage.render.skeleton import make_skeleton, symbolic
from tutelage.render.spec import RenderSpec

TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in (Path(__file__).parent / "templates").glob("*.jinja")}
TEMPLATES |= {name: template for name, (template, _) in MARKED.items()} | {"thinking": THINKING}
TEXTS = st.lists(st.sampled_from([*"ab \n\té☃", "</think>", "<think>", "x1", "[INST]", "<|im_end|>"]), max_size=6).map("".join)


def _renderer(template: str) -> Renderer:
    return Renderer(opened("bytes", template, "<|im_end|>"), RenderSpec(tokenizer_engine="tokenizers", append_eos=True))


def _compiled(template: str):
    style = _renderer(template).default
    return symbolic(style.template), style


def _skeleton(template: str, *roles: str):
    compiled, style = _compiled(template)
    assert compiled is not None
    return make_skeleton(compiled, style.template, style.closing, roles=roles, reasoning=[False] * len(roles), eos=style.eos)


def _examples(laid: Laid) -> list:
    offsets = laid.offsets.tolist()
    return [
        (record, laid.pieces[a:b], form.kinds.tolist(), form.turns.tolist(), form.from_data.tolist(), flags)
        for record, (a, b), form, flags in zip(laid.records, pairwise(offsets), laid.forms, laid.flags, strict=True)
    ]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_filled_skeleton_is_what_rendering_and_tracing_give(name, data):
    """Kills a symbol that answers for texts it knows nothing of, a lost strip, a word looked for in the wrong turn."""
    try:
        renderer = _renderer(TEMPLATES[name])
    except TemplateError:
        return  # refused as a whole: no form of it is laid out at all
    pairs = data.draw(st.integers(1, 3))
    turns = [Turn("system", data.draw(TEXTS))] if data.draw(st.booleans()) else []
    for _ in range(pairs):
        turns += [Turn("user", data.draw(TEXTS)), Turn("assistant", data.draw(TEXTS), reasoning=data.draw(st.none() | TEXTS))]
    columns = columns_of([talk(*turns)])
    quick = renderer._layer.lay(columns)
    renderer._layer._filled = lambda *_: None
    slow = renderer._layer.lay(columns)
    assert _examples(quick) == _examples(slow)
    assert [str(refusal) for _, _, refusal in quick.refusals] == [str(refusal) for _, _, refusal in slow.refusals]


@pytest.mark.parametrize("name", ["chatml", "gemma", "zephyr", "thinking"])
def test_ordinary_records_do_not_run_the_template(name, monkeypatch):
    """Kills a fast way that is never taken."""
    renderer = _renderer(TEMPLATES[name])
    chats = [talk(("user", f"q {i}"), ("assistant", f"a {i}")) for i in range(20)]
    renderer.render(chats[:2])  # the first record of a form is rendered and traced too
    monkeypatch.setattr(renderer._layer, "_rendered", None)
    assert len(renderer.render(chats)) == 20


@pytest.mark.parametrize(
    "use",
    [
        "{{ m.content | length }}",
        "{{ m.content[0] }}",
        "{{ m.content[:3] }}",
        "{{ m.content | upper }}",
        "{{ m.content | tojson }}",
        "{{ '%s' % m.content }}",
        "{{ '{}'.format(m.content) }}",
        "{% if m.content in 'yes or no' %}{{ m.content }}{% endif %}",
        "{% if m.content < 'b' %}{{ m.content }}{% endif %}",
        "{% for c in m.content %}{{ c }}{% endfor %}",
        "{% if 'long text'.startswith(m.content) %}{{ m.content }}{% endif %}",
        "{{ {m.content: 1} }}",
        "{{ m.content.split() | last }}",
        "{{ m.content.strip('abc') }}",
        "{{ m.content * 2 }}",
        "{{ [m.content] | join(',') | length }}",
        "{% set x %}{{ m.content }}{% endset %}{{ x | length }}",
    ],
)
def test_a_template_that_does_more_with_a_text_has_no_skeleton(use):
    """Kills a hole through which a text's own value decides what is printed: each of these prints otherwise for another text."""
    template = CHATML.replace("m.content", "(m.content if m.role == 'assistant' else '')").replace(
        "{% if add", "{% for m in messages %}{% if m.role == 'user' %}" + use + "{% endif %}{% endfor %}{% if add"
    )
    style = _renderer(CHATML).default
    from tutelage.render.template import ChatTemplate

    told = ChatTemplate(template)
    compiled = symbolic(told)
    assert compiled is not None
    assert make_skeleton(compiled, told, style.closing, roles=["user", "assistant"], reasoning=[False] * 2, eos=None) is None


@pytest.mark.parametrize(
    ("use", "holds"),
    [
        ("{% if '</x>' in m.content %}!{% endif %}{{ m.content }}", "</x>"),
        ("{% if m.content.startswith('</x>') %}!{% endif %}{{ m.content }}", "</x>"),
        ("{% if m.content == '</x>' %}!{% endif %}{{ m.content }}", "</x>"),
        ("{{ m.content.split('</x>')[-1] }}", "</x>"),
        ("{{ m.content.replace('</x>', '') }}", "</x>"),
        ("{% set t = 'a' ~ m.content ~ 'b' %}{% if '</x>' in t %}!{% endif %}{{ t }}", "</x>"),
    ],
)
def test_a_word_that_the_template_looks_for_is_a_condition(use, holds):
    """Kills a question answered for all texts at once."""
    template = "{% for m in messages %}<{{ m.role }}>" + use + "<|im_end|>{% endfor %}"
    skeleton = _skeleton(template, "user", "assistant")
    assert skeleton is not None
    assert {word for _, word in skeleton.words} == {holds}


def test_a_word_across_a_border_is_no_condition_on_one_text():
    """Kills a search in the text alone where half of the word stands in the template."""
    use = "{% set t = '<' ~ m.content ~ '>' %}{% if '<b' in t %}!{% endif %}{{ t }}"
    template = "{% for m in messages %}{{ m.role }}" + use + "<|im_end|>{% endfor %}"
    assert _skeleton(template, "user", "assistant") is None


def test_blank_texts_are_rendered_by_the_template():
    """Kills a skeleton filled with nothing, where a template would ask whether there is something."""
    template = "{% for m in messages %}{% if m.content %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    renderer = _renderer(template)
    sheet = renderer.lay(columns_of([talk(("user", ""), ("assistant", "a"))]))
    assert "".join(sheet.texts.texts) == "<assistant>a<|im_end|>"


def test_a_trimmed_answer_is_flagged_on_both_ways():
    """Kills a rewritten answer that nobody hears of."""
    renderer = _renderer(MARKED["gemma"][0])
    chats = columns_of([talk(("user", "q"), ("assistant", " a\n")), talk(("user", "q"), ("assistant", "a"))])
    for _ in range(2):
        block = renderer.render_columns(chats)
        assert (block.flags & Flag.REWRITTEN > 0).tolist() == [True, False]
        renderer._layer._filled = lambda *_: None


def test_a_skeleton_that_differs_stops_the_run(monkeypatch):
    """Kills a check that looks at nothing: a template whose skeleton lies is found at the first record."""
    from tutelage.render import forms

    real = forms.make_skeleton

    def lying(*args, **more):
        made = real(*args, **more)
        literals = tuple("?" if literal is not None else None for literal in made.literals)
        return type(made)(literals, made.slots, made.kinds, made.turns, made.from_data, made.words, made.hidden)

    monkeypatch.setattr(forms, "make_skeleton", lying)
    with pytest.raises(TemplateError, match="differs from the template's rendering"):
        _renderer(CHATML).render([talk(("user", "q"), ("assistant", "a"))])


def test_numbers_of_turns_survive_where_only_some_are_shown():
    """Kills turns renumbered by the skeleton: windows and dropped system turns keep the record's own numbers."""
    spec = RenderSpec(tokenizer_engine="tokenizers", system="default")
    renderer = Renderer(opened("bytes", CHATML, "<|im_end|>"), spec)
    for _ in range(2):
        block = renderer.render_columns(columns_of([talk(("system", "s"), ("user", "q"), ("assistant", "a"))]))
        assert sorted(set(block.turns.tolist())) == [-1, 1, 2]
        assert np.isin(block.turns[block.kinds == 3], [2]).all()
        renderer._layer._filled = lambda *_: None
