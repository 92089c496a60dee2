"""Does a model trained with notes and descriptions obey both, and each alone: melodies of the demo set, held out.

    python -m benchmarks.instruct_notes runs/music [--melodies 40] [--json FILE]

The pitch is right where the fundamental (YIN) lies within 50 cents of the note, over the frames in the middle of notes;
the instrument is what a softmax regression hears that learnt it from the training recordings. With the notes goes the
caption without the notes' names, so that each tells what the other does not.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from avray.codecs.base import decode_all
from avray.codecs.spectral import Spectral
from avray.data.demo import Recording
from avray.data.demo_sound import SAMPLE_RATE_HZ, with_article
from avray.engine import Generator
from avray.family import Request
from avray.metrics.pitch import f0_hz
from benchmarks.instruct_prompts import Classifier, singles

LEARNT_FROM = 300
HOP_S = 0.01
EDGE = 0.25
"""Of a note, at either end, that is not judged."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("--melodies", type=int, default=40)
    parser.add_argument("--json")
    given = parser.parse_args()
    codec = Spectral().load("cpu")
    model = Generator.open(given.checkpoint, slots=4)
    classify = Classifier(codec, list(islice(singles("train", ("melody",)), LEARNT_FROM)), "instrument")
    melodies = list(islice(singles("validation", ("melody",)), given.melodies))
    asked: dict[str, list[dict[str, Any]]] = {
        "notes and description": [{"text": described(one), "notes": one.row["notes"]} for one in melodies],
        "notes alone": [{"notes": one.row["notes"]} for one in melodies],
        "description alone": [{"text": described(one)} for one in melodies],
        "the whole caption, with the notes' names": [{"text": one.row["text"]} for one in melodies]}
    sounds = {"the recording, through the codec": [decode_all(codec, codec.encode_batch([one.samples])[0])
                                                   for one in melodies]}
    for name, rows in asked.items():
        made = model.generate_many([
            Request(text=row.get("text"), fields={"notes": row["notes"]} if "notes" in row else {}, seed=seed)
            for seed, row in enumerate(rows)])
        sounds[name] = [one.audio.samples[0] for one in made]
    figures = {name: judged(some, melodies, classify) for name, some in sounds.items()}
    print(f"| {len(melodies)} held-out melodies | pitch within 50 cents | median | instrument |\n|---|---|---|---|")
    for name, row in figures.items():
        print(f"| {name} | {100 * row['pitch']:.0f} % | {row['cents']:.0f} cents | {100 * row['instrument']:.0f} % |")
    if given.json:
        Path(given.json).write_text(json.dumps(figures))


def described(one: Recording) -> str:
    return (f"A melody on {with_article(str(one.row['instrument']))} in {one.row['musical_key']} at "
            f"{one.row['tempo_bpm']} bpm, {float(one.row['length_s']):.2f} seconds long.")  # type: ignore[arg-type]


def judged(sounds: list[np.ndarray], melodies: list[Recording], classify: Classifier) -> dict[str, float]:
    cents = np.concatenate([off(samples, one) for samples, one in zip(sounds, melodies, strict=True)])
    right = [classify(samples) == one.row["instrument"] for samples, one in zip(sounds, melodies, strict=True)]
    return {"pitch": float((cents <= 50).mean()), "cents": float(np.median(cents)), "instrument": float(np.mean(right))}


def off(samples: np.ndarray, one: Recording) -> np.ndarray:
    """Cents between each judged frame and its note; a frame without a pitch is an octave off."""
    track, found = f0_hz(samples, SAMPLE_RATE_HZ, hop_s=HOP_S), []
    for note in one.row["notes"]:  # type: ignore[attr-defined]
        start, length = note["start_s"], note["duration_s"]
        frames = track[round((start + EDGE * length) / HOP_S) : round((start + (1 - EDGE) * length) / HOP_S)]
        missing = max(1, round((1 - 2 * EDGE) * length / HOP_S)) - len(frames)
        found += [1200 * abs(math.log2(hz / note["hz"])) if np.isfinite(hz) else 1200.0 for hz in frames]
        found += [1200.0] * max(0, missing)
    return np.array(found)


if __name__ == "__main__":
    main()
