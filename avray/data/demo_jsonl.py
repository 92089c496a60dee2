"""Rows of the five-task model, text, code, image, audio and video: ``{task, instruction, input, output, embedding}``.

Instruction, input and output together stay under 64 characters where the model reads all three, its smallest context.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

WORDS = ("lamp", "river", "stone", "cloud", "garden", "window", "paper", "bridge", "candle", "forest",
         "silver", "button", "market", "island", "pencil", "rocket", "summer", "violin", "anchor", "planet")
OPERATIONS = {"add {} to x": "x + {}", "subtract {} from x": "x - {}", "multiply x by {}": "x * {}"}
IMAGES = {"circle": '<circle r="{}" fill="{}"/>', "square": '<rect width="{0}" height="{0}" fill="{1}"/>'}
IMAGE_COLOURS = ("red", "green", "blue", "orange", "purple")


@dataclass(frozen=True)
class Embedded:
    """A sound or a clip of the set: its file below the set's folder, its name in few words, its caption and the
    numbers that stand for it."""

    file: str
    label: str
    caption: str
    embedding: np.ndarray


def _row(task: str, instruction: str, input: str, output: str, embedding: Sequence[float] | None = None) -> dict:
    return {"task": task, "instruction": instruction, "input": input, "output": output, "embedding": embedding}


def _media_row(task: str, item: Embedded, by_file: bool = False) -> dict:
    """``output`` is a label for people. ``by_file`` names the file in place of its numbers."""
    instruction = {"audio": "Play:", "video": "Show:"}[task]
    numbers = None if by_file else [round(float(number), 4) for number in item.embedding]
    row = _row(task, instruction, item.label, item.caption, numbers)
    return {**row, task: item.file} if by_file else row


def text_rows() -> list[dict]:
    return ([_row("text", "Spell backwards:", word, word[::-1]) for word in WORDS]
            + [_row("text", "Count the letters:", word, str(len(word))) for word in WORDS])


def code_rows() -> list[dict]:
    return [_row("code", "Write Python:", words.format(number), f"f = lambda x: {code.format(number)}")
            for number in range(2, 15) for words, code in OPERATIONS.items()]


def image_rows() -> list[dict]:
    return [_row("image", "Draw:", f"{colour} {shape}", svg.format(size, colour))
            for size in (4, 6, 8, 9) for colour in IMAGE_COLOURS for shape, svg in IMAGES.items()]


def write_tasks(folder: Path, sounds: Sequence[Embedded], clips: Sequence[Embedded]) -> None:
    """``sample_audio.jsonl`` and ``sample_video.jsonl`` with numbers in every row, ``mixed_multimodal_av.jsonl`` with
    all five tasks in turn and, in every second of its audio and video rows, the file instead of the numbers."""
    write_jsonl(folder / "sample_audio.jsonl", (_media_row("audio", item) for item in sounds))
    write_jsonl(folder / "sample_video.jsonl", (_media_row("video", item) for item in clips))
    mixed = [text_rows(), code_rows(), image_rows(),
             [_media_row("audio", item, bool(index % 2)) for index, item in enumerate(sounds)],
             [_media_row("video", item, bool(index % 2)) for index, item in enumerate(clips)]]
    dealt = (row for turn in zip_longest(*mixed) for row in turn if row is not None)
    write_jsonl(folder / "mixed_multimodal_av.jsonl", dealt)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """UTF-8, one object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
