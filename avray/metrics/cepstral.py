"""Mel-cepstral distortion: how far two spectral envelopes are apart, whatever their level."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from avray.metrics.spectral import decibels, magnitudes, mel_bands, window_for

Samples = Float[np.ndarray, " time"]
Target = Float[np.ndarray, " target_time"]

NUM_COEFFICIENTS = 13
_NUM_BANDS = 64


def mel_cepstra(samples: Samples, sample_rate_hz: int) -> Float[np.ndarray, "frames coefficients"]:
    """Coefficients 1 to 13 (not 0, which is the level) of the orthonormal DCT of the natural logarithm of 64 mel
    magnitudes, a frame each quarter of 40 ms."""
    window = window_for(sample_rate_hz)
    power = np.square(magnitudes(samples, window, window // 4)) @ mel_bands(sample_rate_hz, window, _NUM_BANDS)
    logs = decibels(power) * (math.log(10) / 20)
    order = np.arange(1, NUM_COEFFICIENTS + 1)[:, None]
    basis = math.sqrt(2 / _NUM_BANDS) * np.cos(math.pi * order * (np.arange(_NUM_BANDS) + 0.5) / _NUM_BANDS)
    return logs @ basis.T


def mel_cepstral_distortion(a: Samples, b: Target, sample_rate_hz: int, align: bool = False) -> float:
    """10 / ln 10 × √(2 Σ (c - c')²) in dB (Kubichek 1993), the mean over frames side by side or, with ``align``, over
    the path of least distance (dynamic time warping), for two lengths. ValueError for two lengths without it."""
    ours, theirs = mel_cepstra(a, sample_rate_hz), mel_cepstra(b, sample_rate_hz)
    scale = 10 / math.log(10) * math.sqrt(2)
    if align:
        return scale * _warped(ours, theirs)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} samples do not compare frame by frame: cut them to one length, or "
                         "align them.")
    return scale * float(np.linalg.norm(ours - theirs, axis=1).mean())


def _warped(a: np.ndarray, b: np.ndarray) -> float:
    """The mean distance along the best path of steps (1, 0), (0, 1) and (1, 1)."""
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
    cost = np.sqrt(np.maximum(squares, 0))
    total, steps = np.full((len(a) + 1, len(b) + 1), np.inf), np.zeros((len(a) + 1, len(b) + 1))
    total[0, 0] = 0
    for i in range(len(a)):
        for j in range(len(b)):
            best = min((i, j), (i, j + 1), (i + 1, j), key=lambda at: total[at])
            total[i + 1, j + 1], steps[i + 1, j + 1] = total[best] + cost[i, j], steps[best] + 1
    return float(total[-1, -1] / steps[-1, -1])
