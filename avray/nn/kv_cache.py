"""A transformer that steps: cached keys and values of a fixed number of rows, each row at its own position.

A row's results are a function of its own tokens and the number of rows, to the bit (float32 on CPU), because every
operation has the same shape whoever else is there. Attention is the one whose cost should follow the longest row:
the cache is cut into blocks of ``BLOCK`` positions, each attended to by itself (the same kernel at the same shape
however many blocks there are), and the blocks' results are joined by their weights, where a block past a row's
position weighs exactly 0. A prompt is encoded alone, at its own length.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from avray.nn.transformer import Block, Transformer

BLOCK = 256
FAR = -1e30


class CachedTransformer:
    """Keys and values ``[layers, blocks, rows, kv heads, BLOCK, head]`` of a transformer in eval mode."""

    def __init__(self, transformer: Transformer, rows: int):
        config = transformer.config
        weight = transformer.norm.weight
        self.transformer, self.rows = transformer, rows
        self.num_blocks = math.ceil(config.context / BLOCK)
        shape = (config.num_layers, self.num_blocks, rows, config.kv_heads, BLOCK, config.head_dim)
        self.keys = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
        self.values = torch.zeros_like(self.keys)
        self.slots = torch.arange(rows, device=weight.device)
        self.offsets = torch.arange(self.num_blocks * BLOCK, device=weight.device).view(self.num_blocks, 1, BLOCK)

    @torch.inference_mode()
    def prefill(self, row: int, x: Float[Tensor, "time width"]) -> None:
        """Fill a row's cache from position 0 with the steps ``x`` (embeddings without positions)."""
        if not len(x):
            return
        config = self.transformer.config
        x, angles = self.transformer.place(x[None], torch.arange(len(x), device=x.device))
        for layer, block in enumerate(self.transformer.blocks):
            query, key, value = block.attention.project(block.norm1(x), angles)
            for cache, new in ((self.keys, key), (self.values, value)):
                for index, part in enumerate(new[0].split(BLOCK, dim=1)):
                    cache[layer, index, row, :, : part.shape[1]] = part
            if layer + 1 < config.num_layers:
                mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True,
                                                       enable_gqa=config.kv_heads != config.num_heads)
                x = x + block.attention.out(mixed.transpose(1, 2).flatten(2))
                x = x + block.mlp(block.norm2(x))

    @torch.inference_mode()
    def step(self, x: Float[Tensor, "rows width"], positions: list[int]) -> Float[Tensor, "rows width"]:
        """Hidden states of one further step of every row. A row nobody uses may stand at position 0."""
        at = torch.tensor(positions, device=x.device)
        num_blocks = max(positions) // BLOCK + 1
        # [blocks, rows, heads, 1, BLOCK]: 0 up to the row's own position, far below any score after it.
        mask = torch.where(self.offsets[:num_blocks] <= at[:, None], 0.0, FAR).to(x.dtype)[:, :, None, None]
        x, angles = self.transformer.place(x[:, None], at[:, None])
        angles = angles if angles is None else angles[:, None]
        for layer, block in enumerate(self.transformer.blocks):
            x = self._block(x, layer, block, angles, at, num_blocks, mask)
        return self.transformer.norm(x)[:, 0]

    def _block(self, x: Tensor, layer: int, block: Block, angles: Tensor | None, at: Int[Tensor, " rows"],
               num_blocks: int, mask: Tensor) -> Tensor:
        query, key, value = block.attention.project(block.norm1(x), angles)
        self.keys[layer][at // BLOCK, self.slots, :, at % BLOCK] = key[:, :, 0]
        self.values[layer][at // BLOCK, self.slots, :, at % BLOCK] = value[:, :, 0]
        mixed = self._attend(query, self.keys[layer, :num_blocks], self.values[layer, :num_blocks], mask)
        x = x + block.attention.out(mixed.flatten(1)[:, None])
        return x + block.mlp(block.norm2(x))

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        num_blocks, rows, kv_heads, _, head_dim = keys.shape
        grouped = query.view(1, rows, kv_heads, -1, head_dim)
        scores = grouped @ keys.transpose(-1, -2) * head_dim**-0.5 + mask
        greatest = scores.amax(dim=(0, -1), keepdim=True)
        weights = (scores - greatest).exp()
        # One product gives each block's weighted values, another its weight; joined over all the blocks there could
        # be, so that the sum has one order.
        parts = weights @ values
        sums = weights @ torch.ones(BLOCK, 1, dtype=values.dtype, device=values.device)
        return (parts.sum(0) / sums.sum(0)).view(rows, -1, head_dim)
