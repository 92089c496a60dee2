"""Writes sound (libsndfile) and video (FFmpeg)."""

from __future__ import annotations

import io
import os
from fractions import Fraction
from typing import Any, BinaryIO

import av
import fsspec
import numpy as np
import soundfile as sf

from avray.media.types import Audio, Video, is_url

_FORMATS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "mp3": ("MP3", "MPEG_LAYER_III"),
            "ogg": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS")}


def write_audio(target: str | os.PathLike[str] | BinaryIO, audio: Audio, format: str | None = None) -> None:
    """Write ``wav`` or ``flac`` (16-bit), ``mp3``, ``ogg`` (Vorbis) or ``opus`` to a path, a URL or an open file.

    ``format`` is the path's suffix unless given. Samples beyond ±1 are clipped. ValueError for samples that are not
    finite, and for a rate or a number of channels that the format does not have.
    """
    path = os.fspath(target) if isinstance(target, str | os.PathLike) else ""
    kind = format or os.path.splitext(path)[1][1:].lower()
    if kind not in _FORMATS:
        raise ValueError(f"Cannot write sound as {kind!r}; choose one of {', '.join(_FORMATS)}.")
    samples = np.asarray(audio.samples, np.float32)
    assert samples.ndim == 2, f"samples are [channels, time], not {samples.shape}"
    if not samples.size or not np.isfinite(samples).all():
        raise ValueError(f"There is nothing to write to {path or 'the file'}: the sound is empty or not finite.")
    samples = np.clip(samples, -1.0, 1.0).T
    container, coding = _FORMATS[kind]
    buffer = io.BytesIO()
    try:
        with sf.SoundFile(buffer, "w", audio.sample_rate_hz, samples.shape[1], coding, format=container) as sound:
            # In pieces of a second: libsndfile's Vorbis encoder puts a whole write on the stack and overflows it.
            for start in range(0, len(samples), audio.sample_rate_hz):
                sound.write(samples[start:start + audio.sample_rate_hz])
    except (sf.SoundFileError, ValueError) as error:
        raise ValueError(f"{kind} cannot hold {samples.shape[1]} channels at {audio.sample_rate_hz} Hz; resample the "
                         "sound or choose another format.") from error
    if not path:
        target.write(buffer.getbuffer())  # type: ignore[union-attr]
        return
    with (fsspec.open(path, "wb") if is_url(path) else open(path, "wb")) as file:
        file.write(buffer.getbuffer())


def write_video(path: str | os.PathLike[str], video: Video, note: str | None = None) -> None:
    """Write an H.264 MP4 (yuv420p, so any browser plays it), with AAC sound where there is any, and a comment.

    ValueError for no frames, an odd width or height (4:2:0 colour halves both), or sound that AAC cannot carry.
    """
    num_frames, height, width, _ = video.frames.shape
    if not num_frames or height % 2 or width % 2:
        raise ValueError(f"{path} needs at least one frame and an even width and height, not {num_frames} frames of "
                         f"{width} x {height}; pad or crop the frames.")
    with av.open(os.fspath(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        if note is not None:
            container.metadata["comment"] = note
        rate = Fraction(video.frame_rate_hz).limit_denominator(1001)
        # One thread and no B-frames: the bytes are then the same every time (x264's look-ahead differed in 17 of 36
        # clips over 24 tries with them), and the clips written here are short.
        pictures = container.add_stream("libx264", rate=rate, options={"threads": "1", "x264-params": "bframes=0"})
        pictures.width, pictures.height, pictures.pix_fmt = width, height, "yuv420p"
        sound = _add_sound(container, video.audio) if video.audio else None
        for frame in video.frames:
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(pictures.encode())
        if video.audio and sound:
            samples = np.clip(np.ascontiguousarray(video.audio.samples, dtype=np.float32), -1.0, 1.0)
            whole = av.AudioFrame.from_ndarray(samples, format="fltp", layout=sound.layout.name)
            whole.sample_rate, whole.time_base = video.audio.sample_rate_hz, Fraction(1, video.audio.sample_rate_hz)
            # Without a pts the encoder's 1,024 samples of priming are left in and the sound comes out late.
            whole.pts = 0
            container.mux(sound.encode(whole))
            container.mux(sound.encode())


def _add_sound(container: Any, audio: Audio) -> Any:
    channels = audio.samples.shape[0]
    rates = av.Codec("aac", "w").audio_rates
    if channels not in (1, 2) or audio.sample_rate_hz not in rates:
        raise ValueError(f"The sound of an MP4 is mono or stereo at one of {sorted(rates)} Hz, not {channels} channels "
                         f"at {audio.sample_rate_hz} Hz; resample it.")
    return container.add_stream("aac", rate=audio.sample_rate_hz, layout="mono" if channels == 1 else "stereo")
