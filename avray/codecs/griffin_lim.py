"""Magnitudes to samples, a block of frames at a time, so that a stream and a file are the same samples.

Fast Griffin-Lim (Perraudin, Balazs and Søndergaard 2013) with two changes that blocks ask for. What was handed out
before the block, and the silence beyond both ends, are held fixed in every round, so that blocks join without a
crossfade. And phases start from single-pass spectrogram inversion (Beauregard, Harish and Wyse 2015): each spectral
peak advances at its interpolated frequency. From random phases a pure tone came out up to 21 cents off, from these
4 (C3 to C6); rich tones went from 2.2 cents to 0.5.

Which frames make up a block depends on the number of frames alone, never on how they were pushed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Complex, Float
from torch import Tensor


@dataclass(frozen=True)
class GriffinLim:
    """Settings. Frame t is centred on sample ``t * hop + hop / 2`` under a Hann window of ``window`` samples.

    A block is ``step`` frames long, the first ``first_step``. ``lookahead`` frames beyond a block are solved along with
    it and solved again in the next; ``context`` frames before it keep it in step with what was handed out.
    """

    window: int = 1024
    hop: int = 320
    num_rounds: int = 32
    momentum: float = 0.99
    first_step: int = 12
    step: int = 48
    lookahead: int = 6
    context: int = 4

    @property
    def edge(self) -> int:
        """Samples by which the first window begins before sample 0."""
        return (self.window - self.hop) // 2

    def open(self, device: torch.device | str = "cpu") -> Inversion:
        return Inversion(self, torch.device(device))


class Inversion:
    """One signal on its way from magnitudes ``[frames, bins]`` to samples."""

    def __init__(self, settings: GriffinLim, device: torch.device) -> None:
        self.settings = settings
        bins = settings.window // 2 + 1
        self.past = torch.zeros(settings.context * settings.hop + settings.edge, device=device)
        self.magnitudes = torch.zeros(0, bins, device=device)
        self.phases = torch.zeros(0, bins, dtype=torch.complex64, device=device)
        self.num_context = 0


def advance(rows: Sequence[Inversion], magnitudes: Float[Tensor, "rows frames bins"],
            is_last: bool) -> Float[Tensor, "rows samples"]:
    """Magnitudes of the frames that follow -> the next samples: all but ``lookahead`` frames of what is held, or with
    ``is_last`` everything. Rows hold as many frames each, and have as much context."""
    s, num_context = rows[0].settings, rows[0].num_context
    held = torch.cat([torch.stack([row.magnitudes for row in rows]), magnitudes], 1)
    num_new = held.shape[1] - num_context - (0 if is_last else s.lookahead)
    past = torch.stack([row.past for row in rows])
    samples, phases = _solve(s, held, torch.stack([row.phases for row in rows]), past, num_context, is_last)
    known = num_context * s.hop + s.edge
    made = samples[:, known : known + num_new * s.hop].clone()
    past = torch.cat([past, made], 1)[:, -past.shape[1] :]
    keep = max(0, num_context + num_new - s.context)
    for index, row in enumerate(rows):
        row.past, row.magnitudes, row.phases = past[index], held[index, keep:], phases[index, keep:]
        row.num_context = min(s.context, num_context + num_new)
    return made


def _solve(s: GriffinLim, magnitudes: Tensor, phases: Tensor, past: Tensor, num_context: int,
           is_last: bool) -> tuple[Tensor, Tensor]:
    num_frames, known = magnitudes.shape[1], num_context * s.hop + s.edge
    new = first_phases(magnitudes[:, phases.shape[1] :], phases[:, -1:], s.hop)
    phases = torch.cat([phases, new], 1)
    window, scale = _window_and_scale(num_frames, s.window, s.hop, str(magnitudes.device))
    spectra, previous = magnitudes * phases, None
    for round_index in range(s.num_rounds + 1):
        samples = _overlap_add(torch.fft.irfft(spectra, s.window).mul_(window), s.hop).mul_(scale)
        samples[:, :known] = past[:, -known:]
        if is_last:
            samples[:, num_frames * s.hop + s.edge :] = 0
        if round_index == s.num_rounds:
            return samples, phases
        current = torch.fft.rfft(samples.unfold(1, s.window, s.hop) * window)
        ahead = current
        if previous is not None:
            pair = torch.view_as_real(previous), torch.view_as_real(current)
            ahead = torch.view_as_complex(torch.lerp(*pair, 1 + s.momentum))
        phases = ahead.sgn()
        previous, spectra = current, magnitudes * phases
    raise AssertionError("unreachable")


def first_phases(magnitudes: Float[Tensor, "rows frames bins"], before: Complex[Tensor, "rows n bins"],
                 hop: int) -> Complex[Tensor, "rows frames bins"]:
    """Unit phases that continue ``before`` (the frame in front, or none): every bin moves with its nearest peak."""
    num_rows, num_frames, bins = magnitudes.shape
    if num_frames == 0:
        return before[:, :0]
    index = torch.arange(bins, device=magnitudes.device)
    level = magnitudes.clamp_min(1e-8).log()
    left, centre, right = level[..., :-2], level[..., 1:-1], level[..., 2:]
    is_peak = torch.zeros_like(magnitudes, dtype=torch.bool)
    is_peak[..., 1:-1] = (centre >= left) & (centre > right)
    curve = (left - 2 * centre + right).clamp_max(-1e-6)
    shift = torch.zeros_like(magnitudes)
    shift[..., 1:-1] = (0.5 * (left - right) / curve).clamp(-0.5, 0.5)
    below = torch.where(is_peak, index, -bins).cummax(2).values
    above = torch.where(is_peak, index, 2 * bins).flip(2).cummin(2).values.flip(2)
    peak = torch.where(index - below <= above - index, below, above)
    has_peak = (peak >= 0) & (peak < bins)
    peak = torch.where(has_peak, peak, index)
    frequency = peak + torch.where(has_peak, shift.gather(2, peak), 0.0)
    advances = frequency * (math.tau * hop / (2 * (bins - 1)))
    phase = before[:, -1].angle() if before.shape[1] else torch.zeros(num_rows, bins, device=magnitudes.device)
    angles = torch.empty_like(magnitudes)
    for frame in range(num_frames):
        phase = phase.gather(1, peak[:, frame]).add_(advances[:, frame])
        angles[:, frame] = phase
    # A window that is not centred on its first sample turns the sign of every other bin around a peak.
    angles += math.pi * ((index - peak) % 2)
    return torch.polar(torch.ones_like(angles), angles)


def _overlap_add(frames: Float[Tensor, "*rows frames window"], hop: int) -> Float[Tensor, "*rows samples"]:
    """Sum of frames ``hop`` apart; slices of one hop each, five times as fast as ``fold``."""
    *rows, num_frames, window = frames.shape
    num_parts = -(-window // hop)
    total = frames.new_zeros(*rows, num_frames + num_parts - 1, hop)
    for part in range(num_parts):
        piece = frames[..., part * hop : (part + 1) * hop]
        total[..., part : part + num_frames, : piece.shape[-1]] += piece
    return total.flatten(-2)[..., : (num_frames - 1) * hop + window]


@lru_cache(maxsize=256)
def _window_and_scale(num_frames: int, window: int, hop: int, device: str) -> tuple[Tensor, Tensor]:
    """The window, and what undoes its overlapping squares; held at 10 where only the tip of one window reaches."""
    hann = torch.hann_window(window, device=device)
    return hann, 1 / _overlap_add(hann.square().expand(num_frames, window), hop).clamp_min(0.1)
