"""Fixed prompts cut from held-out records, and what a model answers to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tutelage.evaluate.held_out import HeldOut, seeded_order
from tutelage.records import Kind, Rendered, Sample, Score, is_written

if TYPE_CHECKING:
    from tutelage.model.generate import Generation


@dataclass(frozen=True)
class Prompt:
    """A held-out example cut where the model takes over: the ids it sees, and the ids that the data answers with."""

    item: str
    task: str
    ids: list[int]
    reference_ids: list[int]


def cut_prompt(example: Rendered) -> tuple[list[int], list[int]] | None:
    """(prompt ids, reference ids): the example up to the first token that the model writes in its last own turn, and from
    there to its stop. None where nothing comes before, or there is no such turn.

    The template's opening of the answer stays in the prompt (`>`), as inference writes it; the stop (`.`) is in neither:

        ids        < u q . < a > 4 2 .        kinds  the first `<` and `a >` scaffold, `4 2` answer, `.` stop
        prompt     < u q . < a >              reference  4 2

    >>> kinds = [0, 0, 2, 0, 0, 0, 0, 3, 3, 7]
    >>> turns = [-1, 0, 0, -1, -1, -1, -1, 1, 1, 1]
    >>> ids, ones = np.arange(10, dtype=np.int32), np.ones(2, np.float32)
    >>> cut_prompt(Rendered(ids, np.array(kinds, np.uint8), np.array(turns, np.int16), ones))
    ([0, 1, 2, 3, 4, 5, 6], [7, 8])
    """
    own = np.flatnonzero(is_written(example.kinds, example.turns))
    if len(own) == 0:
        return None
    places = own[example.turns[own] == example.turns[own[-1]]]
    start, stops = int(places[0]), places[example.kinds[places] == Kind.STOP]
    end = int(stops[0]) if len(stops) else int(places[-1]) + 1
    if start == 0:
        return None
    return example.ids[:start].tolist(), example.ids[start:end].tolist()


def choose_prompts(held_out: HeldOut, *, num_prompts: int, seed: int) -> list[Prompt]:
    """At most `num_prompts` prompts, spread over tasks: one of each task in turn, tasks and records in seeded orders.

    One prompt per record; a smaller number gives a front part of a larger one, so that raising it keeps what was there.
    """
    queues: dict[str, list[Prompt]] = defaultdict(list)
    seen: set[tuple[str, str]] = set()
    for index in seeded_order(held_out.items, seed=seed, purpose="prompts"):
        task, item = held_out.tasks[index], held_out.items[index]
        cut = cut_prompt(held_out.examples[index])
        if cut is not None and (task, item) not in seen and len(queues[task]) < num_prompts:
            seen.add((task, item))
            queues[task].append(Prompt(item, task, *cut))
    names = sorted(queues)
    order = [names[i] for i in seeded_order(names, seed=seed, purpose="tasks")]
    rounds = [queues[task][turn] for turn in range(num_prompts) for task in order if turn < len(queues[task])]
    return rounds[:num_prompts]


def prompt_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], *, max_new_tokens: int, stop_ids: Sequence[int]
) -> list[Generation]:
    """What the model writes on each prompt, decoded greedily: nothing is drawn, so equal weights give equal answers."""
    from tutelage.model.generate import generate

    if not prompts:
        return []
    return generate(model, tokenizer, [prompt.ids for prompt in prompts], max_new_tokens=max_new_tokens, stop_ids=stop_ids)


def answer_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], *, max_new_tokens: int, stop_ids: Sequence[int]
) -> list[Sample]:
    """One `Sample` per prompt, as `prompt_answers` and `as_samples` make them."""
    return as_samples(
        prompts, prompt_answers(model, tokenizer, prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids), tokenizer
    )


def as_samples(prompts: Sequence[Prompt], answers: Sequence[Generation], tokenizer: Any) -> list[Sample]:
    """One `Sample` per prompt and its answer.

    `ended` = the model wrote a stop token within `max_new_tokens`; `num_tokens` counts what it wrote before that. Prompts
    show their special tokens, answers do not. `run` and `step` are left empty.
    """
    return [
        Sample(
            run="",
            step=0,
            task=prompt.task,
            item=prompt.item,
            prompt=tokenizer.decode(prompt.ids),
            reference=tokenizer.decode(prompt.reference_ids, skip_special_tokens=True),
            output=answer.text,
            ended=answer.ended,
            num_tokens=len(answer.ids),
        )
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def score_samples(samples: Sequence[Sample]) -> list[Score]:
    """Two scores over all samples, task and item "": `ended_share`, and `generated_tokens` per answer; weight = how many.

    >>> sample = Sample("r", 5, "t", "i", "", "", "", ended=True, num_tokens=4)
    >>> [(s.metric, s.value, s.weight) for s in score_samples([sample])]
    [('ended_share', 1.0, 1.0), ('generated_tokens', 4.0, 1.0)]
    """
    if not samples:
        return []
    ended = float(np.mean([sample.ended for sample in samples]))
    tokens = float(np.mean([sample.num_tokens for sample in samples]))
    run, step, count = samples[0].run, samples[0].step, float(len(samples))
    return [
        Score(run, step, "", "", "ended_share", ended, count),
        Score(run, step, "", "", "generated_tokens", tokens, count),
    ]
