"""The plain functions over pairs of sounds as Metrics (``avray.family.Metric``): fed one pair at a time,
merged across workers.

Notable: a pair is mixed to mono and cut to its common length, from the start; ``DurationError`` says how much
that hid. Two rates are a ValueError, never resampled silently. A pair that a figure cannot judge (no target,
no samples, a constant target for SI-SDR, no pitch in common) is skipped and counted: ``details()`` is what a
figure must be read with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from avray.family import Media, Metric, Row
from avray.media import Audio
from avray.metrics import cepstral, intelligibility, level, pitch, rhythm, signal, spectral


@dataclass(frozen=True)
class Pair:
    """Two mono sounds ``[time]`` of one length and rate."""

    generated: np.ndarray
    target: np.ndarray
    sample_rate_hz: int


def common(generated: Media, target: Media) -> Pair:
    """Both as mono, cut to the shorter. ValueError for two rates, or for what is not sound."""
    ours, theirs = _sound(generated), _sound(target)
    if ours.sample_rate_hz != theirs.sample_rate_hz:
        raise ValueError(f"Generated sound at {ours.sample_rate_hz} Hz does not compare with a target at "
                         f"{theirs.sample_rate_hz} Hz: resample one of them first.")
    length = min(ours.samples.shape[-1], theirs.samples.shape[-1])
    mono = [audio.samples[:, :length].mean(axis=0) for audio in (ours, theirs)]
    return Pair(mono[0], mono[1], ours.sample_rate_hz)


@dataclass
class PairMetric:
    """The mean over examples of what ``measure`` gives; nan where it cannot judge."""

    unit: ClassVar[str] = "dB"
    total: float = 0.0
    count: int = 0
    num_skipped: int = 0

    def measure(self, pair: Pair) -> float:
        raise NotImplementedError

    def update(self, generated: Media, target: Media | None, row: Row) -> None:
        pair = None if target is None else common(generated, target)
        self.add(math.nan if pair is None or not len(pair.target) else self.measure(pair))

    def add(self, measured: float) -> None:
        if math.isnan(measured):
            self.num_skipped += 1
        else:
            self.total += measured
            self.count += 1

    def merge(self, other: PairMetric) -> None:
        self.total += other.total
        self.count += other.count
        self.num_skipped += other.num_skipped

    def value(self) -> float:
        return self.total / self.count if self.count else math.nan

    def details(self) -> dict[str, object]:
        return {"unit": self.unit, "count": self.count, "num_skipped": self.num_skipped}


class LogSpectralDistance(PairMetric):
    def measure(self, pair: Pair) -> float:
        return spectral.log_spectral_distance(pair.generated, pair.target, pair.sample_rate_hz)


class LogMelDistance(PairMetric):
    def measure(self, pair: Pair) -> float:
        return spectral.log_mel_distance(pair.generated, pair.target, pair.sample_rate_hz)


class MultiResolutionStft(PairMetric):
    unit = ""

    def measure(self, pair: Pair) -> float:
        distance = spectral.multi_resolution_stft_distance(pair.generated, pair.target)
        return distance if math.isfinite(distance) else math.nan


class SiSdr(PairMetric):
    def measure(self, pair: Pair) -> float:
        return signal.si_sdr(pair.generated, pair.target)


class Stoi(PairMetric):
    unit = ""

    def measure(self, pair: Pair) -> float:
        return intelligibility.stoi(pair.generated, pair.target, pair.sample_rate_hz)


class Pesq(PairMetric):
    """MissingDependency without the package ``pesq``."""

    unit = ""

    def measure(self, pair: Pair) -> float:
        return intelligibility.pesq(pair.generated, pair.target, pair.sample_rate_hz)


class MelCepstralDistortion(PairMetric):
    def measure(self, pair: Pair) -> float:
        return cepstral.mel_cepstral_distortion(pair.generated, pair.target, pair.sample_rate_hz)


class AlignedMelCepstralDistortion(PairMetric):
    """Along the best path between the two, whatever their lengths: for speech, whose speed is its own."""

    def update(self, generated: Media, target: Media | None, row: Row) -> None:
        if target is None:
            return self.add(math.nan)
        ours, theirs = _sound(generated), _sound(target)
        if ours.sample_rate_hz != theirs.sample_rate_hz:
            raise ValueError(f"Generated sound at {ours.sample_rate_hz} Hz does not compare with a target at "
                             f"{theirs.sample_rate_hz} Hz: resample one of them first.")
        self.add(cepstral.mel_cepstral_distortion(ours.samples.mean(0), theirs.samples.mean(0), ours.sample_rate_hz,
                                                  align=True))


class OnsetF1(PairMetric):
    unit = ""

    def measure(self, pair: Pair) -> float:
        ours, theirs = (rhythm.onsets_s(x, pair.sample_rate_hz) for x in (pair.generated, pair.target))
        return rhythm.onset_f1(ours, theirs)


class TempoError(PairMetric):
    """Relative; pairs in which one has no tempo are skipped."""

    unit = ""

    def measure(self, pair: Pair) -> float:
        ours, theirs = (rhythm.tempo_bpm(x, pair.sample_rate_hz) for x in (pair.generated, pair.target))
        return rhythm.tempo_error(ours, theirs)


class LevelError(PairMetric):
    """Mean of signed errors: negative where the model is too quiet."""

    def measure(self, pair: Pair) -> float:
        return level.level_error_db(pair.generated, pair.target)


class PitchError(PairMetric):
    """Mean over examples of the median error in cents; examples without a common pitch are skipped."""

    unit = "cents"

    def measure(self, pair: Pair) -> float:
        tracks = [pitch.f0_hz(x, pair.sample_rate_hz) for x in (pair.generated, pair.target)]
        return pitch.pitch_error(*tracks).cents


class SilenceFraction(PairMetric):
    """Of the generated sound; needs no target."""

    unit = ""

    def update(self, generated: Media, target: Media | None, row: Row) -> None:
        audio = _sound(generated)
        self.add(level.silence_fraction(audio.samples, audio.sample_rate_hz))


class DurationError(PairMetric):
    """Mean absolute difference of the two lengths."""

    unit = "s"

    def update(self, generated: Media, target: Media | None, row: Row) -> None:
        self.add(math.nan if target is None else abs(_sound(generated).seconds - _sound(target).seconds))


def audio_metrics() -> dict[str, Callable[[], Metric]]:
    """What any family that generates sound towards a target may return from ``metrics``."""
    return {
        "log_spectral_distance_db": LogSpectralDistance,
        "log_mel_distance_db": LogMelDistance,
        "multi_resolution_stft": MultiResolutionStft,
        "level_error_db": LevelError,
        "silence_fraction": SilenceFraction,
        "duration_error_s": DurationError,
    }


def _sound(media: Media) -> Audio:
    if not isinstance(media, Audio):
        raise ValueError(f"This figure is about sound, got {type(media).__name__}.")
    return media
