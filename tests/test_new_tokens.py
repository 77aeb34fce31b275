"""A template whose tokens the tokenizer lacks, from the recipe to a folder that plain peft loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from small_recipe import write_small
from toy import VOCAB_SIZE
from tutelage import explain, load_recipe, run
from tutelage.errors import ModelError

TEMPLATE = (
    "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' + m['content'] + '<|done|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
TURN, DONE = VOCAB_SIZE, VOCAB_SIZE + 1
OVERRIDES = ["render.template=turns.jinja", 'model.new_tokens=["<|turn|>", "<|done|>"]', "evaluate.samples=0"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft calls it
def test_new_tokens_reach_rendering_training_and_the_saved_model(tmp_path: Path) -> None:
    """Kills tokens that are rendered letter by letter, and rows that are missing from what is saved."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = write_small(tmp_path, num_records=30)
    (tmp_path / "turns.jinja").write_text(TEMPLATE)
    plain = {status.label: status.key for status in explain(load_recipe(recipe), store=tmp_path / "store")}
    file = load_recipe(recipe, overrides=OVERRIDES)
    done = run(file, until="eval", store=tmp_path / "store", runs=tmp_path / "runs")
    changed = {status.label for status in explain(file, store=tmp_path / "store") if plain[status.label] != status.key}
    assert {"model", "tokenizer", "render sums", "train"} <= changed and "read sums" not in changed
    assert done.artefacts["model"].facts["new_token_ids"] == [TURN, DONE]
    assert DONE in done.artefacts["train"].facts["stop_ids"]
    assert done.artefacts["measure after"].facts["loss"] < done.artefacts["measure before"].facts["loss"]

    model, ids = tmp_path / "runs" / "small" / "model", torch.tensor([[TURN, 65, DONE, TURN, 66]])
    assert json.loads((model / "generation_config.json").read_text())["eos_token_id"][-1] == DONE
    assert AutoTokenizer.from_pretrained(model)("<|turn|>A").input_ids == [TURN, 65]
    tuned = AutoPeftModelForCausalLM.from_pretrained(model)
    start = AutoModelForCausalLM.from_pretrained(done.artefacts["model"].path)
    rows = [start.get_input_embeddings().weight, tuned.get_base_model().get_input_embeddings().weight]
    moved = (rows[0] - rows[1]).abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == [TURN, DONE]
    assert (tuned(ids).logits - start(ids).logits).abs().max() > 1e-3


def test_a_token_that_the_tokenizer_has_stops_the_run_at_once(tmp_path: Path) -> None:
    """Kills a trained token that is started anew."""
    file = load_recipe(write_small(tmp_path), overrides=['model.new_tokens=["<|im_start|>"]'])
    with pytest.raises(ModelError, match=r"model\.new_tokens\.0"):
        run(file, until="render", store=tmp_path / "store", runs=tmp_path / "runs")
