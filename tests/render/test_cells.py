"""Cells: marks belong to the turn whose model writes them, and every learned turn ends with one stop."""

from __future__ import annotations

import itertools

import pytest

from render.styles import CHATML, PLAIN, SPECIAL, THINKING
from tutelage.errors import TemplateError
from tutelage.records import Kind
from tutelage.render.behaviour import describe
from tutelage.render.cells import Closing, Stop, find_stop, layout, probe
from tutelage.render.provenance import Part, Refusal, Span, Trace, trace
from tutelage.render.template import ChatTemplate

CALL = [{"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": "x"}}}]
QUESTION = {"role": "user", "content": "q"}
RESULT = {"role": "tool", "content": "7", "tool_call_id": "1", "name": "add"}
MISTRAL = (  # calls and results have marks of their own, ids among them, and no header stands before an answer
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}{{ '[CALLS] [' }}{% for c in m.tool_calls %}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}{% endfor %}{{ ']' + eos_token }}"
    "{% elif m.role == 'tool' %}{{ '[RESULTS] {' + m.content + ', \"id\": ' + m.tool_call_id | tojson + '}[/RESULTS]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
TWO_ENDS = (  # an answer ends with one token, a call with another, after which a tool speaks
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|head|>\n\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + '(' + c.function.arguments.a + ')</call>' }}{% endfor %}"
    "{{ '<turn>' if m.tool_calls else '<end>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|head|>\n\n' }}{% endif %}"
)
UNENDED = PLAIN.replace("m.content +", "m.content + (m.tool_calls | tojson if m.tool_calls else '') +")


def _assistant(content="", *, calls=None, reasoning=None):
    message = {"role": "assistant", "content": content}
    return message | ({"tool_calls": calls} if calls else {}) | ({"reasoning_content": reasoning} if reasoning else {})


def _cells(text, chat, *ends, eos=None, tools=None):
    ends = ends or ("<|im_end|>",)
    template = ChatTemplate(text, special_tokens={"bos_token": "<s>", "eos_token": ends[0]})
    closing = probe(template.render, end_tokens=ends, special_tokens=SPECIAL)
    traced = trace(lambda these: template.render(these, tools=tools), chat, literals=template.literals)
    made = layout(traced, chat, closing, learned=[m["role"] == "assistant" for m in chat], eos=eos)
    edges = [0, *made.cells.ends]
    texts = [made.text[a:b] for a, b in itertools.pairwise(edges)]
    return list(zip([Kind(k).name for k in made.cells.kinds], made.cells.turns, texts, made.cells.from_data, strict=True))


def _of_turn(cells, turn):
    return [(kind, text) for kind, t, text, _ in cells if t == turn]


def test_what_the_template_writes_around_reasoning_and_calls_is_marks_of_the_turn():
    """Kills marks left to nobody (a model that never writes `</think>`), and marks passed off as the data's text."""
    cells = _cells(THINKING, [QUESTION, _assistant("a", reasoning="r", calls=CALL)])
    assert _of_turn(cells, 1) == [
        ("SCAFFOLD", "<think>\n"),
        ("REASONING", "r"),
        ("SCAFFOLD", "\n</think>\n\n"),
        ("ASSISTANT", "a"),
        ("SCAFFOLD", '\n<call>{"name": "'),
        ("TOOL_CALL", "add"),
        ("SCAFFOLD", '", "arguments": {"a": "'),
        ("TOOL_CALL", "x"),
        ("SCAFFOLD", '"}}</call>'),
        ("STOP", "<|im_end|>"),
    ]
    assert [is_own for *_, is_own in cells] == [kind in ("USER", "REASONING", "ASSISTANT", "TOOL_CALL") for kind, *_ in cells]
    assert all(turn == -1 for kind, turn, text, _ in cells if kind == "SCAFFOLD" and "assistant" in text)


def test_the_generation_prompt_and_what_it_opens_are_no_marks():
    """Kills training `<think>` where the prompt already ends with it."""
    prompted = THINKING.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
    cells = _cells(prompted, [QUESTION, _assistant("a", reasoning="r")])
    assert _of_turn(cells, 1)[:2] == [("REASONING", "r"), ("SCAFFOLD", "\n</think>\n\n")]


def test_an_empty_block_that_the_template_supplies_is_no_mark_before_a_call_either():
    """Kills training a model to write an empty reasoning block that inference never asks of it."""
    cells = _cells(THINKING, [QUESTION, _assistant(calls=CALL)])
    assert _of_turn(cells, 1)[0] == ("SCAFFOLD", '\n<call>{"name": "')


def test_the_marks_of_calls_are_found_without_a_header():
    """Kills `[CALLS]` left to the prompt where no header stands before answers, after questions and after results."""
    chat = [QUESTION, _assistant(calls=CALL), RESULT, _assistant(calls=CALL), RESULT, _assistant("a")]
    cells = _cells(MISTRAL, chat, "</s>")
    for turn in (1, 3):
        mine = _of_turn(cells, turn)
        assert mine[0] == ("SCAFFOLD", '[CALLS] [{"name": "')
        assert mine[-2:] == [("SCAFFOLD", '"}, "id": "1"}]'), ("STOP", "</s>")]
    assert _of_turn(cells, 5) == [("ASSISTANT", "a"), ("STOP", "</s>")]


def test_a_call_may_end_with_another_end_token():
    """Kills refusing calls that hand over to a tool, and a stop taken from the turn after."""
    chat = [QUESTION, _assistant(calls=CALL), RESULT, _assistant("a")]
    cells = _cells(TWO_ENDS, chat, "<end>", "<turn>")
    assert _of_turn(cells, 1)[-2:] == [("SCAFFOLD", ")</call>"), ("STOP", "<turn>")]
    assert _of_turn(cells, 3) == [("ASSISTANT", "a"), ("STOP", "<end>")]
    without = TWO_ENDS.replace("'<turn>' if", "'' if").replace("'<end>' }}{% endfor", "'<end>' }}{% endfor")
    with pytest.raises(Refusal, match="no_stop"):
        _cells(without, [QUESTION, _assistant(calls=CALL), _assistant("a")], "<end>", "<turn>")


def test_an_added_stop_stands_behind_the_whole_call():
    """Kills an end token in the middle of a call's closing braces."""
    chat = [QUESTION, _assistant(calls=CALL), RESULT, _assistant("a", calls=CALL)]
    cells = _cells(UNENDED, chat, "</s>", eos="</s>")
    for turn in (1, 3):
        assert _of_turn(cells, turn)[-2:] == [("SCAFFOLD", '"}}}]'), ("STOP", "</s>")]


def test_a_content_that_the_template_splits_is_one_answer_with_marks_in_it():
    """Kills refusing answers with `<think>` in their text, and marks between the pieces that nobody writes."""
    cells = _cells(THINKING, [QUESTION, _assistant("<think>so</think>five")])
    assert _of_turn(cells, 1) == [
        ("SCAFFOLD", "<think>\n"),
        ("ASSISTANT", "so"),
        ("SCAFFOLD", "\n</think>\n\n"),
        ("ASSISTANT", "five"),
        ("STOP", "<|im_end|>"),
    ]


@pytest.mark.parametrize(
    "shown",
    [
        "{{ m.content.split('</think>')[-1] + '|' + m.content.split('</think>')[0] }}",  # out of order
        "{{ m.content.split('</think>')[0] + '|' + m.content.split('</think>')[0] }}",  # twice
        "{{ m.content + '|' + m.content }}",
    ],
)
def test_pieces_out_of_order_or_repeated_are_refused(shown):
    """Kills accepting any several pieces of an answer."""
    text = f"{{% for m in messages %}}{{{{ m.role }}}}:{{% if m.role == 'user' or '</think>' not in m.content and '+' not in m.content %}}{{{{ m.content }}}}{{% else %}}{shown}{{% endif %}}<|im_end|>{{% endfor %}}"
    with pytest.raises(Refusal, match="shown_twice"):
        _cells(text, [QUESTION, _assistant("so+</think>five")])


def test_an_answer_in_two_places_is_refused():
    """Kills joining pieces of an answer over the turn between them."""
    text = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{% if messages | length > 4 %}{{ messages[1].content }}<|im_end|>{% endif %}"
    with pytest.raises(Refusal, match="shown_twice"):
        _cells(text, [QUESTION, _assistant("a"), QUESTION, _assistant("b"), QUESTION])


def test_a_template_that_needs_tools_is_probed_with_them():
    """Kills refusing every conversation because the template for tools has none to show."""
    text = "{% for t in tools %}{{ t.function.name }}{% endfor %}" + CHATML
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert _of_turn(_cells("{{ tools[0].function.name }}" + CHATML, [QUESTION, _assistant("a")], tools=tools), 1)[-1][0] == "STOP"
    assert probe(ChatTemplate(text).render, end_tokens=["<|im_end|>"], special_tokens=SPECIAL).last is not None


def test_a_template_that_needs_other_variables_stays_refused_with_the_cause():
    """Kills a probe that swallows why."""
    with pytest.raises(TemplateError, match="'functions' is undefined"):
        probe(ChatTemplate("{{ functions.x }}").render, end_tokens=[], special_tokens=[])


PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
)


def test_contents_are_sent_as_parts_where_only_parts_are_shown():
    """Kills an answer silently missing from the text, and parts sent to templates that read plain text."""
    assert ChatTemplate(PARTS).content_as_parts and not ChatTemplate(CHATML).content_as_parts
    assert _of_turn(_cells(PARTS, [QUESTION, _assistant(" a ")]), 1) == [("ASSISTANT", " a "), ("STOP", "<|im_end|>")]


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        (CHATML, {"keeps_prefix", "drops_reasoning", "drops_earlier_reasoning", "hides_tools"}),
        (THINKING, {"drops_earlier_reasoning"}),
        (PARTS, {"keeps_prefix", "drops_reasoning", "drops_earlier_reasoning", "hides_tools", "content_as_parts"}),
        (
            CHATML.split("{% if add_gen")[0] + "<|im_start|>assistant\n",
            {"appends_header", "drops_reasoning", "drops_earlier_reasoning", "hides_tools"},
        ),
        (
            "{{ strftime_now('%d') }}" + CHATML,
            {"keeps_prefix", "prints_date", "drops_reasoning", "drops_earlier_reasoning", "hides_tools"},
        ),
        (
            "{% if messages[0].role == 'system' or tools %}{{ raise_exception('no') }}{% endif %}"
            + CHATML.replace("m.content", "m.content | trim"),
            {"keeps_prefix", "refuses_system", "refuses_tools", "trims", "drops_reasoning", "drops_earlier_reasoning"},
        ),
        ("{{ raise_exception('never') }}", {"refuses_tools"}),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}</s>{% endfor %}",
            {"keeps_prefix", "drops_system", "drops_reasoning", "drops_earlier_reasoning", "hides_tools"},
        ),
    ],
)
def test_behaviours_are_described(text, facts):
    """Kills each fact given to every template, or to none."""
    found = describe(ChatTemplate(text.replace("PARTS", PARTS)))
    assert {name for name, value in found.items() if value is True} == facts


def test_the_markers_of_a_template_are_named():
    """Kills markers taken from messages, or left out because only one role prints them."""
    found = describe(ChatTemplate(CHATML))["markers"]
    assert found == ["<|im_start|>", "<|im_end|>"]
    assert describe(ChatTemplate(MISTRAL, special_tokens={"bos_token": "<s>", "eos_token": "</s>"}))["markers"] == [
        "<s>",
        "[INST]",
        "[/INST]",
        "</s>",
        "[CALLS]",
        "[RESULTS]",
        "[/RESULTS]",
    ]


def test_a_span_that_does_not_say_where_it_is_from_counts_as_the_whole_text():
    """Kills a repeated answer that passes because its spans were made without their places."""
    stop = Stop("</s>", 4, "</s>")
    part = Part(1, Kind.ASSISTANT)
    traced = Trace("q:a a</s>", (Span(0, 1, Part(0, Kind.USER)), Span(2, 3, part), Span(4, 5, part)))
    with pytest.raises(Refusal, match="shown_twice"):
        layout(traced, [QUESTION, _assistant("a")], Closing(stop, stop), learned=[False, True])


def test_a_text_far_longer_than_any_stop_is_none():
    """Kills training the question that a judge's template puts behind the conversation as if the model wrote it."""
    question = "\n\nIs the answer above safe? Say `safe` or `unsafe`, and why, with the numbers of the rules that it breaks.</s>"
    assert find_stop(question, end_tokens=["</s>"], special_tokens=["</s>"]) is None
    assert find_stop("\n\n</s>" + question, end_tokens=["</s>"], special_tokens=["</s>"]).length == 6


def test_a_trimmed_answer_is_no_split_one():
    """Kills a stop whose white space turns into marks because a space in front of the answer was trimmed away."""
    text = "{% for m in messages %}{{ m.role + ':\n' + m.content | trim + '\n<|im_end|>' }}{% endfor %}"
    for answer in ("a", "\n a\n"):
        cells = _cells(text, [QUESTION, _assistant(answer)])
        assert _of_turn(cells, 1) == [("ASSISTANT", "a"), ("STOP", "\n<|im_end|>")]


def test_the_usual_stop_may_stand_behind_other_white_space():
    """Kills refusing answers because tools in the list change a line end before the stop."""
    text = CHATML.replace("'<|im_end|>\n'", "('\n' if tools else '') + '<|im_end|>\n'")
    cells = _cells(text, [QUESTION, _assistant("a")], tools=[{"type": "function"}])
    assert _of_turn(cells, 1) == [("ASSISTANT", "a"), ("STOP", "\n<|im_end|>")]


def test_a_name_repeated_beside_the_result_is_no_part_of_the_call():
    """Kills a stop sought behind the tool's answer, where templates repeat the name of the tool that was called."""
    text = TWO_ENDS.replace(
        "+ m.content }}", "+ (messages[1].tool_calls[0].function.name + ': ' if m.role == 'tool' else '') + m.content }}"
    )
    cells = _cells(text, [QUESTION, _assistant(calls=CALL), RESULT, _assistant("a")], "<end>", "<turn>")
    assert _of_turn(cells, 1)[-2:] == [("SCAFFOLD", ")</call>"), ("STOP", "<turn>")]
    assert _of_turn(cells, 3) == [("ASSISTANT", "a"), ("STOP", "<end>")]


def test_marks_may_stand_between_a_split_answer_and_its_stop():
    """Kills refusing an answer that is all thought, behind which the template closes the thought itself."""
    text = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if '<think>' in m.content %}"
        "{{ '<think>\n' + m.content.split('<think>')[-1] + '\n</think>\n\n' }}{% else %}{{ m.content }}{% endif %}"
        "{% if m.reasoning_content %}{{ '<why>' + m.reasoning_content + '</why>' }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    )
    thought = _of_turn(_cells(text, [QUESTION, _assistant("<think>so")]), 1)
    assert thought[-3:] == [("ASSISTANT", "so"), ("SCAFFOLD", "\n</think>\n\n"), ("STOP", "<|im_end|>")]
    silent = _of_turn(_cells(text, [QUESTION, _assistant("", reasoning="r")]), 1)
    assert silent[-3:] == [("REASONING", "r"), ("SCAFFOLD", "</why>"), ("STOP", "<|im_end|>")]
    signed = "{% for m in messages %}{{ m.content + (' (the ' ~ loop.index ~ 'th)' if loop.index > 4 else '') + '<|im_end|>' }}{% endfor %}"
    with pytest.raises(Refusal, match="no_stop"):  # a plain answer ends where its text ends
        _cells(signed, [QUESTION, _assistant("a")] * 3)
