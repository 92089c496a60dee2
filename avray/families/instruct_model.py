"""The network of ``instruct``: encoders of what is asked, a duration predictor and a diffusion transformer, one root.

A request passes through ``condition`` and the duration predictor once, and through the transformer at each step. In
training both kinds of conditions are dropped apart from each other, row by row, so that each can be guided by itself;
the durations are always learnt with the text there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from avray.family import Fitted
from avray.nn.conditioning import (
    Adapter,
    AdapterConfig,
    AlignedEncoder,
    DurationPredictor,
    Summary,
    TextEncoder,
    Tokens,
    fitting,
    init_conditioning,
    stretched,
)
from avray.nn.dit import Conditions, DiT, DiTConfig

ALIGNED = ("notes", "sound", "video")
"""Conditions that come as frames; ``spoken`` becomes frames here."""


@dataclass(frozen=True)
class Asked:
    """Texts of a batch, encoded: what is described, what is spoken, and the summary of the first."""

    text: Tokens | None
    spoken: Tokens | None
    instruction: Tokens | None
    summary: Tensor
    log_seconds: Float[Tensor, " batch"]


class InstructModel(nn.Module):
    """Frames go in and out as the codec has them and are normalised inside."""

    def __init__(self, network: DiTConfig, adapter: AdapterConfig, text_layers: int, text_heads: int,
                 widths: Mapping[str, int], vector_width: int, fitted: Fitted) -> None:
        """``widths`` of the frames of each condition that the tasks take (``text`` and ``spoken`` count none);
        ``vector_width`` of a frozen text encoder, or 0 for bytes."""
        super().__init__()
        width = network.width
        sources = {name: width if name == "spoken" else size for name, size in widths.items() if name != "text"}
        self.text = TextEncoder(258, vector_width, width, text_layers, text_heads)
        apart = vector_width > 0 and "spoken" in widths  # what is spoken is read letter by letter
        self.letters = TextEncoder(258, 0, width, text_layers, text_heads) if apart else None
        self.adapter = Adapter(adapter, width, text_heads)
        self.summary = Summary(width)
        self.start, self.nothing = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.aligned = AlignedEncoder(sources, width) if sources else None
        self.duration = DurationPredictor(width, "spoken" in widths)
        self.network = DiT(network, fitted.data["width"], bool(sources), "sound" in sources)
        self.mean, self.scale = (torch.from_numpy(fitted.arrays[name].copy()) for name in ("mean", "scale"))
        self.seconds_mean, self.seconds_scale = fitted.data["log_seconds"]

    def init(self, generator: torch.Generator) -> None:
        init_conditioning(self, generator)
        self.network.init(generator)

    def normalised(self, frames: Tensor) -> Tensor:
        return (frames - self.mean.to(frames.device)) / self.scale.to(frames.device)

    def restored(self, frames: Tensor) -> Tensor:
        return frames * self.scale.to(frames.device) + self.mean.to(frames.device)

    def ask(self, batch: Mapping[str, Tensor]) -> Asked:
        """Encode the batch's texts; foresee each row's duration from them."""
        encoders = {"text": self.text, "spoken": self.letters or self.text, "instruction": self.text}
        encoded = {name: encoder(batch[name], batch[f"{name}_valid"])
                   for name, encoder in encoders.items() if name in batch}
        instruction = encoded.get("instruction")
        text = encoded.get("text")
        if text is not None:
            text = self.adapter.text(text, instruction)
        elif instruction is not None and self.adapter.name == "prefix":
            text = instruction
        rows = next(iter(batch.values())).shape[0]
        if text is None:
            summary = self.nothing.expand(rows, -1)
        else:
            summary = torch.where(text.valid.any(1)[:, None], self.summary(text), self.nothing)
        log_seconds = self.seconds_mean + self.seconds_scale * self.duration(summary)
        spoken = encoded.get("spoken")
        if spoken is not None:
            total = self.duration.characters(spoken).sum(1).clamp_min(1e-3).log()
            log_seconds = torch.where(spoken.valid.any(1), total, log_seconds)
        return Asked(text, spoken, instruction, summary, log_seconds)

    def condition(self, asked: Asked, batch: Mapping[str, Tensor], lengths: Tensor, num_frames: int,
                  with_text: Bool[Tensor, " batch"], with_aligned: Bool[Tensor, " batch"]) -> Conditions:
        """Conditions of rows of ``lengths`` frames in a batch of ``num_frames``, those of some rows left out."""
        start = self.start.expand(len(lengths), 1, -1)
        tokens, valid = start, torch.ones(start.shape[:2], dtype=torch.bool, device=start.device)
        summary = torch.where(with_text[:, None], asked.summary, self.nothing)
        if asked.text is not None:
            tokens = torch.cat([start, asked.text.values], 1)
            valid = torch.cat([valid, asked.text.valid & with_text[:, None]], 1)
        if self.aligned is None:
            return Conditions(tokens, valid, summary)
        sources = {name: self.normalised(batch[name]) if name == "sound" else batch[name]
                   for name in ALIGNED if name in batch}
        present = {name: batch[f"{name}_there"] & with_aligned for name in sources}
        if asked.spoken is not None:
            durations = self.duration.characters(asked.spoken).detach()
            sources["spoken"] = stretched(asked.spoken, durations, lengths, num_frames)
            present["spoken"] = asked.spoken.valid.any(1) & with_aligned
        heard = None
        if self.network.keep is not None:
            heard = torch.zeros(len(lengths), num_frames, len(self.mean), device=lengths.device)
            if "sound" in sources:
                heard = fitting(sources["sound"], num_frames) * present["sound"][:, None, None]
        if not sources:
            aligned = self.aligned.absent.expand(len(lengths), num_frames, -1)
        else:
            aligned = self.adapter.ask(self.aligned(sources, present, lengths, num_frames), asked.instruction)
        return Conditions(tokens, valid, summary, aligned, heard)
