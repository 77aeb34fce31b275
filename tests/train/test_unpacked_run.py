"""A state-space model from a recipe to its folder: unpacked it trains, packed it is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from small_recipe import write_small
from toy import save_tiny
from tutelage import tables
from tutelage.errors import ModelError
from tutelage.pipeline import run
from tutelage.recipe import load_recipe
from tutelage.store import Silent

SMALL = ["mix.epochs=3", "evaluate.samples=1", "evaluate.max_new_tokens=2", "evaluate.every_steps=99", "render.max_tokens=96"]
UNPACKED = [*SMALL, "batch={pack: none, examples_per_step: 6}"]


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mamba")
    save_tiny(folder / "model", kind="mamba")
    return write_small(folder, num_records=8)


def test_a_state_space_model_trains_one_document_per_row(mamba: Path, tmp_path: Path) -> None:
    """Kills: a model room, a loop, a measurement or a sampler that only attention survives."""
    from transformers import AutoModelForCausalLM

    notes = Notes()
    recipe = load_recipe(mamba, overrides=[*UNPACKED, "model.adapter=full", "train.learning_rate=1e-2"])
    done = run(recipe, store=tmp_path / "store", runs=tmp_path / "runs", until="train", progress=notes)
    assert any("one document per row, padded on the right: MambaForCausalLM does not keep" in line for line in notes.lines)
    steps = tables.read_table(done.folder / "steps.parquet", tables.STEPS).to_pylist()
    losses = [row["loss_sum"] / row["weight"] for row in steps if row["part"] == "all"]
    assert len(losses) >= 2
    assert AutoModelForCausalLM.from_pretrained(done.folder / "model").config.model_type == "mamba"
    scores = tables.read_scores(done.folder / "evals.parquet")
    looks = {s.step: s.value for s in scores if s.metric == "nll" and not s.item and not s.task}
    assert looks.keys() == {0, len(losses)} and looks[len(losses)] < looks[0] - 0.1


def test_packing_is_refused_for_it_with_the_reason_and_the_remedy(mamba: Path, tmp_path: Path) -> None:
    """Kills: packed rows that are silently run as something else."""
    recipe = load_recipe(mamba, overrides=[*SMALL, "batch.slots_per_step=192"])
    with pytest.raises(ModelError, match=r"MambaForCausalLM does not keep packed documents apart.*set `batch\.pack: none`"):
        run(recipe, store=tmp_path / "store", runs=tmp_path / "runs", until="train")
