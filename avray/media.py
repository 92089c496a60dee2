"""Samples with their rate. Reading and writing sound live further down (being written)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np


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


def write_video(path: str, video: Video) -> None:
    """Write an H.264 MP4 (yuv420p, so any browser plays it), with AAC sound where there is any.

    ValueError for no frames, an odd width or height (4:2:0 colour halves both), or sound AAC cannot carry.
    """
    num_frames, height, width, _ = video.frames.shape
    if not num_frames or height % 2 or width % 2:
        raise ValueError(f"{path} needs at least one frame and an even width and height, not {num_frames} frames of "
                         f"{width} x {height}; pad or crop the frames.")
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        rate = Fraction(video.frame_rate_hz).limit_denominator(1001)
        # One thread: the bytes are then the same on every machine, and the clips written here are short.
        pictures = container.add_stream("libx264", rate=rate, options={"threads": "1"})
        pictures.width, pictures.height, pictures.pix_fmt = width, height, "yuv420p"
        sound = _add_sound(container, video.audio) if video.audio else None
        for frame in video.frames:
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(pictures.encode())
        if sound:
            samples = np.clip(np.ascontiguousarray(video.audio.samples, dtype=np.float32), -1.0, 1.0)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=sound.layout.name)
            frame.sample_rate, frame.time_base = video.audio.sample_rate_hz, Fraction(1, video.audio.sample_rate_hz)
            # Without a pts the encoder's 1,024 samples of priming are left in and the sound comes out late.
            frame.pts = 0
            container.mux(sound.encode(frame))
            container.mux(sound.encode())


def _add_sound(container: av.container.OutputContainer, audio: Audio) -> av.AudioStream:
    channels = audio.samples.shape[0]
    rates = av.Codec("aac", "w").audio_rates
    if channels not in (1, 2) or audio.sample_rate_hz not in rates:
        raise ValueError(f"The sound of an MP4 is mono or stereo at one of {sorted(rates)} Hz, not {channels} channels "
                         f"at {audio.sample_rate_hz} Hz; resample it.")
    return container.add_stream("aac", rate=audio.sample_rate_hz, layout="mono" if channels == 1 else "stereo")
