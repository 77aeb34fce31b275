from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toy import tiny_llama, tiny_model
from tutelage.errors import ModelError
from tutelage.model.isolation import logits_of
from tutelage.model.loss import LossOptions, head_of, hidden_states, plain_weighted_loss, weighted_loss


def make_case(num: int = 11, *, words: int = 7, size: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(num, size, dtype=torch.float64, generator=generator).to(dtype).requires_grad_(),
        "head": torch.randn(words, size, dtype=torch.float64, generator=generator).to(dtype).requires_grad_(),
        "bias": torch.randn(words, dtype=torch.float64, generator=generator).to(dtype).requires_grad_(),
        "targets": torch.randint(0, words, (num,), generator=generator),
        "weights": torch.rand(num, generator=generator) * (torch.rand(num, generator=generator) < 0.6),
    }


def run(function, case: dict, **options) -> tuple:
    given_options = LossOptions(bias=case["bias"], **options)
    loss = function(case["hidden"], case["head"], targets_N=case["targets"], weights_N=case["weights"], options=given_options)
    gradients = torch.autograd.grad(loss.loss_sum * 0.37, [case["hidden"], case["head"], case["bias"]])
    return loss, gradients


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 25), st.sampled_from([None, 1.3]), st.sampled_from([1.0, 0.25]), st.integers(0, 99))
def test_the_chunked_loss_is_the_plain_one(num: int, chunk: int, softcap: float | None, scale: float, seed: int) -> None:
    """Kills: a chunk left out or taken twice, a cap or scale without its derivative, a gradient not scaled by what comes in."""
    case = make_case(num, seed=seed)
    got, got_gradients = run(weighted_loss, case, chunk_rows=chunk, softcap=softcap, scale=scale)
    want, want_gradients = run(plain_weighted_loss, case, softcap=softcap, scale=scale)
    torch.testing.assert_close(got.loss_sum, want.loss_sum)
    torch.testing.assert_close(got.nll_N, want.nll_N)
    torch.testing.assert_close(got.weight_sum, want.weight_sum)
    for mine, reference in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_agree_with_finite_differences(softcap: float | None) -> None:
    """Kills: a gradient that agrees with the plain version because both are wrong."""
    case = make_case(6)

    def loss_sum(hidden, head, bias):
        options = LossOptions(chunk_rows=2, bias=bias, softcap=softcap, scale=0.5)
        return weighted_loss(hidden, head, targets_N=case["targets"], weights_N=case["weights"], options=options).loss_sum

    assert torch.autograd.gradcheck(loss_sum, (case["hidden"], case["head"], case["bias"]))


def test_weight_one_counts_and_weight_zero_does_not() -> None:
    """Kills: the other polarity, where 1 means "leave out"."""
    hidden = torch.tensor([[5.0, 0.0], [0.0, 5.0]], requires_grad=True)
    head = torch.eye(2)
    loss = weighted_loss(hidden, head, targets_N=torch.tensor([0, 0]), weights_N=torch.tensor([1.0, 0.0]))
    assert loss.loss_sum.item() == pytest.approx(math.log(1 + math.exp(-5)), rel=1e-4)
    assert loss.nll_N[1] == 0 and loss.weight_sum == 1
    loss.loss_sum.backward()
    assert hidden.grad[0].abs().sum() > 0 and hidden.grad[1].abs().sum() == 0


def test_what_stands_at_weight_zero_never_matters() -> None:
    """Kills: multiplying by 0 instead of leaving out (0 * nan is nan), and -100 targets that are looked up."""
    case = make_case(5)
    case["weights"] = torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0])
    clean, _ = run(weighted_loss, case)
    with torch.no_grad():
        case["hidden"][1] = float("nan")
    case["targets"][3] = -100
    dirty, gradients = run(weighted_loss, case)
    assert torch.equal(clean.loss_sum, dirty.loss_sum)
    assert gradients[0][1].abs().sum() == 0 and gradients[1].isfinite().all()


def test_no_supervised_position_is_a_loss_of_zero_with_a_gradient() -> None:
    """Kills: a micro-batch of padding that raises, or has no graph, and so leaves one rank out of step."""
    case = make_case(3)
    case["weights"] = torch.zeros(3)
    loss, gradients = run(weighted_loss, case)
    assert loss.loss_sum == 0 and loss.weight_sum == 0
    assert all(g.abs().sum() == 0 for g in gradients)


def test_one_loss_for_one_batch_or_two_halves() -> None:
    """Kills: a mean inside: 10 tokens at loss 2 and 90 at loss 1 are 1.10 together, not 1.50."""
    case = make_case(10)
    whole, _ = run(weighted_loss, case)
    parts = [
        weighted_loss(
            case["hidden"][rows],
            case["head"],
            targets_N=case["targets"][rows],
            weights_N=case["weights"][rows],
            options=LossOptions(bias=case["bias"]),
        )
        for rows in (slice(0, 2), slice(2, 10))
    ]
    torch.testing.assert_close(whole.loss_sum, parts[0].loss_sum + parts[1].loss_sum)
    torch.testing.assert_close(whole.weight_sum, parts[0].weight_sum + parts[1].weight_sum)


def test_bfloat16_losses_are_summed_in_float32() -> None:
    """Kills: a bfloat16 sum, which stops growing at 256 when each position adds 1; and head gradients that stop likewise."""
    hidden = torch.zeros(3000, 2, dtype=torch.bfloat16).add_(1).requires_grad_()
    head = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    options = LossOptions(chunk_rows=4)
    loss = weighted_loss(hidden, head, targets_N=torch.zeros(3000).long(), weights_N=torch.ones(3000), options=options)
    assert loss.loss_sum.dtype == loss.nll_N.dtype == torch.float32
    assert loss.loss_sum.item() == pytest.approx(3000 * math.log(3), rel=1e-5)
    loss.loss_sum.backward()
    assert head.grad.dtype == torch.bfloat16
    assert head.grad[0, 0].item() == pytest.approx(-2000, rel=0.01)


def test_without_gradients_the_loss_is_the_same_and_keeps_nothing() -> None:
    """Kills: an evaluation that pays for gradients, or differs from training."""
    case = make_case(9)
    with torch.no_grad():
        quiet = weighted_loss(case["hidden"], case["head"], targets_N=case["targets"], weights_N=case["weights"])
    loud = weighted_loss(case["hidden"], case["head"], targets_N=case["targets"], weights_N=case["weights"])
    assert torch.equal(quiet.loss_sum, loud.loss_sum)
    assert not quiet.loss_sum.requires_grad and loud.loss_sum.requires_grad and not loud.nll_N.requires_grad


def test_full_logits_are_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a chunked loss that makes all logits first and cuts them afterwards."""
    sizes = []
    real = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *rest: sizes.append(len(x)) or real(x, *rest))
    case = make_case(40)
    case["weights"] = (torch.arange(40) % 2).double()
    run(weighted_loss, case, chunk_rows=6)
    assert sizes == [6, 6, 6, 2], "20 supervised positions of 40, six at a time"


@pytest.mark.parametrize("wrong", ["negative", "nan", "target", "shape", "int32"])
def test_what_means_nothing_is_refused(wrong: str) -> None:
    """Kills: a negative weight that is left out quietly, a target that reads beyond the vocabulary."""
    case = make_case(4)
    case["weights"] = torch.ones(4)
    match wrong:
        case "negative":
            case["weights"][1] = -1
        case "nan":
            case["weights"][1] = float("nan")
        case "target":
            case["targets"][1] = 7
        case "shape":
            case["targets"] = case["targets"][:3]
        case "int32":
            case["targets"] = case["targets"].int()
    with pytest.raises(ModelError):
        run(weighted_loss, case)


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_of_a_model_is_transformers_own(tied: bool) -> None:
    """Kills: hidden states before the final norm, a head of the wrong matrix, half of the gradient of a tied matrix."""
    model = tiny_llama(tied=tied)
    ids = torch.tensor([[7, 3, 9, 1, 4, 4, 8]])
    model(ids, labels=ids).loss.mul(6).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    head = head_of(model)
    loss = weighted_loss(
        hidden_states(model, ids, lengths=[7])[:-1],
        head.weight,
        targets_N=ids[0, 1:],
        weights_N=torch.ones(6),
        options=head.options(),
    )
    loss.loss_sum.backward()
    assert ("lm_head.weight" in want) is not tied
    for name, parameter in model.named_parameters():
        # transformers computes its own loss in float32, whatever the model's dtype.
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox", "qwen3"])
def test_head_of_knows_what_the_model_does_to_its_logits(kind: str) -> None:
    """Kills: Gemma 2 without its final soft cap."""
    model = tiny_model(kind)
    ids = torch.arange(9)[None]
    torch.testing.assert_close(logits_of(hidden_states(model, ids), head_of(model)), model(ids).logits[0])


@pytest.mark.parametrize(("key", "value", "scale"), [("logit_scale", 0.0625, 0.0625), ("logits_scaling", 8.0, 0.125)])
def test_scaled_heads_are_known_by_their_configuration(key: str, value: float, scale: float) -> None:
    """Kills: Granite multiplied where it divides."""
    model = tiny_llama()
    setattr(model.config, key, value)
    assert head_of(model).scale == scale
