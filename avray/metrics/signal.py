"""Sample-exact agreement, for what has one right answer (enhancement, round trips)."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

Samples = Float[np.ndarray, " time"]
Target = Float[np.ndarray, " target_time"]  # a length of its own: two lengths are refused with a sentence


def si_sdr(estimate: Samples, target: Target) -> float:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019), means removed; within ±100 dB,
    so that one perfect or hopeless example does not own an average. nan for a constant target, which has no
    signal. ValueError for two lengths."""
    if len(estimate) != len(target):
        raise ValueError(f"{len(estimate)} and {len(target)} samples do not compare: cut them to one length.")
    if not len(target):
        return math.nan
    estimate, raw = np.asarray(estimate, np.float64), np.asarray(target, np.float64)
    estimate, target = estimate - estimate.mean(), raw - raw.mean()
    power = target @ target
    if power <= 1e-20 * (raw @ raw):
        return math.nan
    wanted = (estimate @ target / power) * target
    signal, noise = wanted @ wanted, np.square(estimate - wanted).sum()
    if signal <= 1e-10 * noise or signal == 0:
        return -100.0
    return 100.0 if noise <= 1e-10 * signal else float(10 * np.log10(signal / noise))
