"""What a codec does to a sound at each number of codebooks: the table that tells how many a model should predict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import soxr
import torch

from avray.codecs.base import Codec, decode_all
from avray.media import Audio
from avray.metrics.spectral import log_spectral_distance

_USUAL = (1, 2, 4, 8)


@dataclass(frozen=True)
class RoundTrip:
    """One row. ``codebooks`` of 0 stands for the continuous latents, at 16 bits a number."""

    codebooks: int
    bits_per_second: float
    spectral_distance_db: float
    """``metrics.spectral.log_spectral_distance`` to what the codec was given: mono, at its own rate."""
    audio: Audio


def round_trip_table(codec: Codec, audio: Audio, codebooks: Sequence[int] | None = None) -> list[RoundTrip]:
    """A row for each number of codebooks: for None, of 1, 2, 4 and 8 those that the codec has.

    ValueError, naming both numbers, for more than it has, and for a codec whose codes are not fitted yet.
    """
    if codebooks is None:
        codebooks = [number for number in _USUAL if number <= max(codec.num_codebooks, 1)]
    samples = at_rate(audio, codec.sample_rate_hz)
    latents = codec.encode_batch([samples])[0]
    return [_row(codec, samples, latents, number) for number in codebooks]


def _row(codec: Codec, samples: np.ndarray, latents: np.ndarray, codebooks: int) -> RoundTrip:
    bits = 16 * codec.width if codebooks == 0 else codebooks * math.log2(codec.cardinality or 1)
    if codebooks:
        codes = codec.to_codes(torch.from_numpy(latents.T.copy())[None], codebooks)
        latents = codec.from_codes(codes)[0].T.cpu().numpy()
    decoded = decode_all(codec, latents)[: len(samples)]
    distance_db = log_spectral_distance(samples, decoded, codec.sample_rate_hz)
    return RoundTrip(codebooks, bits * codec.frame_rate_hz, distance_db, Audio(decoded[None], codec.sample_rate_hz))


def at_rate(audio: Audio, sample_rate_hz: int) -> np.ndarray:
    """Mono ``[samples]`` float32 at another rate."""
    mono = audio.samples.mean(axis=0, dtype=np.float32)
    return mono if audio.sample_rate_hz == sample_rate_hz else soxr.resample(mono, audio.sample_rate_hz, sample_rate_hz)
