"""Where sounds begin, and how fast they follow each other."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from avray.metrics.spectral import decibels, magnitudes, mel_bands

Samples = Float[np.ndarray, " time"]

_HOP_S, _WINDOW_S, _NUM_BANDS = 0.01, 0.04, 40
_RISE_DB = 3.0
"""A beginning rises by this much over all bands on average; steady noise stays below 2."""
_APART_S = 0.05


def novelty(samples: Samples, sample_rate_hz: int) -> Float[np.ndarray, " frames"]:
    """Mean rise of 40 mel bands in dB over 20 ms, a value each 10 ms; levels below -60 dB count as that, and so does
    what was before the first sample."""
    hop, window = round(_HOP_S * sample_rate_hz), 2 ** round(math.log2(_WINDOW_S * sample_rate_hz))
    padded = np.pad(np.asarray(samples, np.float32), window // 2)
    power = np.square(magnitudes(padded, window, hop)) @ mel_bands(sample_rate_hz, window, _NUM_BANDS)
    levels = np.pad(np.maximum(decibels(power), -60.0), ((1, 1), (0, 0)), constant_values=-60.0)
    return np.maximum(levels[2:] - levels[:-2], 0).mean(1)


def onsets_s(samples: Samples, sample_rate_hz: int) -> Float[np.ndarray, " onsets"]:
    """Seconds at which sounds begin: the novelty's peaks over 3 dB, at least 50 ms apart, the highest first."""
    rise = novelty(samples, sample_rate_hz)
    around = np.pad(rise, 1)
    peaks = np.flatnonzero((rise >= _RISE_DB) & (rise >= around[:-2]) & (rise > around[2:])).tolist()
    kept: list[int] = []
    for index in sorted(peaks, key=lambda index: -rise[index]):
        if all(abs(index - other) * _HOP_S >= _APART_S for other in kept):
            kept.append(index)
    return np.array(sorted(kept)) * _HOP_S


def onset_f1(estimate: Float[np.ndarray, " onsets"], target: Float[np.ndarray, " others"],
             within_s: float = 0.05) -> float:
    """Harmonic mean of precision and recall, each onset matched once, in time (MIREX's 50 ms); 1 where neither has
    any."""
    if not len(estimate) and not len(target):
        return 1.0
    matched, index = 0, 0
    for onset in target:
        while index < len(estimate) and estimate[index] < onset - within_s:
            index += 1
        if index < len(estimate) and estimate[index] <= onset + within_s:
            matched, index = matched + 1, index + 1
    return 2 * matched / (len(estimate) + len(target))


def tempo_bpm(samples: Samples, sample_rate_hz: int, lowest: float = 40.0, highest: float = 240.0) -> float:
    """Beats a minute: the lag at which the novelty repeats best, interpolated; nan where nothing begins twice."""
    rise = novelty(samples, sample_rate_hz)
    rise = np.where(rise >= _RISE_DB, rise, 0.0)
    if np.count_nonzero(rise) < 2:
        return math.nan
    # A beat is rarely a whole number of frames: the peaks are made wide enough to meet.
    rise = np.convolve(rise, np.hanning(9)[1:-1], "same")
    fast = 2 ** math.ceil(math.log2(2 * len(rise)))
    repeats = np.fft.irfft(np.square(np.abs(np.fft.rfft(rise, fast))))[: len(rise)]
    shortest, longest = math.floor(60 / highest / _HOP_S), math.ceil(60 / lowest / _HOP_S)
    lags = np.arange(shortest, min(longest, len(repeats) - 2) + 1)
    peaks = [lag for lag in lags if repeats[lag] >= repeats[lag - 1] and repeats[lag] > repeats[lag + 1]]
    if not peaks or max(repeats[lag] for lag in peaks) < 0.2 * repeats[0]:
        return math.nan
    # The shortest of those that come near the best: every multiple of a beat repeats as well.
    most = max(repeats[lag] / (len(rise) - lag) for lag in peaks)
    best = next(lag for lag in peaks if repeats[lag] / (len(rise) - lag) >= 0.8 * most)
    left, middle, right = repeats[best - 1 : best + 2]
    bend = left - 2 * middle + right
    return 60 / ((best + (0.5 * (left - right) / bend if bend else 0.0)) * _HOP_S)


def tempo_error(estimate_bpm: float, target_bpm: float) -> float:
    """Relative difference, another level of the metre forgiven (a half or a third, twice or thrice, as MIREX's second
    accuracy does); nan where either has none."""
    return min(abs(estimate_bpm * factor / target_bpm - 1) for factor in (1 / 3, 1 / 2, 1, 2, 3))
