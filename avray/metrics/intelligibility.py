"""How well speech can be understood beside its clean original: STOI, and PESQ where its package is installed.

STOI is computed here at 10 kHz in numpy; on speech-like sounds it agrees with pystoi within 0.001 (tests). PESQ is a
standard with a reference code of its own, which the package ``pesq`` wraps.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import soxr
from jaxtyping import Float

from avray.errors import MissingDependency

Samples = Float[np.ndarray, " time"]
Target = Float[np.ndarray, " target_time"]

RATE_HZ = 10_000
_WINDOW, _FFT, _SEGMENT = 256, 512, 30
_NUM_BANDS, _LOWEST_HZ = 15, 150.0
_RANGE_DB, _CLIP_DB = 40.0, -15.0
_TINY = np.finfo(np.float64).eps


def stoi(estimate: Samples, target: Target, sample_rate_hz: int) -> float:
    """Short-time objective intelligibility (Taal et al. 2011), 1 for the target itself. nan where fewer than 0.4 s of
    it are louder than 40 dB below its loudest frame. ValueError for two lengths."""
    if len(estimate) != len(target):
        raise ValueError(f"{len(estimate)} and {len(target)} samples do not compare: cut them to one length.")
    sounds = [np.asarray(x, np.float64) if sample_rate_hz == RATE_HZ else soxr.resample(
        np.asarray(x, np.float64), sample_rate_hz, RATE_HZ, quality="VHQ") for x in (estimate, target)]
    estimate, target = _without_silence(*sounds)
    bands = [_band_levels(x) for x in (estimate, target)]
    if bands[0].shape[1] < _SEGMENT:
        return math.nan
    ours, clean = (np.lib.stride_tricks.sliding_window_view(x, _SEGMENT, axis=1) for x in bands)
    gain = np.linalg.norm(clean, axis=2, keepdims=True) / (np.linalg.norm(ours, axis=2, keepdims=True) + _TINY)
    ours = np.minimum(ours * gain, clean * (1 + 10 ** (-_CLIP_DB / 20)))
    ours, clean = (_unit(x) for x in (ours, clean))
    return float((ours * clean).sum(2).mean())


def _unit(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(2, keepdims=True)
    return centred / (np.linalg.norm(centred, axis=2, keepdims=True) + _TINY)


def _windows(x: np.ndarray) -> np.ndarray:
    hann = np.hanning(_WINDOW + 2)[1:-1]
    count = max(0, -(-(len(x) - _WINDOW) // (_WINDOW // 2)))
    starts = np.arange(count) * (_WINDOW // 2)
    return x[starts[:, None] + np.arange(_WINDOW)] * hann


def _without_silence(estimate: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both without the frames in which the target is silent, overlapped and added."""
    frames = [_windows(x) for x in (estimate, target)]
    if not len(frames[1]):
        return estimate[:0], target[:0]
    level = 20 * np.log10(np.linalg.norm(frames[1], axis=1) + _TINY)
    kept = level > level.max() - _RANGE_DB
    hop = _WINDOW // 2
    joined = []
    for part in frames:
        out = np.zeros((int(kept.sum()) - 1) * hop + _WINDOW)
        for index, frame in enumerate(part[kept]):
            out[index * hop : index * hop + _WINDOW] += frame
        joined.append(out)
    return joined[0], joined[1]


def _band_levels(x: np.ndarray) -> Float[np.ndarray, "bands frames"]:
    if len(x) <= _WINDOW:
        return np.zeros((_NUM_BANDS, 0))
    power = np.square(np.abs(np.fft.rfft(_windows(x), _FFT)))
    return np.sqrt(_thirds() @ power.T)


@functools.lru_cache(maxsize=1)
def _thirds() -> Float[np.ndarray, "bands bins"]:
    """Which bins belong to each third of an octave."""
    hz = np.linspace(0, RATE_HZ, _FFT + 1)[: _FFT // 2 + 1]
    middles = _LOWEST_HZ * 2.0 ** (np.arange(_NUM_BANDS) / 3)
    edges = [[int(np.argmin(np.square(hz - middle * 2 ** (side / 6)))) for side in (-1, 1)] for middle in middles]
    bands = np.zeros((_NUM_BANDS, len(hz)))
    for band, (low, high) in zip(bands, edges, strict=True):
        band[low:high] = 1
    return bands


def pesq(estimate: Samples, target: Target, sample_rate_hz: int) -> float:
    """Perceptual evaluation of speech quality, wideband, from 1 to 4.64 (ITU-T P.862.2), at 16 kHz.
    MissingDependency without the package ``pesq``; nan where it finds no speech."""
    try:
        import pesq as reference
    except ImportError as error:
        raise MissingDependency("PESQ needs the package pesq, which builds its C code: pip install pesq.") from error
    ours, clean = (np.asarray(x, np.float32) if sample_rate_hz == 16_000 else soxr.resample(
        np.asarray(x, np.float32), sample_rate_hz, 16_000) for x in (estimate, target))
    try:
        return float(reference.pesq(16_000, clean, ours, "wb"))
    except reference.NoUtterancesError:
        return math.nan
