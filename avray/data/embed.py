"""One shard through one frozen network. No Ray here: Ray Data calls it in actors, a benchmark in a plain loop.

A recording is decoded once, from the first unit it has in the shard to the last, and the network sees it as one
stream: a unit's frames are a cut of the whole recording's, whatever the units are. Recordings up to a minute go through
the network as a batch by length; longer ones as a stream in bounded memory. A recording entered in the middle starts
``context_s`` early, on a whole second, because only there do samples at every rate and frames at every rate coincide.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from avray.data import recipes
from avray.data.cache import Cache, Claim
from avray.data.plan import Shard
from avray.errors import DataError
from avray.family import Column, Network, Unit
from avray.media import Limits, read_video, stream_audio
from avray.store import Store

BATCHED_S = 60.0
LOOKAHEAD_S = 1.0
MAX_CRASHES = 2


@dataclass(frozen=True)
class Cut:
    """The part of one recording that a shard needs, and the units (by index) that are cut from it."""

    source: str
    start_s: float
    stop_s: float
    units: tuple[int, ...]
    recipe: str = ""


@dataclass
class Values:
    """A column's values by unit index, and why the others have none."""

    arrays: dict[int, np.ndarray] = field(default_factory=dict)
    rejects: dict[int, str] = field(default_factory=dict)


class Embedder:
    """Computes what the cache lacks of one column. The network is opened when a shard first needs it, so an
    unchanged data set costs no forward pass and no weights."""

    def __init__(self, column: Column, cache: Cache, device: torch.device | str = "cpu",
                 limits: Limits | None = None) -> None:
        self.column = column
        self.cache = cache
        self.device = device
        self.limits = limits or Limits()
        self.journal = Journal(cache.store)
        self._network: Network | None = None
        self.computed_shards = 0

    @property
    def network(self) -> Network:
        if self._network is None:
            self._network = self.column.encoder.load(self.device)
        return self._network

    def ensure(self, shard: Shard) -> bool:
        """Commit the shard's column if the cache lacks it; True if it was computed here."""
        if self.column not in shard.wants([self.column]) or self.cache.commit(shard, self.column) is not None:
            return False
        with self.cache.claim(shard, self.column) as claim:
            if claim is None:
                return False
            values = self.compute(shard, claim)
            arrays = [values.arrays.get(index) for index in range(len(shard.units))]
            self.cache.write(shard, self.column, arrays, values.rejects)
            self.journal.clear(shard, self.column)
            self.computed_shards += 1
            return True

    def compute(self, shard: Shard, claim: Claim | None = None) -> Values:
        """Every wanted unit's frames, or the reason it has none."""
        wanted = shard.wanted_units(self.column)
        if self.column.modality == "video":
            return self._compute_clips(shard, wanted, claim)
        if self.column.modality == "text":
            texts = [shard.units[index].source for index in wanted]
            return Values(dict(zip(wanted, self.network.encode_batch(texts), strict=True)))  # type: ignore[arg-type]
        values = Values()
        batch: list[tuple[Cut, np.ndarray]] = []
        crashes = self.journal.crashes(shard, self.column)
        for piece in cuts(shard.units, wanted, self.column.context_s):
            if crashes.get(piece.source, 0) > MAX_CRASHES:
                values.rejects.update(dict.fromkeys(piece.units, "its decoder crashed the process three times"))
                continue
            self.journal.enter(shard, self.column, piece.source)
            try:
                if piece.recipe or piece.stop_s - piece.start_s <= BATCHED_S:
                    samples = np.concatenate(list(self._decode(piece)))
                    if piece.recipe:
                        samples = recipes.apply(piece.recipe, samples, self.network.sample_rate_hz)
                    batch.append((piece, samples))
                else:
                    self._cut_units(shard, piece, self._encode_stream(piece), values)
            except DataError as error:
                values.rejects.update(dict.fromkeys(piece.units, str(error)))
            if claim is not None:
                claim.refresh()
        if batch:
            encoded = self.network.encode_batch([samples for _, samples in batch])
            for (piece, _), frames in zip(batch, encoded, strict=True):
                self._cut_units(shard, piece, iter([frames]), values)
        return values

    def _compute_clips(self, shard: Shard, wanted: Sequence[int], claim: Claim | None) -> Values:
        """A span at a time: a clip's vectors are its own, whatever else is read of the file."""
        network: Any = self.network
        values, crashes = Values(), self.journal.crashes(shard, self.column)
        for index in wanted:
            unit = shard.units[index]
            if crashes.get(unit.source, 0) > MAX_CRASHES:
                values.rejects[index] = "its decoder crashed the process three times"
                continue
            self.journal.enter(shard, self.column, unit.source)
            try:
                clip = read_video(unit.source, unit.start_s, unit.duration_s, network.sampling_hz, network.size,
                                  self.limits)
                values.arrays[index] = network.encode_batch([clip])[0].astype(self.column.dtype)
            except DataError as error:
                values.rejects[index] = str(error)
            if claim is not None:
                claim.refresh()
        return values

    def _decode(self, piece: Cut) -> Iterator[np.ndarray]:
        return stream_audio(piece.source, start_s=piece.start_s, duration_s=piece.stop_s - piece.start_s,
                            sample_rate_hz=self.network.sample_rate_hz, limits=self.limits, past_end="stop")

    def _encode_stream(self, piece: Cut) -> Iterator[np.ndarray]:
        stream = self.network.stream()
        for samples in self._decode(piece):
            yield stream.push(samples)
        yield stream.finish()

    def _cut_units(self, shard: Shard, piece: Cut, frames: Iterator[np.ndarray], values: Values) -> None:
        """Units from a stream of frames, holding no more of it than the units under way."""
        rate = self.network.frame_rate_hz
        pending = sorted(piece.units, key=lambda index: shard.units[index].start_s)
        held: list[np.ndarray] = []
        first = 0
        for block in itertools.chain(frames, [None]):
            if block is not None:
                held = [np.concatenate([*held, block])] if len(block) else held
            while pending:
                unit = shard.units[pending[0]]
                start = round((unit.start_s - piece.start_s) * rate) - first
                stop = start + round(unit.duration_s * rate)
                have = len(held[0]) if held else 0
                if have < stop and block is not None:
                    break
                index = pending.pop(0)
                if not held or have < stop - 1:
                    values.rejects[index] = f"it ends {(stop - have) / rate:.2f} s before its span does"
                else:
                    cut = held[0][start:stop]
                    if have < stop:  # a recording's last frame may be a rounding away
                        cut = np.concatenate([cut, cut[-1:]])
                    values.arrays[index] = cut.astype(self.column.dtype)
            if held and pending:
                done = round((shard.units[pending[0]].start_s - piece.start_s) * rate) - first
                drop = min(done, len(held[0]))
                if drop > 0:
                    held, first = [held[0][drop:]], first + drop


def cuts(units: Sequence[Unit], wanted: Sequence[int], context_s: float) -> list[Cut]:
    """Units grouped into contiguous stretches of each source, widened by the network's context."""
    stretches: list[Cut] = []
    by_source: dict[tuple[str, str], list[int]] = {}
    for index in wanted:
        by_source.setdefault((units[index].source, units[index].recipe), []).append(index)
    for (source, recipe), indices in by_source.items():
        indices.sort(key=lambda index: units[index].start_s)
        run: list[int] = []
        stop = -math.inf
        for index in indices:
            if run and units[index].start_s > stop + 2 * context_s + 2:
                stretches.append(_widened(source, units, run, stop, context_s, recipe))
                run, stop = [], -math.inf
            run.append(index)
            stop = max(stop, units[index].start_s + units[index].duration_s)
        stretches.append(_widened(source, units, run, stop, context_s, recipe))
    return stretches


def _widened(source: str, units: Sequence[Unit], run: list[int], stop: float, context_s: float, recipe: str) -> Cut:
    start = max(0.0, math.floor(units[run[0]].start_s - context_s))
    return Cut(source, start, stop + LOOKAHEAD_S, tuple(run), recipe)


class Journal:
    """Which file was being decoded when a process died: written before each, removed with the commit, so that a file
    that kills its decoder is given up after two retries instead of killing actors for ever."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._crashes: dict[str, int] = {}

    def _name(self, shard: Shard, column: Column) -> str:
        return f"journal/{shard.name}-{column.id()}.json"

    def crashes(self, shard: Shard, column: Column) -> dict[str, int]:
        """How often each source was entered last before a death."""
        self._crashes = {}
        try:
            state: dict[str, Any] = json.loads(self.store.read(self._name(shard, column)))
        except FileNotFoundError:
            return {}
        self._crashes = dict(state["crashes"])
        self._crashes[state["under_way"]] = self._crashes.get(state["under_way"], 0) + 1
        return self._crashes

    def enter(self, shard: Shard, column: Column, source: str) -> None:
        content = {"crashes": self._crashes, "under_way": source}
        self.store.write(self._name(shard, column), json.dumps(content).encode())

    def clear(self, shard: Shard, column: Column) -> None:
        self._crashes = {}
        self.store.remove(self._name(shard, column))
