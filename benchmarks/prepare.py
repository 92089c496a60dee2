"""Recordings → latents in Parquet: avray on Ray Data beside a plain two-process loop over the same network, and Daft.

    python benchmarks/prepare.py [--minutes 480] [--repeats 5] [--json FILE]

All three decode the same WAV files, run the same ``spectral`` network and write float16 latents to Parquet, with two
processes of one thread each. Start-up is left out: the loop is timed from when its workers have opened the network,
avray from when its first actor begins its first shard (and opens the network), to when the last file is on disk. The
bound is the network alone on samples already in memory, in two processes. Then: a second pass over unchanged input,
which must run no network, and the peak memory of a worker for 10 minutes and for ``--long-hours`` of input.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from avray.codecs.spectral import Spectral
from avray.family import Column
from benchmarks.measure import Table, interleaved

SECONDS = 60.0


def make_recordings(folder: Path, minutes: float, seed: int = 0) -> list[str]:
    """One-minute WAVs of the demo's sound, each at a level and an offset of its own, so that no two are equal."""
    import soundfile

    from avray.data.demo import make_demo

    demo = make_demo(folder / "demo", minutes=4.0, seed=seed)
    sound = np.concatenate([soundfile.read(path, dtype="float32")[0]
                            for path in sorted(Path(demo.folder).rglob("*.wav"))])
    random = np.random.default_rng(seed)
    paths = []
    for index in range(round(minutes)):
        samples = np.roll(sound, random.integers(len(sound)))[: round(SECONDS * 24_000)] * random.uniform(0.3, 1.0)
        path = folder / "wavs" / f"{index:05d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples, 24_000)
        paths.append(str(path))
    return paths


def plain_worker(paths: list[str], out: str, barrier: Barrier) -> None:
    """What one would write without avray: decode, encode, append to a Parquet file."""
    import torch

    from avray.media import read_audio

    torch.set_num_threads(1)
    network = Spectral().load("cpu")
    network.encode_batch([np.zeros(24_000, np.float32)])
    barrier.wait()
    schema = pa.schema([("path", pa.string()), ("value", pa.list_(pa.float16())), ("frames", pa.int32())])
    with pq.ParquetWriter(out, schema, use_dictionary=False, compression="none") as writer:
        for path in paths:
            latents = network.encode_batch([read_audio(path, sample_rate_hz=24_000).samples[0]])[0].astype(np.float16)
            row = {"path": [path], "value": [latents.reshape(-1)], "frames": [len(latents)]}
            writer.write_table(pa.table(row, schema))
    barrier.wait()


def plain(paths: list[str], folder: Path) -> float:
    return two_processes(plain_worker, paths, folder)


def network_worker(paths: list[str], out: str, barrier: Barrier) -> None:
    """The bound: nothing but the network, on samples in memory."""
    import torch

    from avray.media import read_audio

    torch.set_num_threads(1)
    network = Spectral().load("cpu")
    recordings = [read_audio(path, sample_rate_hz=24_000).samples[0] for path in paths]
    barrier.wait()
    for samples in recordings:
        network.encode_batch([samples])
    barrier.wait()


def network_alone(paths: list[str], folder: Path) -> float:
    return two_processes(network_worker, paths, folder)


def two_processes(work, paths: list[str], folder: Path) -> float:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    workers = [context.Process(target=work, args=(paths[i::2], str(folder / f"plain-{i}.parquet"), barrier))
               for i in range(2)]
    for worker in workers:
        worker.start()
    barrier.wait()
    began = time.perf_counter()
    barrier.wait()
    elapsed = time.perf_counter() - began
    for worker in workers:
        worker.join()
    return elapsed


def avray_plan(paths: list[str]):
    from avray.data.plan import plan_split
    from avray.families.continuation import Continuation
    from avray.media import content_hash

    rows = [{"id": Path(p).stem, "audio": p, "audio_hash": content_hash(p), "duration_s": SECONDS, "start_s": 0.0,
             "split": "train"} for p in paths]
    return plan_split(Continuation(codec=Spectral(), segment_s=SECONDS / 2), rows, "train")


def with_avray(paths: list[str], folder: Path) -> float:
    """Seconds from the first shard's beginning to the last one's end, in a pool of two actors."""
    from avray.codecs.base import Latents
    from avray.data.cache import Cache
    from avray.data.stream import Pool, prepare
    from avray.media import Limits

    column = Column("latents", Latents(Spectral()))
    return prepare(avray_plan(paths), [column], Cache(str(folder / "cache")), Pool(size=2), Limits()).seconds


def second_pass(paths: list[str], folder: Path) -> tuple[float, int]:
    """Seconds, and shards computed, when everything is in the cache already."""
    from avray.codecs.base import Latents
    from avray.data.cache import Cache
    from avray.data.stream import Pool, prepare
    from avray.media import Limits

    plan = avray_plan(paths)
    began = time.perf_counter()
    columns, cache = [Column("latents", Latents(Spectral()))], Cache(str(folder / "cache"))
    computed = prepare(plan, columns, cache, Pool(size=2), Limits()).computed
    return time.perf_counter() - began, computed


def with_daft(paths: list[str], folder: Path) -> float:
    import daft

    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=daft_worker, args=(paths, str(folder / "daft"), queue))
    process.start()
    elapsed = queue.get()
    process.join()
    assert daft.__version__
    return elapsed


def daft_worker(paths: list[str], out: str, queue) -> None:
    import daft
    from daft import DataType

    from avray.media import read_audio

    @daft.cls(use_process=True, max_concurrency=2)
    class Encode:
        def __init__(self) -> None:
            import torch

            torch.set_num_threads(1)
            self.network = Spectral().load("cpu")

        @daft.method(return_dtype=DataType.list(DataType.float32()))
        def __call__(self, path: str):
            samples = read_audio(path, sample_rate_hz=24_000).samples[0]
            return self.network.encode_batch([samples])[0].reshape(-1)

    encode = Encode()
    frame = daft.from_pydict({"path": paths[:2]})
    frame.with_column("value", encode(frame["path"])).write_parquet(out + "-warm")
    began = time.perf_counter()
    frame = daft.from_pydict({"path": paths}).into_batches(4)
    frame.with_column("value", encode(frame["path"])).write_parquet(out)
    queue.put(time.perf_counter() - began)


def peak_memory(hours: float, folder: Path) -> float:
    """MiB of a process that embeds this much, one recording, through the very code of the actors."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=memory_worker, args=(hours, str(folder), queue))
    process.start()
    peak = queue.get()
    process.join()
    return peak


def memory_worker(hours: float, folder: str, queue) -> None:
    import soundfile

    from avray.codecs.base import Latents
    from avray.data.cache import Cache
    from avray.data.embed import Embedder
    from avray.data.plan import plan_split
    from avray.families.continuation import Continuation

    path = Path(folder) / f"long-{hours:g}.wav"
    random = np.random.default_rng(1)
    with soundfile.SoundFile(path, "w", 24_000, 1, subtype="PCM_16", format="RF64") as file:
        for _ in range(round(hours * 60)):
            file.write((random.normal(size=24_000 * 60) * 0.1).astype(np.float32))
    row = {"id": "long", "audio": str(path), "audio_hash": f"{hours}", "duration_s": hours * 3600, "start_s": 0.0,
           "split": "train"}
    plan = plan_split(Continuation(codec=Spectral(), segment_s=2.0, max_pairs_per_song=10**9), [row], "train")
    embedder = Embedder(Column("latents", Latents(Spectral())), Cache(folder + f"/cache-{hours:g}"))
    for shard in plan.shards:
        embedder.ensure(shard)
    path.unlink()
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=480)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--long-hours", type=float, default=10)
    parser.add_argument("--no-daft", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    from avray.data.cluster import Needs, start_ray

    start_ray(Needs(1, 2, 1.0), None, 600)
    base = Path(tempfile.mkdtemp(prefix="avray-benchmark-"))
    paths = make_recordings(base, options.minutes)
    repeat = iter(range(10**6))

    def fresh(function):
        folder = base / f"run-{next(repeat)}"
        folder.mkdir()
        try:
            return options.minutes * 60 / function(paths, folder)
        finally:
            shutil.rmtree(folder)

    candidates = {"avray on Ray Data": lambda: fresh(with_avray), "two-process loop": lambda: fresh(plain),
                  "the network alone (bound)": lambda: fresh(network_alone)}
    if not options.no_daft:
        candidates["Daft"] = lambda: fresh(with_daft)
    results = interleaved(candidates, options.repeats)
    table = Table("Recordings to latents in Parquet", "seconds of sound a second", results, against="two-process loop")
    print(table.markdown())
    again = base / "again"
    again.mkdir()
    first = with_avray(paths, again)
    seconds, computed = second_pass(paths, again)
    print(f"\nSecond pass, unchanged input: {seconds:.2f} s of {first:.1f} s, {computed} shards computed.")
    peaks = {hours: peak_memory(hours, base) for hours in (1 / 6, options.long_hours)}
    print("\nPeak memory of one embedding process: "
          + ", ".join(f"{60 * h:.0f} min of input {m:.0f} MiB" for h, m in peaks.items()))
    shutil.rmtree(base)
    if options.json:
        Path(options.json).write_text(json.dumps({
            "table": table.as_dict(), "second_pass_s": seconds, "computed": computed, "first_pass_s": first,
            "peak_mib": {str(k): v for k, v in peaks.items()}}))


if __name__ == "__main__":
    main()
