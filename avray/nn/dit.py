"""A diffusion transformer over latent frames, conditioned in three ways at once.

What lies along the same time as the sound (notes, a noisy recording, video) is added to the frames in every block; what
does not (a description) is asked by cross-attention; and a summary of it, with the level of noise, sets the scale and
shift of every norm (AdaLN, Peebles and Xie 2023; ``single`` shares one product between all blocks, Chen et al. 2023,
PixArt). The second half of the blocks also sees what the first half made, the last first (Bao et al. 2023, U-ViT).

What it foresees is the sound itself, from which the direction follows (``flow.towards``): a position of several frames
is wider than the network, and noise would not pass through. Where a sound is given that it is to be like (a noisy or a
dull one), it foresees how much of that to keep in each channel and what to add: fine detail need not pass either.

Everything that does not depend on the noisy frames is worked out apart (``context``, ``modulations``), once a request
instead of once a step; training takes the same path. Absent text leaves one learnt token, whose cross-attention needs
no product at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from avray.nn.flow import towards
from avray.nn.transformer import rotary, rotate

AdaLN = Literal["full", "single"]
_NUM_SINES = 128


@dataclass(frozen=True)
class DiTConfig:
    """Sizes. ``patch`` frames make one position."""

    width: int = 192
    num_layers: int = 4
    num_heads: int = 3
    patch: int = 1
    mlp_ratio: float = 3.0
    adaln: AdaLN = "full"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("width", "num_layers", "num_heads", "patch", "mlp_ratio"):
            if not getattr(self, name) > 0:
                raise ValueError(f"family.network.{name} must be above 0, got {getattr(self, name)}.")
        if self.num_layers % 2:
            raise ValueError(f"family.network.num_layers = {self.num_layers} must be even: the second half sees the "
                             "first.")
        if self.width % self.num_heads or self.width // self.num_heads % 2:
            raise ValueError(f"family.network.num_heads = {self.num_heads} must divide family.network.width = "
                             f"{self.width} into even parts.")
        if self.adaln not in get_args(AdaLN):
            raise ValueError(f"family.network.adaln must be one of {', '.join(get_args(AdaLN))}, got {self.adaln!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"family.network.dropout must be from 0 to below 1, got {self.dropout}.")


@dataclass(frozen=True)
class Conditions:
    """What a sound is to be. ``tokens`` begin with one that is always there; ``aligned`` lies along the frames, as does
    ``heard``, a sound that it is to be like, zero where there is none."""

    tokens: Float[Tensor, "batch text width"]
    token_valid: Bool[Tensor, "batch text"]
    summary: Float[Tensor, "batch width"]
    aligned: Float[Tensor, "batch time width"] | None = None
    heard: Float[Tensor, "batch time channels"] | None = None

    def compact(self) -> Conditions:
        """Without the columns of tokens that no row has."""
        some = self.token_valid.any(0)
        return Conditions(self.tokens[:, some], self.token_valid[:, some], self.summary, self.aligned, self.heard)


@dataclass(frozen=True)
class BlockContext:
    """A block's share of the conditions: what attention to a single token comes to, ``alone`` ``[rows, 1, width]``, for
    the first rows, and keys and values ``[rows, heads, text, head]`` for the others; and what is added to the frames of
    all, ``fused`` ``[batch, positions, width]``."""

    alone: Tensor | None
    key: Tensor | None
    value: Tensor | None
    fused: Tensor | None


@dataclass(frozen=True)
class Context:
    blocks: list[BlockContext]
    text_mask: Tensor | None
    heard: Tensor | None

    @staticmethod
    def joined(contexts: Sequence[Context]) -> Context:
        """One batch of several single rows, of which at most the last has a text."""
        assert all(block.key is None for context in contexts[:-1] for block in context.blocks)
        blocks = [BlockContext(*(_joined([getattr(block, name) for block in same]) for name in (
            "alone", "key", "value", "fused"))) for same in zip(*(one.blocks for one in contexts), strict=True)]
        return Context(blocks, contexts[-1].text_mask, _joined([context.heard for context in contexts]))


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


class DiT(nn.Module):
    """Directions for noisy frames ``[batch, time, channels]``; ``has_aligned`` where some condition lies in time,
    ``has_heard`` where one of them is a sound to be like."""

    def __init__(self, config: DiTConfig, channels: int, has_aligned: bool = True, has_heard: bool = False) -> None:
        super().__init__()
        self.config, width, half = config, config.width, config.num_layers // 2
        self.enter = nn.Linear(config.patch * channels, width)
        self.level = nn.Sequential(nn.Linear(2 * _NUM_SINES, width), nn.SiLU(), nn.Linear(width, width))
        self.gather = nn.Linear(config.patch * width, width) if has_aligned else None
        self.shared = nn.Linear(width, 6 * width) if config.adaln == "single" else None
        self.blocks = nn.ModuleList(Block(config, index >= half, has_aligned) for index in range(config.num_layers))
        self.last = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, config.patch * channels)
        self.keep = nn.Linear(width, config.patch * channels) if has_heard else None

    def init(self, generator: torch.Generator) -> None:
        """Glorot's, and 0 for what opens a residual branch, so that a block begins as the identity."""
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2 or name.endswith("table"):
                nn.init.ones_(parameter) if "norm" in name else nn.init.zeros_(parameter)
            elif any(part in name for part in ("modulate", "shared", "last.", "leave", "keep", "ask_out", "fuse")):
                nn.init.zeros_(parameter)
            else:
                nn.init.xavier_uniform_(parameter, generator=generator)

    def forward(self, x: Float[Tensor, "batch time channels"], levels: Float[Tensor, " batch"],
                conditions: Conditions, valid: Bool[Tensor, "batch time"] | None = None,
                ) -> Float[Tensor, "batch time channels"]:
        """``valid`` marks the frames there are; None: all of them."""
        return self.run(x, self.context(conditions), self.modulations(levels, conditions.summary), valid)

    def context(self, conditions: Conditions) -> Context:
        """Of a batch of conditions; nothing in it depends on the noisy frames or the level."""
        mask = conditions.token_valid
        aligned = None
        if conditions.aligned is not None:
            assert self.gather is not None
            aligned = self.gather(self.patches(conditions.aligned))
        alone = mask.shape[1] == 1
        blocks = [block.context(conditions.tokens, alone, aligned) for block in self._blocks()]
        return Context(blocks, None if alone else attended(mask), conditions.heard)

    def modulations(self, levels: Float[Tensor, " batch"],
                    summary: Float[Tensor, "batch width"]) -> list[tuple[Tensor, ...]]:
        """For each block twice a shift, a factor and a gate ``[batch, 1, width]``; for the end a shift, a factor and
        the level, ``[batch, 1, 1]``."""
        state = self.level(level_waves(levels).to(summary.dtype)) + summary
        state = F.silu(state)[:, None]
        shared = None if self.shared is None else self.shared(state)
        found = [block.modulation(state, shared).chunk(6, -1) for block in self._blocks()]
        shift, scale = self.last(state).chunk(2, -1)
        end = (shift, 1 + scale, levels[:, None, None])
        return [*((s1, 1 + f1, g1, s2, 1 + f2, g2) for s1, f1, g1, s2, f2, g2 in found), end]

    def angles(self, time: int, device: torch.device) -> Tensor:
        """Of the rotary positions of ``time`` frames."""
        positions = torch.arange(-(-time // self.config.patch), device=device)
        return rotary(positions, self.config.width // self.config.num_heads, 10_000.0)

    def run(self, x: Float[Tensor, "batch time channels"], context: Context, modulations: list[tuple[Tensor, ...]],
            valid: Bool[Tensor, "batch time"] | None, angles: Tensor | None = None,
            ) -> Float[Tensor, "batch time channels"]:
        noisy, time, patch = x, x.shape[1], self.config.patch
        angles = self.angles(time, x.device) if angles is None else angles
        x = self.enter(self.patches(x))
        if valid is not None:
            if patch > 1:
                valid = F.pad(valid, (0, -time % patch)).unflatten(1, (-1, patch)).any(-1)
            valid = attended(valid)
        skips: list[Tensor] = []
        for index, block in enumerate(self._blocks()):
            skip = skips.pop() if index >= self.config.num_layers // 2 else None
            x = block(x, skip, context.blocks[index], context.text_mask, modulations[index], angles, valid)
            if skip is None:
                skips.append(x)
        shift, factor, level = modulations[-1]
        x = modulated(x, shift, factor)
        sound = self.frames(self.leave(x), time)
        if self.keep is not None:
            assert context.heard is not None
            sound = torch.addcmul(sound, context.heard, self.frames(self.keep(x), time))
        return towards(noisy, sound, level)

    def patches(self, frames: Tensor) -> Tensor:
        """``[batch, time, width]`` -> ``[batch, time / patch, patch * width]``, the end filled with zeros."""
        patch = self.config.patch
        if patch == 1:
            return frames
        return F.pad(frames, (0, 0, 0, -frames.shape[1] % patch)).unflatten(1, (-1, patch)).flatten(2)

    def frames(self, patches: Tensor, time: int) -> Tensor:
        """``[batch, positions, patch * width]`` -> ``[batch, time, width]``."""
        return patches.unflatten(2, (self.config.patch, -1)).flatten(1, 2)[:, :time]

    def _blocks(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]


class Block(nn.Module):
    """Self-attention, cross-attention and an MLP, each on a modulated norm and added to the residual."""

    def __init__(self, config: DiTConfig, has_skip: bool, has_aligned: bool) -> None:
        super().__init__()
        width, hidden = config.width, round(config.mlp_ratio * config.width)
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.skip = nn.Linear(2 * width, width) if has_skip else None
        self.modulate = nn.Linear(width, 6 * width) if config.adaln == "full" else None
        self.table = nn.Parameter(torch.empty(6 * width)) if config.adaln == "single" else None
        self.fuse = nn.Linear(width, width, bias=False) if has_aligned else None
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_norm, self.key_norm = (nn.RMSNorm(width // config.num_heads, eps=1e-6) for _ in range(2))
        self.out = nn.Linear(width, width)
        self.ask_norm = nn.LayerNorm(width)
        self.ask = nn.Linear(width, width, bias=False)
        self.answer = nn.Linear(width, 2 * width, bias=False)
        self.ask_out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def context(self, tokens: Tensor, alone: bool, aligned: Tensor | None) -> BlockContext:
        key, value = self.answer(tokens).chunk(2, -1)
        fused = None if aligned is None or self.fuse is None else self.fuse(aligned)
        if alone:  # attention over one token is that token
            return BlockContext(self.ask_out(value), None, None, fused)
        return BlockContext(None, self.heads(key), self.heads(value), fused)

    def modulation(self, state: Tensor, shared: Tensor | None) -> Tensor:
        if self.modulate is not None:
            return self.modulate(state)
        assert shared is not None and self.table is not None
        return shared + self.table

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, skip: Tensor | None, context: BlockContext, text_mask: Tensor | None,
                modulation: tuple[Tensor, ...], angles: Tensor, valid: Tensor | None) -> Tensor:
        shift1, factor1, gate1, shift2, factor2, gate2 = modulation
        if skip is not None:
            assert self.skip is not None
            x = self.skip(torch.cat([x, skip], -1))
        if context.fused is not None:
            x = x + context.fused
        query, key, value = map(self.heads, self.qkv(modulated(x, shift1, factor1)).chunk(3, -1))
        query, key = rotate(self.query_norm(query), angles), rotate(self.key_norm(key), angles)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=valid)
        x = torch.addcmul(x, gate1, self.out(attended.transpose(1, 2).flatten(2)))
        x = self.heard(x, context, text_mask)
        hidden = F.gelu(self.up(modulated(x, shift2, factor2)), approximate="tanh")
        return torch.addcmul(x, gate2, self.down(F.dropout(hidden, self.dropout, self.training)))

    def heard(self, x: Tensor, context: BlockContext, text_mask: Tensor | None) -> Tensor:
        """``x`` once it has asked the text."""
        if context.key is None or context.value is None:
            assert context.alone is not None
            return x + context.alone
        number = len(x) - len(context.key)
        some = x[number:]
        query = self.heads(self.ask(self.ask_norm(some)))
        told = F.scaled_dot_product_attention(query, context.key, context.value, attn_mask=text_mask)
        some = some + self.ask_out(told.transpose(1, 2).flatten(2))
        return some if context.alone is None else torch.cat([x[:number] + context.alone, some])


def attended(valid: Bool[Tensor, "batch time"]) -> Bool[Tensor, "batch 1 1 time"] | None:
    """The mask of an attention; None where all is there, which nobody knows of tensors without values."""
    return None if not valid.is_meta and bool(valid.all()) else valid[:, None, None, :]


def level_waves(levels: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch waves"]:
    """128 cosines and sines of each level, as of diffusion's thousand steps."""
    frequencies = torch.exp(torch.arange(_NUM_SINES, device=levels.device) * (-math.log(10_000.0) / _NUM_SINES))
    angles = 1000 * levels[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def modulated(x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
    """The norm of ``x`` times a factor plus a shift, each the same along time: for a single row in one call."""
    if x.ndim == 3 and len(x) == 1 and not torch.is_grad_enabled():
        return F.layer_norm(x, x.shape[-1:], factor[0, 0], shift[0, 0])
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), factor)
