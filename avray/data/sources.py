"""What the readers of data sets share: a folder and the files found in it, text out of bytes, and raw rows."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from avray.data.fields import AUDIO_SUFFIXES, VIDEO_SUFFIXES
from avray.store import Store

GroupBy = Literal["talk", "speaker"]


@dataclass(frozen=True)
class RawRow:
    """Fields as they stand in line ``line`` of ``source`` (0: the file itself), or the reason there are none."""

    source: str
    line: int = 0
    fields: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Source:
    """A folder, and the files in it that were named or found; ``texts`` is a second folder of transcripts, or the one
    file ``text_names`` in it. ``group_by`` is what rows of a transcript with times are grouped by."""

    store: Store
    names: tuple[str, ...] = ()
    texts: Store | None = None
    text_names: tuple[str, ...] = ()
    group_by: GroupBy = "talk"

    @cached_property
    def files(self) -> list[str]:
        """All files below the folder, relative and sorted; none that is hidden."""
        names = self.store.list("")
        return sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))

    @cached_property
    def media(self) -> list[str]:
        return [name for name in self.files if name.lower().endswith(AUDIO_SUFFIXES + VIDEO_SUFFIXES)]


def decode(content: bytes) -> tuple[str, bool]:
    """Text, and whether every byte of it made sense; those that did not become U+FFFD."""
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return content.decode(encoding), True
    except UnicodeDecodeError:
        return content.decode(encoding, "replace"), False


def lines(source: Source, name: str) -> Iterator[tuple[int, str | None]]:
    """Numbered lines that are not blank, as they are read; None for one that is not text. Only newlines end a line:
    U+2028 may stand in JSON."""
    path = source.store.path(name)
    with open(path, "rb") if source.store.is_local else source.store.fs.open(path, "rb") as file:
        wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        file.seek(0)
        for number, (line, sound) in enumerate(_wide_lines(file.read()) if wide else _lines(file), 1):
            if line.strip():
                yield number, line.rstrip("\r") if sound else None


def _wide_lines(content: bytes) -> Iterator[tuple[str, bool]]:
    text, sound = decode(content)
    return ((line, sound or "\ufffd" not in line) for line in text.split("\n"))


def _lines(pieces: Iterable[bytes]) -> Iterator[tuple[str, bool]]:
    encoding = "utf-8-sig"
    for piece in pieces:
        try:
            yield piece.removesuffix(b"\n").decode(encoding), True
        except UnicodeDecodeError:
            yield piece.removesuffix(b"\n").decode(encoding, "replace"), False
        encoding = "utf-8"
