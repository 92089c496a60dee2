"""Embeddings on disk, keyed by content and shared by every family.

    <root>/shards/<name>/units.parquet             one row a unit: key, source, span, recipe
    <root>/shards/<name>/<column id>.parquet       the same rows: flat values and their shape, null where rejected
    <root>/shards/<name>/<column id>.json          written last: the commit, with SHA-256 and the rejects

A new encoder is one more file per shard; nothing is joined. What is missing is found by listing commits. Values are
flat ``list<float16|uint16>`` because ragged tensors would fall into pickled Arrow columns, which are never read here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from avray.data.plan import Head, Plan, Shard
from avray.errors import DataError
from avray.family import Column
from avray.store import Store

ARROW_TYPES = {"float16": pa.float16(), "float32": pa.float32(), "uint16": pa.uint16(), "int32": pa.int32()}
MAX_SHARD_BYTES = 128 << 20
STALE_CLAIM_S = 60.0


@dataclass(frozen=True)
class Commit:
    """What a shard's column says of itself. ``rejects`` maps a unit's index to the reason it has no value."""

    sha256: str
    rejects: Mapping[int, str]


class Cache:
    """Columns by shard. ``kept_bytes`` bounds the decoded columns one process holds for re-reading."""

    def __init__(self, root: str, kept_bytes: int = 512 << 20) -> None:
        self.store = Store(root if "://" in root else os.path.abspath(root))
        self.kept_bytes = kept_bytes
        self._kept: OrderedDict[tuple[str, str], list[np.ndarray | None]] = OrderedDict()
        self._kept_size = 0

    def __reduce__(self) -> tuple[type[Cache], tuple[str, int]]:
        return Cache, (self.store.root, self.kept_bytes)

    def commit(self, shard: Shard | Head, column: Column) -> Commit | None:
        """None where the column of this shard is not in the cache."""
        try:
            content = json.loads(self.store.read(f"{_stem(shard, column)}.json"))
        except FileNotFoundError:
            return None
        return Commit(content["sha256"], {int(i): reason for i, reason in content["rejects"].items()})

    def missing(self, plan: Plan, columns: Sequence[Column]) -> list[int]:
        """Indices of the plan's shards that lack a column, found by listing."""
        present = None if self.store.is_local else self.store.list("shards")

        def has(name: str) -> bool:
            return self.store.exists(name) if present is None else name in present

        return [index for index, shard in enumerate(plan.shards.heads())
                if not all(has(f"{_stem(shard, column)}.json") for column in shard.wants(columns))]

    def rejects(self, plan: Plan, columns: Sequence[Column]) -> dict[str, str]:
        """Example id -> reason, for the examples that lost a unit in a committed shard."""
        lost: dict[str, str] = {}
        for index, shard in enumerate(plan.shards.heads()):
            for column in shard.wants(columns):
                commit = self.commit(shard, column)
                for example in plan.shards[index].examples if commit and commit.rejects else ():
                    for unit in example.units.values():
                        if commit is not None and unit in commit.rejects:
                            lost.setdefault(example.id, commit.rejects[unit])
        return lost

    def write(self, shard: Shard, column: Column, values: Sequence[np.ndarray | None],
              rejects: Mapping[int, str]) -> None:
        """Commit a column: one array ``[time, *shape]`` a unit, None where it was rejected or is not wanted."""
        self._write_units(shard)
        table = _to_table(values, column.dtype)
        sink = pa.BufferOutputStream()
        compression = "zstd" if column.dtype in ("uint16", "int32") else "none"  # float16 latents shrink by 3 %, slowly
        pq.write_table(table, sink, compression=compression, use_dictionary=False, row_group_size=64,
                       write_statistics=False)
        content = sink.getvalue()
        if content.size > MAX_SHARD_BYTES:
            raise ValueError(f"A shard's column has {content.size >> 20} MiB, over 128: lower data.shard_seconds.")
        self.store.write(f"{_stem(shard, column)}.parquet", memoryview(content))
        commit = {"sha256": hashlib.sha256(content).hexdigest(), "rows": len(values), "column": column.id(),
                  "rejects": {str(i): reason for i, reason in sorted(rejects.items())}}
        self.store.write(f"{_stem(shard, column)}.json", json.dumps(commit).encode())

    def read(self, shard: Shard, column: Column) -> list[np.ndarray | None]:
        """One array ``[time, *shape]`` a unit, None where rejected. DataError, naming the file, if it is damaged."""
        key = (shard.name, column.id())
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        values = self._read(shard, column)
        self._kept[key] = values
        self._kept_size += _size(values)
        while self._kept_size > self.kept_bytes and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._kept_size -= _size(dropped)
        return values

    def _read(self, shard: Shard, column: Column) -> list[np.ndarray | None]:
        commit = self.commit(shard, column)
        name = f"{_stem(shard, column)}.parquet"
        if commit is None:
            raise DataError(f"The cache lacks {name}: run pipelines/prepare.py with the same settings, or "
                            "data.mode=stream.")
        try:
            content = self.store.read(name)
        except FileNotFoundError:
            content = b""
        if hashlib.sha256(content).hexdigest() != commit.sha256:
            raise DataError(
                f"The cached file {self.store.path(name)} is damaged (its SHA-256 differs from its commit): delete the "
                "folder it is in, and it will be computed again."
            )
        try:
            table = pq.ParquetFile(pa.BufferReader(content)).read()
        except (pa.ArrowException, AttributeError, TypeError, ValueError) as error:  # another library's column types
            raise DataError(f"{name} is not a column of flat numbers ({error}): avray did not write it.") from error
        values = _from_table(table, name)
        if len(values) != len(shard.units):
            raise DataError(f"The cached file {self.store.path(name)} has {len(values)} rows, not {len(shard.units)}.")
        return values

    def _write_units(self, shard: Shard) -> None:
        name = f"shards/{shard.name}/units.parquet"
        if self.store.exists(name):
            return
        table = pa.table({
            "key": pa.array(shard.keys, pa.binary(16)),
            "source": pa.array([unit.source for unit in shard.units]),
            "modality": pa.array([unit.modality for unit in shard.units]),
            "start_s": pa.array([unit.start_s for unit in shard.units], pa.float64()),
            "duration_s": pa.array([unit.duration_s for unit in shard.units], pa.float64()),
            "recipe": pa.array([unit.recipe for unit in shard.units]),
        })
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        self.store.write(name, memoryview(sink.getvalue()))

    @contextlib.contextmanager
    def claim(self, shard: Shard, column: Column) -> Iterator[Claim | None]:
        """Yield a claim if this process shall compute the column; None once another has committed it meanwhile.

        Only on a local or shared file system: without exclusive creation two writers race, harmlessly.
        """
        claim = Claim(self.store.path(f"{_stem(shard, column)}.claim")) if self.store.is_local else Claim(None)
        try:
            while not claim.take():
                if self.commit(shard, column) is not None:
                    break
                time.sleep(0.05)
            yield claim if self.commit(shard, column) is None else None
        finally:
            claim.release()


class Claim:
    """A file that says who is computing a shard. A dead or silent (60 s) owner loses it."""

    def __init__(self, path: str | None) -> None:
        self.path = path
        self.mine = False

    def take(self) -> bool:
        if self.path is None:
            return True
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        try:
            with open(self.path, "x") as file:
                json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
            self.mine = True
        except FileExistsError:
            if self._abandoned():
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path)
        return self.mine

    def refresh(self) -> None:
        if self.mine and self.path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.path)

    def release(self) -> None:
        if self.mine and self.path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)

    def _abandoned(self) -> bool:
        assert self.path is not None
        try:
            age_s = time.time() - os.stat(self.path).st_mtime
            with open(self.path) as file:
                owner = json.load(file)
        except FileNotFoundError:
            return False
        except json.JSONDecodeError:
            return age_s > 1.0
        if owner["host"] == socket.gethostname():
            if owner["pid"] == os.getpid():
                return False
            try:
                os.kill(owner["pid"], 0)
            except ProcessLookupError:
                return True
            except PermissionError:
                pass
        return age_s > STALE_CLAIM_S


def _stem(shard: Shard | Head, column: Column) -> str:
    return f"shards/{shard.name}/{column.id()}"


def _size(values: Sequence[np.ndarray | None]) -> int:
    return sum(value.nbytes for value in values if value is not None)


def _to_table(values: Sequence[np.ndarray | None], dtype: str) -> pa.Table:
    present = [value for value in values if value is not None]
    flat = np.concatenate([value.reshape(-1) for value in present]) if present else np.zeros(0)
    lengths = [0 if value is None else value.size for value in values]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    mask = pa.array([value is None for value in values], pa.bool_())
    data = pa.array(np.ascontiguousarray(flat, dtype=dtype), ARROW_TYPES[dtype])
    shapes = [None if value is None else list(value.shape) for value in values]
    return pa.table({
        "value": pa.ListArray.from_arrays(pa.array(offsets), data, mask=mask),
        "shape": pa.array(shapes, pa.list_(pa.int32())),
    })


def _from_table(table: pa.Table, name: str) -> list[np.ndarray | None]:
    kind = table.schema.field("value").type if "value" in table.column_names else None
    if kind is None or not pa.types.is_list(kind) or kind.value_type not in ARROW_TYPES.values():
        raise DataError(f"{name} is not a column of flat numbers (its type is {kind}): it was not written by avray.")
    values: list[np.ndarray | None] = []
    for chunk, shapes in zip(table["value"].chunks, table["shape"].chunks, strict=True):
        flat = chunk.values.to_numpy(zero_copy_only=True)
        offsets = chunk.offsets.to_numpy()
        for index, shape in enumerate(shapes.to_pylist()):
            values.append(None if shape is None else flat[offsets[index] : offsets[index + 1]].reshape(shape))
    return values
