"""Prompts as inference would see them, and answers to them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from chats import chat, held_out, messages
from hypothesis import given, settings
from hypothesis import strategies as st

from toy import IM_END, VOCAB_SIZE, tiny_llama, toy_tokenizer
from tutelage.evaluate.measure import Measure
from tutelage.evaluate.samples import answer_prompts, choose_prompts, cut_prompt, score_samples
from tutelage.records import Kind, Rendered


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.mark.parametrize("turns", [("Hi", "Hello"), ("a", "b", "c", "the last answer")])
def test_a_prompt_is_what_the_chat_template_gives_for_generation(turns: tuple[str, ...]) -> None:
    """Kills: a prompt without `<|im_start|>assistant`; the first answer's prompt; a prompt holding the answer's first token."""
    tokenizer = toy_tokenizer()
    cut = cut_prompt(chat(*turns))
    assert cut is not None
    prompt, reference = cut
    assert prompt == tokenizer.apply_chat_template(messages(*turns[:-1]), add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(reference) == turns[-1]


def test_the_reference_goes_from_the_first_mark_to_the_stop_with_what_stands_between() -> None:
    """Kills: a prompt that already holds `<think>`; a reference that loses the marks, or holds the stop and what follows."""
    S, answer = Kind.SCAFFOLD, Kind.ASSISTANT
    kinds = [Kind.USER, S, S, Kind.REASONING, S, answer, Kind.STOP, Kind.STOP, S]  # the second and third scaffold are marks
    turns = np.array([0, -1, 1, 1, 1, 1, 1, 1, -1], np.int16)
    example = Rendered(np.arange(9, dtype=np.int32), np.array(kinds, np.uint8), turns, np.ones(2, np.float32))
    assert cut_prompt(example) == ([0, 1], [2, 3, 4, 5])


def test_examples_that_cannot_be_prompts_are_passed_over() -> None:
    """Kills: an empty prompt handed to the model; an example without an answer."""
    user_only = Rendered(np.array([1], np.int32), np.array([Kind.USER], np.uint8), np.zeros(1, np.int16), np.ones(1, np.float32))
    answer_only = Rendered(
        np.array([1], np.int32), np.array([Kind.ASSISTANT], np.uint8), np.zeros(1, np.int16), np.ones(1, np.float32)
    )
    assert cut_prompt(user_only) is None
    assert cut_prompt(answer_only) is None
    found = choose_prompts(held_out([user_only, answer_only, chat("q", "a")]), num_prompts=5, seed=0)
    assert [prompt.item for prompt in found] == ["r2"]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=20), st.integers(0, 12), st.integers(0, 3))
def test_prompts_are_spread_over_tasks_and_fixed_by_the_seed(tasks: list[str], num_prompts: int, seed: int) -> None:
    """Kills: the first N; a draw over all records, which leaves small tasks out; a choice that moves when N is raised."""
    held = held_out([chat(f"q{i}", "a") for i in range(len(tasks))], tasks)
    found = choose_prompts(held, num_prompts=num_prompts, seed=seed)
    assert found == choose_prompts(held, num_prompts=num_prompts, seed=seed)
    assert found == choose_prompts(held, num_prompts=num_prompts + 3, seed=seed)[:num_prompts]
    assert len(found) == len({prompt.item for prompt in found}) == min(num_prompts, len(tasks))
    available, taken = Counter(tasks), Counter(prompt.task for prompt in found)
    for task in available:
        assert taken[task] == available[task] or taken[task] >= max(taken.values(), default=0) - 1


def test_another_seed_asks_other_prompts() -> None:
    """Kills: a seed that is read and not used."""
    held = held_out([chat(f"q{i}", "a") for i in range(50)])
    chosen = {tuple(p.item for p in choose_prompts(held, num_prompts=5, seed=seed)) for seed in range(3)}
    assert len(chosen) == 3


def test_several_examples_of_one_record_give_one_prompt() -> None:
    """Kills: the same conversation shown twice under one name."""
    held = held_out([chat("q", "a"), chat("q", "a", "r", "b")])
    held = type(held)(("same", "same"), held.tasks, held.examples)
    assert len(choose_prompts(held, num_prompts=4, seed=0)) == 1


def test_ended_means_that_the_model_wrote_a_stop_by_itself(model: Any) -> None:
    """Kills: `ended` for every answer; `ended` for one cut at its longest; the stop counted as a token of the answer."""
    prompts = choose_prompts(held_out([chat("Hi", "Hello"), chat("2+2", "4")]), num_prompts=2, seed=0)
    tokenizer = toy_tokenizer()
    cut = answer_prompts(model, tokenizer, prompts, max_new_tokens=5, stop_ids=[])
    assert [(s.ended, s.num_tokens) for s in cut] == [(False, 5), (False, 5)]
    stopped = answer_prompts(model, tokenizer, prompts, max_new_tokens=5, stop_ids=range(VOCAB_SIZE))
    assert [(s.ended, s.num_tokens, s.output) for s in stopped] == [(True, 0, ""), (True, 0, "")]
    assert [(s.metric, s.value, s.weight) for s in score_samples([cut[0], stopped[1]])] == [
        ("ended_share", 0.5, 2.0),
        ("generated_tokens", 2.5, 2.0),
    ]


def test_a_sample_shows_prompt_reference_and_answer(model: Any) -> None:
    """Kills: prompt and reference mixed up; a prompt whose special tokens are hidden."""
    prompts = choose_prompts(held_out([chat("Hi", "Hello")]), num_prompts=1, seed=0)
    (sample,) = answer_prompts(model, toy_tokenizer(), prompts, max_new_tokens=3, stop_ids=[IM_END])
    assert sample.prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert (sample.reference, sample.item, sample.task) == ("Hello", "r0", "t")


def test_equal_weights_give_equal_samples_and_no_prompts_give_none(model: Any) -> None:
    """Kills: sampling instead of the likeliest token; a crash without prompts."""
    measure = Measure(held_out([chat("Hi", "Hello"), chat("2+2", "4")]), toy_tokenizer(), [IM_END], max_new_tokens=6)
    assert measure(model, 0).samples == measure(model, 0).samples
    assert answer_prompts(model, toy_tokenizer(), [], max_new_tokens=3, stop_ids=[]) == []


def test_the_models_own_end_tokens_end_an_answer_as_in_the_saved_folder(model: Any) -> None:
    """Kills: stopping at the rendered stops only, so that inside the run other answers end than from the saved model."""
    prompts = choose_prompts(held_out([chat("Hi", "Hello")]), num_prompts=1, seed=0)
    (free,) = answer_prompts(model, toy_tokenizer(), prompts, max_new_tokens=1, stop_ids=[])
    first = ord(free.output)
    other = tiny_llama()
    other.generation_config.eos_token_id = first
    (sample,) = Measure(held_out([chat("Hi", "Hello")]), toy_tokenizer(), [IM_END], max_new_tokens=4)(other, 0).samples
    assert (sample.ended, sample.output) == (True, "")
