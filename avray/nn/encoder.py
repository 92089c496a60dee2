"""A post-norm transformer encoder that trains fast on a CPU, with the mathematics of ``nn.TransformerEncoder``.

Stock PyTorch has no fused attention with dropout on CPU: at 1200 frames, 8 heads of 16 and dropout 0.1 it writes the
whole score matrix to memory a dozen times, and draws its dropout mask at 6 ns an element (78 % of a training step).
Here the scores live in blocks of a few megabytes that stay in cache and are computed again in the backward pass, and
masks come from 16 random bits an element at 0.5 ns (numpy's SFC64, seeded by torch's generator, so that
``torch.manual_seed`` and activation checkpointing keep their meaning). Without dropout, and on other devices, it is
``scaled_dot_product_attention``. Weights of a stock encoder load as they are (``load_stock``).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

_BLOCK_ELEMENTS = 1 << 19
"""Scores held at once, for each thread: 2 MB in float32, three such buffers in the backward pass. Blocks of a quarter
were 25 % slower (more calls), of twice the size 5 % (out of the cache)."""


def sinusoidal_positions(num_frames: int, width: int, device: torch.device | str) -> Float[Tensor, "time width"]:
    """Sines and cosines of geometrically falling frequency (Vaswani et al. 2017), interleaved; no parameters."""
    frequencies = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    angles = torch.arange(num_frames, device=device)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]


class Encoder(nn.Module):
    """``num_layers`` post-norm layers with GELU: ``nn.TransformerEncoder``'s defaults, batch first, no final norm."""

    def __init__(self, width: int, num_layers: int, num_heads: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(width, num_heads, feed_forward, dropout) for _ in range(num_layers))

    def forward(self, frames: Float[Tensor, "batch time width"],
                valid: Bool[Tensor, "batch time"] | None = None) -> Float[Tensor, "batch time width"]:
        """``valid`` marks the frames that may be attended to (at least one a row); None means all of them."""
        for layer in self.layers:
            frames = layer(frames, valid)
        return frames

    def load_stock(self, stock: nn.TransformerEncoder) -> None:
        """Take the weights of a stock encoder of the same shape. RuntimeError where they do not fit."""
        names = {"self_attn.in_proj_weight": "attention.qkv.weight", "self_attn.in_proj_bias": "attention.qkv.bias",
                 "self_attn.out_proj.weight": "attention.out.weight", "self_attn.out_proj.bias": "attention.out.bias"}
        weights = {}
        for name, tensor in stock.state_dict().items():
            prefix, index, rest = name.split(".", 2)
            weights[f"{prefix}.{index}.{names.get(rest, rest)}"] = tensor
        self.load_state_dict(weights)


class EncoderLayer(nn.Module):
    def __init__(self, width: int, num_heads: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.attention = Attention(width, num_heads, dropout)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, feed_forward)
        self.linear2 = nn.Linear(feed_forward, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, frames: Tensor, valid: Tensor | None) -> Tensor:
        rate = self.dropout if self.training else 0.0
        frames = self.norm1(frames + dropout(self.attention(frames, valid), rate))
        hidden = dropout(F.gelu(self.linear1(frames)), rate)
        return self.norm2(frames + dropout(self.linear2(hidden), rate))


class Attention(nn.Module):
    """Multi-head self-attention, dropout on the attention weights."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        assert width % num_heads == 0
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, frames: Tensor, valid: Tensor | None) -> Tensor:
        batch, time, width = frames.shape
        rate = self.dropout if self.training else 0.0
        q, k, v = self.qkv(frames).view(batch, time, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if rate and frames.device.type == "cpu":
            mixed = _blocked_attention(q, k, v, valid, rate)
        else:
            mask = None if valid is None else valid[:, None, None, :]
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))


def dropout(values: Tensor, rate: float) -> Tensor:
    """``F.dropout`` with the cheap mask on CPU; the identity at rate 0."""
    if not rate:
        return values
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(values, rate)
    return _Dropout.apply(values, _Mask(rate, _draw_seed()))


class _Mask:
    """Draws masks of independent elements, kept with the probability ``keep`` (``1 - rate`` to within 2**-16): the
    same ones again for the same seed and the same sizes in the same order."""

    def __init__(self, rate: float, seed: int) -> None:
        dropped = min(round(rate * 65536), 65535)
        self.keep = 1 - dropped / 65536
        self._threshold = dropped - 32768
        self._bits = np.random.Generator(np.random.SFC64(seed))

    def fill(self, out: Tensor) -> Tensor:
        """Set contiguous ``out`` to 1 (kept) and 0."""
        words = self._bits.integers(0, 2**64, size=-(-out.numel() // 4), dtype=np.uint64)
        bits = torch.from_numpy(words.view(np.int16)[:out.numel()]).view(out.shape)
        return torch.ge(bits, self._threshold, out=out)


def _draw_seed() -> int:
    return int(torch.randint(2**63 - 1, ()))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, mask: _Mask) -> Tensor:  # type: ignore[no-untyped-def]
        kept = mask.fill(torch.empty(values.shape, dtype=values.dtype)).div_(mask.keep)
        ctx.save_for_backward(kept)
        return values * kept

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return grad * ctx.saved_tensors[0], None


@torch.compiler.disable
def _blocked_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, rate: float) -> Tensor:
    """``[batch, heads, time, dim]`` each; ``valid`` ``[batch, time]`` marks the keys."""
    batch, heads, time, _ = q.shape
    bias = None
    if valid is not None:
        bias = torch.zeros(valid.shape).masked_fill_(~valid, -math.inf).repeat_interleave(heads, 0)[:, None]
    flat = [part.reshape(batch * heads, time, -1).float() for part in (q, k, v)]
    return _BlockedAttention.apply(*flat, bias, rate, _draw_seed()).view(q.shape).to(q.dtype)


def _blocks(num_heads: int, time: int) -> list[tuple[slice, slice]]:
    """(heads, query rows) of each block: several whole heads where they fit, else rows of up to 8 heads."""
    elements = _BLOCK_ELEMENTS * torch.get_num_threads()
    heads = max(min(num_heads, 8), min(num_heads, elements // (time * time)))
    rows = max(1, min(time, elements // (heads * time)))
    return [(slice(h, min(h + heads, num_heads)), slice(r, min(r + rows, time)))
            for h in range(0, num_heads, heads) for r in range(0, time, rows)]


class _BlockedAttention(torch.autograd.Function):
    """softmax(q kᵀ / √dim + bias), dropout, times v; on ``[heads, time, dim]`` float32. Nothing of ``time²`` is kept:
    the backward pass makes weights and masks again, block by block."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rate: float, seed: int):  # type: ignore[no-untyped-def]
        num_heads, time, _ = q.shape
        ctx.rate, ctx.seed, ctx.blocks = rate, seed, _blocks(num_heads, time)
        mask, out = _Mask(rate, seed), torch.empty_like(q)
        buffers = torch.empty(2, _buffer_size(ctx.blocks, time))
        for heads, rows in ctx.blocks:
            shape = (heads.stop - heads.start, rows.stop - rows.start, time)
            scores, keep = (buffer[:math.prod(shape)].view(shape) for buffer in buffers)
            weights = _weights(q[heads, rows], k[heads], None if bias is None else bias[heads], scores)
            weights *= mask.fill(keep)
            torch.bmm(weights, v[heads], out=out[heads, rows])
        out /= mask.keep
        ctx.save_for_backward(q, k, v, bias, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        q, k, v, bias, out = ctx.saved_tensors
        mask, (_, time, dim) = _Mask(ctx.rate, ctx.seed), q.shape
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dot = (grad * out).sum(-1, keepdim=True)
        grad = grad / mask.keep
        buffers = torch.empty(3, _buffer_size(ctx.blocks, time))
        for heads, rows in ctx.blocks:
            shape = (heads.stop - heads.start, rows.stop - rows.start, time)
            scores, keep, dropped = (buffer[:math.prod(shape)].view(shape) for buffer in buffers)
            weights = _weights(q[heads, rows], k[heads], None if bias is None else bias[heads], scores)
            torch.mul(weights, mask.fill(keep), out=dropped)
            grad_v[heads].baddbmm_(dropped.transpose(1, 2), grad[heads, rows])
            torch.bmm(grad[heads, rows], v[heads].transpose(1, 2), out=keep)
            grad_scores = keep.mul_(dropped).addcmul_(weights, dot[heads, rows], value=-1)
            torch.bmm(grad_scores, k[heads], out=grad_q[heads, rows])
            grad_k[heads].baddbmm_(grad_scores.transpose(1, 2), q[heads, rows])
        return grad_q.mul_(dim**-0.5), grad_k.mul_(dim**-0.5), grad_v, None, None, None


def _weights(q: Tensor, k: Tensor, bias: Tensor | None, scores: Tensor) -> Tensor:
    """softmax(q kᵀ / √dim + bias), written into ``scores``."""
    torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5, out=scores)
    if bias is not None:
        scores += bias
    return torch.softmax(scores, dim=-1, out=scores)


def _buffer_size(blocks: list[tuple[slice, slice]], time: int) -> int:
    heads, rows = blocks[0]
    return (heads.stop - heads.start) * (rows.stop - rows.start) * time
