"""The pipeline's parts by the number of their workers, one thread each: embedding, training, and both at once, where
frozen encoders in a pool of their own feed a trainer and the figure is the share of its time that it waits for them.

    python -m benchmarks.pools [--repeats 3] [--only embedding training waiting] [--json FILE]

``continuation`` and the spectral codec on the demo set. Embedding: rows a second from the first actor's first shard to
the last one's end, into an empty cache. Training: rows a second at steady state, all in the cache. The bound of both is
the machine's cores: a second worker adds at most a factor of 2. Waiting: one epoch with ``data.mode=stream`` into an
empty cache, one trainer, ``data.embed_workers`` actors; the share of its time in ``metrics.csv`` (``train/waiting``)
after the first two windows, which wait for the actors to start. The spectral codec is ahead of the trainer by itself,
so its column is made as slow as a large frozen network on a node of its own would be: it sleeps besides, which takes
nobody's core, so long that one actor makes ``SHARE`` of what the trainer takes. On paper the trainer then waits
1 - ``SHARE`` of its time for one actor, and not at all for two.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

from avray.cli import TRAIN, compose
from avray.config import TrainSettings
from avray.families.continuation import Continuation
from avray.family import Column, Fitted
from avray.registry import family_from_settings, register
from benchmarks.measure import Table, interleaved

STEPS = 60
EMBEDDED_MINUTES = 60
"""The eight minutes of the default are encoded before a second actor has begun."""
SHARE = 0.6


@dataclass(frozen=True)
class Slow:
    """An encoder that sleeps for ``seconds_each`` shard besides."""

    encoder: Any
    seconds_each: float

    def column_id(self) -> str:
        return f"slow{self.seconds_each:.4f}-{self.encoder.column_id()}"

    def load(self, device: Any) -> Any:
        return SlowNetwork(self.encoder.load(device), self.seconds_each)


class SlowNetwork:
    def __init__(self, network: Any, seconds_each: float) -> None:
        self.network, self.seconds_each = network, seconds_each
        self.sample_rate_hz, self.frame_rate_hz = network.sample_rate_hz, network.frame_rate_hz

    def encode_batch(self, recordings: Sequence[np.ndarray]) -> Any:
        time.sleep(self.seconds_each)
        return self.network.encode_batch(recordings)


@dataclass(frozen=True)
class SlowContinuation(Continuation):
    seconds_each: float = 0.0

    def columns(self, fitted: Fitted | None) -> list[Column]:
        return [replace(column, encoder=Slow(column.encoder, self.seconds_each)) for column in super().columns(fitted)]


def settings(base: str, run: str, *more: str) -> TrainSettings:
    return compose(TRAIN, [f"data.demo_dir={base}/demo", f"run.dir={base}/{run}", "trainer.threads_per_worker=1",
                           "trainer.log_every_steps=10", "trainer.validate_every_steps=0", "trainer.num_samples=0",
                           "trainer.checkpoint_every_steps=0", "trainer.loggers.tensorboard=false",
                           "logging.progress=off", *more])


def embedding(base: str, workers: int) -> float:
    from avray.data.cache import Cache
    from avray.data.dataset import open_dataset
    from avray.data.stream import Pool, prepare

    chosen = settings(base, "none", f"data.cache={base}/empty", f"data.demo_minutes={EMBEDDED_MINUTES}")
    family = family_from_settings(chosen.family)
    dataset = open_dataset(family, chosen.data)
    plan = dataset.plans["train"]
    work = prepare(plan, family.columns(None), Cache(f"{base}/empty"), Pool(workers), dataset.limits)
    shutil.rmtree(f"{base}/empty")
    return plan.num_examples / work.seconds


def training(base: str, workers: int) -> float:
    from avray.train.trainer import train

    chosen = settings(base, "run", f"data.cache={base}/cache", f"trainer.num_workers={workers}",
                      f"trainer.max_steps={STEPS}")
    train(chosen, family_from_settings(chosen.family))
    return statistics.median(read(base, "train/rows_per_s"))


def waiting(base: str, workers: int, rows_per_s: float) -> float:
    """A window is 4 steps, as is a round, so that no block holds a lane's whole epoch."""
    from avray.data.dataset import open_dataset
    from avray.train.trainer import train

    chosen = settings(base, "run", f"data.cache={base}/empty", f"data.embed_workers={workers}", "trainer.max_epochs=1",
                      "trainer.num_workers=1", "data.fit_rows=32", "data.window_rows=64", "family.stride_s=0.12",
                      "trainer.log_every_steps=4")
    family = family_from_settings(chosen.family)
    assert isinstance(family, Continuation)
    plan = open_dataset(family, chosen.data).plans["train"]
    seconds_each = plan.num_examples / len(plan.shards) / (SHARE * rows_per_s)
    slow = SlowContinuation(**{name: getattr(family, name) for name in family.__dataclass_fields__},
                            seconds_each=seconds_each)
    train(chosen, slow)
    shutil.rmtree(f"{base}/empty")
    return statistics.mean(read(base, "train/waiting"))


def read(base: str, name: str) -> list[float]:
    """A figure's values after the first two windows."""
    with open(Path(base) / "run" / "metrics.csv", newline="") as file:
        values = [float(row[name]) for row in csv.DictReader(file) if row.get(name)]
    print(f"    {name}: {' '.join(f'{value:.3g}' for value in values)}", file=sys.stderr, flush=True)
    shutil.rmtree(Path(base) / "run")
    return values[2:] or values


def main() -> None:
    from avray.data.cluster import Needs, start_ray

    parts = ("embedding", "training", "waiting")
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=parts, choices=parts)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    register("slow_continuation", SlowContinuation)
    start_ray(Needs(pools=1, embed_workers=2, trainers=2), None, 600.0)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="avray-pools-") as base:
        if "embedding" in given.only:
            table = Table("embedding, from files into an empty cache", "rows/s", interleaved(
                {"1 actor": partial(embedding, base, 1), "2 actors": partial(embedding, base, 2)},
                given.repeats), "1 actor")
            print(table.markdown(), flush=True)
            found["embedding"] = table.as_dict()
        if "training" in given.only:
            training(base, 1)  # fills the cache
            table = Table("training, all in the cache", "rows/s", interleaved(
                {"1 worker": partial(training, base, 1), "2 workers": partial(training, base, 2)},
                given.repeats), "1 worker")
            print(table.markdown(), flush=True)
            found["training"] = table.as_dict()
        if "waiting" in given.only:
            rate = training(base, 1)
            shares = interleaved({f"data.embed_workers={n}": partial(waiting, base, n, rate) for n in (1, 2)},
                                 given.repeats)
            found["waiting"] = {"trainer_rows_per_s": rate, "shares": shares}
            print(json.dumps(found["waiting"]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
