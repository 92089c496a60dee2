"""A decoder-only transformer over one or several token streams: GPT-2's form by default, Llama's by settings.

At its default settings it is the original's model to the number: 12,213,504 parameters untied, 11,820,288 tied.
Queries, keys and values come from one product (no bias). Attention is causal and takes no mask: sequences are padded at
the end only, where causality already hides the padding. Streams (``avray.nn.patterns``) share one embedding table whose
rows are summed at a step, and one output product split between them. Nothing is computed at construction, so a model
builds on the meta device; positions are arithmetic in ``forward``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from avray.nn.causal import causal_attention
from avray.nn.encoder import dropout

Norm = Literal["layer", "rms"]
Mlp = Literal["gelu", "swiglu"]
Positions = Literal["learned", "rotary", "sinusoidal"]


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and options.

    ``dropout`` falls on the embeddings and each residual branch, ``attention_dropout`` on the attention weights.
    ``mlp_width`` None is 4 x ``width`` (8/3 for swiglu, rounded up to 64: the same number of parameters). ``bias`` is
    that of the layer norms and of the products after attention and in the MLP; ``qkv_bias`` and ``head_bias`` have
    their own switch.
    """

    vocabulary: int = 1024
    num_streams: int = 1
    context: int = 2048
    width: int = 384
    num_layers: int = 6
    num_heads: int = 6
    num_kv_heads: int | None = None
    mlp: Mlp = "gelu"
    mlp_width: int | None = None
    norm: Norm = "layer"
    positions: Positions = "learned"
    rotary_base: float = 10_000.0
    qk_norm: bool = False
    tied: bool = False
    bias: bool = True
    qkv_bias: bool = False
    head_bias: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self):
        for name, allowed in (("mlp", ("gelu", "swiglu")), ("norm", ("layer", "rms")),
                              ("positions", ("learned", "rotary", "sinusoidal"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r} is not one of {', '.join(allowed)}.")
        if self.width % self.num_heads:
            raise ValueError(f"width = {self.width} is not a multiple of num_heads = {self.num_heads}.")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads = {self.kv_heads} does not divide num_heads = {self.num_heads}.")
        if self.head_dim % 2:
            raise ValueError(f"width / num_heads = {self.head_dim} must be even.")
        if self.vocabulary % self.num_streams:
            raise ValueError(f"{self.num_streams} streams do not divide vocabulary = {self.vocabulary}.")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 0 and below 1.")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def grouped(self) -> bool:
        return self.kv_heads != self.num_heads

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def hidden(self) -> int:
        if self.mlp_width:
            return self.mlp_width
        return 4 * self.width if self.mlp == "gelu" else math.ceil(8 * self.width / 3 / 64) * 64

    def norm_layer(self) -> nn.Module:
        if self.norm == "rms":
            return nn.RMSNorm(self.width, eps=1e-6)
        return nn.LayerNorm(self.width, bias=self.bias)


def rotary(positions: Int[Tensor, "*time"], head_dim: int, base: float) -> Float[Tensor, "*time head"]:
    """Angles of rotary positions (Su et al., 2021), halves rotated against each other: cosines then sines."""
    channels = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = base ** (-channels / head_dim)
    angles = positions[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Float[Tensor, "*time head"], angles: Float[Tensor, "*#time head"]) -> Float[Tensor, "*time head"]:
    """Turn queries or keys by their angles, in float32."""
    cos, sin = angles.chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def sinusoids(positions: Int[Tensor, "*time"], width: int) -> Float[Tensor, "*time width"]:
    """Sine and cosine positions (Vaswani et al., 2017), sines in the even channels."""
    angles = rotary(positions, width, 10_000.0)
    cos, sin = angles.chunk(2, dim=-1)
    return torch.stack([sin, cos], dim=-1).flatten(-2)


class Attention(nn.Module):
    """Causal self-attention with grouped keys and values, rotary positions and head-wise norms as settings."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        heads = config.num_heads + 2 * config.kv_heads
        self.qkv = nn.Linear(config.width, heads * config.head_dim, bias=config.qkv_bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)
        self.query_norm = nn.RMSNorm(config.head_dim, eps=1e-6) if config.qk_norm else None
        self.key_norm = nn.RMSNorm(config.head_dim, eps=1e-6) if config.qk_norm else None

    def turn(self, heads: Tensor, angles: Tensor | None, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (split along ``dim``), normed and rotated: ready to attend."""
        config = self.config
        query, key, value = heads.split([config.num_heads, config.kv_heads, config.kv_heads], dim=dim)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        return query, key, value

    def project(self, x: Tensor, angles: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """``[batch, time, width]`` -> queries, keys, values ``[batch, heads, time, head]``."""
        heads = self.qkv(x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
        return self.turn(heads, angles, dim=1)

    def forward(self, x: Tensor, angles: Tensor | None) -> Tensor:
        query, key, value = self.project(x, angles)
        mixed = causal_attention(query, key, value, self.config.attention_dropout if self.training else 0.0)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two products with GELU between, or SwiGLU (Shazeer, 2020) with gate and value in one product."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.gated = config.mlp == "swiglu"
        self.up = nn.Linear(config.width, config.hidden * (2 if self.gated else 1), bias=config.bias)
        self.down = nn.Linear(config.hidden, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * x)
        return self.down(F.gelu(x))


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.dropout = config.dropout
        self.norm1, self.attention = config.norm_layer(), Attention(config)
        self.norm2, self.mlp = config.norm_layer(), FeedForward(config)

    def forward(self, x: Tensor, angles: Tensor | None) -> Tensor:
        rate = self.dropout if self.training else 0.0
        x = x + dropout(self.attention(self.norm1(x), angles), rate)
        return x + dropout(self.mlp(self.norm2(x)), rate)


class Transformer(nn.Module):
    """Token embedding, blocks, final norm and output product. ``forward`` goes from embeddings to hidden states, so
    that a family can put other things (text, a start) among the tokens; ``embed`` and ``logits`` are its two ends."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = config.norm_layer()
        self.head = nn.Linear(config.width, config.vocabulary, bias=config.head_bias)
        if config.tied:
            self.head.weight = self.embedding.weight

    def init(self, generator: torch.Generator) -> None:
        """GPT-2's: normal with deviation 0.02, products into the residual divided by sqrt(2 x layers)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                into_residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                scale = 0.02 / math.sqrt(2 * self.config.num_layers) if into_residual else 0.02
                nn.init.normal_(parameter, std=scale, generator=generator)

    def embed(self, tokens: Int[Tensor, "batch time streams"]) -> Float[Tensor, "batch time width"]:
        """The sum of the streams' embeddings; -1 adds nothing."""
        embedded = self.embedding(tokens.clamp(min=0)) * (tokens >= 0).unsqueeze(-1)
        return embedded.sum(dim=2) if tokens.shape[2] > 1 else embedded.squeeze(2)

    def place(self, x: Tensor, positions: Int[Tensor, "*time"]) -> tuple[Tensor, Tensor | None]:
        """Add absolute positions to ``x``, or give the angles ``[*batch, time, head]`` of rotary ones."""
        if self.config.positions == "rotary":
            return x, rotary(positions, self.config.head_dim, self.config.rotary_base)
        if self.config.positions == "sinusoidal":
            return x + sinusoids(positions, self.config.width).to(x.dtype), None
        assert self.position is not None
        return x + self.position(positions), None

    def forward(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """Hidden states after the final norm. ValueError for more steps than the context."""
        if x.shape[1] > self.config.context:
            raise ValueError(f"{x.shape[1]} steps do not fit the context of {self.config.context}.")
        x, angles = self.place(x, torch.arange(x.shape[1], device=x.device))
        x = dropout(x, self.config.dropout if self.training else 0.0)
        for block in self.blocks:
            x = block(x, angles)
        return self.norm(x)

    def logits(self, hidden: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch streams ids"]:
        return self.head(hidden).unflatten(-1, (self.config.num_streams, -1))


SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(width=64, num_layers=2, num_heads=2),
    "small": dict(width=384, num_layers=6, num_heads=6),
    "gpt2": dict(width=768, num_layers=12, num_heads=12),
    "gpt2-medium": dict(width=1024, num_layers=24, num_heads=16),
    "gpt2-large": dict(width=1280, num_layers=36, num_heads=20),
    "gpt2-xl": dict(width=1600, num_layers=48, num_heads=25),
}
"""The original's size and GPT-2's four. Parameters without embeddings: 0.1 M, 10.6 M, 85 M, 302 M, 708 M, 1.5 G."""
