"""The fast encoder is the stock encoder: same outputs, same gradients, same dropout."""

import numpy as np
import pytest
import torch
from torch import nn

from avray.nn import encoder
from avray.nn.encoder import Encoder, dropout, sinusoidal_positions

WIDTH, HEADS = 32, 4


def pair(rate=0.0, layers=2):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, rate, activation="gelu", batch_first=True)
    stock = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ours = Encoder(WIDTH, layers, HEADS, 48, rate)
    ours.load_stock(stock)
    return ours, stock


def gradients(module, frames, *masks, **named):
    frames = frames.clone().requires_grad_()
    weight = torch.linspace(-1, 1, frames.numel()).view(frames.shape)
    out = module(frames, *masks, **named)
    (out * weight).sum().backward()
    return out.detach(), frames.grad, {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_stock_without_dropout(blocked, masked, monkeypatch):
    """``blocked`` forces the blocked path, in blocks that split both heads and rows, with nothing dropped."""
    torch.manual_seed(0)
    ours, stock = pair()
    if blocked:
        monkeypatch.setattr(encoder, "_BLOCK_ELEMENTS", 3 * 37)
        monkeypatch.setattr(encoder._Mask, "__init__", lambda self, rate, seed: vars(self).update(keep=1.0))
        monkeypatch.setattr(encoder._Mask, "fill", lambda self, out: out.fill_(1))
        for layer in ours.layers:
            layer.attention.dropout = 1e-9
    frames = torch.randn(3, 37, WIDTH)
    valid = torch.ones(3, 37, dtype=torch.bool)
    if masked:
        valid[0, 20:] = valid[2, 1:] = False
    ours_out, ours_grad, ours_all = gradients(ours, frames * valid[..., None], valid if masked else None)
    out, grad, everything = gradients(stock, frames * valid[..., None], src_key_padding_mask=~valid if masked else None)
    torch.testing.assert_close(ours_out[valid], out[valid], atol=1e-5, rtol=1e-5)
    if not masked:  # what stands on padding is not the same, and no loss reads it
        torch.testing.assert_close(ours_grad, grad, atol=1e-4, rtol=1e-4)
        for name, gradient in everything.items():
            name = name.replace("self_attn.in_proj_", "attention.qkv.").replace("self_attn.out_proj", "attention.out")
            torch.testing.assert_close(ours_all[name], gradient, atol=1e-4, rtol=1e-4)


def test_blocked_attention_drops_weights_and_keeps_the_mean():
    """Against attention written out with the very mask that was drawn, forward and backward."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 2, 9, 4, dtype=torch.float32, requires_grad=True) for _ in range(3))
    torch.manual_seed(5)
    out = encoder._blocked_attention(q, k, v, None, 0.3)
    torch.manual_seed(5)
    mask = encoder._Mask(0.3, encoder._draw_seed())
    kept = mask.fill(torch.empty(4, 9, 9)).view(2, 2, 9, 9)
    expected = (torch.softmax(q @ k.mT / 2, -1) * kept / mask.keep) @ v
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(out.square().sum(), (q, k, v)),
                            torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_masks_are_independent_bernoulli():
    kept, again = (encoder._Mask(0.1, seed).fill(torch.empty(2_000_003)) for seed in (2, 3))
    deviation = (0.1 * 0.9 / 2e6) ** 0.5
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert abs(float(kept.mean()) - 0.9) < 5 * deviation
    for lag in (1, 2, 4, 128):
        together = float((kept[lag:] * kept[:-lag]).mean())
        assert abs(together - 0.81) < 5 * (0.81 * 0.19 / 2e6) ** 0.5
    assert abs(float((kept * again).mean()) - 0.81) < 5 * (0.81 * 0.19 / 2e6) ** 0.5


def test_the_seed_decides_the_dropout_and_checkpointing_keeps_it():
    ours, _ = pair(0.2)
    frames = torch.randn(2, 11, WIDTH)
    torch.manual_seed(7)
    first, first_grad, _ = gradients(ours, frames)
    torch.manual_seed(7)
    again, _, _ = gradients(ours, frames)
    other, _, _ = gradients(ours, frames)
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(7)
    out, grad, _ = gradients(lambda_module(ours), frames)
    assert torch.equal(first, out)
    torch.testing.assert_close(first_grad, grad)


def lambda_module(module):
    class Checkpointed(nn.Module):
        def forward(self, frames):
            return torch.utils.checkpoint.checkpoint(module, frames, use_reentrant=False)

    return Checkpointed()


def test_dropout_keeps_the_mean_and_eval_is_exact():
    ones = torch.ones(400_000)
    dropped = dropout(ones, 0.25)
    assert abs(float(dropped.mean()) - 1) < 0.01 and abs(float((dropped == 0).float().mean()) - 0.25) < 0.01
    assert dropout(ones, 0.0) is ones
    ours, stock = pair(0.5)
    frames = torch.randn(1, 6, WIDTH)
    torch.testing.assert_close(ours.eval()(frames), stock.eval()(frames), atol=1e-5, rtol=1e-5)


def test_bfloat16_goes_through_the_same_blocks():
    ours, _ = pair(0.1)
    frames = torch.randn(2, 8, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(frames)
    out.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters())


def test_positions():
    positions = sinusoidal_positions(50, 6, "cpu")
    assert positions.shape == (50, 6)
    np.testing.assert_allclose(positions[:, 0], np.sin(np.arange(50)), atol=1e-5)
    np.testing.assert_allclose(positions[:, 5], np.cos(np.arange(50) * 10_000 ** (-4 / 6)), atol=1e-5)
