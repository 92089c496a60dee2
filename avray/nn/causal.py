"""Causal attention with dropout on its weights, for training on a CPU.

torch's fused attention takes no dropout on CPU; what it does instead writes the whole score matrix to memory a dozen
times and draws masks at 6 ns an element: 890 ms forth and back at 2048 steps and 6 heads of 64, where the fused kernel
without dropout takes 190 ms and this 240 ms. Here, as in ``avray.nn.encoder`` (whose masks these are), scores live in
blocks that stay in cache, a block of queries sees only the keys up to its own end, and the backward pass makes scores
and masks again. Without dropout, and on other devices, it is ``scaled_dot_product_attention``.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from avray.nn.encoder import _draw_seed, _Mask

_BLOCK_ELEMENTS = 1 << 19


def causal_attention(query: Float[Tensor, "batch heads time head"], key: Float[Tensor, "batch kv_heads time head"],
                     value: Float[Tensor, "batch kv_heads time head"],
                     dropout: float) -> Float[Tensor, "batch heads time head"]:
    """``scaled_dot_product_attention`` with ``is_causal`` and ``dropout_p``."""
    group = query.shape[1] // key.shape[1]
    if dropout and query.device.type == "cpu":
        if group > 1:
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        return _blocked(query, key, value, dropout)
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, enable_gqa=group > 1)


@torch.compiler.disable
def _blocked(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    flat = [part.flatten(0, 1).float() for part in (query, key, value)]
    return _CausalAttention.apply(*flat, dropout, _draw_seed()).view(query.shape).to(query.dtype)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, rate: float, seed: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.rate, ctx.seed, ctx.blocks = rate, seed, _Blocks(*q.shape[:2])
        mask, out = _Mask(rate, seed), torch.empty_like(q)
        for heads, rows, (scores, keep) in ctx.blocks.each(2):
            weights = _weights(q[heads, rows], k[heads, : rows.stop], scores)
            weights *= mask.fill(keep)
            out[heads, rows] = torch.bmm(weights, v[heads, : rows.stop])
        out /= mask.keep
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        q, k, v, out = ctx.saved_tensors
        mask, scale = _Mask(ctx.rate, ctx.seed), q.shape[-1] ** -0.5
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dot = (grad * out).sum(-1, keepdim=True)
        grad = grad / mask.keep
        for heads, rows, (scores, keep, dropped) in ctx.blocks.each(3):
            seen = slice(rows.stop)
            weights = _weights(q[heads, rows], k[heads, seen], scores)
            torch.mul(weights, mask.fill(keep), out=dropped)
            grad_v[heads, seen].baddbmm_(dropped.transpose(1, 2), grad[heads, rows])
            torch.bmm(grad[heads, rows], v[heads, seen].transpose(1, 2), out=keep)
            grad_scores = keep.mul_(dropped).addcmul_(weights, dot[heads, rows], value=-1)
            grad_q[heads, rows] = torch.bmm(grad_scores, k[heads, seen])
            grad_k[heads, seen].baddbmm_(grad_scores.transpose(1, 2), q[heads, rows], alpha=scale)
        return grad_q.mul_(scale), grad_k, grad_v, None, None


class _Blocks:
    """Blocks of up to 8 heads and as many queries as keep scores in cache: 2 MB of float32 a thread, three buffers in
    the backward pass, against 1 MB of L2 a core and the shared L3."""

    def __init__(self, num_heads: int, time: int):
        self.num_heads, self.time = num_heads, time
        self.heads = min(num_heads, 8)
        self.rows = max(16, min(time, _BLOCK_ELEMENTS * torch.get_num_threads() // (self.heads * time)))

    def each(self, num_buffers: int):  # type: ignore[no-untyped-def]
        """Slices of heads and queries, and buffers ``[heads, queries, keys seen]``."""
        buffers = torch.empty(num_buffers, self.heads * self.rows * self.time)
        for first in range(0, self.num_heads, self.heads):
            heads = slice(first, min(first + self.heads, self.num_heads))
            for begin in range(0, self.time, self.rows):
                rows = slice(begin, min(begin + self.rows, self.time))
                shape = (heads.stop - first, rows.stop - begin, rows.stop)
                yield heads, rows, [buffer[: math.prod(shape)].view(shape) for buffer in buffers]


def _weights(q: Tensor, k: Tensor, scores: Tensor) -> Tensor:
    """softmax of q kᵀ / √head over the keys up to each query, written into ``scores``."""
    torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5, out=scores)
    num_queries = q.shape[1]
    scores[..., -num_queries:] += torch.full((num_queries, num_queries), -math.inf).triu_(1)
    return torch.softmax(scores, dim=-1, out=scores)
