"""Short sounds, one kind after another, each with a caption that says exactly what it is.

All are under four seconds, so that at the default segment of two seconds only songs give a segment and the one after.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from avray.data import demo_sound as sound
from avray.data.demo_songs import Key, Note

SHORTEST_S, LONGEST_S = 1.0, 3.8


@dataclass(frozen=True)
class Short:
    """``label`` names the sound in a few words, ``text`` is the caption, ``fields`` the same for machines."""

    kind: str
    samples: np.ndarray
    label: str
    text: str
    fields: dict[str, object] = field(default_factory=dict)


def _length_s(rng: np.random.Generator) -> float:
    return round(float(rng.uniform(SHORTEST_S, LONGEST_S)), 1)


def _single(kind: str, subject: str, instrument: str, samples: np.ndarray, midi: int, length_s: float) -> Short:
    """A sound of one pitch."""
    note = Note(midi, 0.0, length_s)
    name, hz = sound.note_name(midi), round(sound.note_hz(midi), 2)
    text = f"A {subject} at {name} ({hz:.2f} Hz), {length_s:.2f} seconds long."
    return Short(kind, samples, f"{subject}, {name}", text,
                 {"instrument": instrument, "pitch": name, "pitch_hz": hz, "notes": [note.row()]})


def tone(rng: np.random.Generator) -> Short:
    """A sine."""
    midi, length_s = int(rng.integers(48, 85)), _length_s(rng)
    samples = sound.phasor(sound.note_hz(midi), sound.num_samples(length_s)).imag
    return _single("tone", "pure tone", "sine", samples, midi, length_s)


def pluck(rng: np.random.Generator) -> Short:
    midi, length_s = int(rng.integers(43, 77)), _length_s(rng)
    return _single("pluck", "plucked string", "plucked string",
                   sound.play("plucked string", midi, length_s, rng), midi, length_s)


def bell(rng: np.random.Generator) -> Short:
    midi, length_s = int(rng.integers(55, 85)), _length_s(rng)
    return _single("bell", "bell", "bell", sound.play("bell", midi, length_s, rng), midi, length_s)


def chirp(rng: np.random.Generator) -> Short:
    """A sine whose pitch rises or falls evenly, by one to three octaves."""
    low, octaves, length_s = rng.uniform(100, 600), rng.uniform(1, 3), _length_s(rng)
    ends = [round(float(low), 1), round(float(low * 2 ** octaves), 1)]
    rises = bool(rng.integers(2))
    from_hz, to_hz = ends if rises else ends[::-1]
    samples = sound.glide_phasor(np.geomspace(from_hz, to_hz, sound.num_samples(length_s))).imag
    word = "rising" if rises else "falling"
    return Short("chirp", samples, f"{word} tone, {from_hz:.0f} to {to_hz:.0f} Hz",
                 f"A tone {word} from {from_hz:.1f} Hz to {to_hz:.1f} Hz, {length_s:.2f} seconds long.",
                 {"instrument": "sine", "from_hz": from_hz, "to_hz": to_hz})


def noise(rng: np.random.Generator) -> Short:
    colour = list(sound.NOISE_DB_PER_OCTAVE)[rng.integers(len(sound.NOISE_DB_PER_OCTAVE))]
    length_s = _length_s(rng)
    return Short("noise", sound.coloured_noise(colour, sound.num_samples(length_s), rng), f"{colour} noise",
                 f"Steady {colour} noise, {length_s:.2f} seconds long.", {"instrument": f"{colour} noise"})


@dataclass(frozen=True)
class Pattern:
    """Where in a bar each drum is hit, in beats from 0."""

    words: str
    bar_beats: int
    hits: dict[str, tuple[float, ...]]


PATTERNS = (
    Pattern("kick on 1 and 3, snare on 2 and 4, hi-hat on every half beat", 4,
            {"kick": (0, 2), "snare": (1, 3), "hi-hat": tuple(np.arange(0, 4, 0.5))}),
    Pattern("kick on every beat, hi-hat between the beats", 4,
            {"kick": (0, 1, 2, 3), "hi-hat": (0.5, 1.5, 2.5, 3.5)}),
    Pattern("a waltz, kick on 1, snare on 2 and 3", 3, {"kick": (0,), "snare": (1, 2)}),
)


def drums(rng: np.random.Generator) -> Short:
    """As many whole bars as there is time for."""
    pattern, tempo_bpm = PATTERNS[rng.integers(len(PATTERNS))], int(rng.integers(40, 81)) * 2
    beat_s = 60.0 / tempo_bpm
    num_bars = int(LONGEST_S / (pattern.bar_beats * beat_s))
    length_s = num_bars * pattern.bar_beats * beat_s
    samples = np.zeros(sound.num_samples(length_s), np.float32)
    notes = []
    for drum, beats in pattern.hits.items():
        struck = sound.hit(drum, rng)
        for start_s in (beat_s * (bar * pattern.bar_beats + beat) for bar in range(num_bars) for beat in beats):
            start = sound.num_samples(start_s)
            piece = struck[:len(samples) - start]
            samples[start:start + len(piece)] += piece
            notes.append({"pitch": drum, "start_s": round(start_s, 4), "duration_s": len(piece) / sound.SAMPLE_RATE_HZ})
    return Short("drums", samples, f"drums, {tempo_bpm} bpm",
                 f"Drums at {tempo_bpm} bpm: {pattern.words}, {length_s:.2f} seconds long.",
                 {"instrument": "drums", "tempo_bpm": tempo_bpm,
                  "notes": sorted(notes, key=lambda note: (note["start_s"], note["pitch"]))})


def melody(rng: np.random.Generator) -> Short:
    """A walk through a scale, a note a beat, on any instrument, in any key."""
    instrument = list(sound.VOICES)[rng.integers(len(sound.VOICES))]
    key = Key(int(rng.integers(52, 70)), ("major", "minor")[rng.integers(2)])
    tempo_bpm = int(rng.integers(50, 91)) * 2
    beat_s = 60.0 / tempo_bpm
    num_notes = int(rng.integers(4, min(8, int(LONGEST_S / beat_s)) + 1))
    steps = np.cumsum([rng.integers(0, 5), *rng.choice([-2, -1, 1, 2], num_notes - 1)])
    notes = [Note(key.degree(int(step)), index * beat_s, beat_s) for index, step in enumerate(steps)]
    length_s = num_notes * beat_s
    samples = np.zeros(sound.num_samples(length_s), np.float32)
    for note in notes:
        start = sound.num_samples(note.start_s)
        piece = sound.play(instrument, note.midi, beat_s, rng)[:len(samples) - start]
        samples[start:start + len(piece)] += piece
    names = " ".join(sound.note_name(note.midi) for note in notes)
    first = notes[0].row()
    return Short("melody", samples, f"{instrument}, {names}",
                 f"A melody on {sound.with_article(instrument)} in {key} at {tempo_bpm} bpm, {names}, "
                 f"{length_s:.2f} seconds long.",
                 {"instrument": instrument, "pitch": first["pitch"], "pitch_hz": first["hz"], "musical_key": str(key),
                  "tempo_bpm": tempo_bpm, "notes": [note.row() for note in notes]})


KINDS = (tone, chirp, pluck, bell, drums, noise, melody)
