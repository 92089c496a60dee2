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

from avray.media.types import Audio, Video
from avray.store import is_url

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
    check_clip(path, video)
    with av.open(os.fspath(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        # One thread and no B-frames: the bytes are then the same every time (x264's look-ahead differed in 17 of 36
        # clips over 24 tries with them), and the clips written here are short.
        tracks = _Tracks(container, video, note, {"threads": "1", "x264-params": "bframes=0"})
        tracks.add(video)
        tracks.close()


class Fragments:
    """The same as a fragmented MP4, whose bytes come as its pictures do and are played as they come, a fragment for
    every tenth of a second. Its length, which nobody knows yet, is not in its head."""

    def __init__(self, note: str | None = None) -> None:
        self.note, self.pipe = note, Pipe()
        self.container: Any = None
        self.tracks: _Tracks | None = None

    def push(self, video: Video) -> bytes:
        """What is final now: all but the last third of a second, which comes with the next piece. Every piece
        begins with a key frame, and has sound if the first has. ValueError as ``write_video`` raises it."""
        if self.tracks is None:
            check_clip("An MP4", video)
            # delay_moov: what AAC puts in front of the sound is known only once it was encoded.
            flags = {"movflags": "delay_moov+default_base_moof", "frag_duration": "100000", "flush_packets": "1"}
            # FFmpeg goes back in its buffer to put a box's size in front of it: the first has to fit.
            self.container = av.open(self.pipe, "w", format="mp4", options=flags, buffer_size=1 << 16)
            # zerolatency: x264 holds no pictures back to look ahead.
            options = {"threads": "1", "tune": "zerolatency", "x264-params": "bframes=0"}
            self.tracks = _Tracks(self.container, video, self.note, options)
        self.tracks.add(video)
        return self.pipe.take()

    def finish(self) -> bytes:
        if self.tracks is not None:
            self.tracks.close()
            self.container.close()
        return self.pipe.take()


class Pipe(io.RawIOBase):
    """What FFmpeg writes to when nobody can seek back."""

    def __init__(self) -> None:
        self.written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.written += data
        return len(data)

    def take(self) -> bytes:
        taken, self.written = bytes(self.written), bytearray()
        return taken


def check_clip(path: object, video: Video) -> None:
    """ValueError for what no MP4 holds."""
    num_frames, height, width, _ = video.frames.shape
    if not num_frames or height % 2 or width % 2:
        raise ValueError(f"{path} needs at least one frame and an even width and height, not {num_frames} frames of "
                         f"{width} x {height}; pad or crop the frames.")


class _Tracks:
    """The pictures of an open MP4, and its sound where the first piece has some."""

    def __init__(self, container: Any, first: Video, note: str | None, options: dict[str, str]) -> None:
        self.container = container
        if note is not None:
            container.metadata["comment"] = note
        rate = Fraction(first.frame_rate_hz).limit_denominator(1001)
        self.pictures = container.add_stream("libx264", rate=rate, options=options)
        _, self.pictures.height, self.pictures.width, _ = first.frames.shape
        self.pictures.pix_fmt, self.time_base, self.num_frames, self.num_samples = "yuv420p", 1 / rate, 0, 0
        self.sound = _add_sound(container, first.audio) if first.audio else None

    def add(self, video: Video) -> None:
        for index, pixels in enumerate(video.frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = self.num_frames, self.time_base
            if index == 0:
                frame.pict_type = av.video.frame.PictureType.I
            self.container.mux(self.pictures.encode(frame))
            self.num_frames += 1
        if self.sound:
            assert video.audio is not None, "every piece of a clip has sound, or none has"
            samples = np.clip(np.ascontiguousarray(video.audio.samples, dtype=np.float32), -1.0, 1.0)
            if not samples.size:
                return
            piece = av.AudioFrame.from_ndarray(samples, format="fltp", layout=self.sound.layout.name)
            piece.sample_rate, piece.time_base = video.audio.sample_rate_hz, Fraction(1, video.audio.sample_rate_hz)
            # Without a pts the encoder's 1,024 samples of priming are left in and the sound comes out late.
            piece.pts = self.num_samples
            self.num_samples += samples.shape[1]
            self.container.mux(self.sound.encode(piece))

    def close(self) -> None:
        self.container.mux(self.pictures.encode())
        if self.sound:
            self.container.mux(self.sound.encode())


def _add_sound(container: Any, audio: Audio) -> Any:
    channels = audio.samples.shape[0]
    rates = av.Codec("aac", "w").audio_rates
    if channels not in (1, 2) or audio.sample_rate_hz not in rates:
        raise ValueError(f"The sound of an MP4 is mono or stereo at one of {sorted(rates)} Hz, not {channels} channels "
                         f"at {audio.sample_rate_hz} Hz; resample it.")
    return container.add_stream("aac", rate=audio.sample_rate_hz, layout="mono" if channels == 1 else "stereo")
