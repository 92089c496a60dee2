"""Samples with their rate. Reading and writing live further down (being written)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Audio:
    """float32 samples ``[channels, time]`` in [-1, 1]."""

    samples: np.ndarray
    sample_rate_hz: int

    @property
    def seconds(self) -> float:
        return self.samples.shape[-1] / self.sample_rate_hz


@dataclass(frozen=True)
class Video:
    """uint8 frames ``[time, height, width, 3]``, with sound where there is any."""

    frames: np.ndarray
    frame_rate_hz: float
    audio: Audio | None = None
