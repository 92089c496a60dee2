"""The network of multitask: one causal transformer over task tokens, text and embeddings, and what stands on it.

At the original's settings the transformer has 199,296 + 129 V parameters for V ids. An embedding is predicted at the
token before it: by one product (``mse``, the original's: the mean of what could follow) or by a small network that
carries noise to it (``flow``: rectified flow, Liu et al., 2022, conditioned on the hidden state as in Li et al., 2024),
which draws from what could follow. Where embeddings are sequences, each goes back in through a product of its own, and
a logit says whether it was the last.

Embeddings are in [-1, 1] here, by ``low`` and ``high`` of each number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from avray.encoders.tokens import Tokens
from avray.nn.transformer import Transformer, TransformerConfig, sinusoids

HeadKind = Literal["mse", "flow"]
TASKS = ("text", "code", "image", "audio", "video")
WRITTEN, EMBEDDED = TASKS[:3], TASKS[3:]
FLOW_WIDTH, FLOW_DRAWS, TIME_WIDTH = 256, 8, 32
"""Of the flow's network; noise and times drawn for each embedding at each step: one at a time took four times the
steps to the same loss."""


@dataclass(frozen=True)
class EmbeddingSizes:
    """One task's: numbers of an embedding, and what a decoder makes of it, frames times numbers (0: it needs none)."""

    width: int
    decoded_frames: int = 0
    decoded_width: int = 0


class MultitaskModel(nn.Module):
    """``tokens.size`` text ids, then the five task tokens."""

    def __init__(self, config: TransformerConfig, num_text_ids: int, sizes: Mapping[str, EmbeddingSizes],
                 head: HeadKind, is_sequence: bool, scales: Mapping[str, np.ndarray]) -> None:
        super().__init__()
        self.num_text_ids = num_text_ids
        self.transformer = Transformer(config)
        self.heads = nn.ModuleDict({task: Head(config.width, size.width, head, is_sequence)
                                    for task, size in sizes.items()})
        self.decoders = nn.ModuleDict({task: Decoder(size.width, size.decoded_frames, size.decoded_width)
                                       for task, size in sizes.items() if size.decoded_frames})
        self.scales = {name: torch.from_numpy(array) for name, array in scales.items()}

    def scale(self, name: str, values: Tensor) -> Tensor:
        """To [-1, 1]: ``name`` is a task's, or its decoder's output."""
        low, high = (self.scales[f"{name}.{end}"].to(values.device) for end in ("low", "high"))
        return (values - low) / (high - low) * 2 - 1

    def unscale(self, name: str, values: Tensor) -> Tensor:
        low, high = (self.scales[f"{name}.{end}"].to(values.device) for end in ("low", "high"))
        return (values + 1) / 2 * (high - low) + low

    def embed(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time width"]:
        return self.transformer.embed(tokens[..., None])

    def text_logits(self, hidden: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch ids"]:
        """Of text ids alone: task tokens, and the id of unseen characters, cannot be drawn."""
        return self.transformer.logits(hidden)[..., 0, : self.num_text_ids]

    def decode(self, task: str, embedding: Float[Tensor, " width"]) -> Float[np.ndarray, "frames decoded"]:
        """What a renderer takes: the embedding itself, or what its decoder makes of it."""
        if task not in self.decoders:
            return self.unscale(task, embedding)[None].float().cpu().numpy()
        decoded = self.decoders[task](embedding[None])[0]
        return self.unscale(f"{task}.decoded", decoded).float().cpu().numpy()


class Head(nn.Module):
    """Hidden states to one task's embeddings."""

    def __init__(self, width: int, size: int, kind: HeadKind, is_sequence: bool) -> None:
        super().__init__()
        self.size, self.kind = size, kind
        self.out = nn.Linear(width, size) if kind == "mse" else Flow(width, size)
        self.into = nn.Linear(size, width) if is_sequence else None
        self.end = nn.Linear(width, 1) if is_sequence else None

    def loss(self, hidden: Float[Tensor, "rows width"], wanted: Float[Tensor, "rows size"],
             generator: torch.Generator) -> Float[Tensor, " rows"]:
        """Squared error of each row: of the embedding, or of the flow's velocity, averaged over draws."""
        if isinstance(self.out, Flow):
            return self.out.loss(hidden, wanted, generator)
        return (self.out(hidden).float() - wanted).square().sum(-1)

    def draw(self, hidden: Float[Tensor, "rows width"], noise: Float[Tensor, "rows size"],
             num_steps: int) -> Float[Tensor, "rows size"]:
        """``mse`` draws nothing: the noise is not looked at."""
        return self.out.solve(hidden, noise, num_steps) if isinstance(self.out, Flow) else self.out(hidden)


class Flow(nn.Module):
    """The velocity from noise (time 1) to an embedding (time 0), given a hidden state."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.input = nn.Linear(size, FLOW_WIDTH)
        self.condition = nn.Linear(width + TIME_WIDTH, FLOW_WIDTH)
        self.blocks = nn.ModuleList(residual(FLOW_WIDTH) for _ in range(2))
        self.output = nn.Linear(FLOW_WIDTH, size)

    def forward(self, x: Float[Tensor, "rows size"], time: Float[Tensor, " rows"],
                hidden: Float[Tensor, "rows width"]) -> Float[Tensor, "rows size"]:
        when = sinusoids((1000 * time).round().long(), TIME_WIDTH).to(hidden.dtype)
        condition = self.condition(torch.cat([hidden, when], -1))
        x = self.input(x)
        for block in self.blocks:
            x = x + block(x + condition)
        return self.output(F.silu(x + condition))

    def loss(self, hidden: Tensor, wanted: Tensor, generator: torch.Generator) -> Tensor:
        rows, draws = len(wanted), FLOW_DRAWS
        hidden, wanted = hidden.repeat(draws, 1), wanted.repeat(draws, 1)
        time = torch.rand(len(wanted), generator=generator, device=wanted.device)
        noise = torch.randn(wanted.shape, generator=generator, device=wanted.device)
        noisy = torch.lerp(wanted, noise, time[:, None])
        error = (self(noisy, time, hidden).float() - (noise - wanted)).square().sum(-1)
        return error.view(draws, rows).mean(0)

    def solve(self, hidden: Tensor, x: Tensor, num_steps: int) -> Tensor:
        """Euler's steps from time 1 to 0."""
        for step in range(num_steps):
            time = torch.full((len(x),), 1 - step / num_steps, device=x.device)
            x = x - self(x, time, hidden) / num_steps
        return x


def residual(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))


class Decoder(nn.Module):
    """An embedding that cannot be played or shown -> the codec's frames, all at once."""

    def __init__(self, size: int, num_frames: int, width: int, hidden: int = 256) -> None:
        super().__init__()
        self.num_frames = num_frames
        self.input, self.output = nn.Linear(size, hidden), nn.Linear(hidden, width)
        self.blocks = nn.ModuleList(residual(hidden) for _ in range(2))

    def forward(self, embedding: Float[Tensor, "batch size"]) -> Float[Tensor, "batch frames width"]:
        at = sinusoids(torch.arange(self.num_frames, device=embedding.device), self.input.out_features)
        x = self.input(embedding)[:, None] + at
        for block in self.blocks:
            x = x + block(x)
        return self.output(x)


def init(model: MultitaskModel, generator: torch.Generator) -> None:
    """GPT-2's in the transformer; Glorot's elsewhere, the flow's last product 0."""
    model.transformer.init(generator)
    for part in (*model.heads.values(), *model.decoders.values()):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
    for head in model.heads.values():
        if isinstance(head.out, Flow):
            nn.init.zeros_(head.out.output.weight)


def drawable(tokens: Tokens) -> int:
    """How many text ids can be drawn: the one for unseen characters, the last, is none of them."""
    return tokens.size - hasattr(tokens, "unknown")


def gaussian_flow_loss(deviation: np.ndarray, num_times: int = 1000) -> float:
    """What the best guess loses that knows each number's mean and deviation alone: the velocity's variance given the
    noisy number, s² / ((1 - t)² s² + t²), averaged over times and summed over numbers."""
    time = (np.arange(num_times) + 0.5)[:, None] / num_times
    variance = deviation.astype(np.float64) ** 2
    return float((variance / ((1 - time) ** 2 * variance + time**2)).mean(0).sum())


def noise_of(seed: int, index: int, size: int) -> Tensor:
    """Standard normal numbers ``[size]``, a function of (seed, index) alone."""
    random = np.random.Generator(np.random.Philox(key=[seed % 2**64, index]))
    return torch.from_numpy(random.standard_normal(size, np.float32))
