from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from toy import tiny_llama, tiny_model
from tutelage.errors import ModelError
from tutelage.model import attention, isolation
from tutelage.model.isolation import isolation_probe, logits_of, require_isolation
from tutelage.model.load import add_adapter, checkpoint_activations
from tutelage.model.loss import head_of, hidden_states
from tutelage.model.spec import Lora

KINDS = ["llama", "qwen2", "qwen3", "gemma2", "mistral", "gpt_neox", "gpt2"]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_give_the_logits_of_each_document_alone(kind: str) -> None:
    """Kills: attention over the whole row, positions that run on, a window or soft cap left out, a head rule not known."""
    model = tiny_model(kind)
    assert isolation_probe(model) < 1e-12
    assert require_isolation(model) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_crosses_from_one_document_to_another(kind: str) -> None:
    """Kills: a backward that scatters padding's gradient into real tokens, or into a neighbour."""
    model = tiny_model(kind)
    lengths, ids = (5, 9, 8, 2), torch.arange(24)[None] % 131
    table = model.get_input_embeddings().weight
    hidden_states(model, ids, lengths=lengths)[5:14].square().sum().backward()
    packed = table.grad.clone()
    table.grad = None
    hidden_states(model, ids[:, 5:14]).square().sum().backward()
    torch.testing.assert_close(packed, table.grad)
    assert packed[:5].abs().max() == 0


def test_a_row_with_an_all_ones_attention_mask_is_caught_as_contaminated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: packing under a mask of ones, where every document sees those before it. The probe must not pass it."""

    def contaminated(model, ids, *, positions=None, lengths=None):
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        ones = torch.ones_like(ids)
        return model.base_model(input_ids=ids, position_ids=positions, attention_mask=ones).last_hidden_state[0]

    monkeypatch.setattr(isolation, "hidden_states", contaminated)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        with pytest.raises(ModelError, match=r"LlamaForCausalLM.*batch.pack: none"):
            require_isolation(tiny_llama(dtype=dtype))


@pytest.mark.parametrize(("kind", "stride"), [("gpt2", 1), ("llama", 2)])
def test_positions_that_do_not_restart_are_caught(kind: str, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: positions that run on over the row. (Rotary attention knows distances only, so there it takes a stride.)"""

    def run_on(model, ids, *, lengths):
        return hidden_states(model, ids, positions=stride * torch.arange(ids.shape[1])[None], lengths=lengths)

    monkeypatch.setattr(isolation, "hidden_states", run_on)
    with pytest.raises(ModelError, match="as they are alone"):
        require_isolation(tiny_model(kind))


def test_a_state_space_model_is_refused_by_name() -> None:
    """Kills: packing for an architecture that carries its state from one document into the next."""
    model = tiny_model("mamba")
    model.set_attn_implementation(attention.ATTENTION_NAME)
    with pytest.raises(ModelError, match=r"MambaForCausalLM.*batch.pack: none"):
        require_isolation(model)


def test_a_model_loaded_with_other_attention_refuses_lengths() -> None:
    """Kills: lengths that are ignored without a word because the model does not use our attention."""
    model = tiny_llama()
    model.set_attn_implementation("sdpa")
    with pytest.raises(ModelError, match="attends by `sdpa`"):
        hidden_states(model, torch.ones(1, 6, dtype=torch.int64), lengths=[2, 4])


@pytest.mark.parametrize("lengths", [[], [3, 0], [4, 4]])
def test_lengths_that_do_not_fill_the_row_are_refused(lengths: list[int]) -> None:
    """Kills: a tail of the row that belongs to no document, or to a wrong one."""
    with pytest.raises(ModelError):
        hidden_states(tiny_llama(), torch.ones(1, 7, dtype=torch.int64), lengths=lengths, positions=torch.zeros(1, 7).long())


def test_gradient_checkpointing_recomputes_with_the_documents_still_apart() -> None:
    """Kills: lengths read from a context that is closed by the time backward runs a layer again."""
    ids, lengths = torch.arange(20)[None] + 3, [6, 9, 5]
    gradients = []
    for is_checkpointed in (False, True):
        model = add_adapter(tiny_llama(), Lora(rank=2, alpha=4.0), seed=3).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.05)
        if is_checkpointed:
            checkpoint_activations(model)
        hidden_states(model, ids, lengths=lengths)[6:].square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) > 20
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_an_adapted_model_keeps_documents_apart() -> None:
    """Kills: a wrapper around the model through which the lengths do not reach the layers."""
    model = add_adapter(tiny_llama(), Lora(rank=2, alpha=4.0))
    assert require_isolation(model) < 1e-6


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12))
def test_every_token_has_one_place_and_padding_stays_within_its_bound(lengths: list[int]) -> None:
    """Kills: a grouping that loses, doubles or reorders tokens inside a document."""
    documents = attention.make_documents(lengths, device="cpu")
    assert documents.index_P[documents.places_T].tolist() == list(range(sum(lengths)))
    assert sum(count * length for count, length in documents.shapes) == len(documents.index_P)
    assert len(documents.index_P) * attention.GROUP_RATIO <= sum(lengths)
    for start, length in zip(documents.starts_S.tolist(), lengths, strict=False):
        places = documents.places_T[start : start + length]
        assert (places.diff() == 1).all()


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_grouped_attention_is_a_dense_block_mask_written_out(window: int | None, softcap: float | None) -> None:
    """Kills: an off-by-one in the window, a cap applied after the softmax, a wrong scale, keys repeated the wrong way."""
    lengths, generator = (5, 1, 7, 6), torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(19, heads, 4, dtype=torch.float64, generator=generator) for heads in (4, 2, 2))
    rule = attention.AttentionRule(dropout=0.0, scale=0.3, softcap=softcap, window=window)
    documents = attention.make_documents(lengths, device="cpu")
    got = attention._grouped(query, key, value, documents=documents, rule=rule)

    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    distance = torch.arange(19)[:, None] - torch.arange(19)
    seen = (owner[:, None] == owner) & (distance >= 0) & (distance < (window or 99))
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(2, 1)) * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = F.softmax(scores.masked_fill(~seen, float("-inf")), -1)
    torch.testing.assert_close(got, torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(2, 1)))


def test_grouped_attention_has_the_right_gradient() -> None:
    """Kills: a backward that takes the gather for its own inverse."""
    documents = attention.make_documents((3, 1, 3, 2), device="cpu")
    rule = attention.AttentionRule(dropout=0.0, scale=None, softcap=None, window=2)
    inputs = [torch.randn(9, heads, 2, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1)]
    assert torch.autograd.gradcheck(lambda q, k, v: attention._grouped(q, k, v, documents=documents, rule=rule), inputs)


def test_without_lengths_a_padded_batch_equals_each_row_alone() -> None:
    """Kills: a fall-back path that forgets causality, or lets right padding be seen."""
    model = tiny_llama()
    short, long = torch.tensor([[5, 6, 7]]), torch.tensor([[9, 8, 7, 6, 5]])
    both = torch.cat([F.pad(short, (0, 2)), long])
    together = logits_of(hidden_states(model, both), head_of(model)).unflatten(0, (2, 5))
    torch.testing.assert_close(together[0, :3], model(short).logits[0])
    torch.testing.assert_close(together[1], model(long).logits[0])
