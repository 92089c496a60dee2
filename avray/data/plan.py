"""From manifest rows to shards: which units exist, which examples use them, and what each shard is called.

A shard is the unit of embedding, of the cache's commit and of shuffling: whole recordings in manifest order, cut where
the hash of a recording says so (as rsync does), so that a file added to a data set renames the shard it lands in and
no other. Its name is a hash of its units' keys, and a key is a hash of (source bytes, span, recipe): the content is a
function of the name, which makes two writers of one shard harmless.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from avray.data.order import GroupedOrder, Order
from avray.errors import DataError
from avray.family import Column, Example, Family, Row, Unit, role_columns

HASH_FIELDS = {"audio": "audio_hash", "target_audio": "target_audio_hash", "video": "video_hash"}


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
class Plan:
    """All examples of one split, by shard. With ``groups``, one for each shard, no step mixes two of them."""

    split: str
    shards: tuple[Shard, ...]
    groups: tuple[int, ...] = ()

    @cached_property
    def shard_rows(self) -> tuple[int, ...]:
        return tuple(len(shard.examples) for shard in self.shards)

    @property
    def num_examples(self) -> int:
        return sum(self.shard_rows)

    @property
    def unit_seconds(self) -> float:
        return sum(unit.duration_s for shard in self.shards for unit in shard.units)

    def order(self, batch_size: int, seed: int, window_rows: int, shuffle: bool = True) -> Order:
        if self.groups:
            return GroupedOrder(self.shard_rows, batch_size, seed, window_rows, shuffle, self.groups)
        return Order(self.shard_rows, batch_size, seed, window_rows, shuffle)

    def subset(self, indices: Iterable[int]) -> Plan:
        return Plan(self.split, tuple(self.shards[i] for i in indices))

    def repeated(self, times: float) -> Plan:
        """Each shard ``times`` over; of a fraction, shards spread evenly are there once more."""
        more = round((times - int(times)) * len(self.shards))
        again = tuple(self.shards[i] for i in np.linspace(0, len(self.shards) - 1, more).round().astype(int))
        return Plan(self.split, self.shards * int(times) + again)


def unit_key(unit: Unit, source_hash: str) -> bytes:
    """16 bytes for (source bytes, span to the microsecond, recipe)."""
    span = f"{source_hash}|{unit.modality}|{unit.start_s:.6f}|{unit.duration_s:.6f}|{unit.recipe}"
    return hashlib.blake2b(span.encode(), digest_size=16).digest()


def plan_split(family: Family, rows: Sequence[Row], split: str, *, shard_examples: int = 64,
               shard_seconds: float = 600.0) -> Plan:
    """Segment every recording of a split and lay the examples out in shards.

    Raises DataError where no recording is long enough to give one example.
    """
    hashes = source_hashes(rows)
    recordings = [family.segment(group) for group in by_recording([r for r in rows if r["split"] == split])]
    recordings = [examples for examples in recordings if examples]
    if not recordings:
        raise DataError(
            f"No example of {family.segment_s:g} s could be cut from the {split} split: give longer or more "
            "recordings, or a smaller family.segment_s."
        )
    num_examples = sum(map(len, recordings))
    # 64 shards or so keep a small set well mixed; a power of two keeps the cuts where they were while it grows.
    target = max(4, min(shard_examples, 1 << max(0, (num_examples // 64).bit_length() - 1)))
    shards = [make_shard(examples, hashes) for examples in cut(recordings, target, shard_seconds)]
    return Plan(split, tuple(shards))


def by_recording(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one media file together, in order of start; a row without media stands alone."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.get("audio") or row.get("video") or f"row:{row['id']}", []).append(row)
    return [sorted(group, key=lambda row: row.get("start_s") or 0.0) for group in groups.values()]


def source_hashes(rows: Iterable[Row]) -> dict[str, str]:
    return {row[media]: row[field] for row in rows for media, field in HASH_FIELDS.items() if row.get(media)}


def cut(recordings: Sequence[Sequence[Example]], target: int, shard_seconds: float) -> Iterable[list[Example]]:
    """Examples in runs of about ``target``: ended by a recording whose hash is 0 mod ``target`` (one in ``target``
    examples on average), and at twice that or at ``shard_seconds`` of media in any case."""
    shard: list[Example] = []
    seconds = 0.0
    seen: set[Unit] = set()
    for examples in recordings:
        for example in examples:
            fresh = {unit for unit in example.units.values() if unit not in seen}
            added = sum(unit.duration_s for unit in fresh)
            if shard and (len(shard) >= 2 * target or seconds + added > shard_seconds):
                yield shard
                shard, seconds, seen = [], 0.0, set()
                fresh = set(example.units.values())
                added = sum(unit.duration_s for unit in fresh)
            shard.append(example)
            seen |= fresh
            seconds += added
        digest = hashlib.blake2b(examples[0].id.encode(), digest_size=8).digest()
        if len(shard) >= target // 2 and int.from_bytes(digest, "big") % max(1, target // len(examples)) == 0:
            yield shard
            shard, seconds, seen = [], 0.0, set()
    if shard:
        yield shard


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
