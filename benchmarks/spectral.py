"""The spectral codec's speed: sound to frames, frames to sound, codebooks from frames. Pitch and level are tested.

``python benchmarks/spectral.py`` on two threads, five times, median and range.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from avray.codecs.base import decode_all
from avray.codecs.spectral import Spectral


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config, seconds, num_frames = Spectral(), 20.0, 100_000
    codec, rng = config.load(), np.random.default_rng(0)
    sound = rng.normal(0, 0.1, int(seconds * codec.sample_rate_hz)).astype(np.float32)
    latents = codec.encode_batch([sound])[0]
    frames = rng.normal(size=(num_frames, codec.width)).astype(np.float32)
    runs = {
        "encode, × real time": lambda: codec.encode_batch([sound]),
        "decode, × real time": lambda: decode_all(codec, latents),
        f"fit {config.num_codebooks} codebooks to {num_frames:,} frames, s": lambda: config.fit(frames),
    }
    found: dict[str, list[float]] = {}
    for name, run in runs.items():
        values = found[name] = []
        for _ in range(options.repeats):
            start = time.perf_counter()
            run()
            taken = time.perf_counter() - start
            values.append(seconds / taken if "real time" in name else taken)
    print("| spectral codec | median (range) |\n|---|---|")
    for name, values in found.items():
        print(f"| {name} | {statistics.median(values):,.4g} ({min(values):,.4g} to {max(values):,.4g}) |")
    if options.json:
        options.json.write_text(json.dumps({"threads": options.threads, "figures": found}, indent=1))


if __name__ == "__main__":
    main()
