"""Blocks with context: how a network that looks a little ahead encodes and decodes a recording of any length.

Frames are cut into blocks counted from the start, and each block is run with some frames before and after it, whose
output is thrown away. Where the blocks lie depends on the number of frames alone, so that pieces joined are the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """Frames ``[start, stop)`` run for the sake of ``[start + before, stop - after)``."""

    start: int
    stop: int
    before: int
    after: int
    is_last: bool


@dataclass(frozen=True)
class Blocks:
    """Frames a block, and of context on each side."""

    block: int
    left: int = 0
    right: int = 0

    def ready(self, first: int, num_frames: int) -> Window | None:
        """The block that starts with frame ``first``, once ``num_frames`` frames hold it, its context and, where it
        has any, one more: so that the last window is never what was but another's context."""
        if num_frames < first + self.block + self.right + min(self.right, 1):
            return None
        before = min(self.left, first)
        return Window(first - before, first + self.block + self.right, before, self.right, is_last=False)

    def last(self, first: int, num_frames: int) -> Window | None:
        """All that is left from frame ``first`` on, at most ``block + right`` frames; None where nothing is."""
        before = min(self.left, first)
        return Window(first - before, num_frames, before, 0, is_last=True) if num_frames > first else None

    def windows(self, num_inputs: int, unit: int) -> list[Window]:
        """Those of a whole recording, ``unit`` inputs a frame: the very ones a stream of it runs."""
        found, first = [], 0
        while window := self.ready(first, num_inputs // unit) or self.last(first, -(-num_inputs // unit)):
            found.append(window)
            first = window.stop - window.after
        return found


class BlockBuffer:
    """Inputs of a recording as they come, cut into windows; ``unit`` inputs make a frame. The last window of an encoder
    may end within a frame."""

    def __init__(self, blocks: Blocks, unit: int) -> None:
        self.blocks, self.unit = blocks, unit
        self.held: list[np.ndarray] = []
        self.begin = self.num_inputs = 0
        """Where what is held begins, and how many inputs there were in all."""
        self.first = 0

    def put(self, piece: np.ndarray) -> None:
        self.held.append(piece)
        self.num_inputs += len(piece)

    def take(self, last: bool) -> tuple[np.ndarray, Window] | None:
        """The inputs of the next window, once they are there; with ``last`` what is left, too."""
        window = self.blocks.ready(self.first, self.num_inputs // self.unit)
        if window is None and last:
            window = self.blocks.last(self.first, -(-self.num_inputs // self.unit))
        if window is None:
            return None
        held = np.concatenate(self.held) if len(self.held) > 1 else self.held[0]
        inputs = held[window.start * self.unit - self.begin : window.stop * self.unit - self.begin]
        self.first = window.stop - window.after
        begin = max(0, self.first - self.blocks.left) * self.unit
        self.held, self.begin = [held[begin - self.begin :]], begin
        return inputs, window


class BlockStream:
    """A ``FrameStream`` over ``run``, which gets the inputs of one window after another, in order, and returns what
    belongs to the window without its context; ``nothing`` is the output of no frames."""

    def __init__(self, blocks: Blocks, unit: int, run: Callable[[np.ndarray, Window], np.ndarray],
                 nothing: np.ndarray) -> None:
        self.buffer, self.run, self.nothing = BlockBuffer(blocks, unit), run, nothing

    def push(self, piece: np.ndarray) -> np.ndarray:
        self.buffer.put(piece)
        return self._run(last=False)

    def finish(self) -> np.ndarray:
        return self._run(last=True)

    def _run(self, last: bool) -> np.ndarray:
        made = [self.nothing]
        while found := self.buffer.take(last):
            made.append(self.run(*found))
        return np.concatenate(made)
