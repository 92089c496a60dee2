"""The tasks of ``instruct``: what each is given, what it must have, and how notes become frames.

A condition is either aligned in time with the sound (``notes``, ``sound``, ``video``, ``spoken``) or not (``text``). A
task may take several, and where it asks for any of them, any may be absent.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

Condition = Literal["text", "spoken", "notes", "sound", "video"]
NUM_PITCHES = 128
ROLL_WIDTH = NUM_PITCHES + 1
"""MIDI pitches, and where a note begins."""
_STEPS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
_DRUMS = {"kick": 36, "snare": 38, "hi-hat": 42}


@dataclass(frozen=True)
class Task:
    """``needs`` must all be there, and one of ``any_of`` where it names some."""

    instruction: str
    needs: tuple[Condition, ...] = ()
    any_of: tuple[Condition, ...] = ()
    recipe: str = ""
    """How the given sound is made of the wanted one, where a row brings no ``target_audio`` of its own."""

    @property
    def takes(self) -> tuple[Condition, ...]:
        return (*self.needs, *self.any_of)


TASKS = {
    "text_to_audio": Task("Make the sound that is described.", needs=("text",)),
    "text_to_music": Task("Make the music that is described, with these notes.", any_of=("text", "notes")),
    "speech": Task("Say this text.", needs=("spoken",)),
    "singing": Task("Sing these notes.", needs=("notes",)),
    "enhancement": Task("Remove the noise.", needs=("sound",), recipe="noise"),
    "super_resolution": Task("Restore the high frequencies.", needs=("sound",), recipe="lowpass"),
    "video_to_audio": Task("Make the sound of these pictures.", needs=("video",)),
}


def conditions_of(task: str, fields: Mapping[str, Any]) -> dict[Condition, Any]:
    """What of a row or request its task takes. ValueError for what it lacks."""
    wanted = TASKS[task]
    text = str(fields.get("text") or "").strip()
    given: dict[Condition, Any] = {"text": text, "spoken": text, "notes": fields.get("notes") or None,
                                   "sound": fields.get("audio"), "video": fields.get("video")}
    for name in wanted.needs:
        if not given[name]:
            raise ValueError(f"{_SAID[name]} is missing: task {task} needs it.")
    if wanted.any_of and not any(given[name] for name in wanted.any_of):
        raise ValueError(f"{' and '.join(_SAID[name] for name in wanted.any_of)} are missing: task {task} needs one "
                         "of them.")
    return {name: given[name] for name in wanted.takes if given[name]}


_SAID = {"text": "text", "spoken": "text", "notes": "notes", "sound": "audio", "video": "video"}


def parse_pitch(value: Any) -> float:
    """A MIDI number from one, from a name ("C#4", "Bb3") or from one of three drums. ValueError for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < NUM_PITCHES:
        return float(value)
    if isinstance(value, str):
        if value in _DRUMS:
            return float(_DRUMS[value])
        if match := re.fullmatch(r"([A-G])([#b]?)(-?\d)", value):
            step, sign, octave = match.groups()
            midi = _STEPS[step] + {"#": 1, "b": -1, "": 0}[sign] + 12 * (int(octave) + 1)
            if 0 <= midi < NUM_PITCHES:
                return float(midi)
    raise ValueError(f"pitch {value!r} is no note: give a name such as C#4, or a MIDI number from 0 to 127")


@dataclass(frozen=True)
class Note:
    """``to_midi`` is where a glide ends."""

    midi: float
    start_s: float
    duration_s: float
    to_midi: float


def parse_notes(notes: Any, owner: str, clip_s: float | None = None) -> list[Note]:
    """``[{pitch or hz, start_s, duration_s, to_pitch}, …]``. ValueError, naming the owner and the note, for what is no
    note or begins beyond the clip; one that outlasts it is cut by it."""
    if not isinstance(notes, Sequence) or isinstance(notes, str):
        raise ValueError(f"{owner}: notes must be a list of notes.")
    parsed = []
    for index, note in enumerate(notes):
        try:
            if not isinstance(note, Mapping):
                raise ValueError("is no mapping of pitch, start_s and duration_s")
            start, duration = (_seconds(note, name) for name in ("start_s", "duration_s"))
            if clip_s is not None and start >= clip_s:
                raise ValueError(f"begins at {start:g} s, beyond the clip of {clip_s:g} s")
            midi = parse_pitch(note["pitch"]) if "pitch" in note else _midi_of(note.get("hz"))
            parsed.append(Note(midi, start, duration, parse_pitch(note.get("to_pitch", midi))))
        except ValueError as error:
            raise ValueError(f"{owner}: notes[{index}] {error}.") from None
    return parsed


def _seconds(note: Mapping[str, Any], name: str) -> float:
    value = note.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (name == "duration_s" and value == 0):  # type: ignore[operator]
        raise ValueError(f"has {name} = {value!r}, which is no length of time")
    return float(value)  # type: ignore[arg-type]


def _midi_of(hz: Any) -> float:
    if isinstance(hz, int | float) and not isinstance(hz, bool) and 8.2 < hz < 13_000:
        return 69 + 12 * math.log2(hz / 440)
    raise ValueError(f"has neither a pitch nor a frequency (hz = {hz!r})")


def piano_roll(notes: Sequence[Note], num_frames: int, frame_rate_hz: float) -> Float[np.ndarray, "time pitches"]:
    """1 where a pitch sounds, shared between two where it lies between them; the last column marks beginnings."""
    roll = np.zeros((num_frames, ROLL_WIDTH), np.float32)
    for note in notes:
        first = round(note.start_s * frame_rate_hz)
        last = min(max(first + 1, round((note.start_s + note.duration_s) * frame_rate_hz)), num_frames)
        frames = np.arange(first, last)
        if not len(frames):
            continue
        pitch = note.midi + (note.to_midi - note.midi) * (frames - first) / max(1, note.duration_s * frame_rate_hz)
        below = np.minimum(pitch.astype(int), NUM_PITCHES - 2)
        roll[frames, below] = np.maximum(roll[frames, below], 1 - (pitch - below))
        roll[frames, below + 1] = np.maximum(roll[frames, below + 1], pitch - below)
        roll[first, NUM_PITCHES] = 1
    return roll


def end_of(notes: Sequence[Note]) -> float:
    """Seconds to the last note's end."""
    return max((note.start_s + note.duration_s for note in notes), default=0.0)
