"""Reads pictures: the frames of a span, sampled by rate and scaled while they are decoded.

Memory is what is returned and one frame: a frame is scaled as it comes, and its size is looked at again, because a
stream may change it behind its header.
"""

from __future__ import annotations

from collections.abc import Sequence

import av
import numpy as np

from avray.errors import DataError
from avray.media import container
from avray.media.opening import kind_of, opened
from avray.media.types import Audio, Limits, Video


def read_video(path: str, start_s: float = 0.0, duration_s: float | None = None, frame_rate_hz: float | None = None,
               size: int | None = None, limits: Limits | None = None) -> Video:
    """The frames of a clip, or of a span of it, without its sound.

    At ``frame_rate_hz`` (None: its own) frame k is the one shown at ``start_s`` + (k + 1/2) / rate; there are
    round(duration × rate), at least one. ``size`` scales to ``size`` × ``size``, whatever the shape was.

    DataError for a file that cannot be used, has no pictures in the span, or is over the limits in bytes, pixels,
    seconds, or bytes decoded. ValueError for a span or a rate that makes no sense.
    """
    if start_s < 0 or any(value is not None and value <= 0 for value in (duration_s, frame_rate_hz, size)):
        raise ValueError(f"A span of {path} needs a start of at least 0, a duration, a rate and a size above 0.")
    limits = limits or Limits()
    with opened(path, limits) as file:
        kind = kind_of(path, file)
        info = container.video_header(path, file, kind)
        limits.check_video(path, info)
        if start_s >= info.duration_s:
            raise DataError(f"{path} has no pictures from {start_s:g} s on: it ends at {info.duration_s:g} s.")
        rate = frame_rate_hz or info.frame_rate_hz
        wanted_s = max(0.0, info.duration_s - start_s) if duration_s is None else duration_s
        number = max(1, round(wanted_s * rate))
        width, height = (size, size) if size else (info.width, info.height)
        if number * width * height * 3 > limits.max_decoded_bytes:
            raise DataError(f"{path} would take {number * width * height * 3:,} bytes of memory, over the limit of "
                            f"{limits.max_decoded_bytes:,} (data.limits.max_decoded_bytes).")
        file.seek(0)
        times = start_s + (np.arange(number) + 0.5) / rate
        frames: list[np.ndarray] = []
        before: np.ndarray | None = None
        for at_s, frame in container.pictures(path, file, kind, limits, start_s, (width, height)):
            while len(frames) < number and at_s > times[len(frames)] + 1e-6 and before is not None:
                frames.append(before)
            before = frame
            if len(frames) == number:
                break
    if before is None:
        raise DataError(f"{path} has no pictures from {start_s:g} s on.")
    frames += [before] * (number - len(frames))
    return Video(np.stack(frames), rate)


def joined(pieces: Sequence[Video]) -> Video:
    """Pieces of a clip, one after another, with their sound where they have it."""
    sounds = [piece.audio for piece in pieces if piece.audio is not None]
    assert len(sounds) in (0, len(pieces)), "every piece of a clip has sound, or none has"
    audio = Audio(np.concatenate([sound.samples for sound in sounds], 1), sounds[0].sample_rate_hz) if sounds else None
    return Video(np.concatenate([piece.frames for piece in pieces]), pieces[0].frame_rate_hz, audio)


def rescaled(video: Video, frame_rate_hz: float, size: int) -> Video:
    """A clip's pictures at another rate and ``size`` × ``size``, as ``read_video`` samples and scales a file's."""
    number = max(1, round(len(video.frames) / video.frame_rate_hz * frame_rate_hz))
    shown = ((np.arange(number) + 0.5) * video.frame_rate_hz / frame_rate_hz).astype(int)
    frames = video.frames[np.minimum(shown, len(video.frames) - 1)]
    if frames.shape[1:3] != (size, size):
        frames = np.stack([av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                           .reformat(size, size, format="rgb24").to_ndarray() for frame in frames])
    return Video(frames, frame_rate_hz)
