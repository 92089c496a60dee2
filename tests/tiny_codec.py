"""A codec so small that models over latents can be tested without any: 1 kHz, 25 frames a second, 8 channels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RATE_HZ, HOP, WIDTH = 1000, 40, 8
SILENCE = -3.0


@dataclass(frozen=True)
class TinyConfig:
    name: str = "tiny"
    needs_fit: bool = False

    def column_id(self):
        return "tiny-v1"

    def load(self, device="cpu", fitted=None):
        return TinyCodec()


class TinyCodec:
    """A frame is the mean of each eighth of its samples, less 3, so that silence is not at 0."""

    sample_rate_hz, hop_samples, frame_rate_hz, width = RATE_HZ, HOP, RATE_HZ / HOP, WIDTH

    def encode_batch(self, recordings):
        padded = [np.pad(r, (0, -len(r) % HOP)).reshape(-1, WIDTH, HOP // WIDTH) for r in recordings]
        return [(frames.mean(2) + SILENCE).astype(np.float32) for frames in padded]

    def decoder(self):
        return TinyDecoder()


class TinyDecoder:
    """Holds one frame back, as a codec with an overlap does."""

    def __init__(self):
        self.held = np.zeros((0, WIDTH), np.float32)

    def push(self, piece):
        assert piece.dtype == np.float32 and piece.shape[1] == WIDTH
        frames = np.concatenate([self.held, piece])
        self.held = frames[-1:]
        return self._samples(frames[:-1])

    def finish(self):
        return self._samples(self.held)

    def _samples(self, frames):
        return np.repeat(frames - SILENCE, HOP // WIDTH).astype(np.float32)
