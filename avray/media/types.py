"""The values that media travel in, and the bounds they are held to."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from avray.errors import DataError


@dataclass(frozen=True)
class Audio:
    """float32 samples ``[channels, time]`` in [-1, 1]."""

    samples: np.ndarray
    sample_rate_hz: int

    @property
    def seconds(self) -> float:
        return self.samples.shape[-1] / self.sample_rate_hz


@dataclass(frozen=True)
class Video:
    """uint8 frames ``[time, height, width, 3]``, with sound where there is any."""

    frames: np.ndarray
    frame_rate_hz: float
    audio: Audio | None = None

    @property
    def seconds(self) -> float:
        return len(self.frames) / self.frame_rate_hz


@dataclass(frozen=True)
class Limits:
    """Bounds on one media file, checked before memory is taken for it."""

    max_file_bytes: int = 16 * 2**30
    """The file itself."""
    max_seconds: float = 24 * 3600.0
    """What its header says it plays for."""
    max_sample_rate_hz: int = 384_000
    """The fastest converters made; a FLAC header can claim 655,350."""
    max_channels: int = 16
    """Third-order ambisonics."""
    max_decoded_bytes: int = 4 * 2**30
    """What one ``read_audio`` may return; longer recordings are for ``stream_audio``."""
    max_pixels: int = 3840 * 2160
    """Of one video frame."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"data.limits.{field.name} must be above 0, not {getattr(self, field.name)}.")

    def check_audio(self, path: str, info: AudioInfo) -> None:
        """DataError for a header that claims nothing, or too much."""
        if info.num_frames <= 0:
            raise DataError(f"{path} holds no samples.")
        if not 0 < info.sample_rate_hz <= self.max_sample_rate_hz or not 0 < info.channels <= self.max_channels:
            raise DataError(f"{path} claims {info.channels} channels at {info.sample_rate_hz:,} Hz, over the limit of "
                            f"{self.max_channels} at {self.max_sample_rate_hz:,} Hz (data.limits).")
        if info.duration_s > self.max_seconds:
            raise DataError(f"{path} claims {info.duration_s:,.0f} s, over the limit of {self.max_seconds:,.0f} s "
                            "(data.limits.max_seconds).")

    def check_video(self, path: str, info: VideoInfo) -> None:
        """DataError for a header that claims nothing, or too much."""
        if not min(info.num_frames, info.frame_rate_hz, info.duration_s, info.width, info.height) > 0:
            raise DataError(f"{path} holds no pictures, or does not say how many.")
        if info.duration_s > self.max_seconds or info.width * info.height > self.max_pixels:
            raise DataError(f"{path} claims {info.duration_s:,.0f} s of {info.width} x {info.height} pictures, over "
                            f"the limit of {self.max_seconds:,.0f} s and {self.max_pixels:,} pixels (data.limits).")


@dataclass(frozen=True)
class AudioInfo:
    """What a file's header says of its sound. ``format`` is ``wav``, ``flac``, ``mp3``, ``ogg``, ``mp4`` …"""

    num_frames: int
    sample_rate_hz: int
    channels: int
    format: str

    @property
    def duration_s(self) -> float:
        return self.num_frames / self.sample_rate_hz


@dataclass(frozen=True)
class VideoInfo:
    """What a file's header says of its pictures."""

    num_frames: int
    width: int
    height: int
    frame_rate_hz: float
    duration_s: float
    has_audio: bool


def resampled_length(num_frames: int, source_hz: int, target_hz: int) -> int:
    """How many samples ``num_frames`` at one rate are at another: what every reader here keeps to."""
    return round(num_frames * target_hz / source_hz)
