"""Rows of the five-task model whose prompts are combinations of few words, a fifth of them held out: what is asked
for in validation was never asked for in training, but every word of it was. Wholly synthetic.

Sounds are steady tones, two octaves of pitches by four instruments at two levels; clips are shapes that move through
the middle. Both come as the numbers of their default embedding (mean log-mel frame, DCT), made when first asked for.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avray.codecs.clip_dct import SIZE, encode_clip
from avray.codecs.spectral import Spectral
from avray.data import demo_sound as sound
from avray.data.demo_jsonl import IMAGE_COLOURS, IMAGES, OPERATIONS, WORDS, write_jsonl
from avray.data.demo_video import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, Clip, draw_clip

VERSION = 1
HELD_OUT = 5
PITCHES = range(60, 85)
"""C4 to C6, in MIDI's numbers."""
INSTRUMENTS = ("pure tone", "flute", "organ", "clarinet")
LEVELS = {"soft": 0.1, "loud": 0.4}
SIZES = {"small": 7.0, "large": 11.0}
LENGTH_S = 0.6


def tone(level: str, instrument: str, midi: int) -> np.ndarray:
    """float32 samples of the steady part of a note, at 24 kHz."""
    hz, num = sound.note_hz(midi), sound.num_samples(LENGTH_S)
    harmonics = (1.0,) if instrument == "pure tone" else sound.VOICES[instrument].harmonics
    samples = sound.harmonic_sum(sound.phasor(hz, num), harmonics, hz)
    return (LEVELS[level] * samples / np.abs(samples).max()).astype(np.float32)


def clip(size: str, colour: str, shape: str, direction: str, background: str) -> Clip:
    margin, middle = SIZES[size] + 2, SIZE / 2
    first, last = (SIZE - margin, margin) if direction in ("left", "up") else (margin, SIZE - margin)
    horizontal = direction in ("left", "right")
    start, stop = [(along, middle) if horizontal else (middle, along) for along in (first, last)]
    return Clip(shape, colour, direction, background, SIZES[size], start, stop)


def audio_prompts() -> Iterator[tuple[str, str, int]]:
    yield from itertools.product(LEVELS, INSTRUMENTS, PITCHES)


def video_prompts() -> Iterator[tuple[str, str, str, str, str]]:
    yield from itertools.product(SIZES, COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS)


def audio_rows() -> list[dict[str, Any]]:
    codec = Spectral().load("cpu")
    prompts = list(audio_prompts())
    frames = codec.encode_batch([tone(*prompt) for prompt in prompts])
    return [_row("audio", "Play", f"{level} {instrument} {sound.note_name(midi)}", embedding=latents[5:-5].mean(0))
            for (level, instrument, midi), latents in zip(prompts, frames, strict=True)]


def video_rows() -> list[dict[str, Any]]:
    return [_row("video", "Show", f"{size} {colour} {shape} going {direction}, {background}",
                 embedding=encode_clip(draw_clip(clip(size, colour, shape, direction, background))))
            for size, colour, shape, direction, background in video_prompts()]


def written_rows() -> dict[str, list[dict[str, Any]]]:
    ways = {"Say twice:": lambda word: f"{word} {word}", "In capitals:": str.upper, "Many:": lambda word: word + "s",
            "First letter:": lambda word: word[0], "Count the letters:": lambda word: str(len(word))}
    return {"text": [_row("text", way, word, made(word)) for way, made in ways.items() for word in WORDS],
            "code": [_row("code", "Write Python:", words.format(number), f"f = lambda x: {code.format(number)}")
                     for words, code in OPERATIONS.items() for number in range(2, 42)],
            "image": [_row("image", "Draw:", f"{size} {colour} {shape}", svg.format(size, colour))
                      for colour in IMAGE_COLOURS for shape, svg in IMAGES.items() for size in range(2, 10)]}


def _row(task: str, instruction: str, input: str, output: str = "",
         embedding: Sequence[float] | np.ndarray | None = None) -> dict[str, Any]:
    numbers = None if embedding is None else [round(float(number), 4) for number in embedding]
    return {"task": task, "instruction": instruction, "input": input, "output": output or input, "embedding": numbers}


def task_rows() -> list[dict[str, Any]]:
    """All rows, the tasks in turn, each with its ``split``. What is held out is spread by a fixed permutation."""
    tasks = {**written_rows(), "audio": audio_rows(), "video": video_rows()}
    for index, rows in enumerate(tasks.values()):
        held = np.random.default_rng([VERSION, index]).permutation(len(rows))[: len(rows) // HELD_OUT]
        for at, row in enumerate(rows):
            row["split"] = "validation" if at in set(held.tolist()) else "train"
    return [row for turn in itertools.zip_longest(*tasks.values()) for row in turn if row is not None]


def ensure_tasks(folder: Path) -> Path:
    """The set's JSONL below ``folder``, made where it is not there; two that make it at once write the same."""
    target = folder / f"tasks-{VERSION}" / "tasks.jsonl"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=target.parent)
        os.close(handle)
        write_jsonl(Path(scratch), task_rows())
        os.replace(scratch, target)
    return target
