"""DFT, the pull to the starting model, and NEFTune's noise, each against what its paper says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from toy import tiny_llama, tiny_model
from tutelage.errors import ModelError
from tutelage.model.chunks import Anchor, Head, LossOptions
from tutelage.model.dropout import set_dropout
from tutelage.model.load import add_adapter
from tutelage.model.loss import counted_rows, hidden_states, plain_weighted_loss, weighted_loss
from tutelage.model.noise import embedding_noise, uniform
from tutelage.model.objective import document_key, mix
from tutelage.model.spec import Lora
from tutelage.model.start import Start

IDS = torch.tensor([7, 3, 9, 1, 4, 4, 8])
PLACES = torch.tensor([0, 1, 2, 3, 0, 1, 2])
LENGTHS = [4, 3]


def make_case(num: int = 9, *, words: int = 7, size: int = 4, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return {
        "hidden": normal(num, size).requires_grad_(),
        "head": normal(words, size).requires_grad_(),
        "start": normal(num, size),
        "start_head": normal(words, size),
        "targets": torch.randint(0, words, (num,), generator=generator),
        "weights": torch.rand(num, generator=generator).double() * (torch.arange(num) % 3 != 0),
        "pulls": torch.rand(num, generator=generator).double() * (torch.arange(num) % 2 == 0),
    }


def anchor_of(case: dict, direction: str, **how: float) -> Anchor:
    return Anchor(case["start"], Head(case["start_head"], **how), case["pulls"], direction)


def by_hand_dft(case: dict) -> torch.Tensor:
    """sum w * sg(p) * -log p, with the full logits."""
    p = (case["hidden"] @ case["head"].T).softmax(-1)[torch.arange(len(case["targets"])), case["targets"]]
    return (case["weights"] * p.detach() * -p.log()).sum()


@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_dft_weighs_each_token_by_its_own_probability(chunk_rows: int | None) -> None:
    """Kills a probability with a gradient of its own (that is -p(1 + log p), another objective), and p of another token."""
    case = make_case()
    given_ = {"targets_N": case["targets"], "weights_N": case["weights"]}
    loss = weighted_loss(case["hidden"], case["head"], **given_, options=LossOptions(chunk_rows=chunk_rows, objective="dft"))
    want = by_hand_dft(case)
    torch.testing.assert_close(loss.loss_sum, want)
    inputs = [case["hidden"], case["head"]]
    for mine, reference in zip(torch.autograd.grad(loss.loss_sum, inputs), torch.autograd.grad(want, inputs), strict=True):
        torch.testing.assert_close(mine, reference)
    nll = weighted_loss(case["hidden"], case["head"], **given_)
    torch.testing.assert_close(loss.nll_N, nll.nll_N)  # the loss that is logged stays the nll


def test_dft_of_an_impossible_token_is_zero_and_its_nll_is_still_told() -> None:
    """Kills 0 * inf: nan in the loss where a word has probability 0."""
    hidden = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    head = torch.tensor([[-5e3], [5e3]], dtype=torch.float64)
    given_ = {"targets_N": torch.tensor([0]), "weights_N": torch.ones(1)}
    loss = weighted_loss(hidden, head, **given_, options=LossOptions(objective="dft"))
    loss.loss_sum.backward()
    assert loss.loss_sum == 0 and loss.nll_N[0] == 1e4 and hidden.grad is not None and hidden.grad[0, 0] == 0
    infinite = weighted_loss(hidden, head * math.inf, **given_, options=LossOptions(objective="dft"))
    assert not infinite.nll_N.isfinite().all()


@given(
    st.integers(1, 12),
    st.integers(1, 13),
    st.sampled_from(["forward", "reverse"]),
    st.sampled_from([None, 1.3]),
    st.sampled_from(["nll", "dft"]),
    st.integers(0, 99),
)
def test_the_chunked_pull_is_the_plain_one(num: int, chunk: int, direction: str, cap: float | None, kind: str, seed: int) -> None:
    """Kills KL the other way round, a slope without its own mean, a cap on one side only, rows that only the pull chose."""
    case = make_case(num, seed=seed)
    given_ = {"targets_N": case["targets"], "weights_N": case["weights"], "anchor": anchor_of(case, direction, softcap=cap)}
    options = LossOptions(chunk_rows=chunk, softcap=cap, scale=0.5, objective=kind)
    got = weighted_loss(case["hidden"], case["head"], **given_, options=options)
    want = plain_weighted_loss(case["hidden"], case["head"], **given_, options=options)
    torch.testing.assert_close(got.loss_sum, want.loss_sum)
    torch.testing.assert_close(got.kl_N, want.kl_N)
    torch.testing.assert_close(got.nll_N, want.nll_N)
    inputs = [case["hidden"], case["head"]]
    mine, theirs = (torch.autograd.grad(loss.loss_sum * 0.7, inputs) for loss in (got, want))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_pull_agrees_with_finite_differences(direction: str) -> None:
    """Kills a slope that agrees with the plain version because both are wrong."""
    case = make_case(5)

    def loss_sum(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        given_ = {"targets_N": case["targets"], "weights_N": case["weights"], "anchor": anchor_of(case, direction)}
        return weighted_loss(hidden, head, **given_, options=LossOptions(chunk_rows=2)).loss_sum

    assert torch.autograd.gradcheck(loss_sum, (case["hidden"], case["head"]))


@pytest.mark.parametrize(
    ("direction", "want"), [("forward", 0.5 * math.log(4 / 3)), ("reverse", 0.75 * math.log(1.5) - 0.25 * math.log(2))]
)
def test_directions_by_hand(direction: str, want: float) -> None:
    """Kills directions swapped: start (1/2, 1/2), model (3/4, 1/4); forward is sum q log(q/p), reverse sum p log(p/q)."""
    hidden = torch.tensor([[math.log(3.0)]], dtype=torch.float64, requires_grad=True)
    head = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    anchor = Anchor(torch.zeros(1, 1, dtype=torch.float64), Head(head), torch.ones(1), direction)
    loss = weighted_loss(hidden, head, targets_N=torch.tensor([-100]), weights_N=torch.zeros(1), anchor=anchor)
    assert loss.loss_sum.item() == pytest.approx(want) and loss.kl_N is not None and loss.kl_N.item() == pytest.approx(want)
    assert loss.nll_N.item() == 0.0, "no target here: the pull alone chose this place"


def test_rows_are_counted_on_the_host_as_on_the_device() -> None:
    """Kills a place that only the pull chose and that is left out, and checks that the fast way would skip."""
    targets, weights = np.array([3, -100, 2, 1]), np.array([1, 0, 0, 0.5], np.float32)
    pulls = np.array([0, 0.5, 0, 0], np.float32)
    assert counted_rows(targets, weights, num_words=4, pulls=pulls).tolist() == [0, 1, 3]
    assert counted_rows(targets, weights, num_words=4).tolist() == [0, 3]
    for odd in (np.array([-1, 0, 0, 0], np.float32), np.array([np.nan, 0, 0, 0], np.float32)):
        with pytest.raises(ModelError, match="finite"):
            counted_rows(targets, odd, num_words=4)
    with pytest.raises(ModelError, match="vocabulary of 3 words"):
        counted_rows(targets, weights, num_words=3)


# --- the starting model


def test_the_start_of_an_adapter_is_the_model_without_it_and_without_dropout() -> None:
    """Kills a reference that drops or keeps the adapter, and one that leaves the model in another mode or trains a frozen part."""
    base = tiny_model("gpt_neox")
    set_dropout(base, 0.5)
    want = hidden_states(base, IDS[None], positions=PLACES[None], lengths=LENGTHS).detach()
    model = add_adapter(base, Lora(rank=4, alpha=8.0, dropout=0.5), seed=1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.1)
            if "layers.0" in name:
                p.requires_grad_(False)
    start = Start(model)
    model.train()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    model.get_submodule("base_model.model.gpt_neox.layers.1").eval()
    modes = [module.training for module in model.modules()]
    found, _ = start.states(IDS, positions_N=PLACES, lengths=LENGTHS)
    assert torch.equal(found, want) and not found.requires_grad and start.copied_bytes == 0
    assert trained == [name for name, p in model.named_parameters() if p.requires_grad]
    assert modes == [module.training for module in model.modules()]
    noisy = hidden_states(model, IDS[None], positions=PLACES[None], lengths=LENGTHS)
    assert (noisy - want).abs().max() > 0.1, "with adapter and dropout it must differ, or this test shows nothing"


def test_the_start_of_a_whole_model_stays_where_it_was_and_shares_what_is_frozen() -> None:
    """Kills a reference that moves with the model, and a second copy of weights that never change."""
    model = tiny_llama(tied=False)
    model.model.embed_tokens.requires_grad_(False)
    want = hidden_states(model, IDS[None], positions=PLACES[None], lengths=LENGTHS).detach()
    start = Start(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.5)
    model.train()
    found, head = start.states(IDS, positions_N=PLACES, lengths=LENGTHS)
    assert torch.equal(found, want)
    assert torch.equal(head.weight * 1.5, model.lm_head.weight) and not head.weight.requires_grad
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert start.copied_bytes == 8 * trained < 8 * sum(p.numel() for p in model.parameters())
    assert start._model.model.embed_tokens.weight is model.model.embed_tokens.weight


# --- noise


def test_noise_is_uniform_within_the_bound_of_its_own_document() -> None:
    """Kills noise scaled by the row, by sqrt(L) alone, or between 0 and 1."""
    lengths, size = [100, 4], 64
    keys = torch.tensor([11] * 100 + [22] * 4)
    places = torch.cat([torch.arange(100), torch.arange(4)])
    noise = embedding_noise(keys, places, lengths=lengths, size=size, alpha=5.0)
    for part, bound in ((noise[:100], 5 / 80), (noise[100:], 5 / 16)):
        assert 0.98 * bound < part.abs().max() <= bound
        assert abs(part.mean()) < 0.1 * bound
        assert part.pow(2).mean().item() == pytest.approx(bound**2 / 3, rel=0.15)


def test_the_counting_generator_is_splitmix64() -> None:
    """Kills a shift that repeats the sign: half of the numbers would be wrong. Python's whole numbers are the reference."""
    states = [0x9E3779B97F4A7C15, 1, 1 << 63, (1 << 64) - 1, 12345678901234567890]
    signed = torch.tensor([s - (1 << 64) if s >> 63 else s for s in states])
    want = [(2 * (mix(s) >> 41) + 1 - (1 << 23)) / (1 << 23) for s in states]
    assert uniform(signed).tolist() == want


def test_noise_depends_on_the_document_alone() -> None:
    """Kills noise drawn row by row: another packing would be another run."""
    keys = {"a": document_key(0, 3, 5, 0), "b": document_key(0, 3, 6, 0)}

    def drawn(order: str) -> dict[str, torch.Tensor]:
        lengths = [{"a": 5, "b": 3}[name] for name in order]
        keys_N = torch.tensor(np.repeat([keys[name] for name in order], lengths))
        places = torch.cat([torch.arange(n) for n in lengths])
        parts = embedding_noise(keys_N, places, lengths=lengths, size=6, alpha=1.0).split(lengths)
        return dict(zip(order, parts, strict=True))

    together, turned, alone = drawn("ab"), drawn("ba"), drawn("a")
    assert torch.equal(together["a"], turned["a"]) and torch.equal(together["b"], turned["b"])
    assert torch.equal(together["a"], alone["a"]) and not torch.equal(together["a"][:3], together["b"])


@example((0, 3, 5, 0), (0, 3, 6, 0))
@example((0, 1, 2, 0), (0, 2, 1, 0))
@given(st.tuples(*[st.integers(0, 3)] * 4), st.tuples(*[st.integers(0, 3)] * 4))
def test_keys_tell_seed_step_example_and_visit_apart(one: tuple, other: tuple) -> None:
    """Kills sums of the four, under which step 1 of example 2 is step 2 of example 1."""
    assert (document_key(*one) == document_key(*other)) is (one == other)


# --- dropout of the architecture


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2"])
def test_dropout_acts_in_training_alone(kind: str) -> None:
    """Kills a field that is set and never read, and dropout in evaluation."""
    model = tiny_model(kind)
    quiet = model(IDS[None]).logits
    assert set_dropout(model, 0.5)
    assert torch.equal(model(IDS[None]).logits, quiet)
    model.train()
    assert (model(IDS[None]).logits - model(IDS[None]).logits).abs().max() > 1e-3
    set_dropout(model, 0.0)
    torch.testing.assert_close(model(IDS[None]).logits, quiet)


def test_dropout_where_there_is_none_is_refused() -> None:
    """Kills a setting without effect."""
    with pytest.raises(ModelError, match=r"train.dropout: MambaForCausalLM has no dropout .*`model.adapter.dropout`"):
        set_dropout(tiny_model("mamba"), 0.1)
