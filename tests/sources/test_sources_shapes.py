"""Objects to turns: every shape, every refusal, and the keys of a record."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.errors import DataError
from tutelage.records import Turn
from tutelage.sources.chat import messages, sharegpt
from tutelage.sources.detect import check_columns, choose, spread
from tutelage.sources.keys import content_key, normalise, prompt_key
from tutelage.sources.reasons import MALFORMED, REFUSED, Malformed
from tutelage.sources.shapes import (
    PAIRS,
    Record,
    Shape,
    alpaca,
    columns,
    natural_instructions,
    prompt_completion,
    split_instances,
)

COMMON = settings(max_examples=100, deadline=None)
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20).filter(
    lambda text: not text.isspace()
)
ASK = {"role": "user", "content": "2+2?"}
SAY = {"role": "assistant", "content": "4"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"b": 2, "a": 2}'}}


def turns(shape: Shape, record: Record) -> list[Turn]:
    return [Turn(*row) for row in shape(record)[0]]


def reason(shape: Shape, record: Any) -> str:
    with pytest.raises(Malformed) as caught:
        shape(record)
    return caught.value.reason


@COMMON
@given(TEXT, TEXT, TEXT)
def test_texts_arrive_as_they_were(request: str, answer: str, system: str) -> None:
    """Kills strip(), normalisation and any other quiet edit on the way in."""
    plain = [Turn("user", request), Turn("assistant", answer)]
    assert turns(alpaca, {"instruction": request, "input": "", "output": answer}) == plain
    for asked, answered in PAIRS:
        assert turns(prompt_completion, {asked: request, answered: answer}) == plain
    chat = [{"role": "system", "content": system}, {"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    assert turns(messages, {"messages": chat}) == [Turn("system", system), *plain]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [{"from": names[each["role"]], "value": each["content"]} for each in chat]
    assert turns(sharegpt, {"conversations": shared}) == [Turn("system", system), *plain]
    assert turns(columns("q", "{a}", "s"), {"q": request, "a": answer, "s": system}) == [Turn("system", system), *plain]


def test_alpaca_reads_history_system_and_both_spellings() -> None:
    """Kills a reader that throws earlier exchanges, the system prompt or Dolly's context away."""
    record = {"instruction": "And 3?", "context": "Add.", "response": "6", "system": "Be brief.", "history": [["2?", "4"]]}
    assert [(t.role, t.content) for t in turns(alpaca, record)] == [
        ("system", "Be brief."),
        ("user", "2?"),
        ("assistant", "4"),
        ("user", "And 3?\n\nAdd."),
        ("assistant", "6"),
    ]


def test_messages_keep_tools_calls_reasoning_names_and_weights() -> None:
    """Kills a reader that knows only role and content, or that sorts the keys that a template will print."""
    record = {
        "tools": [{"type": "function", "function": {"name": "add", "description": "d"}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}], "name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "add them"},
            {"role": "tool", "content": "4", "tool_call_id": "c1"},
            {"role": "assistant", "content": "4", "train": False},
        ],
    }
    found = turns(messages, record)
    assert found[0] == Turn("user", "2+2?", name="ann")
    assert found[1] == Turn("assistant", "", reasoning="add them", tool_calls=json.dumps([CALL], separators=(",", ":")))
    assert found[2] == Turn("tool", "4", call_id="c1")
    assert found[3] == Turn("assistant", "4", weight=0.0)
    assert json.loads(str(messages(record)[1])) == record["tools"]
    assert str(messages(record)[1]).index('"type"') < str(messages(record)[1]).index('"function":')


def test_sharegpt_reads_function_calls_observations_and_loss_flags() -> None:
    """Kills a reader that takes a function call for the text of an answer."""
    record = {
        "system": "S",
        "tools": '[{"name": "add"}]',
        "conversations": [
            {"from": "human", "value": "2+2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "4", "loss": True},
        ],
    }
    found = turns(sharegpt, record)
    assert [t.role for t in found] == ["system", "user", "assistant", "tool", "assistant"]
    assert json.loads(str(found[2].tool_calls)) == [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
    assert found[4].weight == 1.0
    assert sharegpt(record)[1] == '[{"name":"add"}]'


def test_seed_tasks_and_flat_instances_are_natural_instructions_too() -> None:
    """Kills a reader that knows one spelling of tasks."""
    seed = {"name": "n", "instruction": "Add.", "instances": [{"input": "1, 1", "output": "2"}, {"input": "", "output": "0"}]}
    parts = split_instances(seed)
    assert [turns(natural_instructions, part)[0].content for part in parts if isinstance(part, dict)] == ["Add.\n\n1, 1", "Add."]
    flat = split_instances({"definition": "Add.", "inputs": "1, 1", "targets": "2"})
    assert [turns(natural_instructions, part)[1].content for part in flat if isinstance(part, dict)] == ["2"]


def chat(*pairs: tuple[str, Any]) -> Record:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("shape", "record", "expected"),
    [
        (alpaca, {"instruction": "a"}, "missing_field"),
        (alpaca, {"instruction": "a", "output": None}, "missing_field"),
        (alpaca, {"instruction": "a", "output": 7}, "wrong_type"),
        (alpaca, {"instruction": "a", "input": 7, "output": "b"}, "wrong_type"),
        (alpaca, {"instruction": " \n", "output": "b"}, "empty_request"),
        (alpaca, {"instruction": "a", "output": "\t "}, "empty_answer"),
        (alpaca, {"instruction": "a", "output": "b", "history": [["x"]]}, "wrong_type"),
        (prompt_completion, {"text": "a"}, "missing_field"),
        (prompt_completion, {"prompt": None, "completion": "b"}, "missing_field"),
        (prompt_completion, {"prompt": ["a"], "completion": "b"}, "wrong_type"),
        (columns("a", "b"), {"a": "x"}, "missing_field"),
        (columns("{a}{c}", "b"), {"a": "x", "b": "y", "c": 1.5}, "wrong_type"),
        (messages, {}, "missing_field"),
        (messages, {"messages": "hi"}, "wrong_type"),
        (messages, {"messages": []}, "no_request"),
        (messages, {"messages": ["hi"]}, "wrong_type"),
        (messages, {"messages": [{"content": "x"}]}, "missing_field"),
        (messages, {"messages": [{"role": 3, "content": "x"}]}, "wrong_type"),
        (messages, chat(("narrator", "x")), "unknown_role"),
        (messages, chat(("user", 5), ("assistant", "x")), "wrong_type"),
        (messages, chat(("user", " "), ("assistant", "x")), "empty_request"),
        (messages, chat(("user", "x"), ("assistant", "")), "empty_answer"),
        (messages, chat(("user", "x"), ("assistant", None)), "missing_field"),
        (messages, chat(("user", [{"type": "image_url"}]), ("assistant", "x")), "unsupported_content"),
        (messages, chat(("system", "a"), ("system", "b"), ("user", "x"), ("assistant", "y")), "two_system_turns"),
        (messages, {"system": "a", **chat(("system", "b"), ("user", "x"), ("assistant", "y"))}, "two_system_turns"),
        (messages, chat(("user", "x"), ("system", "b"), ("assistant", "y")), "system_not_first"),
        (messages, chat(("user", "x")), "no_answer"),
        (messages, chat(("assistant", "x")), "no_request"),
        (messages, chat(("user", "x"), ("assistant", "y"), ("user", "z")), "ends_without_answer"),
        (messages, chat(("user", "x"), ("tool", "y"), ("assistant", "z")), "stray_tool_result"),
        (messages, {"messages": [ASK, {"role": "assistant", "tool_calls": [{"id": 1}]}]}, "bad_tool_call"),
        (messages, {"messages": [ASK, {"role": "assistant", "tool_calls": "f"}]}, "bad_tool_call"),
        (messages, {"messages": [ASK, {**SAY, "weight": -1}]}, "wrong_type"),
        (messages, {"messages": [ASK, {**SAY, "weight": float("nan")}]}, "wrong_type"),
        (messages, {"messages": [ASK, {**SAY, "reasoning": 3}]}, "wrong_type"),
        (messages, {"messages": [ASK, SAY], "tools": "{nope"}, "bad_tool_call"),
        (messages, {"messages": [ASK, SAY], "tools": {"name": "f"}}, "bad_tool_call"),
        (sharegpt, {"conversations": [{"from": "narrator", "value": "x"}]}, "unknown_role"),
        (
            sharegpt,
            {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "f("}]},
            "bad_tool_call",
        ),
        (split_instances, {"definition": "d"}, "missing_field"),
        (split_instances, {"definition": "d", "instances": []}, "missing_field"),
        (split_instances, {"definition": 4, "instances": [{}]}, "wrong_type"),
        (split_instances, {"definition": "d", "instances": [{}], "positive_examples": [{"input": 1}]}, "wrong_type"),
        (natural_instructions, {"lead": ("d", ""), "input": "a"}, "missing_field"),
        (natural_instructions, {"lead": ("d", ""), "input": "a", "output": [" "]}, "empty_answer"),
    ],
)
def test_a_record_that_cannot_be_kept_says_why(shape: Shape, record: Record, expected: str) -> None:
    """Kills str() around numbers, dropped turns, and guesses at what was meant."""
    assert reason(shape, record) == expected


@COMMON
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda x: (
            st.lists(x, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["messages", "role", "content", "from", "value", "user", "tools", "tool_calls", "function", "name", "weight"]
                ),
                x,
                max_size=4,
            )
        ),
        max_leaves=12,
    ),
    st.sampled_from([messages, sharegpt, alpaca, prompt_completion, split_instances]),
)
def test_no_object_whatsoever_raises_anything_but_malformed(value: Any, shape: Shape) -> None:
    """Kills a shape that stops the run with a TypeError on one odd row."""
    record = value if isinstance(value, dict) else {"messages": value, "instruction": value, "output": value, "instances": value}
    try:
        shape(record)
    except Malformed as error:
        assert error.reason in MALFORMED


def test_the_shape_of_a_file_is_that_of_most_records_and_not_of_the_first() -> None:
    """Kills detection by the first record."""
    records: list[Record | Malformed] = [{"question": "a", "answer": "b"}, *({"messages": [ASK, SAY], "id": i} for i in range(5))]
    decision = choose([*records, Malformed("broken_json")])
    assert decision.name == "messages"
    assert decision.why == "5 of 7 sampled records hold messages; not read: answer, id, question"


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"instruction": "a", "context": "", "response": "b", "category": "c"}, "alpaca"),
        ({"instruction": "a", "response": "b"}, "prompt_completion"),
        ({"input": "a", "output": "b"}, "prompt_completion"),
        ({"conversation": [ASK, SAY]}, "messages"),
        ({"messages": [{"from": "human", "value": "a"}]}, "sharegpt"),
        ({"Definition": ["d"], "Positive Examples": [], "Instances": [{}]}, "natural_instructions"),
        ({"instruction": "a", "instances": []}, "natural_instructions"),
    ],
)
def test_auto_knows_the_published_spellings(record: Record, name: str) -> None:
    """Kills an order of tests in which a general shape shadows a special one."""
    assert choose([record]).name == name


def test_when_no_shape_fits_the_keys_are_shown_and_columns_proposed() -> None:
    """Kills a silent guess."""
    with pytest.raises(DataError, match=r"keys: titel, body.*shape: columns"):
        choose([{"titel": "a", "body": "b"}])
    with pytest.raises(DataError, match="did you mean `titel`"):
        check_columns([{"titel": "a", "body": "b"}], ["title"])


@COMMON
@given(st.lists(st.integers(), max_size=60, unique=True), st.integers(2, 50))
def test_a_sample_is_spread_from_first_to_last(items: list[int], limit: int) -> None:
    """Kills `items[:limit]`."""
    found = spread(items, limit)
    assert len(found) == len(set(found)) == min(limit, len(items))
    assert not items or (found[0] == items[0] and found[-1] == items[-1])


@COMMON
@given(st.text())
def test_normalising_twice_is_normalising_once(text: str) -> None:
    """Kills a normal form that is none: equal requests would fall on two sides of the split."""
    assert normalise(normalise(text)) == normalise(text)


def test_requests_that_differ_in_form_alone_have_one_prompt_key() -> None:
    """Kills a split that can be fooled by case, width, spaces or a full stop."""
    forms = ["What is 2+2?", "what  is\n2+2", "WHAT IS 2+2 !", "\uff37hat is 2+2\u3002", "\u201cWhat is 2+2\u201d"]
    assert len({prompt_key([("user", form, None, None, None, None, None)]) for form in forms}) == 1


ROW = st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=3), st.none() | st.just("r"), st.none() | st.just("[]"))


@COMMON
@given(st.lists(ROW, max_size=3), st.lists(ROW, max_size=3))
def test_content_keys_are_equal_exactly_for_equal_turns(one: list[Any], two: list[Any]) -> None:
    """Kills joining without separators: ("ab", "c") and ("a", "bc") are different records."""
    rows = [[(*row, None, None, None) for row in each] for each in (one, two)]
    if any("\0" in row[1] for row in [*one, *two]):
        return
    assert (content_key(rows[0], None) == content_key(rows[1], None)) == (one == two)
    assert content_key(rows[0], "[]") != content_key(rows[0], None)


def test_nul_and_surrogates_from_any_format_are_refused_by_the_key() -> None:
    """Kills a check that only JSON lines pass through."""
    for text, expected in (("a\0b", "nul_character"), ("\ud800", "lone_surrogate")):
        with pytest.raises(Malformed) as caught:
            content_key([("user", text, None, None, None, None, None)], None)
        assert caught.value.reason == expected


def test_no_code_stands_for_two_things() -> None:
    """Kills a refusal that would count as a bad record."""
    assert not MALFORMED.keys() & REFUSED.keys()
    assert len(MALFORMED) >= 12
