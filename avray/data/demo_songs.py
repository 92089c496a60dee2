"""Songs whose next seconds follow from the last ones, and are not a copy of them.

A steady loop would make "repeat the input" unbeatable, and random notes would make every model a mean. So each form
moves by a rule that two seconds are enough to see (scales, broken chords, progressions, glides, ringing chords), and
each phrase grows and fades. That last matters most: on 15 songs the 859,520-parameter model's margin over the best
baseline went from 13 % to 27 % with it. Bars are no multiple of a segment, so a segment begins anywhere in one. Songs
take turns through the forms; key, tempo, pattern and length are drawn, so a held-out song is a new mixture of known
things.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from avray.data import demo_sound as sound

SHORTEST_S, LONGEST_S = 8.0, 30.0
"""Most are near the shortest, 12 s on average: many songs matter more to a small set than long ones."""
RING_S = 8.0
TEMPI_BPM = (66, 80, 96, 112)
PROGRESSIONS = ((0, 3, 4, 0), (0, 4, 5, 3), (0, 5, 3, 4))
"""Scale degrees of the chords: I IV V I, I V vi IV, I vi IV V."""
PHRASE_DB = 40.0
"""How far a phrase grows and fades."""


@dataclass(frozen=True)
class Note:
    """``to_midi`` is where a glide ends."""

    midi: int
    start_s: float
    duration_s: float
    to_midi: int | None = None

    def row(self) -> dict[str, object]:
        row: dict[str, object] = {"pitch": sound.note_name(self.midi), "hz": round(sound.note_hz(self.midi), 2),
                                  "start_s": round(self.start_s, 4), "duration_s": round(self.duration_s, 4)}
        if self.to_midi is not None:
            row["to_pitch"] = sound.note_name(self.to_midi)
        return row


@dataclass(frozen=True)
class Key:
    """A scale from its tonic up."""

    tonic: int
    mode: str

    def degree(self, step: int) -> int:
        """Midi number of a scale step: 0 is the tonic, 7 the one above."""
        return self.tonic + 12 * (step // 7) + sound.SCALES[self.mode][step % 7]

    def __str__(self) -> str:
        return f"{sound.note_name(self.tonic)[:-1]} {self.mode}"


KEYS = (Key(48, "major"), Key(55, "major"), Key(45, "minor"), Key(52, "minor"))
"""C, G, A minor and E minor: two octaves of nearly the same notes, so that few songs suffice to learn them."""


@dataclass(frozen=True)
class Sheet:
    """What a form composes on."""

    rng: np.random.Generator
    key: Key
    beat_s: float
    length_s: float

    def times(self, beats: float) -> np.ndarray:
        """Starts of the notes that follow each other every ``beats``."""
        return np.arange(0.0, self.length_s - 0.05, beats * self.beat_s)

    def walk(self, steps: tuple[int, ...], first: int) -> tuple[Note, ...]:
        """A note a beat, round and round through ``steps`` of the scale."""
        return tuple(Note(self.key.degree(steps[(first + index) % len(steps)]), start, self.beat_s)
                     for index, start in enumerate(self.times(1.0)))


@dataclass(frozen=True)
class Part:
    """What a form wrote. ``title`` opens the caption."""

    title: str
    notes: tuple[Note, ...]
    phrase_beats: int = 8


def scale(sheet: Sheet) -> Part:
    """Up and down two octaves."""
    down = bool(sheet.rng.integers(2))
    notes = sheet.walk((*range(14), *range(14, 0, -1)), 14 if down else 0)
    return Part("A falling and rising scale" if down else "A rising and falling scale", notes)


def arpeggio(sheet: Sheet) -> Part:
    """Up and down the tonic chord over two octaves."""
    down = bool(sheet.rng.integers(2))
    notes = sheet.walk((0, 2, 4, 7, 9, 11, 14, 11, 9, 7, 4, 2), 6 if down else 0)
    return Part("A falling and rising broken chord" if down else "A rising and falling broken chord", notes)


def chords(sheet: Sheet) -> Part:
    """A progression, a chord every four beats."""
    progression = PROGRESSIONS[sheet.rng.integers(len(PROGRESSIONS))]
    notes = [Note(sheet.key.degree(progression[index % len(progression)] + step), start, 4 * sheet.beat_s)
             for index, start in enumerate(sheet.times(4.0)) for step in (0, 2, 4)]
    return Part("A chord progression", tuple(notes))


def slide(sheet: Sheet) -> Part:
    """One tone that glides over an octave in eight beats, and back."""
    low = sheet.key.tonic
    ends = (low, low + 12) if sheet.rng.integers(2) else (low + 12, low)
    notes = [Note(ends[index % 2], start, 8 * sheet.beat_s, ends[(index + 1) % 2])
             for index, start in enumerate(sheet.times(8.0))]
    return Part("A slow glide over an octave and back", tuple(notes))


def swell(sheet: Sheet) -> Part:
    """The tonic chord held through each phrase."""
    notes = [Note(sheet.key.degree(step), start, 8 * sheet.beat_s)
             for start in sheet.times(8.0) for step in (0, 2, 4)]
    return Part("A held chord", tuple(notes))


def toll(sheet: Sheet) -> Part:
    """A wide chord struck every four beats and left to ring."""
    notes = [Note(sheet.key.degree(step), start, 4 * sheet.beat_s)
             for start in sheet.times(4.0) for step in (0, 4, 9)]
    return Part("A ringing chord", tuple(notes), phrase_beats=12)


FORMS: dict[str, Callable[[Sheet], Part]] = {
    "chords": chords, "scale": scale, "toll": toll, "slide": slide, "arpeggio": arpeggio, "swell": swell,
}
CASTS = (("chords", "organ"), ("scale", "flute"), ("toll", "bell"), ("slide", "clarinet"),
         ("arpeggio", "plucked string"), ("swell", "organ"), ("chords", "plucked string"), ("scale", "clarinet"))
"""Form and instrument of each song in turn: few enough for the default set to play each of them twice."""


@dataclass(frozen=True)
class Song:
    """A composition, ready to be played."""

    form: str
    instrument: str
    key: Key
    tempo_bpm: int
    length_s: float
    part: Part

    @property
    def phrase_s(self) -> float:
        return self.part.phrase_beats * 60.0 / self.tempo_bpm

    def caption(self) -> str:
        first = self.part.notes[0].midi
        return (f"{self.part.title} on {sound.with_article(self.instrument)} in {self.key} at {self.tempo_bpm} bpm, "
                f"starting on {sound.note_name(first)} ({sound.note_hz(first):.2f} Hz), growing and fading every "
                f"{self.part.phrase_beats} beats, {self.length_s:.2f} seconds long.")

    def fields(self) -> dict[str, object]:
        """The caption for machines."""
        notes = [note.row() for note in self.part.notes]
        return {"form": self.form, "instrument": self.instrument, "pitch": notes[0]["pitch"],
                "pitch_hz": notes[0]["hz"], "musical_key": str(self.key), "tempo_bpm": self.tempo_bpm,
                "phrase_beats": self.part.phrase_beats, "notes": notes}


def compose(index: int, rng: np.random.Generator) -> Song:
    """The ``index``-th song."""
    form, instrument = CASTS[index % len(CASTS)]
    key = KEYS[rng.integers(len(KEYS))]
    tempo_bpm = TEMPI_BPM[rng.integers(len(TEMPI_BPM))]
    length_s = round(SHORTEST_S + (LONGEST_S - SHORTEST_S) * rng.uniform() ** 4, 1)
    part = FORMS[form](Sheet(rng, key, 60.0 / tempo_bpm, length_s))
    return Song(form, instrument, key, tempo_bpm, length_s, part)


def perform(song: Song) -> np.ndarray:
    """Samples ``[time]`` float32. A note is played once and copied to every place it returns in, as a sampler does;
    a string is plucked the same way each time."""
    num = sound.num_samples(song.length_s)
    if song.form == "slide":
        last = song.part.notes[-1]
        starts = [note.start_s for note in song.part.notes] + [last.start_s + last.duration_s]
        pitches = [note.midi for note in song.part.notes] + [last.to_midi or last.midi]
        mixed = sound.glide(song.instrument, np.interp(np.arange(num) / sound.SAMPLE_RATE_HZ, starts, pitches))
    else:
        mixed = _mix(song, num)
    cycle = np.cos(np.arange(num) * (2 * np.pi / (song.phrase_s * sound.SAMPLE_RATE_HZ)))
    return mixed * 10 ** ((-PHRASE_DB / 40) * (1 + cycle)).astype(np.float32)


def _mix(song: Song, num: int) -> np.ndarray:
    voice = sound.VOICES[song.instrument]
    mixed = np.zeros(num, np.float32)
    played: dict[tuple[int, float], np.ndarray] = {}
    for note in song.part.notes:
        sounds_s = RING_S if voice.struck else note.duration_s + voice.release_s
        key = (note.midi, sounds_s)
        if key not in played:
            played[key] = sound.play(song.instrument, note.midi, sounds_s, np.random.default_rng(note.midi))
        start = sound.num_samples(note.start_s)
        piece = played[key][:num - start]
        mixed[start:start + len(piece)] += piece
    return mixed
