"""Log-mel frames made different at every step: another speed and voice, noise, holes in time and in frequency.

The changes are made where the frames are, in the batch, so nothing is stored and no step sees the same twice. A speed
of s takes every s-th frame and moves what was at a frequency f to s f, which is what playing a recording faster does to
its spectrogram (Ko et al., 2015; the move alone is vocal tract length perturbation, Jaitly and Hinton, 2013). Masks are
SpecAugment's (Park et al., 2019), filled with the row's mean. Noise adds power, flat from frame to frame, with a random
slope over the bands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """What varies, and how much; all 0 changes nothing."""

    speed: float = 0.0
    """Speeds from 1 - speed to 1 + speed."""
    noise_db: float = 0.0
    """Noise up to so many dB below the row's loudest band, from 30 dB further down; 0: none."""
    time_masks: int = 0
    """Holes of up to a fifth of the row's frames each."""
    frequency_masks: int = 0
    """Holes of up to a sixth of the bands each."""
    gain_db: float = 0.0
    """Levels up to so many dB higher or lower."""

    def __post_init__(self) -> None:
        if not 0 <= self.speed < 0.5:
            raise ValueError(f"family.augment.speed must be from 0 to below 0.5, got {self.speed}.")
        for name in ("noise_db", "time_masks", "frequency_masks", "gain_db"):
            if getattr(self, name) < 0:
                raise ValueError(f"family.augment.{name} must be at least 0, got {getattr(self, name)}.")

    def __call__(self, frames: Float[Tensor, "batch time bands"], lengths: Int[Tensor, " batch"],
                 generator: torch.Generator) -> tuple[Float[Tensor, "batch time2 bands"], Int[Tensor, " batch"]]:
        """Changed frames (natural logarithms of magnitudes in bands of Slaney's mel scale, as codec ``spectral``
        has them) and their lengths."""
        if frames.is_meta:  # memory is estimated, and a speed's new length is not known there
            return frames, lengths
        draw = _Draw(len(frames), generator, frames.device)
        if self.speed:
            frames, lengths = change_speed(frames, lengths, 1 + self.speed * (2 * draw() - 1))
        if self.gain_db:
            frames = frames + ((2 * draw() - 1) * self.gain_db * math.log(10) / 20)[:, None, None]
        if self.noise_db:
            frames = self._noisy(frames, lengths, draw)
        inside = torch.arange(frames.shape[1], device=frames.device) < lengths[:, None]
        if self.time_masks or self.frequency_masks:
            mean = (frames * inside[..., None]).sum((1, 2)) / (lengths.clamp(min=1) * frames.shape[2])
            hidden = torch.zeros_like(frames, dtype=torch.bool)
            for _ in range(self.time_masks):
                hidden |= _holes(frames.shape[1], lengths, 0.2, draw)[:, :, None]
            for _ in range(self.frequency_masks):
                bands = torch.full_like(lengths, frames.shape[2])
                hidden |= _holes(frames.shape[2], bands, 1 / 6, draw)[:, None, :]
            frames = torch.where(hidden, mean[:, None, None], frames)
        return frames * inside[..., None], lengths

    def _noisy(self, frames: Tensor, lengths: Tensor, draw: _Draw) -> Tensor:
        inside = torch.arange(frames.shape[1], device=frames.device) < lengths[:, None]
        loudest = frames.masked_fill(~inside[..., None], -torch.inf).amax((1, 2))
        below_db = self.noise_db + 30 * draw()
        slope = (2 * draw() - 1)[:, None] * torch.linspace(-1, 1, frames.shape[2], device=frames.device)
        level = (loudest - below_db * math.log(10) / 20)[:, None] + slope
        flutter = torch.rand(frames.shape, generator=draw.generator, device=frames.device).clamp_min(1e-4)
        noise = level[:, None] + 0.5 * torch.log(-torch.log(flutter))  # a Rayleigh magnitude's logarithm
        return 0.5 * torch.logaddexp(2 * frames, 2 * noise)


def change_speed(frames: Float[Tensor, "batch time bands"], lengths: Int[Tensor, " batch"],
                 speeds: Float[Tensor, " batch"],
                 top_hz: float = 12_000.0) -> tuple[Float[Tensor, "batch time2 bands"], Int[Tensor, " batch"]]:
    """Rows played ``speeds`` times as fast, by linear interpolation over time and over bands (0 to ``top_hz``)."""
    _, time, bands = frames.shape
    lengths = (lengths / speeds).floor().long().clamp(min=1) * (lengths > 0)
    at = torch.arange(int(lengths.max()), device=frames.device) * speeds[:, None]
    frames = _between(frames, at.clamp(max=time - 1))
    a_band = mel_of(torch.tensor(top_hz, device=frames.device)) / (bands + 1)
    heard_hz = hz_of(torch.arange(1, bands + 1, device=frames.device) * a_band) / speeds[:, None]
    index = mel_of(heard_hz) / a_band - 1
    return _between(frames.transpose(1, 2), index.clamp(0, bands - 1)).transpose(1, 2), lengths


def mel_of(hz: Tensor) -> Tensor:
    """Slaney's scale (Auditory Toolbox, 1998): even up to 1 kHz, which is 15, and logarithmic above."""
    return torch.where(hz < 1000, hz * 0.015, 15 + 27 / math.log(6.4) * (hz.clamp(min=1) / 1000).log())


def hz_of(mel: Tensor) -> Tensor:
    """The inverse of ``mel_of``."""
    return torch.where(mel < 15, mel / 0.015, 1000 * ((mel - 15) * math.log(6.4) / 27).exp())


def _between(rows: Float[Tensor, "batch size rest"], at: Float[Tensor, "batch places"]) -> Tensor:
    """Each row at fractional indices along its first dimension."""
    low = at.floor().long()
    high = (low + 1).clamp(max=rows.shape[1] - 1)
    share = (at - low)[..., None]

    def picked(index: Tensor) -> Tensor:
        return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))

    return picked(low) * (1 - share) + picked(high) * share


def _holes(size: int, lengths: Tensor, share: float, draw: _Draw) -> Tensor:
    """One hole a row ``[batch, size]``, of up to ``share`` of its length."""
    width = draw() * share * lengths
    begin = draw() * (lengths - width)
    at = torch.arange(size, device=lengths.device)[None]
    return (at >= begin[:, None]) & (at < (begin + width)[:, None])


@dataclass
class _Draw:
    rows: int
    generator: torch.Generator
    device: torch.device

    def __call__(self) -> Tensor:
        """A uniform number a row."""
        return torch.rand(self.rows, generator=self.generator, device=self.device)
