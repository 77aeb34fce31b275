from __future__ import annotations

import random

import pytest
import torch

from toy import IM_END, save_tiny, tiny_model, toy_tokenizer
from tutelage.errors import ModelError
from tutelage.model import generate as module
from tutelage.model.generate import generate, stream
from tutelage.model.load import load_model

PROMPTS = [[72, 105], [1, 2, 3, 4, 5, 6, 7, 8, 9], [65, 66, 67, 68], [72, 105], [90], [100, 101, 102, 33, 40]]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral", "gpt_neox"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_gets_the_same_answer_alone_and_in_a_batch(kind: str, temperature: float) -> None:
    """Kills: padding that is seen, positions that count padding, one random source for the whole batch."""
    model, tokenizer = tiny_model(kind), toy_tokenizer()
    settings = {"max_new_tokens": 7, "stop_ids": [IM_END], "temperature": temperature, "top_p": 0.95, "seed": 5}
    together = generate(model, tokenizer, PROMPTS, **settings)
    for index in (0, 1, 2, 4, 5):
        assert generate(model, tokenizer, [PROMPTS[index]], **settings) == [together[index]]


def test_greedy_answers_are_transformers_own() -> None:
    """Kills: a cache that is out of step, a first token taken from the prompt's last but one."""
    model = tiny_model("llama")
    got = generate(model, toy_tokenizer(), PROMPTS, max_new_tokens=9, stop_ids=[])
    for prompt, answer in zip(PROMPTS, got, strict=True):
        ids = torch.tensor([prompt])
        want = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert answer.ids == want[0, len(prompt) :].tolist()
        assert not answer.ended


def test_an_answer_ends_before_its_stop_token_and_says_so() -> None:
    """Kills: a stop token left in the text, answers that run on, `ended` told of an answer that was cut off."""
    model, tokenizer = tiny_model("llama"), toy_tokenizer()
    free = generate(model, tokenizer, PROMPTS, max_new_tokens=12, stop_ids=[])
    stop = free[4].ids[3]
    for before, after in zip(free, generate(model, tokenizer, PROMPTS, max_new_tokens=12, stop_ids=[stop]), strict=True):
        cut = before.ids.index(stop) if stop in before.ids else None
        assert after.ids == before.ids[:cut]
        assert after.ended == (cut is not None)
        assert after.text == tokenizer.decode(after.ids, skip_special_tokens=True)


def test_the_same_prompt_twice_gives_two_draws_and_another_seed_gives_others() -> None:
    """Kills: n samples that are one sample n times; a seed that is ignored."""
    model, tokenizer = tiny_model("llama"), toy_tokenizer()
    settings = {"max_new_tokens": 8, "stop_ids": [], "temperature": 1.5}
    draws = [answer.ids for answer in generate(model, tokenizer, [PROMPTS[1]] * 4, **settings, seed=1)]
    assert len({tuple(ids) for ids in draws}) == 4
    assert generate(model, tokenizer, [PROMPTS[1]] * 4, **settings, seed=1)[3].ids == draws[3]
    assert generate(model, tokenizer, [PROMPTS[1]], **settings, seed=2)[0].ids != draws[0]


def test_top_p_keeps_the_likeliest_words_only() -> None:
    """Kills: a top-p that keeps the tail, or drops the word that crosses the threshold."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    sampling = module._Sampling(1, frozenset(), 1.0, 0.6, 0)
    source = torch.Generator().manual_seed(0)
    assert {module._choose(logits, sampling, source) for _ in range(200)} == {0, 1}


def test_the_callers_random_state_and_training_mode_are_untouched() -> None:
    """Kills: an evaluation in the middle of training that changes the training after it."""
    model = tiny_model("llama").train()
    torch.manual_seed(3)
    random.seed(3)
    state, other = torch.get_rng_state(), random.getstate()
    generate(model, toy_tokenizer(), PROMPTS, max_new_tokens=3, stop_ids=[], temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == other
    assert model.training


def test_streamed_pieces_join_to_the_whole_answer() -> None:
    """Kills: a stream that swallows the last piece, or shows the stop token."""
    model, tokenizer = tiny_model("llama"), toy_tokenizer()
    settings = {"max_new_tokens": 9, "stop_ids": [IM_END], "temperature": 1.0, "seed": 4}
    pieces = list(stream(model, tokenizer, PROMPTS[0], **settings))
    assert "".join(pieces) == generate(model, tokenizer, [PROMPTS[0]], **settings)[0].text
    assert len(pieces) > 2


def test_batches_hold_their_bounds_and_every_prompt_once() -> None:
    """Kills: a batch whose cache outgrows memory; a prompt that is lost."""
    lengths = [random.Random(0).randint(1, 3000) for _ in range(200)]
    batches = list(module._batches(lengths, max_new_tokens=500))
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    for batch in batches:
        widest = max(lengths[index] for index in batch) + 500
        assert len(batch) <= module.MAX_BATCH and len(batch) * widest <= module.MAX_BATCH_TOKENS


def test_a_loaded_model_generates_after_and_between_packed_steps(tmp_path) -> None:
    """Kills: lengths of a training step that stay set and reach the next generation."""
    from tutelage.model.loss import hidden_states

    model = load_model(save_tiny(tmp_path))
    before = generate(model, toy_tokenizer(), PROMPTS, max_new_tokens=5, stop_ids=[])
    hidden_states(model, torch.ones(1, 9, dtype=torch.int64), lengths=[4, 5])
    assert generate(model, toy_tokenizer(), PROMPTS, max_new_tokens=5, stop_ids=[]) == before


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"prompts": [[]]}])
def test_numbers_that_mean_nothing_are_refused(wrong: dict) -> None:
    """Kills: an empty prompt that answers with whatever stands at position -1."""
    settings = {"prompts": PROMPTS, "max_new_tokens": 4, "stop_ids": [], **wrong}
    with pytest.raises(ModelError):
        generate(tiny_model("llama"), toy_tokenizer(), settings.pop("prompts"), **settings)
