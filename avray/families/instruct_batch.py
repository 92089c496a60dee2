"""Rows of ``instruct`` as named tensors: what is wanted, and each condition as its task takes it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from avray.encoders.tokens import Bytes
from avray.families.instruct_tasks import ROLL_WIDTH, TASKS, Condition, end_of, parse_notes, piano_roll
from avray.family import Batch, Fitted, Row

OUTPUT, SOUND, VIDEO, LATENTS, STATES, FRAMES = "output", "sound", "video", "latents", "states", "frames"


@dataclass(frozen=True)
class Layout:
    """What of a row goes into a batch: the conditions that the model's tasks take, the longest sound and text, whether
    the instruction is heard, and whether a frozen encoder reads the texts."""

    conditions: tuple[Condition, ...]
    segment_s: float
    max_text: int
    has_instruction: bool
    has_encoder: bool


def collate(rows: Sequence[Row], fitted: Fitted, layout: Layout) -> Batch:
    """``output`` ``[batch, time, width]`` with ``lengths`` ``[batch]`` of it and ``weight`` ``[batch]``; each
    condition as the tasks take them: ids of ``text``, ``spoken`` and ``instruction`` with ``…_valid``, frames of
    ``notes``, ``sound`` and ``video`` with ``…_there``. A request has no output; its length is that of its notes, its
    sound or its pictures, or 0."""
    rate, width = fitted.data["frame_rate_hz"], fitted.data["width"]
    outputs = [row.get(f"{OUTPUT}.{LATENTS}") if row["weight"] else None for row in rows]
    given = [_given(row) if row["weight"] else {} for row in rows]
    lengths = [len(output) if output is not None else _length(conditions, fitted, layout.segment_s)
               for output, conditions in zip(outputs, given, strict=True)]
    time = max([1, *lengths])
    padded = np.zeros((len(rows), time, width), np.float32)
    for index, output in enumerate(outputs):
        if output is not None:
            padded[index, : len(output)] = output
    weight = np.array([row["weight"] if output is not None else 0.0
                       for row, output in zip(rows, outputs, strict=True)], np.float32)
    tensors = {"output": padded, "lengths": np.array(lengths), "weight": weight,
               "log_seconds": np.log(np.maximum(lengths, 1) / rate).astype(np.float32),
               "seed": np.array([zlib.crc32(str(row.get("id", "")).encode()) for row in rows]),
               "told": weight * np.array(["text" in conditions or "spoken" in conditions for conditions in given])}
    for name in ("text", "spoken"):
        if name in layout.conditions:
            told = [str(conditions.get(name, "")) for conditions in given]
            tensors |= _texts(name, told, layout) if name == "spoken" else _told(name, told, rows, fitted, layout)
    if layout.has_instruction:
        told = [str(row.get("instruction") or "") if row["weight"] else "" for row in rows]
        tensors |= _told("instruction", told, rows, fitted, layout)
    for name, size in (("notes", ROLL_WIDTH), ("sound", width), ("video", fitted.data.get("video_width", 0))):
        if name in layout.conditions:
            frames = np.zeros((len(rows), time, size), np.float32)
            for index, conditions in enumerate(given):
                if name in conditions:
                    found = _frames(name, conditions[name], lengths[index], fitted)[:time]
                    frames[index, : len(found)] = found
            tensors |= {name: frames, f"{name}_there": np.array([name in conditions for conditions in given])}
    counts = {"flow": float(np.dot(weight, lengths)) * width, "duration": float(tensors["told"].sum())}
    return Batch({name: torch.from_numpy(array) for name, array in tensors.items()}, counts,
                 [str(row.get("id", "")) for row in rows])


def _frames(name: str, given: Any, length: int, fitted: Fitted) -> np.ndarray:
    """``[time, size]`` at the rate of the latents; a picture lasts until the next."""
    if name == "sound":
        return given
    rate = fitted.data["frame_rate_hz"]
    if name == "notes":
        return piano_roll(given, length, rate)
    shown = ((np.arange(length) + 0.5) / rate * fitted.data["video_rate_hz"]).astype(int)
    return given[np.minimum(shown, len(given) - 1)]


def _length(conditions: Mapping[str, Any], fitted: Fitted, most_s: float) -> int:
    frame_rate_hz = fitted.data["frame_rate_hz"]
    if "sound" in conditions:
        return len(conditions["sound"])
    if "video" in conditions:
        return max(1, round(len(conditions["video"]) / fitted.data["video_rate_hz"] * frame_rate_hz))
    if "notes" in conditions:
        return max(1, round(min(end_of(conditions["notes"]), most_s) * frame_rate_hz))
    return 0


def _told(name: str, texts: Sequence[str], rows: Sequence[Row], fitted: Fitted,
          layout: Layout) -> dict[str, np.ndarray]:
    """Ids, or what the frozen encoder made of the texts."""
    if not layout.has_encoder:
        return _texts(name, texts, layout)
    states = [row.get(f"{name}.{STATES}") if text else None for row, text in zip(rows, texts, strict=True)]
    longest = max([1, *(len(one) for one in states if one is not None)])
    padded = np.zeros((len(rows), longest, fitted.data["text_width"]), np.float32)
    valid = np.zeros((len(rows), longest), bool)
    for index, one in enumerate(states):
        if one is not None:
            padded[index, : len(one)], valid[index, : len(one)] = one, True
    return {name: padded, f"{name}_valid": valid}


def byte_ids(text: str, whose: str, most: int) -> list[int]:
    """ValueError for a text that is too long."""
    ids = Bytes().encode(text)
    if len(ids) > most:
        raise ValueError(f"{whose} has {len(ids)} bytes, over family.max_text = {most}: shorten it, or "
                         "train with more")
    return ids


def _texts(name: str, texts: Sequence[str], layout: Layout) -> dict[str, np.ndarray]:
    """Ids from 1; 0 is nothing."""
    ids = [byte_ids(text, name, layout.max_text) for text in texts]
    padded = np.zeros((len(ids), max(1, *map(len, ids), 1)), np.int64)
    for index, one in enumerate(ids):
        padded[index, : len(one)] = np.array(one, np.int64) + 1
    return {name: padded, f"{name}_valid": padded > 0}


def _given(row: Row) -> dict[str, Any]:
    """A row's conditions as its task takes them, notes parsed and sounds as latents."""
    task = TASKS[row["task"]]
    text = str(row.get("text") or "")
    found: dict[str, Any] = {"text": text, "spoken": text, "sound": row.get(f"{SOUND}.{LATENTS}"),
                             "video": row.get(f"{VIDEO}.{FRAMES}")}
    if row.get("notes") and "notes" in task.takes:
        found["notes"] = parse_notes(row["notes"], str(row.get("id", "The request")))
    return {name: found[name] for name in task.takes
            if name in found and found[name] is not None and (name in ("sound", "video") or found[name])}
