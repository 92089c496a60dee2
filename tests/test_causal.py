"""Blocked causal attention with dropout: the mathematics of the fused kernel, and one mask in both passes."""

import pytest
import torch
from torch.nn import functional as F

from avray.nn import causal
from avray.nn.causal import causal_attention


@pytest.fixture(autouse=True, params=[1 << 19, 1 << 11], ids=["one block", "many blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(causal, "_BLOCK_ELEMENTS", request.param)


def parts(kv_heads: int = 9, time: int = 70) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (9, kv_heads, kv_heads)
    return [torch.randn(2, each, time, 16, generator=generator, requires_grad=True) for each in heads]


def assert_same_gradients(one, two, inputs) -> None:
    grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(1))
    for own, other in zip(*(torch.autograd.grad(out, inputs, grad) for out in (one, two)), strict=True):
        torch.testing.assert_close(own, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kv_heads", [9, 3])
def test_with_hardly_any_dropout_it_is_the_fused_kernel(kv_heads):
    inputs = parts(kv_heads)
    mixed = causal_attention(*inputs, 1e-9)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(mixed, expected)
    assert_same_gradients(mixed, expected, inputs)


def test_gradients_are_those_of_the_mask_that_was_drawn():
    """Against the plain formula with the mask that the same seed gives, read off by making every weight visible."""
    query, key, value = parts(time=40)

    def drawn(value: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return causal_attention(query, key, value, 0.3)

    eye = torch.eye(40).expand(2, 9, 40, 40)
    weights = torch.cat([drawn(part) for part in eye.split(16, dim=-1)[:2]] + [
        drawn(F.pad(eye[..., 32:], (0, 8)))[..., :8]], dim=-1)
    scores = (query @ key.transpose(-1, -2) / 4).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
    plain = scores.softmax(-1)
    mask = (weights.detach() > 0).float() / 0.7
    expected, mixed = (plain * mask) @ value, drawn(value)
    torch.testing.assert_close(mixed, expected, atol=1e-4, rtol=1e-4)
    kept = (weights > 0).float().sum() / (plain > 0).float().sum()
    assert kept.item() == pytest.approx(0.7, abs=0.02)
    assert_same_gradients(mixed, expected, (query, key, value))


def test_the_seed_decides():
    inputs = parts()
    torch.manual_seed(1)
    first, second = causal_attention(*inputs, 0.2), causal_attention(*inputs, 0.2)
    torch.manual_seed(1)
    assert torch.equal(first, causal_attention(*inputs, 0.2))
    assert not torch.equal(first, second)
