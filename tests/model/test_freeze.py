"""Weights left out of training by pattern."""

from __future__ import annotations

import pytest

from toy import tiny_llama
from tutelage.errors import ModelError
from tutelage.model.freeze import count_weights, freeze
from tutelage.model.patterns import matches
from tutelage.model.spec import Full, ModelSpec


def trained(model: object) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}  # type: ignore[attr-defined]


def test_what_a_pattern_covers_is_frozen_and_nothing_else() -> None:
    """Kills a prefix match (`layers.1` freezes 10 too) and a substring match (`norm` freezes `layernorm`)."""
    model = tiny_llama(tied=False)
    before = trained(model)
    num = freeze(model, ["embed_tokens", "layers.0.mlp.*", "norm"])
    gone = before - trained(model)
    assert gone == {
        "model.embed_tokens.weight", "model.norm.weight",
        *(f"model.layers.0.mlp.{part}_proj.weight" for part in ("up", "down", "gate")),
    }  # fmt: skip
    assert num == sum(weight.numel() for name, weight in model.named_parameters() if name in gone)
    assert count_weights(model) == (sum(p.numel() for p in model.parameters()) - num, sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_tied_weight_is_frozen_by_either_of_its_names(name: str) -> None:
    """Kills a head that is called frozen while its twin is trained."""
    model = tiny_llama(tied=True)
    freeze(model, [name])
    assert not model.get_output_embeddings().weight.requires_grad and not model.get_input_embeddings().weight.requires_grad


def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_name() -> None:
    """Kills a misspelt pattern that freezes nothing."""
    with pytest.raises(ModelError, match=r"model\.freeze\.1: 'embed_token' matches no weight; did you mean `embed_tokens`"):
        freeze(tiny_llama(), ["norm", "embed_token"])


def test_nothing_left_to_train_is_an_error() -> None:
    """Kills a run that trains nothing."""
    with pytest.raises(ModelError, match="nothing is left to train"):
        freeze(tiny_llama(), ["*"])


def test_freezing_under_an_adapter_is_refused() -> None:
    """Kills a pattern that is read by nobody."""
    assert ModelSpec(adapter=Full(), freeze=["norm"]).freeze == ("norm",)
    with pytest.raises(ValueError, match="`freeze` is for `adapter: full`"):
        ModelSpec(freeze=["norm"])


def test_brackets_and_stars_are_those_of_a_shell() -> None:
    """Kills patterns taken as regular expressions, where `.` is any letter."""
    assert not matches("layers.0", "model.layersx0.weight")
    assert not matches("layers.1", "model.layers.10.weight") and matches("layers.1", "model.layers.1.weight")
    assert matches("layers.[!0]", "model.layers.1.weight") and not matches("layers.[!0]", "model.layers.0.weight")
    assert matches("*proj", "model.q_proj.weight") and not matches("proj*", "model.q_proj.weight")
