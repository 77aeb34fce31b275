"""Faults of published code that touch rendering and loss weights, each rebuilt beside ours on the same data.

docs/faults.md tells the story of each, with the thread where people met it. Faults of mixing are in `plan/test_mixing_faults.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForLanguageModeling

from render.styles import CHATML, MARKED, THINKING, opened, reference, talk
from small_recipe import write_small
from toy import save_tiny, toy_tokenizer
from tutelage import Batches, load_recipe, make_plan, render_conversations, run, weigh_tokens
from tutelage.errors import DataError, ModelError, PlanError
from tutelage.model.names import find_bundled
from tutelage.plan.spec import BatchSpec
from tutelage.records import NO_TARGET, Conversation, Kind, Rendered, Tally, Turn
from tutelage.render.provenance import Refusal
from tutelage.render.spec import RenderSpec
from tutelage.render.tokenizer import OpenTokenizer, open_tokenizer
from tutelage.tables import PLANNED, RenderedSet, Shards, read_dropped, read_table

DOCS = Path(__file__).parents[2] / "docs"


@cache
def _smollm2_folder() -> Path:
    """The bundled model's tokenizer, without its weights (they would take seconds and half a gigabyte)."""
    try:
        path = find_bundled("bundled:smollm2-135m")
    except ModelError as error:
        pytest.skip(str(error))
    from gguf import GGUFReader

    from tutelage.model.bundled import _write_tokenizer

    folder = Path(mkdtemp(prefix="tutelage-smollm2-"))
    _write_tokenizer(folder, {name: field.contents() for name, field in GGUFReader(path).fields.items()})
    return folder


def _smollm2() -> OpenTokenizer:
    return open_tokenizer(_smollm2_folder())


def _one(tokenizer: OpenTokenizer, *turns: Turn | tuple[str, str], **spec: object) -> Rendered | Refusal:
    (made,) = render_conversations([talk(*turns)], tokenizer=tokenizer, spec=RenderSpec(**spec))
    return made


def _read(tokenizer: OpenTokenizer, ids: np.ndarray) -> str:
    return tokenizer.backend.decode(np.asarray(ids).tolist(), skip_special_tokens=False)


def _weights(made: Rendered) -> np.ndarray:
    return weigh_tokens(made.kinds, turns=made.turns, turn_weights=made.turn_weights)


def _trained(tokenizer: OpenTokenizer, made: Rendered) -> str:
    """What the response loss learns of an example, read back from its ids."""
    return _read(tokenizer, made.ids[_weights(made) > 0])


def _find(ids: np.ndarray, wanted: list[int]) -> int:
    """Where a run of ids begins, -1 for nowhere: the search that tools mark responses with."""
    return next((i for i in range(len(ids) - len(wanted) + 1) if ids[i : i + len(wanted)].tolist() == wanted), -1)


def _after_marker(tokenizer: OpenTokenizer, ids: np.ndarray, marker: str) -> np.ndarray:
    """The wrong program: everything behind the first place where the marker's ids, encoded by themselves, are found."""
    wanted = tokenizer.backend.encode(marker, add_special_tokens=False).ids
    at = _find(ids, wanted)
    return np.zeros(0, ids.dtype) if at < 0 else ids[at + len(wanted) :]


def test_lesson_only_the_text_before_the_first_assistant_header_is_masked() -> None:
    """Kills training on everything behind the first assistant header, later user turns included."""
    tokenizer = _smollm2()
    made = _one(tokenizer, ("user", "Name a colour."), ("assistant", "Red."), ("user", "And a fish?"), ("assistant", "A carp."))
    wrong = _read(tokenizer, _after_marker(tokenizer, made.ids, "<|im_start|>assistant\n"))
    assert "And a fish?" in wrong and wrong.startswith("Red.")
    assert _trained(tokenizer, made) == "Red.<|im_end|>A carp.<|im_end|>"
    assert _read(tokenizer, made.ids[made.kinds == Kind.USER]) == "Name a colour.And a fish?"


def test_lesson_pad_equals_end_and_the_real_end_is_masked() -> None:
    """Kills hiding targets by the pad id: where pad and end are one token, the model never learns to stop."""
    theirs, ours = reference("bytes", CHATML, "<|im_end|>"), opened("bytes", CHATML, "<|im_end|>")
    end = theirs.eos_token_id
    assert theirs.pad_token_id == end
    made = _one(ours, ("user", "one"), ("assistant", "two"))
    wrong = DataCollatorForLanguageModeling(theirs, mlm=False, pad_to_multiple_of=8)([{"input_ids": made.ids.tolist()}])
    assert (wrong["labels"] != NO_TARGET).any() and end not in wrong["labels"]

    weights = _weights(made)
    plan = make_plan(["t"], [len(made.ids)], weights=[weights[1:].sum()], batch=BatchSpec(examples_per_step=1, pack="none"))
    batch = Batches.of(plan, [made])[0]
    learned = batch.targets[batch.weights > 0]
    assert learned.tolist() == made.ids[weights > 0].tolist() and learned[-1] == end
    assert batch.inputs.size > len(made.ids) and not batch.weights[batch.segments == 0].any()


def test_trl_3927_truncation_takes_every_answer_and_the_run_goes_on(tmp_path: Path) -> None:
    """Kills cutting at `max_tokens` after the check for answers: nothing is left to train, and nobody is told."""
    tokenizer = _smollm2()
    turns = (("user", "hello"), ("assistant", "world"))  # short; the template's own system text is what takes the room
    made = _one(tokenizer, *turns)
    limit = int(np.flatnonzero(_weights(made))[0])
    assert limit >= 16 and not _weights(made)[:limit].any(), "cut there, the example is all context"
    refused = _one(tokenizer, *turns, max_tokens=limit)
    assert isinstance(refused, Refusal) and refused.reason == "overlong"
    assert f"{len(made.ids)} tokens" in str(refused) and str(limit) in str(refused)
    assert isinstance(_one(tokenizer, *turns, max_tokens=limit, overlong="truncate"), Refusal), "no exchange fits"

    file = load_recipe(write_small(tmp_path), overrides=["render.max_tokens=8"])
    with pytest.raises(PlanError, match=r"no task has a training record.*overlong"):
        run(file, store=tmp_path / "store", runs=tmp_path / "runs", until="plan")


GENERATION = CHATML.replace(
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}",
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}",
)


@pytest.mark.parametrize("style", sorted(MARKED))
def test_trl_4879_a_template_without_the_generation_keyword_masks_everything(style: str) -> None:
    """Kills relying on `{% generation %}`: most published templates lack it, and the mask comes back empty."""
    template, eos = MARKED[style]
    chat = talk(("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))
    wrong = _their_mask("bytes", template, eos, chat.messages())
    made = _one(opened("bytes", template, eos), *chat.turns)
    assert len(wrong) == len(made.ids) and not any(wrong)
    learned = made.ids[_weights(made) > 0]
    assert re.fullmatch(r"two\s*(<.*?>)\s*four\s*\1", _read(opened("bytes", template, eos), learned).strip())


def test_trl_4879_where_the_keyword_stands_we_train_the_same_tokens() -> None:
    """Kills a provenance that disagrees with the marks of an author who did set them."""
    chat = talk(("system", "be brief"), ("user", "one"), ("assistant", "hi\n\nhill"), ("user", "é"), ("assistant", "four"))
    marked = _their_mask("bytes", GENERATION, "<|im_end|>", chat.messages())
    made = _one(opened("bytes", GENERATION, "<|im_end|>"), *chat.turns)
    assert any(marked) and (_weights(made) > 0).astype(int).tolist() == marked


def _their_mask(kind: str, template: str, eos: str, messages: list[dict[str, object]]) -> list[int]:
    tokenizer = reference(kind, template, eos)
    made = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    return list(made["assistant_masks"])


def test_trl_6668_a_batch_without_a_target_reports_loss_zero(tmp_path: Path) -> None:
    """Kills a mean over nothing that is printed as 0.0, and a run that reaches the trainer with nothing to learn."""
    masked = cross_entropy(torch.zeros(4, 3), torch.full((4,), NO_TARGET), ignore_index=NO_TARGET)
    assert torch.isnan(masked) and torch.nan_to_num(masked) == 0.0, "the wrong program prints this"
    assert math.isnan(Tally().mean)

    file = load_recipe(write_small(tmp_path), overrides=["loss={weights: {reasoning: 1}}"])
    with pytest.raises(PlanError, match="no task has a training record"):
        run(file, store=tmp_path / "store", runs=tmp_path / "runs", until="plan")


def test_trl_6668_records_without_a_target_are_set_aside_by_name(tmp_path: Path) -> None:
    """Kills keeping records that no target is left of: each dilutes its batch without a word."""
    recipe = write_small(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "words.jsonl").read_text().splitlines()]
    for line in lines[::5]:
        for message in line["messages"]:
            message["weight"] = 0
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run(load_recipe(recipe), store=tmp_path / "store", runs=tmp_path / "runs", until="plan")
    dropped = read_dropped(done.artefacts["plan"].file("dropped.parquet"))
    fates = {d.row: d.reason for d in dropped if d.source == "words"}
    marked = {row for row in range(0, len(lines), 5) if fates[row] != "held_out"}
    assert marked and {row for row, fate in fates.items() if fate == "no_loss_weight"} == marked


@pytest.mark.parametrize(
    ("kind", "style", "marker", "answer"),
    [
        ("pieces", "mistral", "[/INST]", "hi"),  # encoded alone it begins with the space that SentencePiece puts in front
        ("bytes", "chatml", "<|im_start|>assistant\n", "\nhi"),  # two line ends are one token
    ],
)
def test_unsloth_1290_the_response_marker_is_not_found(kind: str, style: str, marker: str, answer: str) -> None:
    """Kills looking for the ids of a marker that was encoded by itself: in its place it has other ids, and all is masked."""
    template, eos = MARKED[style]
    tokenizer = opened(kind, template, eos)
    made = _one(tokenizer, ("user", "what"), ("assistant", answer))
    assert marker in tokenizer.backend.decode(made.ids.tolist(), skip_special_tokens=False)
    assert not len(_after_marker(tokenizer, made.ids, marker))
    assert _trained(tokenizer, made).strip() == f"{answer.strip()}{eos}"


def test_unsloth_1290_on_a_real_tokenizer() -> None:
    """Kills the same on SmolLM2, whose vocabulary has runs of line ends: an answer that opens with them hides its header."""
    tokenizer = _smollm2()
    plain, airy = (_one(tokenizer, ("user", "Capital of France?"), ("assistant", text)) for text in ("Paris.", "\n\nParis."))
    found = [_read(tokenizer, _after_marker(tokenizer, made.ids, "<|im_start|>assistant\n")) for made in (plain, airy)]
    assert found == ["Paris.<|im_end|>\n", ""]
    assert _trained(tokenizer, plain) == "Paris.<|im_end|>" and _trained(tokenizer, airy).lstrip() == "Paris.<|im_end|>"


def test_unsloth_1290_a_message_that_spells_the_marker_is_not_an_answer() -> None:
    """Kills the same search where it does find something: a user who quotes the marker gets his own words trained."""
    template, eos = MARKED["mistral"]
    tokenizer = opened("bytes", template, eos)
    made = _one(tokenizer, ("user", "what does [/INST] mean?"), ("assistant", "hi"))
    assert "mean?" in _read(tokenizer, _after_marker(tokenizer, made.ids, "[/INST]"))
    assert _trained(tokenizer, made) == f"hi{eos}"


LONG = (
    ("system", "Answer with a number."),
    ("user", "First, an easy one: 2 + 2?"),
    ("assistant", "2 + 2 = 4, so the answer is 4."),
    ("user", "A train leaves at 9 and arrives at 11. Another takes twice as long. How long does that one take?"),
    ("assistant", "The first takes 11 - 9 = 2 hours, and twice 2 is 4, so the answer is 4 hours."),
)


def _cut_in_proportion(source: np.ndarray, target: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The wrong program: both sides keep their first tokens, in proportion to their lengths."""
    kept = limit * len(target) // (len(source) + len(target))
    return source[: limit - kept], target[:kept]


def test_llamafactory_3995_long_examples_are_trimmed_instead_of_dropped() -> None:
    """Kills trimming tokens: the question loses its end, the answer its result and its stop, and training goes on."""
    tokenizer = _smollm2()
    made = _one(tokenizer, *LONG)
    begin = int(np.flatnonzero(_weights(made) * (made.turns == 4))[0])
    source, target = _cut_in_proportion(made.ids[:begin], made.ids[begin:], limit := len(made.ids) * 3 // 4)
    assert len(source) + len(target) <= limit
    assert not _read(tokenizer, source).rstrip().endswith("<|im_start|>assistant") and "4 hours" not in _read(tokenizer, target)
    assert made.ids[-2] not in target, "the stop is gone as well"

    dropped = _one(tokenizer, *LONG, max_tokens=limit)
    assert isinstance(dropped, Refusal) and dropped.reason == "overlong"
    with pytest.raises(DataError, match=r"s/f\.jsonl:1: .* tokens"):
        _one(tokenizer, *LONG, max_tokens=limit, overlong="error")
    short = _one(tokenizer, *LONG, max_tokens=limit, overlong="truncate")
    assert _trained(tokenizer, short) == f"{LONG[4][1]}<|im_end|>"
    assert [_read(tokenizer, short.ids[short.turns == turn]) for turn in range(4)] == [LONG[0][1], "", "", LONG[3][1]]


def test_llamafactory_3995_a_run_lists_what_was_too_long(tmp_path: Path) -> None:
    """Kills an example that is shortened or lost without a line in the account."""
    recipe = write_small(tmp_path)
    with (tmp_path / "sums.jsonl").open("a") as file:
        file.write(json.dumps({"question": "Add these. " + "1 + " * 200 + "1", "answer": "201"}) + "\n")
    done = run(load_recipe(recipe), store=tmp_path / "store", runs=tmp_path / "runs", until="plan")
    listed = read_dropped(done.artefacts["plan"].file("dropped.parquet"))
    (long,) = [d for d in listed if d.reason == "overlong"]
    assert (long.source, long.row) == ("sums", 60) and "`render.max_tokens` is 256" in long.detail


CHAT_RECIPE = """\
name: chats
model: {name: model}
sources:
  chats: {path: chats.jsonl, task: chat, licence: MIT}
split: {held_out_share: 0}
batch: {slots_per_step: 2048, capacity: 1024}
"""


@dataclass(frozen=True)
class Prepared:
    """What a run made of one conversation: its examples in order of `part`, and what each trains, from its batches."""

    examples: list[Rendered]
    texts: list[str]
    trained: list[str]


def _prepare(folder: Path, conversation: Conversation, *overrides: str, template: str = THINKING) -> Prepared:
    """A run up to its plan, on a tokenizer with one id per character; `overrides` as on the command line."""
    folder.mkdir()
    save_tiny(folder / "model")
    tokenizer = toy_tokenizer(template)
    tokenizer.save_pretrained(folder / "model")
    (folder / "chats.jsonl").write_text(json.dumps({"messages": conversation.messages()}) + "\n")
    (folder / "chats.yaml").write_text(CHAT_RECIPE.replace("model}", f"{folder / 'model'}}}"))
    file = load_recipe(folder / "chats.yaml", overrides=["render.max_tokens=1024", *overrides])
    done = run(file, store=folder / "store", runs=folder / "runs", until="plan")
    render, plan = (done.artefacts[label].path for label in ("render chats", "plan"))
    rendered = RenderedSet(render)
    parts = rendered.examples["part"].to_pylist()
    assert rendered.examples["row"].to_pylist() == [0] * len(parts) and parts == list(range(len(parts)))
    planned = read_table(plan / "planned.parquet", PLANNED)["part"].to_pylist()
    trained = [""] * len(parts)
    for batch in Batches(plan, Shards({("chats", "render"): render})):
        for document in batch.documents:
            place = (document.row, slice(document.start, document.start + document.length))
            learned = batch.targets[place][batch.weights[place] > 0]
            trained[planned[document.example]] += tokenizer.decode(learned.tolist())
    examples = [rendered[i] for i in range(len(parts))]
    return Prepared(examples, [tokenizer.decode(made.ids.tolist()) for made in examples], trained)


THOUGHTFUL = (
    ("user", "2 + 2?"),
    Turn("assistant", "4.", reasoning="two and two"),
    ("user", "And 3 + 3?"),
    Turn("assistant", "6.", reasoning="three and three"),
    ("user", "Thanks."),
    Turn("assistant", "Gladly.", reasoning="be polite"),
)


def test_llamafactory_8634_messages_encoded_one_by_one_are_not_what_the_template_writes() -> None:
    """Kills encoding each message by itself: what a template does by position (earlier reasoning goes) is lost."""
    tokenizer, theirs = opened("bytes", THINKING, "<|im_end|>"), reference("bytes", THINKING, "<|im_end|>")
    messages = talk(*THOUGHTFUL).messages()
    wrong = "".join(theirs.apply_chat_template([message], tokenize=False) for message in messages)
    made = _one(tokenizer, *THOUGHTFUL)
    assert "two and two" in wrong and "two and two" not in _read(tokenizer, made.ids)
    assert made.ids.tolist() == theirs.apply_chat_template(messages, return_dict=False)
    assert "be polite" in _trained(tokenizer, made)


def test_llamafactory_8634_expanded_every_turn_is_trained_as_inference_shows_it(tmp_path: Path) -> None:
    """Kills training earlier answers without the reasoning that the template took away, and any answer twice."""
    chat, theirs = talk(*THOUGHTFUL), toy_tokenizer(THINKING)
    learned = [f"<think>\n{turn.reasoning}\n</think>\n\n{turn.content}<|im_end|>" for turn in chat.turns[1::2]]
    (wrong,) = _prepare(tmp_path / "as_template", chat).trained
    assert wrong == "4.<|im_end|>6.<|im_end|>" + learned[2], "two answers are trained as if nobody had to think"
    made = _prepare(tmp_path / "expand", chat, "render.history=expand")
    assert made.trained == learned
    messages = chat.messages()
    ends = (2, 4, 6)
    assert [m.ids.tolist() for m in made.examples] == [theirs.apply_chat_template(messages[:n], return_dict=False) for n in ends]


def test_ms_swift_9829_histories_hold_thinking_blocks_that_inference_leaves_out(tmp_path: Path) -> None:
    """Kills an empty thinking block in every turn of one example: at inference the history has none."""
    chat, theirs = talk(*((turn.role, turn.content) for turn in talk(*THOUGHTFUL).turns)), toy_tokenizer(THINKING)
    messages, block = chat.messages(), "<think>\n\n</think>\n\n"
    prompts = [theirs.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=True) for n in (1, 3, 5)]
    wrong = "".join(theirs.apply_chat_template([message], tokenize=False) for message in messages)
    assert wrong.count(block) == 3 and not wrong.startswith(prompts[2])

    made = _prepare(tmp_path / "expand", chat, "render.history=expand")
    assert [text.startswith(prompt) for text, prompt in zip(made.texts, prompts, strict=True)] == [True] * 3
    assert [text.count(block) for text in made.texts] == [1, 1, 1] and block not in "".join(prompts)
    answers = [trained.removeprefix(block) for trained in made.trained]
    assert answers == ["4.<|im_end|>", "6.<|im_end|>", "Gladly.<|im_end|>"], "each answer once, in its own example"


def test_ms_swift_9829_only_the_last_turn_where_the_recipe_says_so(tmp_path: Path) -> None:
    """Kills a loss on earlier answers, whose reasoning the template took away, when the last turn alone is asked for."""
    chat = talk(*THOUGHTFUL)
    (every,) = _prepare(tmp_path / "every", chat).trained
    (last,) = _prepare(tmp_path / "last", chat, "loss={kind: response, turns: last}").trained
    assert every == "4.<|im_end|>6.<|im_end|>" + last
    assert last == "<think>\nbe polite\n</think>\n\nGladly.<|im_end|>"


@pytest.mark.parametrize("limit", [88, 120, 200, 260])
def test_llamafactory_3995_windows_never_train_a_tail_without_its_beginning(tmp_path: Path, limit: int) -> None:
    """Kills cutting at every `max_tokens` tokens: a window then opens in the middle of an answer and trains its tail."""
    chat = talk(*LONG[1:], ("user", "Sure?"), ("assistant", "Yes."), ("user", "Why?"), ("assistant", "Twice 2 is 4."))
    answers = {i: f"{turn.content}<|im_end|>" for i, turn in enumerate(chat.turns) if turn.role == "assistant"}
    (whole,) = _prepare(tmp_path / "whole", chat, template=CHATML).examples
    weights = _weights(whole)
    tails = [at for at in range(limit, len(whole.ids), limit) if weights[at] > 0 and weights[at - 1] > 0]
    assert tails, "blocks of this size open inside an answer"

    made = _prepare(tmp_path / "split", chat, f"render.max_tokens={limit}", "render.overlong=split", template=CHATML)
    assert len(made.examples) > 1 and all(len(example.ids) <= limit for example in made.examples)
    pieces = [_pieces(example) for example in made.examples]
    assert all(answers[turn].startswith(text) for window in pieces for turn, text in window.items()), "no tail by itself"
    once = Counter(turn for window in pieces for turn in window)
    assert max(once.values()) == 1, "no answer twice"
    whole_ones = {turn for window in pieces for turn, text in window.items() if text == answers[turn]}
    assert whole_ones >= {1, 5, 7} | ({3} if limit >= 200 else set()), "what fits beside its question is trained whole"
    assert made.trained == ["".join(window.values()) for window in pieces], "and the batches train that"


def _pieces(example: Rendered) -> dict[int, str]:
    """What an example of the character tokenizer trains, by turn."""
    weights = _weights(example)
    turns = np.unique(example.turns[weights > 0]).tolist()
    return {turn: toy_tokenizer().decode(example.ids[(example.turns == turn) & (weights > 0)].tolist()) for turn in turns}


def test_every_fault_on_the_page_names_its_guard_and_every_guard_is_on_the_page() -> None:
    """Kills a page that promises a test which was renamed or removed, and a guard that nobody can find."""
    page = (DOCS / "faults.md").read_text()
    named = re.findall(r"`(test_\w+)`", page)
    files = (Path(__file__), Path(__file__).parents[1] / "plan/test_mixing_faults.py")
    guards = [name for file in files for name in re.findall(r"^def (test_(?!every_fault)\w+)", file.read_text(), re.MULTILINE)]
    assert sorted(named) == sorted(guards)
    story = page.split("## Waiting")[0]
    assert story.count("\n**") == story.count("Guard: ") + story.count("Guards: ")
