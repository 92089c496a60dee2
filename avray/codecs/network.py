"""What every loaded network codec shares: arrays in, arrays out, codes in pieces that bound memory.

A kind of network (``encodec``, ``mimi``, ``dac``, ``xcodec``) says how one stream is encoded and decoded and how its
own quantiser works; the rest of the ``Codec`` protocol is here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from avray.codecs.rvq import check_codebooks
from avray.codecs.together import Block, in_batches, num_rows
from avray.family import FrameStream

_QUANTIZE_FRAMES = 4096
"""1024 distances each: 16 MB at a time."""


@dataclass(frozen=True)
class Rates:
    """What a network's own configuration says about its frames."""

    sample_rate_hz: int
    hop_samples: int
    width: int
    cardinality: int


class NetworkCodec(ABC):
    """A ``Codec`` (see ``base``) over a network of ``transformers``."""

    def __init__(self, rates: Rates, num_codebooks: int, device: torch.device, dtype: torch.dtype) -> None:
        self.sample_rate_hz, self.hop_samples = rates.sample_rate_hz, rates.hop_samples
        self.frame_rate_hz = rates.sample_rate_hz / rates.hop_samples
        self.width, self.cardinality, self.num_codebooks = rates.width, rates.cardinality, num_codebooks
        self.device, self.dtype = device, dtype
        self.decode_rows = num_rows(device)

    @abstractmethod
    def stream(self) -> FrameStream: ...

    @abstractmethod
    def decoder(self) -> FrameStream: ...

    @abstractmethod
    def quantize(self, latents: Float[Tensor, "batch width time"],
                 num_codebooks: int) -> Int[Tensor, "batch codebooks time"]: ...

    @abstractmethod
    def from_codes(self, codes: Int[Tensor, "batch codebooks time"]) -> Float[Tensor, "batch width time"]: ...

    def encode(self, samples: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch width time"]:
        frames = self.encode_batch(list(samples.cpu().numpy()))
        return torch.from_numpy(np.stack(frames)).transpose(1, 2).to(self.device)

    def encode_batch(self, recordings: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One after another; a kind that gains from a batch does better."""
        found = []
        for samples in recordings:
            stream = self.stream()
            found.append(np.concatenate([stream.push(mono(samples)), stream.finish()]))
        return found

    def to_codes(self, latents: Float[Tensor, "batch width time"],
                 num_codebooks: int | None = None) -> Int[Tensor, "batch codebooks time"]:
        """ValueError naming both numbers when more codebooks are asked for than there are."""
        num_codebooks = check_codebooks(num_codebooks, self.num_codebooks)
        with exact():
            pieces = latents.to(self.device, torch.float32).split(_QUANTIZE_FRAMES, dim=2)
            return torch.cat([self.quantize(piece, num_codebooks) for piece in pieces], dim=2)

    def decode_windows(self, blocks: Sequence[Block], decode: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
        """Blocks as long as each other, their context cut off again: ``decode`` takes latents ``[batch, time, width]``
        to samples ``[batch, n]``; what it lacks of whole frames is silence."""
        made: list[np.ndarray] = []
        for rows, filled in in_batches(blocks, self.decode_rows):
            window, hop = rows[0].window, self.hop_samples
            assert window is not None
            samples = decode(np.stack([row.latents for row in filled]))
            whole = np.zeros((len(filled), len(rows[0].latents) * hop), np.float32)
            whole[:, : samples.shape[1]] = samples[:, : whole.shape[1]]
            made += [*whole[: len(rows), window.before * hop : whole.shape[1] - window.after * hop]]
        return made

    def tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, self.dtype)

    @property
    def no_frames(self) -> np.ndarray:
        return np.zeros((0, self.width), np.float32)

    @property
    def no_samples(self) -> np.ndarray:
        return np.zeros(0, np.float32)


@contextmanager
def exact() -> Iterator[None]:
    """No gradients, and on a GPU whole float32 in convolutions and recurrences, where cuDNN by itself keeps ten bits
    of the fraction (TF32): codes made there and on a CPU go into the same cache."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def mono(samples: np.ndarray) -> np.ndarray:
    """ValueError for anything but ``[samples]``."""
    if samples.ndim != 1:
        raise ValueError(f"Expected mono samples [samples], got shape {samples.shape}: average the channels first.")
    return np.ascontiguousarray(samples, dtype=np.float32)


def numpy(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
