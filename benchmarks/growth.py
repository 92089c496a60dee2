"""What grows with the number of rows and of workers, media and networks aside: the driver's memory with a manifest of
synthetic rows, and the orchestration of embedding with its work replaced by sleep.

    python -m benchmarks.growth --rows 1000 100000 10000000
    python -m benchmarks.growth --workers 1 4 16 64

Of each number of rows in a process of its own: peak memory over that of the imports, seconds, and the bytes of the plan
that every actor gets. A number that would not fit this machine's free memory, going by the one before, is not tried.
With workers, a shard takes ``SLEEP_S`` on each, so W of them are to make W / ``SLEEP_S`` shards a second.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psutil

SLEEP_S = 1.0
SHARDS_EACH = 12
SPARE = 0.5
"""Of the free memory."""


@dataclass(frozen=True)
class Memory:
    rows: int
    peak_bytes: int
    plan_bytes: int
    manifest_s: float
    plan_s: float

    def line(self) -> str:
        return (f"| {self.rows:,} | {self.peak_bytes / 2**20:,.0f} MiB | {self.peak_bytes / self.rows:,.0f} | "
                f"{self.plan_bytes / 2**20:,.1f} MiB | {self.manifest_s + self.plan_s:,.1f} |")


def measured(rows: int, connection: Any) -> None:
    from ray import cloudpickle

    from avray.cli import TRAIN, compose
    from avray.data.plan import plan_split
    from avray.registry import family_from_settings

    family = family_from_settings(compose(TRAIN, ["family=continuation", "family.segment_s=1"]).family)
    before = peak_bytes()
    began_s = time.perf_counter()
    manifest = [synthetic(index) for index in range(rows)]
    read_s = time.perf_counter()
    plan = plan_split(family, manifest, "train")
    done_s = time.perf_counter()
    peak = peak_bytes() - before
    head = plan.subset(range(min(1000, len(plan.shards))))
    plan_bytes = len(cloudpickle.dumps(head)) * len(plan.shards) // len(head.shards)
    connection.send(asdict(Memory(rows, peak, plan_bytes, read_s - began_s, done_s - read_s)))


def synthetic(index: int) -> dict[str, Any]:
    """A row as the manifest leaves it, of a recording that gives one example."""
    name = f"recordings/{index:09d}"
    return {"id": name, "audio": f"/shared/{name}.wav", "audio_hash": f"{index:032x}", "start_s": 0.0,
            "duration_s": 2.0, "sample_rate_hz": 24_000, "channels": 1, "group": f"group{index % 1000}",
            "split": "train"}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def driver_memory(counts: Sequence[int]) -> list[Memory]:
    context = multiprocessing.get_context("spawn")
    found: list[Memory] = []
    print("| rows | driver's memory | bytes a row | plan, as sent | seconds |\n|---|---|---|---|---|")
    for rows in counts:
        free = psutil.virtual_memory().available
        expected = found[-1].peak_bytes / found[-1].rows * rows if found else 0
        if expected > SPARE * free:
            print(f"| {rows:,} | not tried: some {expected / 2**30:.0f} GiB, of {free / 2**30:.0f} free | | | |")
            continue
        ours, theirs = context.Pipe()
        process = context.Process(target=measured, args=(rows, theirs))
        process.start()
        found.append(Memory(**ours.recv()))
        process.join()
        print(found[-1].line(), flush=True)
    return found


@dataclass(frozen=True)
class Sleeper:
    """An encoder that only takes its time."""

    def column_id(self) -> str:
        return "sleep"

    def load(self, device: Any) -> Sleeper:
        return self

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        time.sleep(SLEEP_S)
        return [np.zeros((1, 1), np.float32) for _ in texts]


def orchestration(workers: int) -> dict[str, float]:
    """Shards a second from the first actor's first shard to the last one's end, and of what they could be."""
    import ray

    from avray.data.cache import Cache
    from avray.data.cluster import Needs, start_ray
    from avray.data.plan import Plan, make_shard
    from avray.data.stream import Pool, prepare
    from avray.family import Column, Example, Unit
    from avray.media import Limits

    count = SHARDS_EACH * workers
    examples = [Example(f"{index}", {"text": Unit(f"row {index}", "text", 0.0, 0.0)}) for index in range(count)]
    shards = tuple(make_shard([example], {}) for example in examples)
    with tempfile.TemporaryDirectory(prefix="avray-growth-") as folder:
        start_ray(Needs(pools=1, embed_workers=workers), None, 600.0)
        began_s = time.perf_counter()
        column = Column("sleep", Sleeper(), "text", "float32")  # type: ignore[arg-type]
        work = prepare(Plan("train", shards), [column], Cache(folder), Pool(workers), Limits())
        elapsed_s = time.perf_counter() - began_s
        ray.shutdown()
    assert work.computed == count
    rate = count / work.seconds
    return {"workers": workers, "shards_per_s": rate, "share": rate * SLEEP_S / workers, "with_start_s": elapsed_s}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="*", default=[])
    parser.add_argument("--workers", type=int, nargs="*", default=[])
    given = parser.parse_args()
    if given.rows:
        driver_memory(given.rows)
    for workers in given.workers:
        print(json.dumps(orchestration(workers)), flush=True)


if __name__ == "__main__":
    main()
