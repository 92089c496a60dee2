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
        are the same samples. ``finish`` completes it: t frames give t * hop samples in all."""

    def to_codes(self, latents: Tensor, num_codebooks: int | None = None) -> Tensor:
        """ValueError naming both numbers when more codebooks are asked for than there are."""

    def from_codes(self, codes: Tensor) -> Tensor: ...


class CodecConfig(Protocol):
    """A codec's settings. ``name`` is what ``codec=`` takes."""

    name: str

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
