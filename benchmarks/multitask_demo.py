"""What multitask makes of held-out prompts of the demo set: tones by their pitch, shapes by where they go.

    python pipelines/train.py experiment=multitask_demo run.dir=runs/tasks
    python -m benchmarks.multitask_demo runs/tasks

Prompts are combinations that training did not have. Pitches are measured on the generated sound, and on what the codec
makes of the very numbers that were held out (its round trip); directions on the MP4, decoded again. Level and distance
are those of the generated sound from that round trip: what the head loses, the codec's part left out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from avray.codecs.spectral import Spectral
from avray.data.demo_sound import note_hz
from avray.data.demo_tasks import audio_prompts, task_rows, video_prompts
from avray.engine import Generator
from avray.media import Audio, read_video, write_video
from avray.metrics.level import level_error_db
from avray.metrics.pitch import f0_hz
from avray.metrics.spectral import log_mel_distance

SECONDS, WITHIN_CENTS = 0.6, 50.0


def held_out(task: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each prompt was made of, and its row."""
    made = list(audio_prompts() if task == "audio" else video_prompts())
    rows = [row for row in task_rows() if row["task"] == task]
    return [(parts, row) for parts, row in zip(made, rows, strict=True) if row["split"] == "validation"]


def cents(sound: np.ndarray, rate_hz: int, midi: int) -> float:
    """The median pitch's distance from the note's; nan where none is heard."""
    track = f0_hz(sound, rate_hz, lowest_hz=150.0, highest_hz=1500.0)
    return float(1200 * abs(np.log2(np.nanmedian(track) / note_hz(midi)))) if np.isfinite(track).any() else float("nan")


def round_trip(embedding: list[float]) -> np.ndarray:
    decoder = Spectral().load("cpu").decoder()
    frames = np.repeat(np.array([embedding], np.float32), round(75 * SECONDS), 0)
    return np.concatenate([decoder.push(frames), decoder.finish()])


def direction(path: Path) -> str:
    """Where the brightest difference from the background goes, from the first frames to the last."""
    frames = read_video(str(path)).frames.astype(float)
    away = np.abs(frames - np.median(frames, (0, 1, 2))).sum(-1)
    away[away < 0.25 * away.max()] = 0
    place = np.arange(frames.shape[1])
    x, y = ((away.sum(axis) * place).sum(-1) / away.sum((1, 2)) for axis in (1, 2))
    across, down = x[-4:].mean() - x[:4].mean(), y[-4:].mean() - y[:4].mean()
    return ("right" if across > 0 else "left") if abs(across) > abs(down) else ("down" if down > 0 else "up")


def judge_sounds(generator: Generator, temperature: float | None = None) -> dict[str, float]:
    found: dict[str, list[float]] = {"pitch": [], "round_trip_pitch": [], "level_db": [], "log_mel_distance_db": []}
    for (_, _, midi), row in held_out("audio"):
        prompt = f"{row['instruction']} {row['input']}"
        sound = generator.generate(prompt, task="audio", seconds=SECONDS, temperature=temperature,
                                   seed=len(found["pitch"])).media
        assert isinstance(sound, Audio)
        ours, theirs = sound.samples[0], round_trip(row["embedding"])
        found["pitch"].append(cents(ours, sound.sample_rate_hz, midi) <= WITHIN_CENTS)
        found["round_trip_pitch"].append(cents(theirs, sound.sample_rate_hz, midi) <= WITHIN_CENTS)
        found["level_db"].append(level_error_db(ours, theirs))
        found["log_mel_distance_db"].append(log_mel_distance(ours, theirs, sound.sample_rate_hz))
    return {name: float(np.mean(values)) for name, values in found.items()}


def judge_clips(generator: Generator, temperature: float | None = None) -> dict[str, float]:
    right = []
    with tempfile.TemporaryDirectory() as folder:
        for parts, row in held_out("video"):
            path = Path(folder) / "clip.mp4"
            prompt = f"{row['instruction']} {row['input']}"
            made = generator.generate(prompt, task="video", temperature=temperature, seed=len(right)).media
            write_video(path, made)  # type: ignore[arg-type]
            right.append(direction(path) == parts[3])
    return {"direction": float(np.mean(right))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    generator = Generator.open(parser.parse_args().checkpoint)
    print(json.dumps(judge_sounds(generator) | judge_clips(generator), indent=2))


if __name__ == "__main__":
    main()
