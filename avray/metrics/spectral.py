"""How far two sounds are apart in their short-time spectra.

Notable: spectra are scaled so that a sine of full scale stands at 0 dB whatever the rate, and everything
below -100 dB counts as -100 dB. So digital silence has a finite distance to everything, inaudible differences
near zero do not swamp the figure, and figures of different rates and codecs compare. Literature on
super-resolution (Kuleshov et al. 2017, AudioSR) gives the log-spectral distance in log10 of power: ten times
less than the decibels here, and without the floor.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from jaxtyping import Float

FLOOR_DB = -100.0
_WINDOW_S = 0.04
_NUM_BANDS = 64

Samples = Float[np.ndarray, " time"]
Target = Float[np.ndarray, " target_time"]  # a length of its own: two lengths are refused with a sentence


def log_spectral_distance(a: Samples, b: Target, sample_rate_hz: int) -> float:
    """Mean over frames of the root mean square over bins of the difference of two power spectra in dB (Gray
    and Markel 1976). Frames: Hann, the power of two nearest to 40 ms, a quarter of it apart. ValueError for
    two lengths."""
    _same_length(a, b)
    window = window_for(sample_rate_hz)
    difference = np.subtract(*(decibels(np.square(magnitudes(x, window, window // 4))) for x in (a, b)))
    return float(np.sqrt(np.square(difference).mean(axis=1)).mean())


def log_mel_distance(a: Samples, b: Target, sample_rate_hz: int) -> float:
    """Mean absolute difference in dB of 64 mel bands from 0 Hz to half the rate (HTK scale, triangles that
    peak at 1), over the frames of ``log_spectral_distance``. ValueError for two lengths."""
    _same_length(a, b)
    window = window_for(sample_rate_hz)
    bands = mel_bands(sample_rate_hz, window, _NUM_BANDS)
    mels = [decibels(np.square(magnitudes(x, window, window // 4)) @ bands) for x in (a, b)]
    return float(np.abs(mels[0] - mels[1]).mean())


def multi_resolution_stft_distance(estimate: Samples, target: Target) -> float:
    """Spectral convergence plus the mean absolute difference of natural log magnitudes, averaged over windows
    of 512, 1024 and 2048 samples, a quarter of it apart (the loss of Parallel WaveGAN, Yamamoto et al. 2020,
    with the floor of this module). ValueError for two lengths; inf for a silent target and an estimate that
    is not."""
    _same_length(estimate, target)
    floor = 10 ** (FLOOR_DB / 20)
    total = 0.0
    for window in (512, 1024, 2048):
        ours, theirs = (magnitudes(x, window, window // 4) for x in (estimate, target))
        off, size = float(np.linalg.norm(theirs - ours)), float(np.linalg.norm(theirs))
        total += off / size if size else (math.inf if off else 0.0)
        total += float(np.abs(np.log(np.maximum(ours, floor)) - np.log(np.maximum(theirs, floor))).mean())
    return total / 3


def window_for(sample_rate_hz: int) -> int:
    """The power of two nearest to 40 ms: 512 at 16 kHz, 1024 at 24 kHz, 2048 at 44.1 and 48 kHz."""
    return 2 ** max(4, round(math.log2(_WINDOW_S * sample_rate_hz)))


def magnitudes(samples: Samples, window: int, hop: int) -> Float[np.ndarray, "frames bins"]:
    """Hann-windowed magnitude spectra, 1 for a sine of full scale. No padding, but for a sound shorter than a
    window, which is filled up with zeros; the end that fills no frame is left out."""
    samples = np.asarray(samples, dtype=np.float32)
    if samples.ndim != 1:
        raise ValueError(f"Expected samples [time], got shape {samples.shape}: mix to mono first.")
    if len(samples) < window:
        samples = np.pad(samples, (0, window - len(samples)))
    hann = np.hanning(window + 1)[:-1].astype(np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(samples, window)[::hop]
    return np.abs(np.fft.rfft(frames * hann, axis=1)) * (2 / hann.sum())


def decibels(power: np.ndarray) -> np.ndarray:
    """Of power relative to 1, no lower than the floor."""
    return 10 * np.log10(np.maximum(power, 10 ** (FLOOR_DB / 10)))


def _same_length(a: Samples, b: Target) -> None:
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} samples do not compare: cut them to one length.")


def mel(frequency_hz: float) -> float:
    """HTK's scale."""
    return 2595 * math.log10(1 + frequency_hz / 700)


@functools.lru_cache(maxsize=8)
def mel_bands(sample_rate_hz: int, window: int, num_bands: int) -> Float[np.ndarray, "bins bands"]:
    """Triangles that peak at 1, evenly spaced in mel (HTK) from 0 Hz to half the rate. Read-only, as it is
    shared."""
    top_mel = mel(sample_rate_hz / 2)
    edges_hz = 700 * (10 ** (np.linspace(0, top_mel, num_bands + 2) / 2595) - 1)
    bins_hz = np.arange(window // 2 + 1)[:, None] * (sample_rate_hz / window)
    low, centre, high = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    rising, falling = (bins_hz - low) / (centre - low), (high - bins_hz) / (high - centre)
    bands = np.maximum(0, np.minimum(rising, falling)).astype(np.float32)
    bands.flags.writeable = False
    return bands
