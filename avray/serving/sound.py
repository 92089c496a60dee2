"""16-bit samples to the bytes of a file, and frames to those of an MP4, whole or as they come.

WAV and PCM are written here; FLAC, MP3 and Opus by FFmpeg, frame by frame. A streamed WAV says 0xFFFFFFFF where its
length stands, as OpenAI's does and as every player reads it; a whole one says the truth.
"""

from __future__ import annotations

import io
import struct
import tempfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Protocol

import av
import numpy as np
import soxr

from avray.media import Audio, Fragments, Video, joined, write_video
from avray.media.writing import Pipe
from avray.serving.messages import Part

Format = Literal["wav", "flac", "mp3", "opus", "pcm"]
MEDIA_TYPES: Mapping[str, str] = {"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg", "opus": "audio/ogg",
                                  "pcm": "audio/pcm", "mp4": "video/mp4"}
_UNKNOWN = 0xFFFFFFFF
_CODECS = {"flac": ("flac", "flac", None), "mp3": ("libmp3lame", "mp3", 128_000), "opus": ("libopus", "ogg", 64_000)}
_OPUS_RATES = (8000, 12_000, 16_000, 24_000, 48_000)
_MP3_RATES = (8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)


class Encoder(Protocol):
    def push(self, samples: bytes) -> bytes:
        """Interleaved 16-bit samples in, bytes of the file out as far as they are final (possibly none)."""

    def finish(self) -> bytes: ...


def rate_of(format: str, wanted_hz: int | None, model_hz: int) -> int:
    """The rate of the file: the one that was asked for, else the model's, as far as the format has it. ValueError for
    one that was asked for and that the format does not have."""
    rates = {"opus": _OPUS_RATES, "mp3": _MP3_RATES}.get(format)
    rate = wanted_hz or (24_000 if format == "pcm" else model_hz)
    if rates is None or rate in rates:
        return rate
    if wanted_hz is not None:
        raise ValueError(f"sample_rate: {format} has no {wanted_hz} Hz, but {', '.join(map(str, rates))}.")
    return 48_000


def open_encoder(format: str, model_hz: int, rate_hz: int, channels: int, note: str | None,
                 is_whole: bool = False) -> Encoder:
    """An encoder of sound at ``model_hz`` into a file at ``rate_hz``. With ``is_whole`` everything comes at
    ``finish``, with lengths in its headers. ``note`` says how it was made; PCM has no place for it."""
    encoder: Encoder
    if format in _CODECS:
        encoder = _Muxed(format, rate_hz, channels, note, is_whole)
    else:
        encoder = _Plain(format, rate_hz, channels, note, is_whole)
    return encoder if rate_hz == model_hz else _Resampled(encoder, model_hz, rate_hz, channels)


def clip_of(part: Part) -> Video:
    """Its pictures, and their sound where there is any."""
    assert isinstance(part.data, bytes)
    audio = None
    if part.sound:
        samples = np.frombuffer(part.sound, "<i2").reshape(-1, part.channels).T
        audio = Audio(samples.astype(np.float32) / 2**15, part.sample_rate_hz)
    return Video(np.frombuffer(part.data, np.uint8).reshape(-1, *part.size, 3), part.frame_rate_hz, audio)


def mp4(parts: Sequence[Part], note: str | None) -> bytes:
    """A whole one. Through a file, whose index FFmpeg moves to the front at the end."""
    clip = joined([clip_of(part) for part in parts])
    with tempfile.NamedTemporaryFile(prefix="avray-", suffix=".mp4") as file:
        write_video(file.name, clip, note)
        return Path(file.name).read_bytes()


class FragmentedClip:
    """An MP4 as it is made."""

    def __init__(self, note: str | None) -> None:
        self.fragments = Fragments(note)

    def push(self, part: Part) -> bytes:
        return self.fragments.push(clip_of(part))

    def finish(self) -> bytes:
        return self.fragments.finish()


class _Plain:
    """WAV and PCM."""

    def __init__(self, format: str, rate_hz: int, channels: int, note: str | None, is_whole: bool) -> None:
        self.rate_hz, self.channels, self.note = rate_hz, channels, note
        self.held: list[bytes] | None = [] if is_whole else None
        self.has_header = format == "pcm"

    def push(self, samples: bytes) -> bytes:
        if self.held is not None:
            self.held.append(samples)
            return b""
        return self._header(None) + samples

    def finish(self) -> bytes:
        if self.held is None:
            return self._header(None)
        whole = b"".join(self.held)
        return self._header(len(whole)) + whole

    def _header(self, num_bytes: int | None) -> bytes:
        """The header, the first time."""
        if self.has_header:
            return b""
        self.has_header = True
        return wav_header(self.rate_hz, self.channels, num_bytes, self.note)


def wav_header(rate_hz: int, channels: int, num_bytes: int | None, note: str | None) -> bytes:
    """Of 16-bit PCM; the note stands in a LIST INFO chunk before the samples."""
    frame = 2 * channels
    info = b""
    if note is not None:
        entries = b"".join(_riff(name, text.encode() + b"\0") for name, text in (
            (b"ICMT", note), (b"ISFT", "avray")))
        info = _riff(b"LIST", b"INFO" + entries)
    middle = b"WAVE" + _riff(b"fmt ", struct.pack("<HHIIHH", 1, channels, rate_hz, rate_hz * frame, frame, 16)) + info
    size = _UNKNOWN if num_bytes is None else len(middle) + 8 + num_bytes
    return (struct.pack("<4sI", b"RIFF", size) + middle
            + struct.pack("<4sI", b"data", _UNKNOWN if num_bytes is None else num_bytes))


def _riff(name: bytes, data: bytes) -> bytes:
    return struct.pack("<4sI", name, len(data)) + data + b"\0" * (len(data) % 2)


class _Muxed:
    """FLAC, MP3 and Opus in Ogg."""

    def __init__(self, format: str, rate_hz: int, channels: int, note: str | None, is_whole: bool) -> None:
        codec, container, bit_rate = _CODECS[format]
        self.pipe = io.BytesIO() if is_whole else Pipe()
        options = {"flush_packets": "1"} | {"ogg": {"page_duration": "100000"}}.get(container, {})
        if format == "mp3" and not is_whole:
            options["write_xing"] = "0"  # a header of lengths, which nobody knows yet
        self.container = av.open(self.pipe, "w", format=container, options=options, buffer_size=1024)
        if note is not None:
            self.container.metadata["comment"] = note
        self.layout = "mono" if channels == 1 else "stereo"
        self.stream: Any = self.container.add_stream(codec, rate=rate_hz, layout=self.layout)
        if bit_rate is not None:
            self.stream.bit_rate = bit_rate
        self.rate_hz, self.channels, self.position = rate_hz, channels, 0

    def push(self, samples: bytes) -> bytes:
        if samples:
            frame = av.AudioFrame.from_ndarray(np.frombuffer(samples, "<i2")[None], format="s16", layout=self.layout)
            frame.sample_rate, frame.pts = self.rate_hz, self.position
            frame.time_base = Fraction(1, self.rate_hz)
            self.position += frame.samples
            self.container.mux(self.stream.encode(frame))
        return self.pipe.take() if isinstance(self.pipe, Pipe) else b""

    def finish(self) -> bytes:
        self.container.mux(self.stream.encode(None))
        self.container.close()
        return self.pipe.take() if isinstance(self.pipe, Pipe) else self.pipe.getvalue()


class _Resampled:
    def __init__(self, encoder: Encoder, model_hz: int, rate_hz: int, channels: int) -> None:
        self.encoder, self.channels = encoder, channels
        self.resampler = soxr.ResampleStream(model_hz, rate_hz, channels, dtype="int16")

    def push(self, samples: bytes) -> bytes:
        return self.encoder.push(self._resample(samples, False))

    def finish(self) -> bytes:
        return self.encoder.push(self._resample(b"", True)) + self.encoder.finish()

    def _resample(self, samples: bytes, last: bool) -> bytes:
        block = np.frombuffer(samples, "<i2").reshape(-1, self.channels)
        made: np.ndarray = self.resampler.resample_chunk(block, last=last)
        return made.astype("<i2").tobytes()
