"""From ``python pipelines/train.py`` to a WAV, in a folder and a cache of its own: the time a newcomer waits.

    python -m benchmarks.first_run [--repeats 3]

The aim is 3 minutes on 2 cores, with a validation loss at least 10 % below the best of the baselines.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def first_run() -> tuple[float, dict]:
    base = Path(tempfile.mkdtemp(prefix="avray-first-"))
    began = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "pipelines" / "train.py"), f"run.dir={base}/run"], cwd=base, check=True,
                   env={**os.environ, "AVRAY_CACHE": str(base / "cache")}, stdout=subprocess.DEVNULL)
    elapsed = time.perf_counter() - began
    summary = json.loads((base / "run" / "summary.json").read_text())
    wavs = list((base / "run" / "samples").rglob("*.generated.wav"))
    pictures = list((base / "run" / "samples").rglob("*.png"))
    assert wavs and pictures
    shutil.rmtree(base)
    return elapsed, summary


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    results = [first_run() for _ in range(parser.parse_args().repeats)]
    times = [elapsed for elapsed, _ in results]
    summary = results[0][1]
    best = min(summary["baselines"].items(), key=lambda item: item[1])
    below = 1 - summary["best_validation_loss"] / best[1]
    print(f"First run: {statistics.median(times):.0f} s ({min(times):.0f} to {max(times):.0f}); validation loss "
          f"{summary['best_validation_loss']:.3g}, {below:.0%} below the best baseline ({best[0]}, {best[1]:.3g}).")


if __name__ == "__main__":
    main()
