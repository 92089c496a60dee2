"""Loudness, silence and length: what goes wrong first in a generator, and what a spectral distance hides."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

FLOOR_DBFS = -120.0
"""Of digital silence."""

Samples = Float[np.ndarray, "*channels time"]


def rms_dbfs(samples: Samples) -> float:
    """Root mean square over all samples and channels in dB relative to 1.0, so that a sine of full scale is
    -3.01 dBFS (AES17 calls it 0); at least -120; nan for no samples."""
    if not np.size(samples):
        return math.nan
    power = float(np.square(samples, dtype=np.float64).mean())
    return max(FLOOR_DBFS, 10 * math.log10(power)) if power > 0 else FLOOR_DBFS


def level_error_db(generated: Samples, target: Samples) -> float:
    """Level of ``generated`` over that of ``target`` in dB: negative where it came out too quiet."""
    return rms_dbfs(generated) - rms_dbfs(target)


def silence_fraction(samples: Samples, sample_rate_hz: int, threshold_dbfs: float = -60.0) -> float:
    """Share of 20 ms frames (the last one shorter) whose level is below the threshold; nan for no samples."""
    samples = np.atleast_2d(samples)
    if not samples.size:
        return math.nan
    frame = max(1, round(0.02 * sample_rate_hz))
    starts = np.arange(0, samples.shape[-1], frame)
    energy = np.add.reduceat(np.square(samples, dtype=np.float64).mean(axis=0), starts)
    lengths = np.diff(np.append(starts, samples.shape[-1]))
    return float((energy / lengths < 10 ** (threshold_dbfs / 10)).mean())
