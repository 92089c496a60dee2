"""Reads sound: what a header says, a whole recording, or an endless one in blocks.

WAV, FLAC, MP3, OGG and their kin go through libsndfile (1.2), MP4, WebM and AAC through FFmpeg, and so does an MP3
without a length header, whose end libsndfile guesses from its bit rate (it lost 59 % of one in a trial). Resampling is
soxr's stream, whose output does not depend on block sizes, so a file read whole and in pieces is the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import BinaryIO, Literal

import numpy as np
import soundfile as sf
import soxr
from jaxtyping import Float32

from avray.errors import DataError
from avray.media import container
from avray.media.opening import check_wav_length, kind_of, mp3_tells_length, opened
from avray.media.types import Audio, AudioInfo, Limits, VideoInfo, resampled_length

SLACK_S = 0.1
"""How far a file may fall short of its header, or a span reach beyond the file, before that is an error: encoders and
manifests round (an HE-AAC frame at 24 kHz is 85 ms). What is missing of a file is silence."""
_LEAD_S = {"mp3": 0.5, "ogg": 5.0}
"""Decoded and dropped after a seek, so that a span is a cut of the whole. An MP3 frame borrows bits from up to nine
before it. In Vorbis libsndfile (1.2.2) lands 128 samples off in the last page, and Opus forgets where it was entered
only after 2 s; 1 and 5 s were enough in trials, and 5 s take 7 ms."""
_BLOCK_VALUES = 2**22
"""Samples times channels decoded at once, at most: 16 MB."""


def probe(path: str, limits: Limits | None = None) -> AudioInfo:
    """What a recording's header says, in about a millisecond. Only WebM, bare AAC and MP3s without a length header are
    read to the end (not decoded), since they do not say how long they are. DataError for a file that cannot be used."""
    limits = limits or Limits()
    with opened(path, limits) as file:
        return _header(path, file, limits)


def probe_video(path: str, limits: Limits | None = None) -> VideoInfo:
    """What a clip's header says of its pictures. DataError for a file that cannot be used, or has no pictures."""
    limits = limits or Limits()
    with opened(path, limits) as file:
        info = container.video_header(path, file, kind_of(path, file))
    limits.check_video(path, info)
    return info


def stream_audio(
    path: str, start_s: float = 0.0, duration_s: float | None = None, sample_rate_hz: int | None = None,
    block_s: float = 10.0, limits: Limits | None = None, past_end: Literal["error", "stop"] = "error",
) -> Iterator[Float32[np.ndarray, " samples"]]:
    """A recording, or a span of it, as mono blocks of at most about ``block_s``, in bounded memory.

    The blocks joined are ``read_audio`` of the same span, bit for bit, whatever ``block_s`` is; see there for what a
    span is and what raises (here at the first block). With ``past_end="stop"`` a span may reach beyond the end.
    """
    _check_span(path, start_s, duration_s)
    limits = limits or Limits()
    with opened(path, limits) as file:
        info = _header(path, file, limits)
        span = _span(path, info, start_s, duration_s, past_end)
        for block in _blocks(path, file, info, span, sample_rate_hz or info.sample_rate_hz, True, block_s):
            yield block[:, 0]


def read_audio(
    path: str, start_s: float = 0.0, duration_s: float | None = None, sample_rate_hz: int | None = None,
    mono: bool = True, limits: Limits | None = None,
) -> Audio:
    """A recording, or a span of it, in memory: ``[1, time]``, or ``[channels, time]`` with ``mono=False``.

    A span starts at frame round(start_s × rate) and has round(duration_s × rate) frames (no duration: to the end), and
    is a cut of the whole to the bit, but for MP3 and AAC, which are entered within rounding. ``n`` frames give
    round(n × target / source) samples, always: the resampler's tail is cut, or filled with zeros, to that. Mono is the
    mean of the channels. Float samples beyond ±1 are kept.

    DataError for a file that cannot be used, or is over 0.1 s shorter than its header says or than the span needs, or
    holds samples that are not finite. ValueError for a span that makes no sense.
    """
    _check_span(path, start_s, duration_s)
    limits = limits or Limits()
    with opened(path, limits) as file:
        info = _header(path, file, limits)
        span = _span(path, info, start_s, duration_s, "error")
        rate, channels = sample_rate_hz or info.sample_rate_hz, 1 if mono else info.channels
        total = resampled_length(len(span), info.sample_rate_hz, rate)
        if total * channels * 4 > limits.max_decoded_bytes:
            raise DataError(f"{path} would take {total * channels * 4:,} bytes of memory, over the limit of "
                            f"{limits.max_decoded_bytes:,} (data.limits.max_decoded_bytes).")
        # Pages are backed by memory only once written, so a header that lies about its length costs nothing here.
        samples, done = np.empty((channels, total), np.float32), 0
        for block in _blocks(path, file, info, span, rate, mono, 10.0):
            samples[:, done:done + len(block)] = block.T
            done += len(block)
        assert done == total
        return Audio(samples, rate)


def _header(path: str, file: BinaryIO, limits: Limits) -> AudioInfo:
    """What the file says of its sound, held against the limits."""
    kind = kind_of(path, file)
    if kind == "wav":
        check_wav_length(path, file)
    if _through_ffmpeg(kind, file):
        info = container.audio_header(path, file, kind)
    else:
        with sf.SoundFile(file) as sound:
            info = AudioInfo(sound.frames, sound.samplerate, sound.channels, kind)
    file.seek(0)
    limits.check_audio(path, info)
    return info


def _through_ffmpeg(kind: str, file: BinaryIO) -> bool:
    return not mp3_tells_length(file) if kind == "mp3" else kind in container.DEMUXERS


def _check_span(path: str, start_s: float, duration_s: float | None) -> None:
    if not 0 <= start_s < math.inf or (duration_s is not None and not 0 < duration_s < math.inf):
        raise ValueError(f"A span of {path} needs start_s of 0 or more and duration_s above 0, not {start_s} and "
                         f"{duration_s}.")


def _span(path: str, info: AudioInfo, start_s: float, duration_s: float | None, past_end: str) -> range:
    """The frames of a span; DataError if the file does not have them."""
    first = round(start_s * info.sample_rate_hz)
    stop = info.num_frames if duration_s is None else first + round(duration_s * info.sample_rate_hz)
    beyond = stop - info.num_frames > SLACK_S * info.sample_rate_hz
    if first >= info.num_frames or (beyond and past_end == "error"):
        asked = f"start_s {start_s:g}" + (f" and duration_s {duration_s:g}" if duration_s else "")
        raise DataError(f"{path} is {info.duration_s:.3f} s long, too short for {asked}.")
    return range(first, min(stop, info.num_frames))


def _blocks(path: str, file: BinaryIO, info: AudioInfo, span: range, rate: int, mono: bool,
            block_s: float) -> Iterator[np.ndarray]:
    """Blocks ``[n, channels]`` of a span at ``rate``, together ``resampled_length`` samples."""
    size = max(1, min(int(block_s * info.sample_rate_hz), _BLOCK_VALUES // info.channels))
    decode = container.audio_blocks if _through_ffmpeg(info.format, file) else _sound_blocks
    blocks = _exactly(path, decode(path, file, info, span.start, size), info, span, mono)
    if rate == info.sample_rate_hz:
        yield from blocks
        return
    left = resampled_length(len(span), info.sample_rate_hz, rate)
    channels = 1 if mono else info.channels
    resampler = soxr.ResampleStream(info.sample_rate_hz, rate, channels, dtype="float32")
    for block in blocks:
        ready = resampler.resample_chunk(block)[:left]
        left -= len(ready)
        if len(ready):
            yield ready
    if left:
        tail = resampler.resample_chunk(np.zeros((0, channels), np.float32), last=True)[:left]
        yield np.concatenate([tail, np.zeros((left - len(tail), channels), np.float32)])


def _exactly(path: str, blocks: Iterator[np.ndarray], info: AudioInfo, span: range, mono: bool) -> Iterator[np.ndarray]:
    """The span's frames, no more and no fewer, finite, mixed down if asked."""
    left = len(span)
    for block in blocks:
        block = block[:left]
        left -= len(block)
        if not np.isfinite(block).all():
            raise DataError(f"{path} holds samples that are not finite numbers.")
        yield block.mean(axis=1, keepdims=True, dtype=np.float32) if mono and block.shape[1] > 1 else block
        if not left:
            return
    if left > SLACK_S * info.sample_rate_hz:
        raise DataError(f"{path} is cut short: its header says {info.duration_s:.2f} s, and it ends "
                        f"{left / info.sample_rate_hz:.2f} s early.")
    yield np.zeros((left, 1 if mono else info.channels), np.float32)


def _sound_blocks(path: str, file: BinaryIO, info: AudioInfo, first: int, size: int) -> Iterator[np.ndarray]:
    """float32 ``[n, channels]`` from frame ``first`` to the end, through libsndfile."""
    with sf.SoundFile(file) as sound:
        lead = min(first, int(_LEAD_S.get(info.format, 0.0) * info.sample_rate_hz))
        sound.seek(first - lead)
        sound.read(lead, dtype="float32")
        while len(samples := sound.read(size, dtype="float32", always_2d=True)):
            yield samples
