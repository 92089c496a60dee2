"""From what is asked to what a diffusion transformer takes: text to tokens, frames to frames, both to a duration.

Small models learn which letters matter from little data only if a local pattern ("C#4", "2.4 s") can reach the output
in few steps: hence two convolutions before the encoder's attention, and a summary that takes each feature's maximum
over the text beside an average.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from avray.nn.transformer import rotary, rotate

AdapterName = Literal["prefix", "cross_attention", "plain"]


@dataclass(frozen=True)
class AdapterConfig:
    """How content meets the instruction: ``prefix`` puts the instruction's tokens in front of the text's,
    ``cross_attention`` lets text and frames ask it, ``plain`` leaves it out."""

    name: AdapterName = "plain"
    num_layers: int = 1

    def __post_init__(self) -> None:
        if self.name not in get_args(AdapterName):
            raise ValueError(f"family.adapter.name must be one of {', '.join(get_args(AdapterName))}, got "
                             f"{self.name!r}.")
        if self.num_layers < 1:
            raise ValueError(f"family.adapter.num_layers must be at least 1, got {self.num_layers}.")


@dataclass(frozen=True)
class Tokens:
    """Vectors, and which of them there are."""

    values: Float[Tensor, "batch time width"]
    valid: Bool[Tensor, "batch time"]


class EncoderBlock(nn.Module):
    """Pre-norm self-attention (rotary) or, over ``memory``, cross-attention, and an MLP."""

    def __init__(self, width: int, num_heads: int, across: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.memory_norm = nn.LayerNorm(width) if across else None
        self.query, self.key_value = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, valid: Tensor, memory: Tensor | None = None) -> Tensor:
        """``valid`` marks what may be attended to; a row with nothing attends to nothing."""
        normed = self.norm1(x)
        source = normed if memory is None or self.memory_norm is None else self.memory_norm(memory)
        query, key, value = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                             for part in (self.query(normed), *self.key_value(source).chunk(2, -1)))
        if memory is None:
            angles = rotary(torch.arange(x.shape[1], device=x.device), query.shape[-1], 10_000.0)
            query, key = rotate(query, angles), rotate(key, angles)
        some = valid | ~valid.any(1, keepdim=True)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=some[:, None, None, :])
        mixed = self.out(mixed.transpose(1, 2).flatten(2)) * valid.any(1)[:, None, None]
        x = x + mixed
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class TextEncoder(nn.Module):
    """Ids, or vectors of a frozen encoder, to tokens."""

    def __init__(self, vocabulary: int, vector_width: int, width: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width) if not vector_width else None
        self.enter = nn.Linear(vector_width, width) if vector_width else None
        self.local = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2) for _ in range(2 if not vector_width else 0))
        self.blocks = nn.ModuleList(EncoderBlock(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, text: Tensor, valid: Bool[Tensor, "batch time"]) -> Tokens:
        """``text`` is ids ``[batch, time]`` or vectors ``[batch, time, width]``."""
        if self.embedding is not None:
            x = self.embedding(text)
        else:
            assert self.enter is not None
            x = self.enter(text)
        for convolution in self.local:
            x = x + F.gelu(convolution((x * valid[..., None]).transpose(1, 2)).transpose(1, 2), approximate="tanh")
        for block in self.blocks:
            x = block(x, valid)
        return Tokens(self.norm(x), valid)


class Summary(nn.Module):
    """Tokens to one vector: each feature's maximum, and its average."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, tokens: Tokens) -> Float[Tensor, "batch width"]:
        """Rows without tokens give what zeros give."""
        valid = tokens.valid[..., None]
        highest = tokens.values.masked_fill(~valid, -1e4).amax(1) * valid.any(1)
        mean = (tokens.values * valid).sum(1) / valid.sum(1).clamp_min(1)
        return self.leave(F.gelu(self.enter(torch.cat([highest, mean], -1)), approximate="tanh"))


class Adapter(nn.Module):
    """Content and instruction become one."""

    def __init__(self, config: AdapterConfig, width: int, num_heads: int) -> None:
        super().__init__()
        self.name = config.name
        across = config.name == "cross_attention"
        layers = 0 if config.name == "plain" else config.num_layers
        self.kinds = nn.Parameter(torch.empty(2, width)) if config.name == "prefix" else None
        self.blocks = nn.ModuleList(EncoderBlock(width, num_heads, across) for _ in range(layers))

    def text(self, content: Tokens, instruction: Tokens | None) -> Tokens:
        if self.name == "plain" or instruction is None:
            return content
        if self.kinds is not None:
            joined = torch.cat([instruction.values + self.kinds[0], content.values + self.kinds[1]], 1)
            valid = torch.cat([instruction.valid, content.valid], 1)
            for block in self.blocks:
                joined = block(joined, valid)
            return Tokens(joined, valid)
        return Tokens(self.ask(content.values, instruction), content.valid)

    def ask(self, frames: Tensor, instruction: Tokens | None) -> Tensor:
        """Frames that have asked the instruction, where this adapter lets them."""
        if self.name == "cross_attention" and instruction is not None:
            for block in self.blocks:
                frames = block(frames, instruction.valid, instruction.values)
        return frames


class AlignedEncoder(nn.Module):
    """The sum of whatever lies along the frames, through two convolutions over nine frames."""

    def __init__(self, widths: dict[str, int], width: int) -> None:
        super().__init__()
        self.enter = nn.ModuleDict({name: nn.Linear(size, width) for name, size in widths.items()})
        self.absent = nn.Parameter(torch.empty(width))
        self.local = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2) for _ in range(2))

    def forward(self, frames: dict[str, Tensor], present: dict[str, Bool[Tensor, " batch"]],
                lengths: Int[Tensor, " batch"], num_frames: int) -> Float[Tensor, "batch time width"]:
        """Sources ``[batch, time, size]`` of any lengths, cut or filled up with zeros; rows marked absent give the
        learnt nothing. What stands beyond a row's length reaches nothing before it."""
        some = torch.stack(list(present.values())).any(0)[:, None, None]
        within = (torch.arange(num_frames, device=some.device) < lengths[:, None])[..., None]
        x = torch.zeros((), device=some.device)
        for name, source in frames.items():
            x = x + self.enter[name](fitting(source, num_frames)) * present[name][:, None, None]
        for convolution in self.local:
            x = x * within
            x = x + F.gelu(convolution(x.transpose(1, 2)).transpose(1, 2), approximate="tanh")
        return torch.where(some, x, self.absent)


class DurationPredictor(nn.Module):
    """The logarithm of a sound's seconds: from a summary of its description or, for what is spoken, the sum of its
    characters' durations."""

    def __init__(self, width: int, speaks: bool) -> None:
        super().__init__()
        self.hidden, self.total = nn.Linear(width, width), nn.Linear(width, 1)
        self.character = nn.Linear(width, 1) if speaks else None

    def forward(self, summary: Float[Tensor, "batch width"]) -> Float[Tensor, " batch"]:
        return self.total(F.gelu(self.hidden(summary), approximate="tanh")).squeeze(-1)

    def characters(self, spoken: Tokens) -> Float[Tensor, "batch time"]:
        """Each one's seconds, 70 ms at first; 0 where there is none."""
        assert self.character is not None
        return (0.07 * torch.exp(self.character(spoken.values).squeeze(-1).clamp(-4, 4))) * spoken.valid


def fitting(frames: Float[Tensor, "batch time width"], num_frames: int) -> Float[Tensor, "batch frames width"]:
    return F.pad(frames, (0, 0, 0, max(0, num_frames - frames.shape[1])))[:, :num_frames]


def stretched(tokens: Tokens, durations: Float[Tensor, "batch time"], lengths: Int[Tensor, " batch"],
              num_frames: int) -> Float[Tensor, "batch frames width"]:
    """Each token over its share of its row's ``lengths`` frames, by durations of any unit; zeros beyond."""
    ends = torch.cumsum(durations * tokens.valid, 1)
    ends = ends / ends[:, -1:].clamp_min(1e-8) * lengths[:, None]
    middles = torch.arange(num_frames, device=ends.device) + 0.5
    which = torch.searchsorted(ends, middles.expand(len(ends), -1).contiguous()).clamp(max=ends.shape[1] - 1)
    within = (middles < lengths[:, None])[..., None]
    return tokens.values.gather(1, which[..., None].expand(-1, -1, tokens.values.shape[2])) * within


def init_conditioning(module: nn.Module, generator: torch.Generator) -> None:
    """Glorot's for products, small normals for tables; durations begin at their mean."""
    for name, parameter in _named(module):
        if name.endswith(("absent", "kinds", "embedding.weight", "start", "nothing")):
            nn.init.normal_(parameter, std=0.02 if not name.endswith("embedding.weight") else 0.5, generator=generator)
        elif "duration." in name and ("total" in name or "character" in name):
            nn.init.zeros_(parameter)
        elif parameter.ndim >= 2:
            nn.init.xavier_uniform_(parameter, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.ones_(parameter)


def _named(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if not name.startswith("network."))
