"""Ray Train with two workers beside the very same loop under torchrun, interleaved.

    python -m benchmarks.ray_train [--steps 60] [--repeats 5] [--json FILE]

The 859,520-parameter ``continuation`` on the demo set, everything in the cache, no validation and no samples, one
thread a worker. The figure is rows a second at steady state: the median of the loop's own windows of ten steps after
the first two. The bound is torchrun itself: Ray Train adds a process that supervises, and one report at the end.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

from avray.cli import TRAIN, compose
from avray.registry import family_from_settings
from benchmarks.measure import Table, interleaved


def settings(base: str, run: str, steps: int):
    return compose(TRAIN, [f"data.cache={base}/cache", f"data.demo_dir={base}/demo", f"run.dir={base}/{run}",
                           "trainer.num_workers=2", f"trainer.max_steps={steps}", "trainer.log_every_steps=10",
                           "trainer.validate_every_steps=0", "trainer.num_samples=0",
                           "trainer.checkpoint_every_steps=0", "trainer.loggers.tensorboard=false"])


def steady(run_dir: Path) -> float:
    with open(run_dir / "metrics.csv", newline="") as file:
        rates = [float(row["train/rows_per_s"]) for row in csv.DictReader(file) if row.get("train/rows_per_s")]
    shutil.rmtree(run_dir)
    return statistics.median(rates[2:] or rates)  # the run that fills the cache is one step long


def with_ray(base: str, steps: int) -> float:
    from avray.train.trainer import train

    chosen = settings(base, "ray-run", steps)
    train(chosen, family_from_settings(chosen.family))
    return steady(Path(base) / "ray-run")


def with_torchrun(base: str, steps: int) -> float:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
               "benchmarks.ray_train", "--worker", base, "--steps", str(steps)]
    subprocess.run(command, check=True, capture_output=True)
    return steady(Path(base) / "torchrun-run")


def worker(base: str, steps: int) -> None:
    """One rank under torchrun."""
    import torch
    import torch.distributed as dist

    from avray.data.cache import Cache
    from avray.data.loader import PreparedSource
    from avray.data.prepare import prepare_training
    from avray.train.loggers import LoggerGroup, open_loggers
    from avray.train.loop import Loop, Place
    from avray.train.trainer import make_job

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    chosen = settings(base, "torchrun-run", steps)
    run_dir = Path(chosen.run.dir)
    run_dir.mkdir(exist_ok=True)
    family = family_from_settings(chosen.family)
    job = make_job(chosen, family, prepare_training(family, chosen.data, run_dir))
    cache = Cache(chosen.data.cache)
    source = PreparedSource(job.train, job.train_order, cache, job.columns)
    validation = PreparedSource(job.validation, job.validation_order, cache, job.columns)
    Loop(job, Place(rank, 2, torch.device("cpu"), lambda epoch, step: source, validation, loggers=lambda resume_step: (
        open_loggers(chosen.trainer.loggers, run_dir, {}, resume_step) if rank == 0 else LoggerGroup([])))).run()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json")
    parser.add_argument("--worker")
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.steps)
        return
    base = tempfile.mkdtemp(prefix="avray-benchmark-")
    with_ray(base, 1)  # fills the cache
    results = interleaved({"avray on Ray Train": lambda: with_ray(base, options.steps),
                           "the same loop under torchrun": lambda: with_torchrun(base, options.steps)}, options.repeats)
    table = Table("Training, two workers", "rows a second", results, against="the same loop under torchrun")
    print(table.markdown())
    shutil.rmtree(base)
    if options.json:
        Path(options.json).write_text(json.dumps(table.as_dict()))


if __name__ == "__main__":
    main()
