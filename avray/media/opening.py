"""Opens a media file, says what kind it is, and turns every way of being bad into one DataError."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import av
import fsspec
import soundfile as sf

from avray.errors import DataError, MissingDependency
from avray.media.types import Limits
from avray.store import is_url

_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (8, b"WAVE", "wav"), (0, b"fLaC", "flac"), (0, b"OggS", "ogg"), (0, b"ID3", "mp3"), (0, b"FORM", "aiff"),
    (0, b"caff", "caf"), (0, b".snd", "au"), (0, b"riff", "w64"), (4, b"ftyp", "mp4"),
    (0, b"\x1aE\xdf\xa3", "matroska"),
)


@contextmanager
def opened(path: str, limits: Limits) -> Iterator[BinaryIO]:
    """The file at its beginning, its size checked. What libsndfile, FFmpeg and the file system raise inside becomes a
    DataError with the path; so check arguments, which are a ValueError, before."""
    try:
        # Unbuffered, because libsndfile and FFmpeg do their own and mix seeks with reads.
        with (fsspec.open(path, "rb") if is_url(path) else open(path, "rb", buffering=0)) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            if not size:
                raise DataError(f"{path} is empty.")
            if size > limits.max_file_bytes:
                raise DataError(f"{path} has {size:,} bytes, over the limit of {limits.max_file_bytes:,} "
                                "(data.limits.max_file_bytes).")
            yield file
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except ImportError as error:
        raise MissingDependency(f"{path} cannot be opened: {error}.") from error
    except (sf.SoundFileError, av.FFmpegError, OSError, EOFError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{path} cannot be read: {reason.removeprefix('Error : ').rstrip('. ')}.") from error


def kind_of(path: str, file: BinaryIO) -> str:
    """The format, from the first bytes. DataError for one that is not known here."""
    head = file.read(16)
    file.seek(0)
    for offset, magic, kind in _MAGIC:
        if head[offset:offset + len(magic)] == magic:
            return kind
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        return "mp3" if head[1] & 0x06 else "aac"
    raise DataError(f"{path} is nothing that avray reads (WAV, FLAC, MP3, OGG, AIFF, CAF, AU, AAC, MP4, WebM).")


def mp3_tells_length(file: BinaryIO) -> bool:
    """Whether the first frame is the Xing, Info or VBRI header that counts the others."""
    head = file.read(10)
    tag_bytes = 0
    if head[:3] == b"ID3" and len(head) == 10:
        tag_bytes = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    file.seek(tag_bytes)
    first_frame = file.read(256)
    file.seek(0)
    return any(name in first_frame for name in (b"Xing", b"Info", b"VBRI"))


def check_wav_length(path: str, file: BinaryIO) -> None:
    """DataError for a data chunk shorter than the samples that follow it. One that claims more than there is, as
    recorders and pipes leave it (0xFFFFFFFF), needs no care: libsndfile reads what is there."""
    size = file.seek(0, io.SEEK_END)
    position = 12
    for _ in range(1000):  # a hostile file is all empty chunks
        file.seek(position)
        header = file.read(8)
        if len(header) < 8:
            break
        name, length = struct.unpack("<4sI", header)
        following = position + 8 + length + length % 2
        if name == b"data":
            file.seek(min(following, size))
            after = file.read(8)
            if len(after) == 8 and not all(32 <= byte < 127 for byte in after[:4]):
                raise DataError(f"{path} says that it holds {length:,} bytes of sound, but {size - position - 8:,} "
                                "follow: have it written again (ffmpeg -i old.wav new.wav).")
            break
        position = following
    file.seek(0)
