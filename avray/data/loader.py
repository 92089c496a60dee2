"""A rank's share of every step, as micro-batches, fetched by a thread while the step before is computed.

The loader asks a ``Source`` for the blocks of its lanes, round after round, and takes ``rows_per_lane`` rows of each
for a step. Ranks hold as many rounds as they have lanes; nothing before (epoch, step) is read.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from avray.data.cache import Cache
from avray.data.order import Order
from avray.data.plan import Plan
from avray.data.rows import gather
from avray.family import Batch, Column, Row


class Source(Protocol):
    """Where blocks come from."""

    def blocks(self, epoch: int, first_round: int, lanes: Sequence[int]) -> Iterator[list[Row]]:
        """The blocks of these lanes, round by round, to the end of the epoch."""


@dataclass(frozen=True)
class PreparedSource:
    """Every rank reads its own blocks from the cache, where everything is already."""

    plan: Plan
    order: Order
    cache: Cache
    columns: Sequence[Column]

    def blocks(self, epoch: int, first_round: int, lanes: Sequence[int]) -> Iterator[list[Row]]:
        for round_index in range(first_round, self.order.rounds):
            for lane in lanes:
                yield gather(self.plan, self.cache, self.columns, self.order.block(epoch, lane, round_index))


@dataclass
class Step:
    """One optimiser step's micro-batches on this rank, and how long the loop waited for them."""

    epoch: int
    step: int
    micro_batches: list[Batch]
    waited_s: float = 0.0


@dataclass(frozen=True)
class Loader:
    """``collate`` turns rows into a Batch; ``accumulate`` micro-batches make a step."""

    order: Order
    collate: Callable[[Sequence[Row]], Batch]
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1
    prefetch: int = 2
    pin: bool = False

    def __post_init__(self) -> None:
        self.order.check_workers(self.world_size, self.accumulate)

    @property
    def lanes(self) -> range:
        return range(self.rank, self.order.lanes, self.world_size)

    def epoch(self, source: Source, epoch: int, first_step: int = 0) -> Generator[Step, None, None]:
        """This rank's steps from ``first_step`` to the end of the epoch."""
        ready: queue.Queue[Step | BaseException | None] = queue.Queue(max(1, self.prefetch))
        stop = threading.Event()

        def fill() -> None:
            try:
                for step in self._steps(source, epoch, first_step):
                    if not _put(ready, step, stop):
                        return
                _put(ready, None, stop)
            except BaseException as error:
                _put(ready, error, stop)

        thread = threading.Thread(target=fill, name="avray-loader", daemon=True)
        thread.start()
        try:
            while True:
                began = time.perf_counter()
                item = ready.get()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                item.waited_s = time.perf_counter() - began
                yield item
        finally:
            stop.set()
            thread.join()

    def _steps(self, source: Source, epoch: int, first_step: int) -> Iterator[Step]:
        order = self.order
        first_round = first_step // order.steps_per_round
        blocks = source.blocks(epoch, first_round, self.lanes)
        for round_index in range(first_round, order.rounds):
            held = [next(blocks) for _ in self.lanes]
            for offset in range(order.steps_per_round):
                step = round_index * order.steps_per_round + offset
                if first_step <= step < order.steps_per_epoch:
                    at = offset * order.rows_per_lane
                    rows = [row for block in held for row in block[at : at + order.rows_per_lane]]
                    yield Step(epoch, step, self._micro_batches(rows))

    def _micro_batches(self, rows: Sequence[Row]) -> list[Batch]:
        size = len(rows) // self.accumulate
        batches = [self.collate(rows[i * size : (i + 1) * size]) for i in range(self.accumulate)]
        return [batch.pin() for batch in batches] if self.pin and torch.cuda.is_available() else batches


def _put(ready: queue.Queue, item: Step | BaseException | None, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
