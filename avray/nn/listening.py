"""How a language model hears: cross-attention added to its layers from outside, so that its own weights keep their
names and any decoder-only network can be the base.

``Gated`` (Flamingo: Alayrac et al., 2022) is added after a layer, times tanh of a gate that starts at 0: at step 0 the
logits are the base model's, to the bit. ``Last`` is the original's single cross-attention over the final hidden states,
residual and LayerNorm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Heard:
    """Keys and values ``[batch, heads, frames, head]`` of one layer; ``mask`` ``[batch, 1, 1, frames]`` is True where a
    frame is, in one place at least; ``present`` ``[batch, 1, 1]`` is 0 for a row without sound."""

    keys: Tensor
    values: Tensor
    mask: Tensor
    present: Tensor


class CrossAttention(nn.Module):
    """Four products of ``width`` with biases: 4 w² + 4 w parameters, as ``nn.MultiheadAttention`` has."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def hear(self, frames: Float[Tensor, "batch frames width"], valid: Bool[Tensor, "batch frames"]) -> Heard:
        present = valid.any(1)[:, None, None]
        mask = valid.clone()
        mask[:, 0] = True  # attention over nothing is not a number
        keys, values = (self._heads(product(frames)) for product in (self.key, self.value))
        return Heard(keys, values, mask[:, None, None], present)

    def forward(self, x: Float[Tensor, "batch time width"], heard: Heard) -> Float[Tensor, "batch time width"]:
        mixed = F.scaled_dot_product_attention(self._heads(self.query(x)), heard.keys, heard.values,
                                               attn_mask=heard.mask)
        return self.out(mixed.transpose(1, 2).flatten(2)) * heard.present

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class Gated(nn.Module):
    """x + tanh(gate) attention(norm(x))."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = CrossAttention(width, num_heads)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, heard: Heard) -> Tensor:
        return x + self.gate.tanh() * self.attention(self.norm(x), heard)


class Last(nn.Module):
    """norm(x + attention(x))."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = CrossAttention(width, num_heads)

    def forward(self, x: Tensor, heard: Heard) -> Tensor:
        return self.norm(x + self.attention(x, heard))


class LowRank(nn.Module):
    """An adapter beside a frozen product (LoRA: Hu et al., 2021): B A x, from zero, times ``alpha`` / ``rank``."""

    def __init__(self, width_in: int, width_out: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.down = nn.Linear(width_in, rank, bias=False)
        self.up = nn.Linear(rank, width_out, bias=False)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x)) * self.scale
