"""A transformer that steps: cached keys and values of a fixed number of rows, each row at its own position.

A row's results are a function of its own tokens and the number of rows, to the bit (float32 on CPU), because every
product has the same shape whoever else is there; only attention is cut to the longest row, rounded up to 64 positions,
and there a masked position weighs exactly 0 and is added last. A prompt is encoded alone, at its own length.

Keys and values share a tensor and are written by one ``index_copy_`` whose index serves every layer: at a width of 384
an eager call costs as much as its arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from avray.nn.native import NativeStep
from avray.nn.transformer import Transformer

ROUND = 64
Weights = Literal["torch", "float32", "bfloat16", "int8"]


class CachedTransformer:
    """Keys and values ``[layers, rows, 2 x kv heads, context, head]`` of a transformer in eval mode, and its step:
    torch's own, or the compiled one (``avray.nn.native``) with weights of the type named; there bfloat16 and int8 keep
    keys and values in bfloat16. ``cuda_graph`` captures torch's step on an NVIDIA GPU, once for each power of two of
    positions attended to. ValueError where a choice does not fit the device."""

    def __init__(self, transformer: Transformer, rows: int, weights: Weights = "torch", cuda_graph: bool = False):
        config = transformer.config
        weight = transformer.norm.weight
        dtype = torch.bfloat16 if weights in ("bfloat16", "int8") else weight.dtype
        self.transformer, self.rows = transformer, rows
        context = -(-config.context // ROUND) * ROUND
        self.cache = torch.zeros(config.num_layers, rows, 2 * config.kv_heads, context, config.head_dim,
                                 device=weight.device, dtype=dtype)
        self.lines = (torch.arange(rows * 2 * config.kv_heads, device=weight.device) * context).view(rows, -1)
        self.positions = torch.arange(context, device=weight.device)
        self.native = None if weights == "torch" else NativeStep(transformer, self.cache, weights)
        if cuda_graph and (weight.device.type != "cuda" or self.native is not None):
            raise ValueError(f"family.cuda_graph is for torch's step on an NVIDIA GPU, not on {weight.device}.")
        self.graph = _Graphs(self) if cuda_graph else None

    @torch.inference_mode()
    def prefill(self, row: int, x: Float[Tensor, "time width"]) -> None:
        """Fill a row's cache from position 0 with the steps ``x`` (embeddings without positions)."""
        if not len(x):
            return
        config = self.transformer.config
        x, angles = self.transformer.place(x[None], self.positions[: len(x)])
        for cache, block in zip(self.cache, self.transformer.blocks, strict=True):
            query, key, value = block.attention.project(block.norm1(x), angles)
            cache[row, : config.kv_heads, : x.shape[1]] = key[0]
            cache[row, config.kv_heads :, : x.shape[1]] = value[0]
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=config.grouped)
            x = x + block.attention.out(mixed.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))

    @torch.inference_mode()
    def step(self, x: Float[Tensor, "rows width"],
             positions: Sequence[int]) -> Float[Tensor, "rows streams ids"]:
        """Logits after one further step of every row, valid until the next. A row nobody uses may stand at 0."""
        at = torch.tensor(positions, device=x.device)
        if self.native is not None:
            x, angles = self.transformer.place(x, at)
            return self.native(x, at, angles).unflatten(-1, (self.transformer.config.num_streams, -1))
        length = max(positions) + 1
        if self.graph is not None:
            return self.graph(x, at, length)
        return self.run(x, at, length if self.rows == 1 else -(-length // ROUND) * ROUND)

    @torch.inference_mode()
    def hidden(self, x: Float[Tensor, "rows width"], positions: Sequence[int]) -> Float[Tensor, "rows width"]:
        """As ``step``, by torch, but for the last product: states after the final norm."""
        at = torch.tensor(positions, device=x.device)
        length = max(positions) + 1
        return self._hidden(x, at, length if self.rows == 1 else -(-length // ROUND) * ROUND)

    def run(self, x: Tensor, at: Tensor, length: int) -> Tensor:
        """A step by torch, attending to the first ``length`` positions; a single row's end there, unless graphed."""
        return self.transformer.logits(self._hidden(x, at, length))

    def _hidden(self, x: Tensor, at: Tensor, length: int) -> Tensor:
        mask = None
        x, angles = self.transformer.place(x, at)
        if self.rows > 1 or self.graph is not None:
            mask = torch.where(self.positions[:length] <= at[:, None], 0.0, -torch.inf).to(x.dtype)[:, None, None]
        lines = (self.lines + at[:, None]).flatten()
        angles = None if angles is None else angles[:, None]
        for cache, block in zip(self.cache, self.transformer.blocks, strict=True):
            x = _step(block, x, cache, lines, length, mask, angles)
        return self.transformer.norm(x)


class _Graphs:
    """A transformer's step as CUDA graphs, one for each length."""

    def __init__(self, cached: CachedTransformer):
        config, device = cached.transformer.config, cached.cache.device
        self.cached = cached
        self.x = torch.zeros(cached.rows, config.width, device=device, dtype=cached.cache.dtype)
        self.at = torch.zeros(cached.rows, device=device, dtype=torch.int64)
        self.captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, x: Tensor, at: Tensor, length: int) -> Tensor:
        self.x.copy_(x)
        self.at.copy_(at)
        length = min(max(256, 1 << (length - 1).bit_length()), len(self.cached.positions))
        if length not in self.captured:
            self.captured[length] = self._capture(length)
        graph, logits = self.captured[length]
        graph.replay()
        return logits

    def _capture(self, length: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """After two plain runs, which torch asks for and which write what the replay will write again."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.cached.run(self.x, self.at, length)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.cached.run(self.x, self.at, length)
        return graph, logits


def _step(block: nn.Module, x: Tensor, cache: Tensor, lines: Tensor, length: int, mask: Tensor | None,
          angles: Tensor | None) -> Tensor:
    attention, config, rows = block.attention, block.attention.config, len(x)
    heads = attention.qkv(block.norm1(x)).view(rows, -1, config.head_dim)
    query, fresh = heads[:, : config.num_heads], heads[:, config.num_heads :]
    if angles is not None or config.qk_norm:
        query, key, value = attention.turn(heads, angles, dim=1)
        fresh = torch.cat([key, value], dim=1)
    cache.view(-1, config.head_dim).index_copy_(0, lines, fresh.reshape(-1, config.head_dim))
    mixed = F.scaled_dot_product_attention(query.unsqueeze(2), cache[:, : config.kv_heads, :length],
                                           cache[:, config.kv_heads :, :length], attn_mask=mask,
                                           enable_gqa=config.grouped)
    x = x + attention.out(mixed.view(rows, -1))
    return x + block.mlp(block.norm2(x))
