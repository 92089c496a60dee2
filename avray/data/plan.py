"""From manifest rows to shards: which units exist, which examples use them, and what each shard is called.

A shard is the unit of embedding, of the cache's commit and of shuffling: whole recordings in manifest order, cut where
the hash of a recording says so (as rsync does), so that a file added to a data set renames the shard it lands in and
no other. Its name is a hash of its units' keys, and a key is a hash of (source bytes, span, recipe): the content is a
function of the name, which makes two writers of one shard harmless.

A data set is walked recording by recording, and a plan holds its shards packed: some 80 bytes an example instead of a
kilobyte of objects, which every process of a node reads from the same memory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Self, get_args, overload

import numpy as np

from avray.data.order import GroupedOrder, Order
from avray.data.packed import Packed, from_bytes, to_bytes
from avray.errors import DataError
from avray.family import Column, Example, Family, Modality, Row, Unit, role_columns

HASH_FIELDS = {"audio": "audio_hash", "target_audio": "target_audio_hash", "video": "video_hash"}
MODALITIES: tuple[Modality, ...] = get_args(Modality)
KEY_BYTES = 16
KEPT_SHARDS = 512
"""Decoded, by a process, of a plan: every lane is in another shard, and there are up to 256 lanes."""


@dataclass(frozen=True)
class PlannedExample:
    """An example whose units are indices into its shard."""

    id: str
    units: Mapping[str, int]
    fields: Mapping[str, Any]
    weight: float


@dataclass(frozen=True)
class Shard:
    name: str
    units: tuple[Unit, ...]
    keys: tuple[bytes, ...]
    examples: tuple[PlannedExample, ...]

    def wants(self, columns: Sequence[Column]) -> list[Column]:
        """The columns that any of its units is encoded by."""
        modalities = {unit.modality for unit in self.units}
        return [column for column in columns if column.modality in modalities]

    def wanted_units(self, column: Column) -> list[int]:
        """Indices of the units that an example wants this column of."""
        wanted: set[int] = set()
        for example in self.examples:
            modalities = {role: self.units[index].modality for role, index in example.units.items()}
            wanted.update(example.units[role] for role in role_columns(column, modalities))
        return sorted(wanted)


@dataclass(frozen=True)
class Head:
    """What can be told of a shard without decoding it."""

    name: str
    num_examples: int
    modalities: frozenset[Modality]

    def wants(self, columns: Sequence[Column]) -> list[Column]:
        """The columns that any of its units is encoded by."""
        return [column for column in columns if column.modality in self.modalities]


class Shards(Packed[Shard]):
    """Shards, each as its head, its units' keys and compressed JSON."""

    _head = struct.Struct("<12sIIB")

    def __init__(self, items: Iterable[Shard] = ()) -> None:
        self._read: Callable[[int], Shard] = lru_cache(KEPT_SHARDS)(super().__getitem__)
        super().__init__(items)

    @overload
    def __getitem__(self, index: int) -> Shard: ...

    @overload
    def __getitem__(self, index: slice) -> list[Shard]: ...

    def __getitem__(self, index: int | slice) -> Shard | list[Shard]:
        return super().__getitem__(index) if isinstance(index, slice) else self._read(index)

    def heads(self) -> Iterator[Head]:
        for start in self._starts:
            name, num_examples, _, modalities = self._head.unpack_from(self._buffer, start)
            yield Head(name.hex(), num_examples, _MODALITY_SETS[modalities])

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """One sequence of several, in a buffer of its own where they are more than one."""
        if len(parts) == 1:
            return parts[0]
        whole = cls()
        for part in parts:
            base = len(whole._buffer)
            whole._buffer += memoryview(part._buffer)
            whole._starts.extend(start + base for start in part._starts)
            whole._sizes.extend(part._sizes)
        return whole

    def _encode(self, item: Shard) -> bytes:
        modalities = sum(1 << MODALITIES.index(modality) for modality in {unit.modality for unit in item.units})
        head = self._head.pack(bytes.fromhex(item.name), len(item.examples), len(item.units), modalities)
        units = [[unit.source, unit.modality, unit.start_s, unit.duration_s, unit.recipe] for unit in item.units]
        examples = [[one.id, dict(one.units), dict(one.fields), one.weight] for one in item.examples]
        return head + b"".join(item.keys) + zlib.compress(to_bytes([units, examples]), 1)

    def _decode(self, content: bytes) -> Shard:
        name, _, num_units, _ = self._head.unpack_from(content)
        begin, end = self._head.size, self._head.size + KEY_BYTES * num_units
        units, examples = from_bytes(zlib.decompress(content[end:]))
        return Shard(name.hex(), tuple(Unit(*unit) for unit in units),
                     tuple(content[at : at + KEY_BYTES] for at in range(begin, end, KEY_BYTES)),
                     tuple(PlannedExample(*example) for example in examples))


_MODALITY_SETS = [frozenset(modality for index, modality in enumerate(MODALITIES) if bits >> index & 1)
                  for bits in range(1 << len(MODALITIES))]


@dataclass(frozen=True)
class Plan:
    """All examples of one split, by shard. With ``groups``, one for each shard, no step mixes two of them."""

    split: str
    shards: Shards
    groups: tuple[int, ...] = ()

    @cached_property
    def shard_rows(self) -> tuple[int, ...]:
        return tuple(head.num_examples for head in self.shards.heads())

    @property
    def num_examples(self) -> int:
        return sum(self.shard_rows)

    def order(self, batch_size: int, seed: int, window_rows: int, shuffle: bool = True) -> Order:
        if self.groups:
            return GroupedOrder(self.shard_rows, batch_size, seed, window_rows, shuffle, self.groups)
        return Order(self.shard_rows, batch_size, seed, window_rows, shuffle)

    def subset(self, indices: Iterable[int]) -> Plan:
        return Plan(self.split, self.shards.pick(indices))

    def repeated(self, times: float) -> Plan:
        """Each shard ``times`` over; of a fraction, shards spread evenly are there once more."""
        count = len(self.shards)
        more = round((times - int(times)) * count)
        again = np.linspace(0, count - 1, more).round().astype(int)
        return Plan(self.split, self.shards.pick(np.concatenate([np.tile(np.arange(count), int(times)), again])))


def unit_key(unit: Unit, source_hash: str) -> bytes:
    """16 bytes for (source bytes, span to the microsecond, recipe)."""
    span = f"{source_hash}|{unit.modality}|{unit.start_s:.6f}|{unit.duration_s:.6f}|{unit.recipe}"
    return hashlib.blake2b(span.encode(), digest_size=16).digest()


@dataclass(frozen=True)
class Recording:
    """The examples of one recording, and the hash of each file they are cut from."""

    examples: list[Example]
    hashes: Mapping[str, str]


def plan_split(family: Family, rows: Sequence[Row], split: str, *, shard_examples: int = 64,
               shard_seconds: float = 600.0) -> Plan:
    """Segment every recording of a split and lay the examples out in shards.

    Raises DataError where no recording is long enough to give one example.
    """
    recordings = segmented(family, rows, split)
    first: list[Recording] = []
    num_examples = 0
    while target_of(num_examples, shard_examples) < max(4, shard_examples):
        recording = next(recordings, None)
        if recording is None:
            break
        first.append(recording)
        num_examples += len(recording.examples)
    if not first:
        raise DataError(
            f"No example of {family.segment_s:g} s could be cut from the {split} split: give longer or more "
            "recordings, or a smaller family.segment_s."
        )
    target = target_of(num_examples, shard_examples)
    return Plan(split, Shards(cut(itertools.chain(first, recordings), target, shard_seconds)))


def target_of(num_examples: int, shard_examples: int) -> int:
    """How many examples a shard is to have: 64 shards or so keep a small set well mixed; a power of two keeps the cuts
    where they were while it grows."""
    return max(4, min(shard_examples, 1 << max(0, (num_examples // 64).bit_length() - 1)))


def segmented(family: Family, rows: Sequence[Row], split: str) -> Iterator[Recording]:
    """A split's recordings that give examples."""
    for group in by_recording(rows, split):
        if examples := family.segment(group):
            yield Recording(examples, source_hashes(group))


def by_recording(rows: Sequence[Row], split: str) -> Iterator[list[Row]]:
    """A split's rows of one media file together, in order of start, files in the order of their first rows; a row
    without media stands alone. What is held meanwhile are three numbers a row."""
    places, hashes, starts = array("q"), array("q"), array("d")
    for place, row in enumerate(rows):
        if row["split"] == split:
            places.append(place)
            hashes.append(hash(recording_of(row)))
            starts.append(row.get("start_s") or 0.0)
    if not places:
        return
    _, first, inverse = np.unique(np.asarray(hashes), return_index=True, return_inverse=True)
    group_of = first[inverse]
    line = np.lexsort((np.asarray(starts), group_of))
    ends = np.flatnonzero(np.diff(group_of[line], append=-1)) + 1
    begin = 0
    for end in ends.tolist():
        together: dict[str, list[Row]] = {}  # more than one where hashes happen to be equal
        for index in line[begin:end].tolist():
            row = rows[places[index]]
            together.setdefault(recording_of(row), []).append(row)
        yield from together.values()
        begin = end


def recording_of(row: Row) -> str:
    return str(row.get("audio") or row.get("video") or f"row:{row['id']}")


def source_hashes(rows: Iterable[Row]) -> dict[str, str]:
    return {row[media]: row[field] for row in rows for media, field in HASH_FIELDS.items() if row.get(media)}


def cut(recordings: Iterable[Recording], target: int, shard_seconds: float) -> Iterator[Shard]:
    """Shards of about ``target`` examples: ended by a recording whose hash is 0 mod ``target`` (one in ``target``
    examples on average), and at twice that or at ``shard_seconds`` of media in any case."""
    shard: list[Example] = []
    hashes: dict[str, str] = {}
    seconds = 0.0
    seen: set[Unit] = set()
    for recording in recordings:
        examples = recording.examples
        hashes |= recording.hashes
        for example in examples:
            fresh = {unit for unit in example.units.values() if unit not in seen}
            added = sum(unit.duration_s for unit in fresh)
            if shard and (len(shard) >= 2 * target or seconds + added > shard_seconds):
                yield make_shard(shard, hashes)
                shard, hashes, seconds, seen = [], dict(recording.hashes), 0.0, set()
                fresh = set(example.units.values())
                added = sum(unit.duration_s for unit in fresh)
            shard.append(example)
            seen |= fresh
            seconds += added
        digest = hashlib.blake2b(examples[0].id.encode(), digest_size=8).digest()
        if len(shard) >= target // 2 and int.from_bytes(digest, "big") % max(1, target // len(examples)) == 0:
            yield make_shard(shard, hashes)
            shard, hashes, seconds, seen = [], {}, 0.0, set()
    if shard:
        yield make_shard(shard, hashes)


def make_shard(examples: Sequence[Example], hashes: Mapping[str, str]) -> Shard:
    units: dict[Unit, int] = {}
    planned = []
    for example in examples:
        refs = {role: units.setdefault(unit, len(units)) for role, unit in example.units.items()}
        planned.append(PlannedExample(example.id, refs, dict(example.fields), example.weight))
    keys = tuple(unit_key(unit, hashes.get(unit.source) or text_hash(unit.source)) for unit in units)
    # Which units an example joins is the family's business; what is encoded is not: the name covers keys alone.
    name = hashlib.blake2b(b"".join(keys), digest_size=12).hexdigest()
    return Shard(name, tuple(units), keys, tuple(planned))


def text_hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def fields_json(fields: Mapping[str, Any]) -> str:
    return json.dumps(dict(fields), ensure_ascii=False)
