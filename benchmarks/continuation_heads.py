"""The two heads of continuation on the same held-out songs of the demo set, trained on the same songs for as long.

    python -m benchmarks.continuation_heads [--seconds 120] [--songs 48] [--json FILE]

Each head gets the same seconds of training on one thread, then continues 2 s of each held-out song by 2 s at three
places. Beside them stand the recording itself, as the codec gives it back, and the input again. ``level`` is in dB
beside the recording, ``Fréchet`` between the codec's latents of all frames; ``in key`` is the share of the spectrum's
energy (100 to 2,000 Hz) on the scale of the song's key, ``in tempo`` how many continuations with a beat have the
song's, within 8 % and up to another level of the metre.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from avray.cli import TRAIN, compose
from avray.codecs.base import decode_all
from avray.codecs.spectral import Spectral
from avray.data.demo import song_recording
from avray.data.demo_sound import SAMPLE_RATE_HZ, SCALES, note_hz
from avray.engine import Engine
from avray.family import Options, Request, Row
from avray.metrics.frechet import Gaussian, frechet_distance
from avray.metrics.level import level_error_db
from avray.metrics.rhythm import tempo_bpm, tempo_error
from avray.metrics.spectral import log_spectral_distance
from avray.registry import family_from_settings
from avray.train.optim import Ema

SEGMENT, HELD_OUT, BATCH = 150, 8, 16
NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--songs", type=int, default=48)
    parser.add_argument("--json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    codec = Spectral().load("cpu")
    songs = [song_recording(index, 0) for index in range(given.songs + HELD_OUT)]
    latents = [codec.encode_batch([song.samples])[0] for song in songs]
    train = [row for frames in latents[HELD_OUT:] for row in pairs(frames, 18)]
    places = [(song, frames, start) for song, frames in zip(songs[:HELD_OUT], latents, strict=False)
              for start in np.linspace(0, len(frames) - 2 * SEGMENT, 3).astype(int)]
    made: dict[str, list[np.ndarray]] = {
        "the recording, through the codec": [frames[s + SEGMENT : s + 2 * SEGMENT] for _, frames, s in places],
        "the input again": [frames[s : s + SEGMENT] for _, frames, s in places]}
    for head in ("mse", "flow"):
        made[f"head={head}"] = continued(head, train, places, given.seconds)
    figures = {name: judged(codec, frames, places) for name, frames in made.items()}
    columns = list(next(iter(figures.values())))
    print(f"| {given.seconds:g} s of training, {len(places)} continuations | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for name, row in figures.items():
        print(f"| {name} | " + " | ".join(f"{row[column]:.3g}" for column in columns) + " |")
    if given.json:
        Path(given.json).write_text(json.dumps(figures))


def pairs(frames: np.ndarray, stride: int) -> list[Row]:
    return [{"id": str(start), "weight": 1.0, "input.latents": frames[start : start + SEGMENT],
             "output.latents": frames[start + SEGMENT : start + 2 * SEGMENT]}
            for start in range(0, len(frames) - 2 * SEGMENT + 1, stride)]


def continued(head: str, train: list[Row], places: list[Any], seconds: float) -> list[np.ndarray]:
    """Train for so long, with averaged weights as a run has, and continue each place."""
    family = family_from_settings(compose(TRAIN, ["family=continuation", f"family.head={head}"]).family)
    fitted = family.fit(iter(train[::10]))
    model = family.build(fitted)
    family.init(model, torch.Generator().manual_seed(0))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    ema, rng = Ema(model, 0.98), np.random.default_rng(0)
    began, step = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * passed / seconds))
        batch = family.collate([train[i] for i in rng.integers(len(train), size=BATCH)], fitted)
        sums = family.loss(model.train(), batch, torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        (sums[head] / batch.counts[head]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        ema.update(step)
        step += 1
    print(f"head={head}: {step} steps", flush=True)
    with ema.swapped():
        engine = Engine(family, model.eval(), fitted)
        sampler, found = engine.sampler, []
        for index, (_, frames, start) in enumerate(places):
            row = {"id": "", "weight": 1.0, "input.latents": frames[start : start + SEGMENT]}
            request = Request(options=Options(seconds=2.0), seed=index)
            sampler.admit([0], family.collate([row], fitted), [request.seed], [request.options])
            pieces = []
            while not pieces or not pieces[-1].done:
                pieces += sampler.step()
            found.append(np.concatenate([piece.data for piece in pieces]))
    return found


def judged(codec: Any, made: list[np.ndarray], places: list[Any]) -> dict[str, float]:
    level, spectral, key, tempo = [], [], [], []
    ours, theirs = Gaussian(), Gaussian()
    for frames, (song, latents, start) in zip(made, places, strict=True):
        wanted = latents[start + SEGMENT : start + 2 * SEGMENT]
        first = (start + SEGMENT) * codec.hop_samples
        target = song.samples[first : first + SEGMENT * codec.hop_samples]
        sound = decode_all(codec, frames.astype(np.float32))[: len(target)]
        ours.add(frames)
        theirs.add(wanted)
        level.append(level_error_db(sound, target))
        spectral.append(log_spectral_distance(sound, target, SAMPLE_RATE_HZ))
        key.append(in_key(sound, song.row["musical_key"]))
        error = tempo_error(tempo_bpm(sound, SAMPLE_RATE_HZ), song.row["tempo_bpm"])
        tempo += [] if math.isnan(error) else [error < 0.08]
    return {"level, dB": float(np.mean(level)), "spectral distance, dB": float(np.mean(spectral)),
            "Fréchet": frechet_distance(ours, theirs), "in key": float(np.mean(key)),
            "in tempo": float(np.mean(tempo)) if tempo else math.nan}


def in_key(samples: np.ndarray, key: str) -> float:
    """Of the energy from 100 to 2,000 Hz, how much lies within 35 cents of the scale's notes."""
    tonic, mode = key.split()
    power = np.square(np.abs(np.fft.rfft(samples * np.hanning(len(samples)))))
    hz = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE_HZ)
    inside = (hz > 100) & (hz < 2000)
    steps = 12 * np.log2(hz[inside] / note_hz(60))
    scale = {(NAMES.index(tonic) + step) % 12 for step in SCALES[mode]}
    on = np.array([round(step) % 12 in scale and abs(step - round(step)) < 0.35 for step in steps])
    return float(power[inside][on].sum() / power[inside].sum())


if __name__ == "__main__":
    main()
