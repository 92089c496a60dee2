"""Sound and pictures in MP4, WebM and bare AAC, through FFmpeg.

FFmpeg is always told which demuxer to use: left to guess, it opens playlists (HLS, concat), and those name other files
and addresses for it to open.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import av
import numpy as np

from avray.errors import DataError
from avray.media.types import AudioInfo, Limits, VideoInfo

DEMUXERS = {"mp4": "mov", "matroska": "matroska", "aac": "aac", "mp3": "mp3"}
_LEAD_S = 0.2
"""Decoded and dropped before a seek: AAC overlaps frames, MP3 borrows bits from those before, Opus needs 80 ms."""


def _open(file: BinaryIO, kind: str) -> Any:
    return av.open(file, format=DEMUXERS[kind], metadata_errors="ignore")


def _first(path: str, streams: Any, what: str) -> Any:
    if not streams or streams[0].codec_context is None:
        raise DataError(f"{path} has no {what} in it that can be decoded.")
    return streams[0]


def audio_header(path: str, file: BinaryIO, kind: str) -> AudioInfo:
    """MP4 says how long its sound is; the others' packets are counted, without decoding (an hour of MP3: about 1 s)."""
    with _open(file, kind) as container:
        stream = _first(path, container.streams.audio, "sound")
        rate, channels = stream.codec_context.sample_rate, stream.codec_context.channels
        ticks = stream.duration if kind == "mp4" else None
        if not ticks:
            start = stream.start_time or 0
            ticks = max((packet.pts + (packet.duration or 0) - start for packet in container.demux(stream)
                         if packet.pts is not None), default=0)
        return AudioInfo(round(ticks * stream.time_base * rate), rate, channels, kind)


def audio_blocks(path: str, file: BinaryIO, info: AudioInfo, first: int, block: int) -> Iterator[np.ndarray]:
    """float32 ``[n, channels]`` from frame ``first`` to the end. Frame 0 is where the sound starts."""
    with _open(file, info.format) as container:
        stream = _first(path, container.streams.audio, "sound")
        to_float = av.AudioResampler(format="fltp")
        start = stream.start_time or 0
        if first:
            target_s = max(0.0, first / info.sample_rate_hz - _LEAD_S)
            container.seek(start + int(target_s / stream.time_base), stream=stream)
        pending: list[np.ndarray] = []
        skip = None
        for frame in container.decode(stream):
            if frame.sample_rate != info.sample_rate_hz or frame.layout.nb_channels != info.channels:
                raise DataError(f"{path} changes its sample rate or its channels midway.")
            if skip is None:
                skip = first - round(((frame.pts or start) - start) * stream.time_base * info.sample_rate_hz)
            for converted in to_float.resample(frame):
                samples = converted.to_ndarray().T
                pending.append(samples[max(0, skip):])
                skip -= min(max(0, skip), len(samples))
            if sum(map(len, pending)) >= block:
                yield np.concatenate(pending)
                pending = []
        if pending:
            yield np.concatenate(pending)


def video_header(path: str, file: BinaryIO, kind: str) -> VideoInfo:
    """DataError where there are no pictures."""
    if kind not in ("mp4", "matroska"):
        raise DataError(f"{path} has no pictures in it.")
    with _open(file, kind) as container:
        stream = _first(path, container.streams.video, "picture")
        size = stream.codec_context
        rate = float(stream.average_rate or 0)
        seconds = float((stream.duration or 0) * stream.time_base) or (container.duration or 0) / av.time_base
        return VideoInfo(stream.frames or round(seconds * rate), size.width, size.height, rate, seconds,
                         bool(container.streams.audio))


def pictures(path: str, file: BinaryIO, kind: str, limits: Limits, first_s: float,
             size: tuple[int, int]) -> Iterator[tuple[float, np.ndarray]]:
    """Times in seconds and frames ``[height, width, 3]`` uint8, from the last one at ``first_s`` or before."""
    with _open(file, kind) as opened:
        stream = _first(path, opened.streams.video, "picture")
        start = stream.start_time or 0
        if first_s > 0:
            opened.seek(start + int(first_s / stream.time_base), stream=stream)
        for frame in opened.decode(stream):
            if frame.width * frame.height > limits.max_pixels:
                raise DataError(f"{path} holds a frame of {frame.width} x {frame.height}, over the limit of "
                                f"{limits.max_pixels:,} pixels (data.limits.max_pixels).")
            at_s = float(((frame.pts if frame.pts is not None else start) - start) * stream.time_base)
            yield at_s, frame.reformat(*size, format="rgb24").to_ndarray()
