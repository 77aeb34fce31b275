"""DFT, NEFTune and the pull to the start through whole steps: the same for every cut, reported, and gone on with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from tiny_training import make_batch, make_docs, run_tiny, trained_weights
from toy import tiny_llama, tiny_model
from tutelage import tables
from tutelage.model import Learner, add_adapter
from tutelage.model.objective import KlRule, Objective
from tutelage.model.spec import Lora
from tutelage.records import NO_TARGET, Batch, Kind
from tutelage.train.objective import Aim, objective_of
from tutelage.train.spec import Kl, TokenKind, TrainSpec
from tutelage.train.step import step_gradients

DOCS = make_docs(8, seed=4)
EVERYTHING = Objective("dft", neftune_alpha=5.0, seed=3, kl=KlRule(0.5, "reverse", (int(Kind.USER), int(Kind.ASSISTANT))))


def packed() -> Batch:
    """Four rows of two documents."""
    return make_batch([DOCS[i : i + 2] for i in range(0, 8, 2)])


def padded() -> Batch:
    """The same documents, one per row, the other way round."""
    return make_batch([[doc] for doc in DOCS[::-1]], capacity=16)


def moved(model: Any) -> Any:
    """The model away from where it is, so that there is a distance to the start."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.linspace(-0.1, 0.1, p.numel()).view_as(p))
    return model


def learner_with(objective: Objective, *, adapter: bool, kind: str = "llama") -> Learner:
    """A learner some way from its start, in training mode."""
    model = tiny_model(kind)
    learner = Learner(add_adapter(model, Lora(rank=4, alpha=8.0), seed=1) if adapter else model, objective)
    moved(learner.model)
    learner.train()
    return learner


def gradients(learner: Learner, batch: Batch, rows: int | None = None) -> tuple[dict[str, torch.Tensor], Any]:
    learner.zero_grad()
    flat, _ = step_gradients(learner, batch, micro_batch_rows=rows)
    return {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}, flat.aimed


@pytest.mark.parametrize("adapter", [True, False])
def test_every_cut_and_layout_gives_one_gradient_with_everything_on(adapter: bool) -> None:
    """Kills noise scaled by the row or drawn per pass, a KL averaged per pass, an adapter that is not put back."""
    learner = learner_with(EVERYTHING, adapter=adapter)
    whole, aimed = gradients(learner, packed())
    tolerance = 1e-5 if adapter else 1e-11  # adapters are float32
    for batch, rows in ((packed(), 1), (packed(), 3), (padded(), None), (padded(), 1)):
        found, other = gradients(learner, batch, rows)
        assert found.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)
        assert other.objective == pytest.approx(aimed.objective, rel=1e-6) and other.kl == pytest.approx(aimed.kl, rel=1e-6)


@pytest.mark.parametrize("kinds", [None, (int(Kind.USER),)])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_pull_through_a_step_is_the_formula(kinds: tuple[int, ...] | None, direction: str) -> None:
    """Kills KL divided by another number than W, chosen places without weight left out, a direction swapped on the way."""
    learner = learner_with(Objective(kl=KlRule(0.5, direction, kinds)), adapter=False)
    start, total, chosen, pull, nll = tiny_llama(), 0.0, 0, torch.zeros((), dtype=torch.float64), 0.0
    for doc in DOCS:
        ids = torch.tensor(doc.ids)[None]
        log_p = learner.model(ids, use_cache=False).logits[0].log_softmax(-1)
        log_q = start(ids, use_cache=False).logits[0].log_softmax(-1).detach()
        one, other = (log_q, log_p) if direction == "forward" else (log_p, log_q)
        kl = (one.exp() * (one - other)).sum(-1)[:-1]
        weights = torch.tensor(doc.weights, dtype=torch.float64)
        # `make_batch` calls targets without weight user's, the others the assistant's.
        places = weights if kinds is None else (weights == 0).double()
        pull, chosen = pull + (places * kl).sum(), chosen + int(places.sum()) if kinds else chosen
        nll = nll - (weights * log_p[torch.arange(len(weights)), ids[0, 1:]]).sum()
        total += float(weights.sum())
    mean_kl = pull / (total if kinds is None else chosen)
    loss = nll / total + 0.5 * mean_kl
    learner.zero_grad()
    loss.backward()
    want = {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}
    found, aimed = gradients(learner, packed(), 2)
    assert aimed.kl == pytest.approx(mean_kl.item(), rel=1e-6) and aimed.objective == pytest.approx(loss.item(), rel=1e-6)
    for name, value in want.items():
        error = (found[name] - value).abs().max() / value.abs().max()
        assert error < 1e-6, f"{name}: weights are float32, the rest float64, found {error:.1e}"


def test_halving_every_weight_changes_nothing_with_a_pull_either() -> None:
    """Kills a pull that counts twice as much where weights are half."""
    learner = learner_with(EVERYTHING, adapter=False)
    halved = [dataclasses.replace(doc, weights=tuple(w / 2 for w in doc.weights)) for doc in DOCS]
    whole, _ = gradients(learner, packed())
    half, _ = gradients(learner, make_batch([halved[i : i + 2] for i in range(0, 8, 2)]))
    for name, value in whole.items():
        torch.testing.assert_close(half[name], value, rtol=1e-6, atol=1e-9, msg=name)


def test_noise_is_of_training_and_of_the_step() -> None:
    """Kills noise in evaluation, and the same noise at every step."""
    learner = learner_with(Objective(neftune_alpha=5.0), adapter=False)
    nll = [step_gradients(learner, dataclasses.replace(packed(), step=step))[1] for step in (0, 0, 1)]
    learner.eval()
    quiet = step_gradients(learner, packed())[1]
    learner.objective = Objective()
    assert np.array_equal(nll[0], nll[1]) and not np.allclose(nll[0], nll[2], atol=1e-4)
    assert np.array_equal(quiet, step_gradients(learner, packed())[1]) and not np.allclose(nll[0], quiet, atol=1e-4)


def test_padding_after_a_document_is_never_pulled() -> None:
    """Kills places without a target: their kind is scaffold, which somebody may choose."""
    flat = step_gradients(tiny_llama(), packed())[0]
    aim = Aim.of(Objective(kl=KlRule(1.0, kinds=(int(Kind.SCAFFOLD),))), flat, step=0, total_weight=2.0)
    pulls = aim.pulls(flat)
    assert aim.num_chosen == 0 and pulls is not None and not pulls[flat.targets == NO_TARGET].any()


ON: dict[str, Any] = {"objective": "dft", "neftune_alpha": 5.0, "kl": Kl(weight=0.5, kinds=("user", "assistant"))}


def test_what_was_minimised_is_written_beside_the_loss(tmp_path: Path) -> None:
    """Kills a log in which runs with and without an objective cannot be compared, and a KL of 0 that never moves."""
    run_tiny(tmp_path / "on", 4, **ON)
    run_tiny(tmp_path / "off", 4)
    run_tiny(tmp_path / "quiet", 4, kl=Kl(weight=0.5))
    on, off, quiet = (
        [line for line in tables.read_table(tmp_path / name / "steps.parquet", tables.STEPS).to_pylist() if line["part"] == "all"]
        for name in ("on", "off", "quiet")
    )
    assert all(line["objective"] is None and line["kl"] is None for line in off)
    assert all(line["objective"] < line["loss_sum"] / line["weight"] for line in on)
    assert on[0]["kl"] > 1e-3, "noise alone moves the model off its start"
    assert abs(quiet[0]["kl"]) < 1e-12 and quiet[-1]["kl"] > 1e-5


def test_a_run_with_everything_on_goes_on_to_the_bit(tmp_path: Path) -> None:
    """Kills noise from a generator that a resume restarts, and a start that is what the checkpoint holds."""

    def interrupt(model: Any, step: int) -> None:
        if step == 3:
            raise InterruptedError

    whole = trained_weights(run_tiny(tmp_path / "whole", 6, **ON)[1])
    with pytest.raises(InterruptedError):
        run_tiny(tmp_path / "parts", 6, measure=interrupt, every_steps=3, **ON)
    parts = trained_weights(run_tiny(tmp_path / "parts", 6, **ON)[1])
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_the_recipe_says_it_and_names_kinds_as_records_do() -> None:
    """Kills a setting that is read and not passed on, and kinds that only one of two lists knows."""
    assert get_args(TokenKind) == tuple(kind.name.lower() for kind in Kind)
    spec = TrainSpec(objective="dft", neftune_alpha=5.0, seed=7, kl=Kl(weight=0.1, direction="reverse", kinds=("stop",)))
    assert objective_of(spec) == Objective("dft", 5.0, 7, KlRule(0.1, "reverse", (int(Kind.STOP),)))
    assert objective_of(TrainSpec()) == Objective() and Objective().is_plain
