from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tutelage.errors import ModelError
from tutelage.model.bundled import write_bundled
from tutelage.model.generate import generate
from tutelage.model.isolation import require_isolation
from tutelage.model.load import load_model
from tutelage.model.names import describe, materialise, resolve

pytestmark = pytest.mark.model

SAMPLE = "In 2024,  don't\n\tübër 日本<|im_end|>"
# The ids that the published tokenizer of this model gives. To make them again, with a connection:
#   AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")(SAMPLE).input_ids
SAMPLE_IDS = [788, 216, 34, 32, 34, 36, 28, 216, 1326, 982, 198, 197, 7170, 82, 26547, 98, 17097, 241, 115, 40993, 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        resolved = resolve("bundled:smollm2-135m")
    except ModelError as error:
        pytest.skip(str(error))
    return materialise(resolved, tmp_path_factory.mktemp("bundled") / "model")


def test_the_bundled_model_is_a_plain_folder_that_answers_and_stops(folder: Path) -> None:
    """Kills: rotated rows, a lost norm or a wrong template: any of them leaves text that is no answer."""
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert plain.dtype == torch.float32 and not hasattr(plain.config, "quantization_config")
    model, tokenizer = load_model(folder), AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True)["input_ids"]
    torch.testing.assert_close(model(torch.tensor([prompt])).logits, plain(torch.tensor([prompt])).logits)
    answer = generate(model, tokenizer, [prompt], max_new_tokens=24, stop_ids=describe(folder).end_ids)[0]
    assert "Paris" in answer.text and answer.ended
    assert require_isolation(model) < 0.1, "rounding on odd text; contaminated it is 25"


def test_the_bundled_tokenizer_is_the_published_one(folder: Path) -> None:
    """Kills: numbers read as one token (this tokenizer splits digits), bytes beyond ASCII, the end token as padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(SAMPLE).input_ids == SAMPLE_IDS
    assert tokenizer.decode(SAMPLE_IDS) == SAMPLE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert describe(folder).end_ids == (2,)


@pytest.mark.slow
def test_writing_it_twice_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """Kills: a store key that changes with the day the model was written."""
    write_bundled(tmp_path, resolve("bundled:smollm2-135m").path)
    for path in folder.iterdir():
        digests = [hashlib.sha256((where / path.name).read_bytes()).hexdigest() for where in (folder, tmp_path)]
        assert digests[0] == digests[1], path.name
