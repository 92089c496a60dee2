"""Decoding for many requests at once: what each has ready is cut into blocks, and blocks that are alike run as a batch.

In float32 a row's bits change with the number of rows beside it, so a device always gets the same number of them, idle
ones among them, and a request sounds the same alone and in company. A GPU gets eight, which take it hardly longer than
one. A processor gets one: idle rows would cost it as much as others, the odd elements at the end of its vector loops
round otherwise, and it gains little (Griffin-Lim, eight abreast: 6.3 ms a row instead of 7.4 in the first short block,
but 21.6 instead of 14.2 in the long ones, since what one row works on still fits the cache).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from avray.codecs.blocks import BlockBuffer, Blocks, Window
from avray.family import FrameStream

GPU_ROWS = 8
Row = TypeVar("Row")


def num_rows(device: torch.device | str) -> int:
    """Rows of a batch on this device, always."""
    return 1 if torch.device(device).type == "cpu" else GPU_ROWS


@dataclass(frozen=True)
class Block:
    """Latents ``[time, width]`` of one request that can be decoded now.

    Blocks with the same ``run`` and ``alike`` may be given to it together, each of another request; it returns the
    samples ``[n]`` of each. ``state`` is what the request's decoder remembers.
    """

    latents: np.ndarray
    run: Callable[[Sequence[Block]], list[np.ndarray]]
    alike: Hashable
    state: Any = None
    window: Window | None = None


class Decoder(ABC):
    """A ``FrameStream`` of one request, latents ``[t, width]`` in, samples ``[n]`` out, that can wait for others."""

    @abstractmethod
    def put(self, latents: np.ndarray) -> None:
        """Take the next frames."""

    @abstractmethod
    def take(self, last: bool) -> Block | None:
        """The next block, once it is whole; with ``last`` what is left, too."""

    def push(self, latents: np.ndarray) -> np.ndarray:
        return decode([ToDecode(self, latents, False)])[0]

    def finish(self) -> np.ndarray:
        return decode([ToDecode(self, None, True)])[0]


@dataclass(frozen=True)
class ToDecode:
    """What a request's ``Render`` hands to the engine to have it decoded together with the others': frames that
    follow, and whether they are the last."""

    decoder: FrameStream
    latents: np.ndarray | None
    last: bool


def decode(asked: Sequence[ToDecode]) -> list[np.ndarray]:
    """The samples ``[n]`` float32 that are final now, of each; no decoder may be among them twice. Streams that are no
    ``Decoder`` run by themselves."""
    made = [[np.zeros(0, np.float32)] for _ in asked]
    waiting: list[tuple[int, Decoder]] = []
    for index, one in enumerate(asked):
        if isinstance(one.decoder, Decoder):
            waiting.append((index, one.decoder))
            if one.latents is not None:
                one.decoder.put(one.latents)
        else:
            made[index] += [] if one.latents is None else [one.decoder.push(one.latents)]
            made[index] += [one.decoder.finish()] if one.last else []
    while waiting:
        alike: dict[Hashable, list[tuple[int, Block]]] = defaultdict(list)
        for index, decoder in waiting:
            block = decoder.take(asked[index].last)
            if block is not None:
                alike[block.run, block.alike].append((index, block))
        if not alike:
            break
        for group in alike.values():
            samples = group[0][1].run([block for _, block in group])
            for (index, _), piece in zip(group, samples, strict=True):
                made[index].append(piece)
    return [np.concatenate(pieces) for pieces in made]


def in_batches(rows: Sequence[Row], size: int) -> list[tuple[Sequence[Row], list[Row]]]:
    """The rows in batches of ``size``: those that count, and the same filled up with the first."""
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [(batch, [*batch, *[batch[0]] * (size - len(batch))]) for batch in batches]


class BlockDecoder(Decoder):
    """Of a codec that decodes in blocks of a fixed number of frames, with some context or a state."""

    def __init__(self, blocks: Blocks, run: Callable[[Sequence[Block]], list[np.ndarray]], state: Any = None) -> None:
        self.buffer, self.run, self.state = BlockBuffer(blocks, 1), run, state

    def put(self, latents: np.ndarray) -> None:
        self.buffer.put(latents)

    def take(self, last: bool) -> Block | None:
        found = self.buffer.take(last)
        if found is None:
            return None
        latents, window = found
        alike = (len(latents), window.start == 0, window.before, window.after, window.is_last)
        return Block(latents, self.run, alike, self.state, window)
