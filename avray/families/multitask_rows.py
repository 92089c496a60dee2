"""What a row of multitask may hold, and what is wrong with one that cannot be used: a sentence each.

The original's rows are ``{task, instruction, input, output, embedding}``; a row may carry ``audio`` or ``video`` in
place of the numbers, a recording or a clip with a ``text`` is a row of its own task, and a bare ``text`` one of text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from avray.families.multitask_model import EMBEDDED, TASKS, WRITTEN
from avray.family import Fitted, Row

SEED_FIELDS = ("instruction", "input", "output", "embedding")


@dataclass(frozen=True)
class TaskRow:
    """``output`` of a written task, ``embedding`` ``[vectors, numbers]`` of the others; None where a file has it.
    ``output`` of an embedded task is a label for people, and is not here."""

    task: str
    prompt: str
    output: str = ""
    embedding: np.ndarray | None = None


def read_row(row: Row, widths: Mapping[str, int], is_sequence: bool) -> TaskRow:
    """ValueError with the reason for a row that cannot be used. ``widths`` are the numbers of each task's embedding."""
    task = task_of(row)
    prompt = prompt_of(row)
    if task in WRITTEN:
        output = str(row.get("output") or "") or ("" if _is_seeds(row) else str(row.get("text") or ""))
        if not output.strip():
            raise ValueError(f"the output is empty, and {task} is learnt from it")
        return TaskRow(task, prompt if _is_seeds(row) else "", output)
    if row.get("embedding") is None:
        if not row.get(task):
            raise ValueError(f"there is neither an embedding nor {'an' if task == 'audio' else 'a'} {task} file, and "
                             f"{task} is learnt from one")
        return TaskRow(task, prompt)
    return TaskRow(task, prompt, embedding=read_embedding(row["embedding"], task, widths[task], is_sequence))


def task_of(row: Row) -> str:
    """The row's task; where it names none, that of its file, or text for a bare text."""
    task = row.get("task")
    if task is None and not _is_seeds(row):
        return next((name for name in EMBEDDED if row.get(name)), "text")
    if task is None:
        raise ValueError(f"the task is missing; it is one of {', '.join(TASKS)}")
    if task not in TASKS:
        raise ValueError(f"task {task!r} is not known; it is one of {', '.join(TASKS)}")
    return task


def _is_seeds(row: Row) -> bool:
    return any(row.get(name) is not None for name in SEED_FIELDS)


def prompt_of(row: Mapping[str, Any]) -> str:
    """Instruction and input, or the text that describes a file."""
    parts = [str(row[name]) for name in ("instruction", "input") if row.get(name)]
    return " ".join(parts) or str(row.get("text") or "")


def read_embedding(value: Any, task: str, width: int, is_sequence: bool) -> np.ndarray:
    """``[vectors, width]`` float32. ValueError with the reason."""
    nested = isinstance(value, list) and bool(value) and isinstance(value[0], list)
    vectors: Sequence[Any] = value if nested else [value]
    if nested and not is_sequence and len(vectors) > 1:
        raise ValueError(f"the embedding is a sequence of {len(vectors)} vectors, and this model learns single ones: "
                         "set family.vector_s")
    for vector in vectors:
        if not isinstance(vector, list) or any(isinstance(x, bool) or not isinstance(x, int | float) for x in vector):
            raise ValueError("the embedding must be a list of numbers")
        if len(vector) != width:
            raise ValueError(f"the embedding has {len(vector)} numbers, and {task} has {width}")
        if not all(map(math.isfinite, vector)):
            raise ValueError("the embedding holds numbers that are not finite")
    return np.array(vectors, np.float32)


def pooled(frames: np.ndarray, frames_each: int | None) -> np.ndarray:
    """Frames ``[time, width]`` -> vectors ``[n, width]``, each the mean of ``frames_each`` (None: of all); a rest under
    half of that is left out."""
    frames = frames.astype(np.float32)
    if frames_each is None:
        return frames.mean(0, keepdims=True)
    number = max(1, int(len(frames) / frames_each + 0.5))
    return np.stack([frames[i * frames_each : (i + 1) * frames_each].mean(0) for i in range(number)])


def limits(name: str, vectors: np.ndarray) -> dict[str, np.ndarray]:
    """Least and greatest of each number, widened where it hardly moves: it may elsewhere."""
    low, high = vectors.min(0).astype(np.float64), vectors.max(0).astype(np.float64)
    half = (high - low) / 2
    centre, half = low + half, np.maximum(half, max(0.01 * half.max(), 1e-6))
    return {f"{name}.low": (centre - half).astype(np.float32), f"{name}.high": (centre + half).astype(np.float32)}


def scaled(vectors: np.ndarray, name: str, fitted: Fitted) -> np.ndarray:
    """To [-1, 1], as ``MultitaskModel.scale`` does."""
    low, high = fitted.arrays[f"{name}.low"], fitted.arrays[f"{name}.high"]
    return ((vectors - low) / (high - low) * 2 - 1).astype(np.float32)
