"""What every codec looks like, whatever its network.

A codec has two faces. Its *configuration* (``CodecConfig``: a frozen dataclass such as ``Spectral`` or ``Pretrained``)
is cheap and travels; ``load`` opens the weights and gives a ``Codec``. Nothing outside a codec knows a sample rate, a
frame rate, a width or a number of codebooks.

Continuous latents are ``[batch, width, time]`` float32, codes ``[batch, codebooks, time]`` int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from avray.codecs.rvq import BLOCK_ROWS, check_codebooks
from avray.family import Fitted, FrameStream


class Codec(Protocol):
    """A loaded codec. ``encode_batch`` and ``encoder`` make it a ``family.Network`` for latents."""

    sample_rate_hz: int
    frame_rate_hz: float
    hop_samples: int
    width: int
    """Channels of the continuous latents."""
    num_codebooks: int
    """0 where it has no codes (a spectral codec not fitted yet)."""
    cardinality: int

    def encode(self, samples: Tensor) -> Tensor:
        """``[batch, samples]`` mono float32 -> latents ``[batch, width, ceil(samples / hop)]``."""

    def encode_batch(self, recordings: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Recordings ``[samples]`` of any lengths -> latents ``[time, width]`` of each, batched by length."""

    def stream(self) -> FrameStream:
        """Samples ``[n]`` in, latents ``[t, width]`` out; recurrent state carried from piece to piece."""

    def decoder(self) -> FrameStream:
        """Latents ``[t, width]`` in, samples ``[n]`` out. The only way a codec decodes, so that a stream and a file
        are the same samples. ``finish`` completes it: t frames give t * hop samples in all. Those that are
        ``together.Decoder`` run together."""

    def to_codes(self, latents: Tensor, num_codebooks: int | None = None) -> Tensor:
        """ValueError naming both numbers when more codebooks are asked for than there are."""

    def from_codes(self, codes: Tensor) -> Tensor: ...


class CodecConfig(Protocol):
    """A codec's settings."""

    @property
    def name(self) -> str:
        """What ``codec=`` takes."""

    def column_id(self) -> str:
        """Of its latents: network, revision and settings."""

    def load(self, device: torch.device | str = "cpu", fitted: Fitted | None = None) -> Codec:
        """MissingDependency, naming the fix, where weights are not at hand. ``fitted`` holds learnt codebooks."""

    @property
    def needs_fit(self) -> bool:
        """Whether its codes have to be learnt from the data (``fit``) before ``to_codes`` works."""

    def fit(self, latents: np.ndarray, seed: int = 0) -> Fitted:
        """Learn codebooks from latents ``[time, width]``."""


def decode_all(codec: Codec, latents: np.ndarray) -> np.ndarray:
    """Latents ``[time, width]`` -> samples ``[time * hop]`` float32, through the streaming decoder."""
    decoder = codec.decoder()
    return np.concatenate([decoder.push(latents), decoder.finish()])


@dataclass(frozen=True)
class Latents:
    """The encoder of a column of continuous latents ``[time, width]``."""

    codec: CodecConfig

    def column_id(self) -> str:
        return self.codec.column_id()

    def load(self, device: torch.device | str) -> Codec:
        return self.codec.load(device)


@dataclass(frozen=True, eq=False)
class Codes:
    """The encoder of a column of codes: uint16 ``[time, num_codebooks]``, the first codebook first.

    ``fitted`` holds the learnt codebooks of a codec that needs them, and is part of the column's id.
    """

    codec: CodecConfig
    num_codebooks: int
    """The first so many of those the codec has."""
    fitted: Fitted | None = None

    def column_id(self) -> str:
        state = f"-{self.fitted.digest()}" if self.fitted else ""
        return f"{self.codec.column_id()}-q{self.num_codebooks}{state}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Codes) and self.column_id() == other.column_id()

    def __hash__(self) -> int:
        return hash(self.column_id())

    def load(self, device: torch.device | str) -> CodesNetwork:
        """ValueError for more codebooks than there are, or a codec whose codes were not fitted."""
        if self.codec.needs_fit and self.fitted is None:
            raise ValueError(f"codec {self.codec.name} learns its codes from the data: fit it before coding with it.")
        return CodesNetwork(self.codec.load(device, self.fitted), self.num_codebooks, torch.device(device))


class CodesNetwork:
    """A ``family.Network`` whose frames are codes."""

    def __init__(self, codec: Codec, num_codebooks: int, device: torch.device) -> None:
        self.codec, self.device = codec, device
        self.num_codebooks = check_codebooks(num_codebooks, codec.num_codebooks)
        self.sample_rate_hz, self.frame_rate_hz = codec.sample_rate_hz, codec.frame_rate_hz

    def quantize(self, latents: np.ndarray) -> np.ndarray:
        """``[time, width]`` -> uint16 ``[time, codebooks]``."""
        if len(latents) == 0:
            return np.zeros((0, self.num_codebooks), np.uint16)
        batch = torch.from_numpy(np.ascontiguousarray(latents.T))[None].to(self.device)
        with torch.inference_mode():
            return self.codec.to_codes(batch, self.num_codebooks)[0].T.cpu().numpy().astype(np.uint16)

    def encode_batch(self, recordings: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self.quantize(latents) for latents in self.codec.encode_batch(recordings)]

    def stream(self) -> CodesStream:
        return CodesStream(self, self.codec.stream())


class CodesStream:
    """Quantises whole blocks of frames counted from the start, so that codes do not depend on the pieces."""

    def __init__(self, network: CodesNetwork, latents: FrameStream) -> None:
        self.network, self.latents = network, latents
        self.held = np.zeros((0, network.codec.width), np.float32)

    def push(self, piece: np.ndarray) -> np.ndarray:
        self.held = np.concatenate([self.held, self.latents.push(piece)])
        ready = len(self.held) // BLOCK_ROWS * BLOCK_ROWS
        codes, self.held = self.network.quantize(self.held[:ready]), self.held[ready:]
        return codes

    def finish(self) -> np.ndarray:
        return self.network.quantize(np.concatenate([self.held, self.latents.finish()]))
