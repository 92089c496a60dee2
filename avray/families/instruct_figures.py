"""The figures that each task of ``instruct`` is judged by."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from avray.codecs.base import CodecConfig
from avray.family import Metric
from avray.media import Audio
from avray.metrics.accumulators import (
    AlignedMelCepstralDistortion,
    DurationError,
    LogSpectralDistance,
    MelCepstralDistortion,
    OnsetF1,
    PitchError,
    SiSdr,
    Stoi,
    TempoError,
)
from avray.metrics.frechet import FrechetDistance


def task_metrics(task: str, codec: CodecConfig) -> dict[str, Callable[[], Metric]]:
    """By name, what tells whether a task is done."""
    shape: dict[str, Callable[[], Metric]] = {"log_spectral_distance_db": LogSpectralDistance}
    match task:
        case "text_to_audio" | "text_to_music":
            return {"frechet_distance_codec_latents": functools.partial(_frechet, codec),
                    "pitch_error_cents": PitchError, "onset_f1": OnsetF1, "tempo_error": TempoError,
                    "duration_error_s": DurationError}
        case "speech":
            return {"mel_cepstral_distortion_aligned_db": AlignedMelCepstralDistortion,
                    "duration_error_s": DurationError}
        case "singing":
            return {"pitch_error_cents": PitchError, "mel_cepstral_distortion_db": MelCepstralDistortion, **shape}
        case "enhancement":
            return {"si_sdr_db": SiSdr, "stoi": Stoi, **shape}
        case "video_to_audio":
            return {"onset_f1": OnsetF1, **shape}
    return shape


def _frechet(config: CodecConfig) -> Metric:
    codec = config.load("cpu")

    def latents(audio: Audio) -> np.ndarray:
        return codec.encode_batch([audio.samples.mean(0, dtype=np.float32)])[0]

    return FrechetDistance(latents, f"latents of {config.column_id()}, a frame each", codec.sample_rate_hz)
