"""What a row's neighbours decide: its id where it has none, its group, and whether it is somebody's duplicate.

A data set has more rows than a driver should hold names for. So one pass looks which hashes of media occur twice, and
only rows that share media are compared by more than their own; ids are kept as eight bytes.
"""

from __future__ import annotations

import hashlib
import posixpath
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from avray.data.fields import MEDIA_FIELDS, Roots
from avray.family import Row

SPAN = "\0span"
"""What a row is called of its file, while it has no name yet; empty for the whole of it."""
_GIVEN = -1


@dataclass(frozen=True)
class Duplicate:
    """A row whose media and span are, byte for byte, those of an earlier row."""

    id: str
    same_as: str


@dataclass
class Naming:
    """Sees every row once in :meth:`look`, and then names each, in the same order."""

    roots: Roots
    duplicates: list[Duplicate] = field(default_factory=list)
    _owners: dict[int, int] = field(default_factory=dict)
    """By an id's hash, the hash of the label it was made of."""
    _leader: dict[str, str] = field(default_factory=dict)
    _shared: set[int] = field(default_factory=set)
    _groups: dict[str, str] = field(default_factory=dict)
    _seen: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def look(self, rows: Sequence[Row]) -> None:
        """Which ids are given, which media several rows hold, and the groups that they have already."""
        hashes, unnamed, grouped = array("q"), False, False
        for row in rows:
            digests = _digests(row)
            hashes.extend(map(hash, dict.fromkeys(digests)))
            for other in digests[1:]:
                self._leader[self._find(other)] = self._find(digests[0])
            unnamed, grouped = unnamed or "id" not in row, grouped or "group" in row
        values, counts = np.unique(np.asarray(hashes), return_counts=True)
        self._shared = set(values[counts > 1].tolist())
        if unnamed:
            self._owners = {_key(row["id"]): _GIVEN for row in rows if "id" in row}
        if grouped and (self._shared or self._leader):
            for row in rows:
                if "group" in row and self._is_shared(digests := _digests(row)):
                    self._groups.setdefault(self._find(digests[0]), row["group"])

    def name(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows with ``id`` and ``group``, their spans' names taken out."""
        for row in rows:
            span = row.pop(SPAN)
            if "id" not in row:
                row["id"] = self._id(row, span)
            digests = _digests(row)
            shared = self._is_shared(digests)
            if "group" not in row:
                path = _path(row)
                default = posixpath.splitext(self.roots.label(path))[0] if path else row["id"]
                row["group"] = self._groups.setdefault(self._find(digests[0]), default) if shared else default
            if shared:
                key = (*(row.get(f"{name}_hash") for name in MEDIA_FIELDS), row["start_s"], row["duration_s"])
                first = self._seen.setdefault(key, row["id"])
                if first != row["id"]:
                    self.duplicates.append(Duplicate(row["id"], first))
            yield row

    def _id(self, row: Row, span: str) -> str:
        """The path without its suffix, and the span where it is not the whole file. It does not change when rows come
        after it."""
        path = _path(row)
        label = self.roots.label(path) if path else f"line-{row.get('manifest_line', 0):07d}"
        name = base = posixpath.splitext(label)[0] + span
        owner = _key(label)
        if self._owners.get(_key(base), owner) != owner:  # a.wav and a.flac
            name = base = label + span
        count = 1
        while _key(name) in self._owners:
            count += 1
            name = f"{base}#{count}"
        self._owners[_key(name)] = owner
        return name

    def _is_shared(self, digests: Sequence[str]) -> bool:
        """Whether another row may hold one of these media, or one that is linked to them."""
        return bool(digests) and (hash(digests[0]) in self._shared or digests[0] in self._leader
                                  or len(digests) > 1)

    def _find(self, digest: str) -> str:
        """The one that stands for all media linked by rows that hold several (one pair's output is another's input),
        so that no sound stands on two sides of a split."""
        while (leader := self._leader.setdefault(digest, digest)) != digest:
            self._leader[digest] = self._leader[leader]
            digest = leader
        return digest


def _digests(row: Row) -> list[str]:
    return [row[f"{name}_hash"] for name in MEDIA_FIELDS if name in row]


def _path(row: Row) -> str | None:
    return next((row[name] for name in MEDIA_FIELDS if name in row), None)


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1
