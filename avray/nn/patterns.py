"""How K codebooks a frame become the token steps of a language model, and back.

Every pattern here is affine: token (frame t, codebook k) stands at step ``t * stride + delays[k]`` of stream
``streams[k]``, so one ``Layout`` serves them all and its inverse is the same arithmetic read backwards. At
EnCodec's 75 frames a second and 4 codebooks ``flatten`` is 300 steps a second of one stream, ``delay`` and
``parallel`` are 75 steps of four streams. ``delay`` is MusicGen's (Copet et al., 2023): a codebook sees the ones
before it in its frame, at K - 1 further steps in all. ``parallel`` draws a frame's codebooks independently given
the past.

Ids are offset by ``codebook * cardinality`` so that codebooks do not share embeddings; -1 is "nothing here".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

NOTHING = -1


@dataclass(frozen=True)
class Layout:
    """Where each codebook's tokens stand, for a given number of codebooks and ids a codebook."""

    cardinality: int
    stride: int
    """Steps a frame."""
    delays: tuple[int, ...]
    """Of each codebook, in steps after the first step of its frame."""
    streams: tuple[int, ...]
    offsets: tuple[int, ...]
    """Added to a codebook's ids."""

    @property
    def num_codebooks(self) -> int:
        return len(self.delays)

    @property
    def num_streams(self) -> int:
        return max(self.streams) + 1

    @property
    def vocabulary(self) -> int:
        """Ids in all; the same number for each stream."""
        return max(self.offsets) + self.cardinality

    @property
    def lag(self) -> int:
        """Steps from a frame's first step to the one that completes it."""
        return max(self.delays)

    def _at(self, num_frames: int) -> np.ndarray:
        """The step of each (frame, codebook)."""
        return np.arange(num_frames)[:, None] * self.stride + np.asarray(self.delays)

    def num_steps(self, num_frames: int) -> int:
        return (num_frames - 1) * self.stride + self.lag + 1 if num_frames else 0

    def num_frames(self, num_steps: int) -> int:
        """Frames that are complete within so many steps."""
        return max(0, (num_steps - 1 - self.lag) // self.stride + 1)

    def tokens(self, codes: np.ndarray) -> np.ndarray:
        """Codes ``[frames, codebooks]`` -> ids ``[steps, streams]`` int64, -1 where nothing stands. A code of -1
        is nothing as well."""
        num_frames, num_codebooks = codes.shape
        assert num_codebooks == self.num_codebooks, (codes.shape, self.num_codebooks)
        codes = codes.astype(np.int64)
        steps = np.full((self.num_steps(num_frames), self.num_streams), NOTHING, np.int64)
        ids = np.where(codes < 0, NOTHING, codes + np.asarray(self.offsets))
        steps[self._at(num_frames), np.asarray(self.streams)] = ids
        return steps

    def codes(self, tokens: np.ndarray) -> np.ndarray:
        """Ids ``[steps, streams]`` from a frame's first step on -> codes ``[frames, codebooks]`` of the frames
        that are complete."""
        ids = tokens[self._at(self.num_frames(len(tokens))), np.asarray(self.streams)]
        return np.where(ids < 0, NOTHING, ids - np.asarray(self.offsets))

    def codebook_at(self, step: int, stream: int) -> int | None:
        """The codebook whose token stands there, None where a stream has nothing (``delay``'s first steps)."""
        for codebook, (delay, own) in enumerate(zip(self.delays, self.streams, strict=True)):
            if own == stream and step >= delay and (step - delay) % self.stride == 0:
                return codebook
        return None


@dataclass(frozen=True)
class Flatten:
    """All codebooks of a frame one after the other in one stream. Without ``offsets`` the codebooks share ids, as
    the original does; they then share embeddings and output rows as well."""

    offsets: bool = True
    name: str = "flatten"

    def layout(self, num_codebooks: int, cardinality: int) -> Layout:
        codebooks = range(num_codebooks)
        offsets = tuple(k * cardinality if self.offsets else 0 for k in codebooks)
        return Layout(cardinality, num_codebooks, tuple(codebooks), (0,) * num_codebooks, offsets)


@dataclass(frozen=True)
class Delay:
    """Codebook k in a stream of its own, ``k * by`` steps late."""

    by: int = 1
    name: str = "delay"

    def __post_init__(self):
        if self.by < 1:
            raise ValueError(f"pattern.by = {self.by} must be at least 1; pattern=parallel has no delay.")

    def layout(self, num_codebooks: int, cardinality: int) -> Layout:
        codebooks = range(num_codebooks)
        return Layout(cardinality, 1, tuple(k * self.by for k in codebooks), tuple(codebooks),
                      tuple(k * cardinality for k in codebooks))


@dataclass(frozen=True)
class Parallel:
    """Codebook k in a stream of its own, all codebooks of a frame in one step."""

    name: str = "parallel"

    def layout(self, num_codebooks: int, cardinality: int) -> Layout:
        codebooks = range(num_codebooks)
        return Layout(cardinality, 1, (0,) * num_codebooks, tuple(codebooks),
                      tuple(k * cardinality for k in codebooks))


Pattern = Flatten | Delay | Parallel
PATTERNS: dict[str, type[Pattern]] = {"flatten": Flatten, "delay": Delay, "parallel": Parallel}
"""By the name that ``pattern=`` takes."""


def read_pattern(value: Pattern | str | Mapping[str, Any]) -> Pattern:
    """A pattern from its name, or from its name and settings as YAML and checkpoints hold them."""
    if isinstance(value, Flatten | Delay | Parallel):
        return value
    settings = {"name": value} if isinstance(value, str) else dict(value)
    name = settings.pop("name", "")
    kind = PATTERNS.get(name)
    if kind is None:
        raise ValueError(f"pattern = {value!r} is not one of {', '.join(PATTERNS)}.")
    unknown = set(settings) - {field.name for field in fields(kind)}
    if unknown:
        raise ValueError(f"pattern.{min(unknown)} is not a setting of pattern={name}.")
    return kind(**settings)
