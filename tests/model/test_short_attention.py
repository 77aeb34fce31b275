"""Written-out attention of short documents against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from toy import tiny_llama
from tutelage.model.attention import AttentionRule, is_short, make_documents
from tutelage.model.loss import hidden_states
from tutelage.model.short_attention import SHORTEST_FOR_FLASH, short_attention


def _inputs(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    count, heads, keys, length, size = shape
    generator = torch.Generator().manual_seed(length)
    shapes = [(count, n, length, size) for n in (heads, keys, keys)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def _reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **rule: object) -> torch.Tensor:
    length, window, scale = query.shape[2], rule.get("window"), rule.get("scale")
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen = seen if window is None else seen.triu(1 - int(str(window)))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale, enable_gqa=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3, 4, 2, 7, 8), (1, 3, 3, 1, 4), (2, 9, 3, 20, 16)])
@pytest.mark.parametrize("rule", [{}, {"window": 3}, {"scale": 0.7}])
def test_values_and_gradients_are_those_of_the_formula(shape: tuple[int, ...], rule: dict[str, float]) -> None:
    """Kills: query heads given to the wrong key head, a scale left out of a gradient, a window off by one."""
    mine, theirs = _inputs(shape, torch.float64), _inputs(shape, torch.float64)  # type: ignore[arg-type]
    found, right = short_attention(*mine, **rule), _reference(*theirs, **rule)  # type: ignore[arg-type]
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    pull = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    found.backward(pull)
    right.backward(pull)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-11, atol=1e-12)


def test_bfloat16_is_as_near_to_the_exact_values_as_the_flash_kernel() -> None:
    """Kills: scores rounded to bfloat16 before the softmax, which moves shares by per cents."""
    shape = (4, 9, 3, 60, 64)
    exact = [x.detach().requires_grad_() for x in _inputs(shape, torch.float64)]
    exact = [x.detach().to(torch.bfloat16).double().requires_grad_() for x in exact]
    narrow = [[x.detach().to(torch.bfloat16).mul(1).requires_grad_() for x in exact] for _ in range(2)]
    right = _reference(*exact)
    mine = short_attention(*narrow[0])
    flash = F.scaled_dot_product_attention(*narrow[1], is_causal=True, enable_gqa=True)
    pull = torch.linspace(-1, 1, right.numel(), dtype=torch.float64).view_as(right).to(torch.bfloat16)
    for output in (right, mine, flash):
        output.backward(pull.to(output.dtype))

    def error(found: torch.Tensor | None, want: torch.Tensor | None) -> float:
        assert found is not None and want is not None
        return ((found.double() - want).norm() / want.norm()).item()

    assert error(mine, right) < 1.2 * error(flash, right)
    for one, other, want in zip(*narrow, exact, strict=True):
        assert error(one.grad, want.grad) < 1.6 * error(other.grad, want.grad)


def test_documents_on_both_sides_of_the_bound_give_what_they_give_alone() -> None:
    """Kills: the short way taken with the layout of the long one, or padding that is seen."""
    lengths = [SHORTEST_FOR_FLASH + 3, 5, SHORTEST_FOR_FLASH - 1, 4]
    model = tiny_llama()
    model.config.max_position_embeddings = 1024
    ids = torch.randint(0, 128, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        together = hidden_states(model, ids, lengths=lengths)
        alone = torch.cat([hidden_states(model, part) for part in ids.split(lengths, dim=1)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


def test_a_number_that_is_not_finite_stays_in_its_document() -> None:
    """Kills: padding that repeats the first token of the row, so that one bad document spoils its group."""
    documents = make_documents([3, 4, 4], device="cpu")
    owner = [0] * 3 + [1] * 4 + [2] * 4
    begin = 0
    for count, length in documents.shapes:
        rows = documents.index_P[begin : begin + count * length].view(count, length)
        assert all(len({owner[i] for i in row}) == 1 for row in rows.tolist())
        begin += count * length


def test_dropout_and_soft_caps_are_left_to_other_kernels() -> None:
    """Kills: a rule that the short way would leave out without a word."""
    query = torch.zeros(1, 1, 4, 8)
    rule = AttentionRule(dropout=0.0, scale=None, softcap=None, window=None)
    assert is_short(query, rule)
    assert not is_short(query, AttentionRule(dropout=0.1, scale=None, softcap=None, window=None))
    assert not is_short(query, AttentionRule(dropout=0.0, scale=None, softcap=30.0, window=None))
    assert not is_short(torch.zeros(1, 1, SHORTEST_FOR_FLASH, 8), rule)
