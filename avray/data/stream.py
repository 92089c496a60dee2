"""Ray Data: the order's blocks through actor pools, one pool a frozen network, into the trainers.

A block travels as three numbers (epoch, round, lane) from pool to pool; each pool makes sure that the cache has its
column of the shards the block needs, and computes what is missing. The last stage reads the rows and sends them on. So
embeddings pass through the cache and not through the object store twice, a killed run has lost one shard an actor, and
the second epoch reads what the first one wrote.

``streaming_split(equal=False)`` with preserved order deals blocks of constant row count round-robin: block j goes to
rank j mod W. Nothing documents that, so every block carries its place and the rank checks it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train

from avray.data.cache import Cache
from avray.data.embed import Embedder
from avray.data.order import Order
from avray.data.plan import Plan
from avray.data.rows import from_table, gather, place_of, to_table
from avray.family import Column, Row
from avray.media import Limits

BLOCKS_PER_ACTOR = 16
"""A block of shards costs an actor some 10 ms besides their work, so many shards go several to a block; this many
blocks an actor still share the work evenly and show progress."""


@dataclass(frozen=True)
class Pool:
    """Actors for one frozen network: how many, and the logical CPUs and GPUs of each."""

    size: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0


@dataclass(frozen=True)
class Work:
    """Shards computed, and the seconds from the first actor's first shard to the last one's end: start-up aside."""

    computed: int
    seconds: float


class EmbedShards:
    """An actor that makes shards of one column: a row in is a shard's index, a row out says what was done."""

    def __init__(self, plan: ray.ObjectRef, cache: Cache, column: Column, limits: Limits, device: str) -> None:
        self.plan: Plan = ray.get(plan)
        self.embedder = Embedder(column, cache, device, limits)

    def __call__(self, table: pa.Table) -> pa.Table:
        began_s = time.time()
        computed = [self.embedder.ensure(self.plan.shards[index]) for index in table["shard"].to_pylist()]
        seconds = pa.array([[began_s, time.time()]] * len(computed), pa.list_(pa.float64()))
        return table.append_column("computed", pa.array(computed)).append_column("worked_s", seconds)


class EmbedBlocks:
    """An actor that makes what blocks need of one column, and at the last column reads their rows."""

    def __init__(self, plan: ray.ObjectRef, order: Order, cache: Cache, column: Column, limits: Limits, device: str,
                 columns: Sequence[Column] | None) -> None:
        self.plan: Plan = ray.get(plan)
        self.order = order
        self.cache = cache
        self.columns = columns
        self.embedder = Embedder(column, cache, device, limits)

    def __call__(self, table: pa.Table) -> pa.Table:
        epoch, round_index, lane = place_of(table)
        block = self.order.block(epoch, lane, round_index)
        for index in self.order.shards_of(block):
            self.embedder.ensure(self.plan.shards[index])
        if self.columns is None:
            return table
        return to_table(gather(self.plan, self.cache, self.columns, block), (epoch, round_index, lane))


def prepare(plan: Plan, columns: Sequence[Column], cache: Cache, pool: Pool, limits: Limits,
            progress: Callable[[int, int], None] | None = None) -> Work:
    """Compute every missing shard of a plan. Needs no Ray where nothing is missing.

    ``progress(done, total)`` counts shards times columns.
    """
    missing = {column: cache.missing(plan, [column]) for column in columns}
    work = {column: shards for column, shards in missing.items() if shards}
    if not work:
        return Work(0, 0.0)
    reference = ray.put(plan)
    total = sum(map(len, work.values()))
    done = computed = 0
    spans: list[list[float]] = []
    for column, shards in work.items():
        size = max(1, len(shards) // (BLOCKS_PER_ACTOR * pool.size))
        dataset = _dataset([pa.table({"shard": shards[i : i + size]}) for i in range(0, len(shards), size)])
        dataset = dataset.map_batches(
            EmbedShards, fn_constructor_args=(reference, cache, column, limits, _device(pool)),
            **_actors(pool, -(-len(shards) // size)))
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            done += batch.num_rows
            computed += int(np.sum(batch["computed"].to_pylist()))
            spans += batch["worked_s"].to_pylist()
            if progress:
                progress(done, total)
    return Work(computed, max(end for _, end in spans) - min(begin for begin, _ in spans))


def block_dataset(plan: Plan, order: Order, columns: Sequence[Column], cache: Cache, pool: Pool, limits: Limits,
                  epoch: int, first_round: int) -> ray.data.Dataset:
    """The blocks of an epoch from ``first_round`` on, embedded on the way; after a start in the middle also the next
    epoch, since the rows before ``first_round`` have not been seen."""
    places = order.blocks(epoch, first_round)
    if first_round:
        places += order.blocks(epoch + 1)
    reference = ray.put(plan)
    dataset = _dataset([pa.table({"place": pa.array([list(place)], pa.list_(pa.int64()))}) for place in places])
    for column in columns:
        last = column is columns[-1]
        arguments = (reference, order, cache, column, limits, _device(pool), list(columns) if last else None)
        dataset = dataset.map_batches(EmbedBlocks, fn_constructor_args=arguments, **_actors(pool, len(places)))
    return dataset


class InOrder(ray.train.DataConfig):
    """Block j to rank j mod W: Train's own configuration cuts rows off to make shards equal, and reorders by place."""

    def configure(self, datasets: dict[str, ray.data.Dataset], world_size: int, worker_handles: Any = None,
                  worker_node_ids: Any = None, **kwargs: Any) -> list[dict[str, ray.data.DataIterator]]:
        output: list[dict[str, ray.data.DataIterator]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            dataset.context.execution_options = self._resolve_execution_options(name)
            dataset.context.execution_options.preserve_order = True
            for rank, split in enumerate(dataset.streaming_split(world_size, equal=False)):
                output[rank][name] = split
        return output


class StreamedSource:
    """A rank's share of :func:`block_dataset`, read once from its beginning."""

    def __init__(self, shard: ray.data.DataIterator) -> None:
        self._batches = iter(shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))

    def blocks(self, epoch: int, first_round: int, lanes: Sequence[int]) -> Iterator[list[Row]]:
        round_index = first_round
        while True:
            for lane in lanes:
                table = next(self._batches, None)
                if table is None:
                    return
                assert place_of(table) == (epoch, round_index, lane), \
                    f"Ray Data dealt block {place_of(table)} where {(epoch, round_index, lane)} was due"
                yield from_table(table)
            round_index += 1


def _dataset(tables: list[pa.Table]) -> ray.data.Dataset:
    dataset = ray.data.from_arrow(tables)
    dataset.context.execution_options.preserve_order = True
    dataset.context.target_max_block_size = None  # a block stays a block
    dataset.context.enable_progress_bars = False
    return dataset


def _actors(pool: Pool, num_tasks: int) -> dict[str, Any]:
    """Ray restarts a dead actor for ever; the embedder's journal is what ends that, file by file."""
    return {"batch_size": None, "batch_format": "pyarrow", "num_cpus": pool.num_cpus, "num_gpus": pool.num_gpus,
            "compute": ray.data.ActorPoolStrategy(size=max(1, min(pool.size, num_tasks)))}


def _device(pool: Pool) -> str:
    return "cuda" if pool.num_gpus else "cpu"
