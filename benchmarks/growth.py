"""What grows with the number of rows and of workers, media and networks aside: the driver's memory with a manifest of
synthetic rows, and the orchestration of embedding with its work replaced by sleep.

    python -m benchmarks.growth --rows 1000 100000 10000000
    python -m benchmarks.growth --lists 1000 100000 1000000
    python -m benchmarks.growth --workers 1 4 16 64

``--rows`` begins with rows as a manifest leaves them, splits and plans them; ``--lists`` reads them from a JSONL first,
as a run does, with only the look at each file replaced. Of each number in a process of its own: peak memory over that
of the imports, seconds, and the bytes of the plan that a node gets. A number that would not fit this machine's free
memory, going by the one before, is not tried. With workers, a shard takes ``SLEEP_S`` on each, so W of them are to make
W / ``SLEEP_S`` shards a second.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

SLEEP_S = 1.0
SHARDS_EACH = 24
SPARE = 0.5
"""Of the free memory."""


@dataclass(frozen=True)
class Memory:
    rows: int
    peak_bytes: int
    plan_bytes: int
    read_s: float
    plan_s: float

    def line(self) -> str:
        return (f"| {self.rows:,} | {self.peak_bytes / 2**20:,.0f} MiB | {self.peak_bytes / self.rows:,.0f} | "
                f"{self.plan_bytes / 2**20:,.1f} MiB | {self.plan_bytes / self.rows:,.0f} | {self.read_s:,.1f} | "
                f"{self.plan_s:,.1f} |")


def measured(rows: int, listed: bool, connection: Any) -> None:
    from ray import cloudpickle

    import avray.data.dataset  # noqa: F401
    from avray.cli import TRAIN, compose
    from avray.registry import family_from_settings

    settings = compose(TRAIN, ["family=continuation", "family.segment_s=1"])
    family = family_from_settings(settings.family)
    with tempfile.TemporaryDirectory(prefix="avray-growth-") as folder:
        if listed:
            write_list(rows, folder)
        before = peak_bytes()
        began_s = time.perf_counter()
        dataset = read_list(family, folder) if listed else split_rows(rows)
        read_s = time.perf_counter()
        plan = plan_of(family, dataset)
        done_s = time.perf_counter()
    peak = peak_bytes() - before
    assert plan.num_examples > 0.8 * rows
    buffers: list[Any] = []
    head = cloudpickle.dumps(plan, protocol=5, buffer_callback=buffers.append)
    sent = len(head) + sum(buffer.raw().nbytes for buffer in buffers)
    connection.send(asdict(Memory(rows, peak, sent, read_s - began_s, done_s - read_s)))


def split_rows(rows: int) -> Any:
    from avray.data.packed import Rows
    from avray.data.splits import assign_splits

    return assign_splits(Rows(map(synthetic, range(rows))))


def plan_of(family: Any, rows: Any) -> Any:
    from avray.data.plan import plan_split

    return plan_split(family, rows, "train")


def read_list(family: Any, folder: str) -> Any:
    """The rows of a run, by its own functions; a file is not opened, and so has no memo either."""
    from avray.config import DataSettings
    from avray.data import probing
    from avray.data.dataset import read_rows
    from avray.media import AudioInfo

    def seen(file: Any, limits: Any, memo: Any) -> Any:
        digest = hashlib.blake2b(file.path.encode(), digest_size=16).hexdigest()
        return probing.Probed(AudioInfo(48_000, 24_000, 1, "wav"), digest)

    probing._probe = seen
    return read_rows(DataSettings(path=f"{folder}/list.jsonl", cache=f"{folder}/cache"), family.segment_s, family).rows


def write_list(rows: int, folder: str) -> None:
    with open(f"{folder}/list.jsonl", "w") as file:
        for index in range(rows):
            row = synthetic(index)
            file.write(json.dumps({"audio": f"{row['id']}.wav", "group": row["group"], "duration": 2.0}) + "\n")


def synthetic(index: int) -> dict[str, Any]:
    """A row as the manifest leaves it, of a recording that gives one example."""
    name = f"recordings/{index:09d}"
    return {"id": name, "audio": f"/shared/{name}.wav", "audio_hash": f"{index:032x}", "start_s": 0.0,
            "duration_s": 2.0, "sample_rate_hz": 24_000, "channels": 1, "group": f"group{index % 1000}"}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def driver_memory(counts: Sequence[int], listed: bool) -> list[Memory]:
    context = multiprocessing.get_context("spawn")
    found: list[Memory] = []
    print("| rows | driver's memory | bytes a row | plan, as sent | bytes a row | s to split | s to plan |"
          "\n|---|---|---|---|---|---|---|")
    for rows in counts:
        free = psutil.virtual_memory().available
        expected = found[-1].peak_bytes / found[-1].rows * rows if found else 0
        if expected > SPARE * free:
            print(f"| {rows:,} | not tried: some {expected / 2**30:.0f} GiB, of {free / 2**30:.0f} free | | | | | |")
            continue
        ours, theirs = context.Pipe()
        process = context.Process(target=measured, args=(rows, listed, theirs))
        process.start()
        theirs.close()
        found.append(Memory(**ours.recv()))
        process.join()
        print(found[-1].line(), flush=True)
    return found


@dataclass(frozen=True)
class Sleeper:
    """An encoder that only takes its time, and notes when."""

    log: str

    def column_id(self) -> str:
        return "sleep"

    def load(self, device: Any) -> Sleeper:
        return self

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        began_s = time.time()
        time.sleep(SLEEP_S)
        with open(f"{self.log}/{os.getpid()}", "a") as file:
            file.write(f"{began_s} {time.time()} {own_bytes()}\n")
        return [np.zeros((1, 1), np.float32) for _ in texts]


def own_bytes() -> int:
    """Memory of this process that no other shares."""
    return int(psutil.Process().memory_full_info().uss)


def orchestration(workers: int) -> dict[str, float]:
    """Shards a second while all actors are there, and of what they could be; what an actor holds, and when the last
    one had begun."""
    import ray

    from avray.data.cache import Cache
    from avray.data.cluster import Needs, start_ray
    from avray.data.plan import Plan, Shards, make_shard
    from avray.data.stream import Pool, prepare
    from avray.family import Column, Example, Unit
    from avray.media import Limits

    count = SHARDS_EACH * workers
    examples = [Example(f"{index}", {"text": Unit(f"row {index}", "text", 0.0, 0.0)}) for index in range(count)]
    shards = Shards(make_shard([example], {}) for example in examples)
    with tempfile.TemporaryDirectory(prefix="avray-growth-") as folder, tempfile.TemporaryDirectory() as log:
        start_ray(Needs(pools=1, embed_workers=workers), None, 600.0)
        began_s = time.time()
        column = Column("sleep", Sleeper(log), "text", "float32")  # type: ignore[arg-type]
        work = prepare(Plan("train", shards), [column], Cache(folder), Pool(workers), Limits())
        ray.shutdown()
        actors = [[tuple(map(float, line.split())) for line in path.read_text().splitlines()]
                  for path in Path(log).iterdir()]
    assert work.computed == count
    first, last = max(actor[0][0] for actor in actors), min(actor[-1][1] for actor in actors)
    done = sum(first < end <= last for actor in actors for _, end, _ in actor)
    rate = done / (last - first) if last > first else math.nan
    return {"workers": workers, "actors_seen": len(actors), "shards_per_s": rate, "share": rate * SLEEP_S / workers,
            "together_s": last - first, "last_began_after_s": first - began_s,
            "actor_mib": max(actor[-1][2] for actor in actors) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="*", default=[])
    parser.add_argument("--lists", type=int, nargs="*", default=[])
    parser.add_argument("--workers", type=int, nargs="*", default=[])
    given = parser.parse_args()
    if given.rows:
        driver_memory(given.rows, listed=False)
    if given.lists:
        driver_memory(given.lists, listed=True)
    for workers in given.workers:
        print(json.dumps(orchestration(workers)), flush=True)


if __name__ == "__main__":
    main()
