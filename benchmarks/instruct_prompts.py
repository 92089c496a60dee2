"""Does a model trained on the demo set do what its prompts say: pitch, duration and instrument of held-out ones.

    python -m benchmarks.instruct_prompts runs/sounds [--prompts 100] [--steps N] [--guidance N] [--json FILE]

Prompts are captions of held-out single notes (a sine, a plucked string, a bell). The pitch is the strongest peak of
the whole sound's spectrum, right within 50 cents; the duration, foreseen from the text, is right within 10 %; the
instrument is what a softmax regression over the mean and spread of the codec's frames says that learnt it from the
training recordings. The same of the recordings themselves, through the codec, stands beside.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from avray.codecs.base import decode_all
from avray.codecs.spectral import Spectral, SpectralCodec
from avray.data.demo import Recording, short_recording
from avray.data.demo_sound import SAMPLE_RATE_HZ, note_hz
from avray.engine import Generator
from avray.family import Options, Request

KINDS = ("tone", "pluck", "bell")
LEARNT_FROM = 300
RANGES = {"C3 to C4": (48, 60), "C4 to C6": (60, 85)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--steps", type=int, help="of the solver; else the model's own")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--json")
    given = parser.parse_args()
    codec = Spectral().load("cpu")
    classify = Classifier(codec, [one for _, one in zip(range(LEARNT_FROM), singles("train"), strict=False)], "kind")
    model = Generator.open(given.checkpoint)
    options = Options(num_steps=given.steps, guidance_scale=given.guidance)
    results: dict[str, list[dict[str, float]]] = {"generated": [], "recording, through the codec": []}
    for number, one in zip(range(given.prompts), singles("validation"), strict=False):
        [answer] = model.generate_many([Request(text=str(one.row["text"]), seed=number, options=options)])
        made = answer.audio.samples[0]
        real = decode_all(codec, codec.encode_batch([one.samples])[0])
        for name, samples in zip(results, (made, real), strict=True):
            results[name].append(judged(samples, one, classify))
    figures = {name: shares(rows) for name, rows in results.items()}
    columns = list(dict.fromkeys(column for row in figures.values() for column in row))
    print(f"| {given.prompts} held-out prompts | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for name, row in figures.items():
        print(f"| {name} | " + " | ".join(f"{100 * row[column]:.0f} %" for column in columns) + " |")
    if given.json:
        Path(given.json).write_text(json.dumps(figures))


def singles(split: str, kinds: Sequence[str] = KINDS) -> Iterator[Recording]:
    """The demo set's single notes (or other ``kinds``) of one side of its split, in its order."""
    for index in itertools.count():
        made = short_recording(index, 0)
        if made.row["split"] == split and made.row["kind"] in kinds:
            yield made


def judged(samples: np.ndarray, one: Recording, classify: Classifier) -> dict[str, float]:
    wanted = float(one.row["pitch_hz"])  # type: ignore[arg-type]
    cents = abs(1200 * math.log2(loudest_hz(samples) / wanted))
    off = abs(len(samples) / SAMPLE_RATE_HZ / float(one.row["length_s"]) - 1)  # type: ignore[arg-type]
    return {"hz": wanted, "pitch": float(cents <= 50), "duration": float(off <= 0.1),
            "instrument": float(classify(samples) == one.row["kind"])}


def shares(rows: list[dict[str, float]]) -> dict[str, float]:
    found = {}
    for name, (low, high) in RANGES.items():
        pitches = [row["pitch"] for row in rows if note_hz(low) - 1 <= row["hz"] < note_hz(high) - 1]
        found[f"pitch, {name}"] = float(np.mean(pitches)) if pitches else math.nan
    return found | {name: float(np.mean([row[name] for row in rows])) for name in ("duration", "instrument")}


def loudest_hz(samples: np.ndarray) -> float:
    """The highest peak of the spectrum over 100 Hz, between bins by a parabola through its logarithm."""
    size = 1 << 16
    power = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), size)) + 1e-9
    power[: round(100 * size / SAMPLE_RATE_HZ)] = 1e-9
    at = min(max(int(power.argmax()), 1), len(power) - 2)
    left, middle, right = np.log(power[at - 1 : at + 2])
    bend = left - 2 * middle + right
    return (at + (0.5 * (left - right) / bend if bend else 0.0)) * SAMPLE_RATE_HZ / size


class Classifier:
    """Softmax regression over a sound's mean frame, its spread and how it fades; learnt from training recordings that
    went through the codec, as what it is shown has."""

    def __init__(self, codec: SpectralCodec, learnt: Sequence[Recording], label: str) -> None:
        self.codec, self.names = codec, sorted({str(one.row[label]) for one in learnt})
        frames = [codec.encode_batch([one.samples])[0] for one in learnt]
        x = torch.stack([self.features(one) for one in frames])
        self.mean, self.scale = x.mean(0), x.std(0).clamp_min(1e-3)
        y = torch.tensor([self.names.index(str(one.row[label])) for one in learnt])
        torch.manual_seed(0)
        self.linear = nn.Linear(x.shape[1], len(self.names))
        optimiser = torch.optim.Adam(self.linear.parameters(), 1e-2, weight_decay=1e-2)
        for _ in range(400):
            optimiser.zero_grad()
            nn.functional.cross_entropy(self.linear((x - self.mean) / self.scale), y).backward()
            optimiser.step()

    def features(self, frames: np.ndarray) -> torch.Tensor:
        half = len(frames) // 2
        return torch.from_numpy(np.concatenate([frames.mean(0), frames.std(0),
                                                frames[half:].mean(0) - frames[:half].mean(0)]).astype(np.float32))

    @torch.no_grad()
    def __call__(self, samples: np.ndarray) -> str:
        x = self.features(self.codec.encode_batch([samples.astype(np.float32)])[0])
        return self.names[int(self.linear((x - self.mean) / self.scale).argmax())]


if __name__ == "__main__":
    main()
