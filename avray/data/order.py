"""Who sees which row when: a function of (seed, epoch) alone, never of the number of workers.

The global batch of G rows is drawn from L lanes (the largest divisor of G up to 256), G/L rows from each. An epoch
permutes the shards with a counter-based generator, lays their rows end to end and cuts that line into L equal lanes;
each lane is shuffled inside windows. Rank r of W owns the lanes l with l mod W = r, so any W that divides L gives the
same global batches, and resuming at (epoch, step) reopens one window a lane: nothing before it is read.

A *block* is one window of one lane, always ``block_rows`` long (the last is padded), because Ray Data deals blocks of
constant row count to ranks round-robin. Blocks are numbered round by round: index = round * L + lane.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

MAX_LANES = 256
PADDING = -1


def num_lanes(batch_size: int) -> int:
    """The largest divisor of ``batch_size`` up to 256."""
    return next(lanes for lanes in range(min(batch_size, MAX_LANES), 0, -1) if batch_size % lanes == 0)


@dataclass(frozen=True)
class Order:
    """``shard_rows[i]`` rows in shard i; ``window_rows`` rows held for shuffling over all lanes together."""

    shard_rows: tuple[int, ...]
    batch_size: int
    seed: int = 0
    window_rows: int = 1024
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"trainer.batch_size must be at least 1, got {self.batch_size}.")

    @cached_property
    def lanes(self) -> int:
        return num_lanes(self.batch_size)

    @property
    def rows_per_lane(self) -> int:
        """Rows a step takes from each lane."""
        return self.batch_size // self.lanes

    @cached_property
    def num_rows(self) -> int:
        return int(sum(self.shard_rows))

    @cached_property
    def steps_per_epoch(self) -> int:
        longest = -(-self.num_rows // self.lanes)
        return -(-longest // self.rows_per_lane)

    @cached_property
    def steps_per_round(self) -> int:
        return max(1, min(self.window_rows // self.batch_size, self.steps_per_epoch))

    @property
    def block_rows(self) -> int:
        return self.steps_per_round * self.rows_per_lane

    @cached_property
    def rounds(self) -> int:
        return -(-self.steps_per_epoch // self.steps_per_round)

    def check_workers(self, num_workers: int, accumulate: int = 1) -> None:
        """ValueError where this many workers cannot share the lanes evenly."""
        if self.lanes % num_workers:
            divisors = [n for n in range(1, self.lanes + 1) if self.lanes % n == 0]
            raise ValueError(
                f"trainer.batch_size={self.batch_size} has {self.lanes} lanes, which {num_workers} workers cannot "
                f"share evenly: use a multiple of {num_workers}, or trainer.num_workers from {divisors}."
            )
        rows = self.batch_size // num_workers
        if rows % accumulate:
            raise ValueError(
                f"trainer.accumulate={accumulate} does not divide the {rows} rows a worker has in each step "
                f"(trainer.batch_size={self.batch_size} over {num_workers} workers)."
            )

    def worker_counts(self, fewest: int, most: int, accumulate: int = 1) -> tuple[int, ...]:
        """The numbers from ``fewest`` to ``most`` that can share the lanes evenly; ValueError where there is none."""
        found = tuple(count for count in range(fewest, most + 1)
                      if self.lanes % count == 0 and self.batch_size // count % accumulate == 0)
        if not found:
            self.check_workers(most, accumulate)
        return found

    def block(self, epoch: int, lane: int, round_index: int) -> np.ndarray:
        """int64 ``[block_rows, 2]``: (shard, row in shard) in the order the lane is read; padding is (-1, -1)."""
        start = lane * self.num_rows // self.lanes
        stop = (lane + 1) * self.num_rows // self.lanes
        first = start + round_index * self.block_rows
        positions = np.arange(first, min(first + self.block_rows, stop))
        if self.shuffle and len(positions):
            positions = positions[self._generator(epoch, 1 + lane, round_index).permutation(len(positions))]
        block = np.full((self.block_rows, 2), PADDING, dtype=np.int64)
        permutation, ends = self._line(epoch)
        which = np.searchsorted(ends, positions, side="right")
        block[: len(positions), 0] = permutation[which]
        block[: len(positions), 1] = positions - (ends[which] - self._rows[permutation[which]])
        return block

    def blocks(self, epoch: int, first_round: int = 0) -> list[tuple[int, int, int]]:
        """(epoch, round, lane) of each block from ``first_round`` on, as they are dealt."""
        return [(epoch, r, lane) for r in range(first_round, self.rounds) for lane in range(self.lanes)]

    def step(self, epoch: int, step: int) -> np.ndarray:
        """int64 ``[batch_size, 2]``: the rows of one step, lane by lane."""
        offset = step % self.steps_per_round * self.rows_per_lane
        return np.concatenate([
            self.block(epoch, lane, step // self.steps_per_round)[offset : offset + self.rows_per_lane]
            for lane in range(self.lanes)
        ])

    def shards_of(self, block: np.ndarray) -> list[int]:
        """The shards a block needs, in order of first use."""
        return list(dict.fromkeys(int(s) for s in block[:, 0] if s != PADDING))

    @cached_property
    def _rows(self) -> np.ndarray:
        return np.asarray(self.shard_rows, np.int64)

    def _line(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        cached = self.__dict__.get("_line_cache")
        if cached is None or cached[0] != epoch:
            count = len(self.shard_rows)
            permutation = self._generator(epoch, 0, 0).permutation(count) if self.shuffle else np.arange(count)
            ends = np.cumsum(self._rows[permutation])
            cached = (epoch, permutation, ends)
            self.__dict__["_line_cache"] = cached
        return cached[1], cached[2]

    def _generator(self, epoch: int, stream: int, index: int) -> np.random.Generator:
        """Philox (Salmon et al. 2011): key (seed, epoch), counter (stream, index); no state to save."""
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch], counter=[0, 0, stream, index]))


@dataclass(frozen=True)
class GroupedOrder(Order):
    """Every step takes all its rows from shards of one group, and groups take turns by chance, each as often as its
    rows make steps. A round is one step, so shuffling inside a lane's window falls away; lanes still begin in different
    shards."""

    groups: tuple[int, ...] = ()
    """Of each shard."""

    @cached_property
    def members(self) -> list[np.ndarray]:
        """The shards of each group."""
        return [np.flatnonzero(np.asarray(self.groups) == group) for group in sorted(set(self.groups))]

    @cached_property
    def parts(self) -> list[Order]:
        """Each group's own order, over its own shards."""
        rows = np.asarray(self.shard_rows)
        return [Order(tuple(rows[shards].tolist()), self.batch_size, self.seed, self.batch_size, self.shuffle)
                for shards in self.members]

    @cached_property
    def steps_per_epoch(self) -> int:
        return sum(part.steps_per_epoch for part in self.parts)

    @cached_property
    def steps_per_round(self) -> int:
        return 1

    def turn(self, epoch: int, round_index: int) -> tuple[int, int]:
        """Whose turn it is, and which of its own rounds."""
        cached = self.__dict__.get("_turns_cache")
        if cached is None or cached[0] != epoch:
            turns = np.repeat(np.arange(len(self.parts)), [part.steps_per_epoch for part in self.parts])
            if self.shuffle:
                turns = turns[self._generator(epoch, 2**32, 0).permutation(len(turns))]
            own = np.zeros(len(turns), np.int64)
            for group in range(len(self.parts)):
                own[turns == group] = np.arange((turns == group).sum())
            cached = (epoch, turns, own)
            self.__dict__["_turns_cache"] = cached
        return int(cached[1][round_index]), int(cached[2][round_index])

    def block(self, epoch: int, lane: int, round_index: int) -> np.ndarray:
        group, own_round = self.turn(epoch, round_index)
        block = self.parts[group].block(epoch, lane, own_round)
        there = block[:, 0] != PADDING
        block[there, 0] = self.members[group][block[there, 0]]
        return block
