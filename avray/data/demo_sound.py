"""Synthetic sound in plain numpy, a few hundred times faster than it plays, every sample a function of a seed.

Two tricks carry the speed. A decaying sinusoid is a geometric series, so ``n`` of its samples are an outer product of
two short ones (one complex multiply each, no ``sin``). And a tone of K harmonics is a polynomial in that phasor, so
Horner's rule sums them; in a decaying phasor harmonic k then dies k times as fast, as it does on a string.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SAMPLE_RATE_HZ = 24_000
LEVEL_DBFS = -20.0
"""Root mean square of a recording, unless its peak would pass ``PEAK``."""
PEAK = 0.9
ROOM_DBFS = -56.0
"""White room tone under every recording, as real ones have it; digital silence would dominate a log spectrum."""
FADE_IN_S, FADE_OUT_S = 0.005, 0.05

SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
NOTE_NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
BELL_PARTIALS = ((0.5, 0.3, 0.6), (1.0, 1.0, 1.0), (1.2, 0.5, 1.3), (1.5, 0.3, 1.7),
                 (2.0, 0.7, 2.0), (2.67, 0.35, 3.0), (3.01, 0.25, 3.6), (4.17, 0.15, 5.0))
"""Hum, prime, minor third, fifth, nominal and three above: ratio to the pitch, amplitude, relative decay."""
NOISE_DB_PER_OCTAVE = {"brown": -6.0, "pink": -3.0, "white": 0.0, "blue": 3.0}
DRUMS = ("kick", "snare", "hi-hat")


@dataclass(frozen=True)
class Voice:
    """How an instrument sounds: amplitudes of its harmonics from the fundamental up (none: a string or a bell),
    decay of the fundamental in nepers a second, and whether it rings on after its note's end (struck)."""

    harmonics: tuple[float, ...] = ()
    attack_s: float = 0.002
    release_s: float = 0.05
    decay_per_s: float = 0.0
    struck: bool = False


VOICES = {
    "flute": Voice((1.0, 0.30, 0.12, 0.04), attack_s=0.08, release_s=0.12, decay_per_s=0.4),
    "organ": Voice((1.0, 0.7, 0.45, 0.4, 0.0, 0.25, 0.0, 0.2), attack_s=0.02, release_s=0.08, decay_per_s=0.4),
    "clarinet": Voice((1.0, 0.0, 0.55, 0.0, 0.35, 0.0, 0.18, 0.0, 0.1), 0.04, 0.08, 0.4),
    "plucked string": Voice(struck=True),
    "bell": Voice(decay_per_s=0.9, struck=True),
}


def note_name(midi: int) -> str:
    """69 -> ``"A4"``."""
    return f"{NOTE_NAMES[midi % 12]}{midi // 12 - 1}"


def note_hz(midi: float) -> float:
    """Equal temperament, A4 = 440 Hz."""
    return 440.0 * 2.0 ** ((midi - 69) / 12)


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def num_samples(seconds: float) -> int:
    return round(seconds * SAMPLE_RATE_HZ)


def phasor(hz: float, num: int, decay_per_s: float = 0.0) -> np.ndarray:
    """``exp((2 pi i hz - decay) t)``, complex64 ``[num]``."""
    rate = (2j * np.pi * hz - decay_per_s) / SAMPLE_RATE_HZ
    block = 512
    inner = np.exp(rate * np.arange(block)).astype(np.complex64)
    outer = np.exp(rate * block * np.arange(-(-num // block))).astype(np.complex64)
    return (outer[:, None] * inner).ravel()[:num]


def glide_phasor(hz: np.ndarray) -> np.ndarray:
    """A phasor whose frequency follows ``hz`` sample by sample."""
    cycles = np.cumsum(hz / SAMPLE_RATE_HZ) % 1.0
    return np.exp(2j * np.pi * cycles).astype(np.complex64)


def harmonic_sum(base: np.ndarray, amplitudes: Sequence[float], highest_hz: float) -> np.ndarray:
    """The harmonics of a phasor that stay below 11 kHz, float32."""
    kept = amplitudes[:max(1, int(11_000 // highest_hz))]
    total = base * np.complex64(kept[-1])
    for amplitude in reversed(kept[:-1]):
        total += np.complex64(amplitude)
        total *= base
    return total.imag


def karplus_strong(hz: float, num: int, rng: np.random.Generator) -> np.ndarray:
    """A plucked string (Karplus and Strong, 1983), a period at a time, tuned by linear interpolation; the fundamental
    falls by about 10 dB a second."""
    delay = SAMPLE_RATE_HZ / hz - 0.5  # the two-point average is half a sample late
    whole = int(delay)
    late = delay - whole
    taps = np.exp(-1.2 / hz) * np.convolve([0.5, 0.5], [1.0 - late, late])
    first = whole + 2
    line = np.zeros(first + num)
    soft = 9  # a finger, not a plectrum: a bright start would leave the rest of the note 10 dB quieter
    burst = np.convolve(rng.uniform(-1.0, 1.0, first + soft - 1), np.ones(soft) / soft, "valid")
    line[:first] = burst - burst.mean()
    for start in range(first, first + num, whole):
        stop = min(start + whole, first + num)
        line[start:stop] = taps[0] * line[start - whole:stop - whole]
        line[start:stop] += taps[1] * line[start - whole - 1:stop - whole - 1]
        line[start:stop] += taps[2] * line[start - whole - 2:stop - whole - 2]
    return line[first:].astype(np.float32)


def strike_bell(hz: float, num: int, decay_per_s: float) -> np.ndarray:
    """Inharmonic partials, the higher the shorter."""
    total = np.zeros(num, np.float32)
    for ratio, amplitude, decay in BELL_PARTIALS:
        if ratio * hz < 11_000:
            total += np.float32(amplitude) * phasor(ratio * hz, num, decay * decay_per_s).imag
    return total


def fade(samples: np.ndarray, fade_in_s: float, fade_out_s: float) -> np.ndarray:
    """Raised-cosine ends, in place."""
    for seconds, end in ((fade_in_s, samples), (fade_out_s, samples[::-1])):
        num = min(num_samples(seconds), len(samples))
        end[:num] *= (0.5 - 0.5 * np.cos(np.pi * np.arange(num) / max(num, 1))).astype(np.float32)
    return samples


def play(instrument: str, midi: int, length_s: float, rng: np.random.Generator) -> np.ndarray:
    """One note of ``length_s`` seconds in all, release included, float32."""
    voice, hz, num = VOICES[instrument], note_hz(midi), num_samples(length_s)
    if instrument == "plucked string":
        samples = karplus_strong(hz, num, rng)
    elif instrument == "bell":
        samples = strike_bell(hz, num, voice.decay_per_s)
    else:
        samples = harmonic_sum(phasor(hz, num, voice.decay_per_s), voice.harmonics, hz)
    return fade(samples, voice.attack_s, voice.release_s)


def glide(instrument: str, midi: np.ndarray) -> np.ndarray:
    """A tone that slides along ``midi`` (a pitch for each sample), float32."""
    hz = note_hz(69) * 2.0 ** ((midi - 69) / 12)
    return harmonic_sum(glide_phasor(hz), VOICES[instrument].harmonics, float(hz.max()))


def coloured_noise(colour: str, num: int, rng: np.random.Generator) -> np.ndarray:
    """Noise whose spectrum falls or rises by ``NOISE_DB_PER_OCTAVE``, flat below 20 Hz, float32."""
    spectrum = np.fft.rfft(rng.standard_normal(num, np.float32))
    hz = np.maximum(np.fft.rfftfreq(num, 1 / SAMPLE_RATE_HZ), 20.0)
    spectrum *= (hz / 1000.0) ** (NOISE_DB_PER_OCTAVE[colour] / (20 * np.log10(2.0)))
    return np.fft.irfft(spectrum, num).astype(np.float32)


def hit(drum: str, rng: np.random.Generator) -> np.ndarray:
    """One of ``DRUMS``: a falling sine, a tone in noise, or a burst of bright noise; 0.25 s at most."""
    t = np.arange(num_samples(0.25 if drum != "hi-hat" else 0.06)) / SAMPLE_RATE_HZ
    if drum == "kick":
        samples = np.sin(2 * np.pi * (50 * t + 4.0 * (1 - np.exp(-t / 0.04)))) * np.exp(-t / 0.08)
    elif drum == "snare":
        samples = (0.5 * np.sin(2 * np.pi * 190 * t) + 0.35 * rng.standard_normal(len(t))) * np.exp(-t / 0.05)
    else:
        samples = 0.3 * np.diff(rng.standard_normal(len(t) + 1)) * np.exp(-t / 0.015)
    return fade(samples.astype(np.float32), 0.001, 0.01)


def master(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """``[time]`` at ``LEVEL_DBFS`` over room tone, with faded ends, float32."""
    rms = float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))
    gain = min(10 ** (LEVEL_DBFS / 20) / rms, PEAK / float(np.abs(samples).max()))
    room = 10 ** (ROOM_DBFS / 20) * rng.standard_normal(len(samples), np.float32)
    return fade(np.float32(gain) * samples + room.astype(np.float32), FADE_IN_S, FADE_OUT_S)
