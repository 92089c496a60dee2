"""Changes made to a sound before a frozen network hears it: seeded, named, and part of the cache's key.

A recipe is text, ``name:key=value:…``, so that it travels in a Unit and two equal ones are one cache entry.
"""

from __future__ import annotations

import math

import numpy as np
import soxr

from avray.media import read_audio


def apply(recipe: str, samples: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """float32 ``[samples]`` changed as the recipe says, of the same length. ValueError for one that is not known.

    ``noise:snr_db=0:seed=7`` adds white noise, with ``source=path`` (which comes last) another recording instead, from
    a place the seed chooses; ``lowpass:rate_hz=8000`` keeps what a recording at that rate holds.
    """
    name, _, rest = recipe.partition(":")
    rest, _, source = rest.partition(":source=")
    try:
        values = {key: float(value) for key, value in (item.split("=", 1) for item in rest.split(":") if item)}
        if name == "noise":
            return _noisy(samples, sample_rate_hz, values["snr_db"], int(values["seed"]), source)
        if name == "lowpass":
            return _low(samples, sample_rate_hz, values["rate_hz"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"The recipe {recipe!r} cannot be followed ({error}).") from error
    raise ValueError(f"The recipe {recipe!r} is not known: it is noise or lowpass.")


def _noisy(samples: np.ndarray, sample_rate_hz: int, snr_db: float, seed: int, source: str) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(len(samples)).astype(np.float32)
    if source:
        other = read_audio(source)
        heard = soxr.resample(other.samples.mean(0), other.sample_rate_hz, sample_rate_hz)
        noise = np.resize(np.roll(heard, -int(rng.integers(len(heard)))), len(samples))
    levels = [math.sqrt(float(np.mean(np.square(x, dtype=np.float64)))) for x in (samples, noise)]
    gain = levels[0] / max(levels[1], 1e-9) * 10 ** (-snr_db / 20)
    return (samples + np.float32(gain) * noise).astype(np.float32)


def _low(samples: np.ndarray, sample_rate_hz: int, rate_hz: float) -> np.ndarray:
    if not 0 < rate_hz <= sample_rate_hz:
        raise ValueError(f"rate_hz must be above 0 and at most {sample_rate_hz}")
    back = soxr.resample(soxr.resample(samples, sample_rate_hz, rate_hz), rate_hz, sample_rate_hz)[: len(samples)]
    return np.pad(back, (0, len(samples) - len(back))).astype(np.float32)
