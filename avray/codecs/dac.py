"""DAC: a network of convolutions that look both ways, run in blocks with all the context they see.

Latents are the encoder's output before quantisation, ``[1024, time]``, 50 frames a second at 16 kHz, 75 at 24 kHz, 86
at 44.1 kHz; codes ``[codebooks, time]`` of 1024 each (Kumar et al. 2023). A recording is filled with silence to whole
frames, as its feature extractor does it. With the whole receptive field as context a block gives what the file gives.
Where a stride is odd the decoder ends some samples early; they are filled with silence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from avray.codecs.blocks import Blocks, BlockStream, Window
from avray.codecs.network import NetworkCodec, Rates, exact, mono, numpy
from avray.codecs.together import Block, BlockDecoder
from avray.family import FrameStream

_ENCODE_FRAMES = 150
_DECODE_FRAMES = 32
_BATCH = 8
_RESIDUAL_REACH = 3 * (1 + 3 + 9)
"""Inputs that a stage's three residual units see on each side: kernels of 7 with dilations of 1, 3 and 9."""


class Dac(NetworkCodec):
    """A ``Codec`` over a ``DacModel`` without weight norm."""

    def __init__(self, model: nn.Module, num_codebooks: int, device: torch.device, dtype: torch.dtype) -> None:
        config = model.config
        rates = Rates(config.sampling_rate, config.hop_length, config.hidden_size, config.codebook_size)
        super().__init__(rates, num_codebooks, device, dtype)
        self.model = model
        reach = frames_in_reach(config.downsampling_ratios)
        self.encode_blocks, self.decode_blocks = Blocks(_ENCODE_FRAMES, reach, reach), decode_blocks(reach)

    def encode_batch(self, recordings: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Blocks of the same length run together, whichever recording they are of."""
        alike: dict[int, list[tuple[int, int, Window, np.ndarray]]] = defaultdict(list)
        found: list[dict[int, np.ndarray]] = [{-1: self.no_frames} for _ in recordings]
        for index, samples in enumerate(recordings):
            for place, window in enumerate(self.encode_blocks.windows(len(mono(samples)), self.hop_samples)):
                piece = samples[window.start * self.hop_samples : window.stop * self.hop_samples]
                alike[window.stop - window.start].append((index, place, window, piece))
        for group in alike.values():
            for start in range(0, len(group), _BATCH):
                chosen = group[start : start + _BATCH]
                frames = self._encode([piece for *_, piece in chosen])
                for (index, place, window, _), rows in zip(chosen, frames, strict=True):
                    found[index][place] = rows[window.before : len(rows) - window.after]
        return [np.concatenate([rows[place] for place in sorted(rows)]) for rows in found]

    @exact()
    def _encode(self, pieces: Sequence[np.ndarray]) -> np.ndarray:
        """Pieces of as many frames each, filled up -> ``[batch, frames, width]``."""
        num_frames = -(-max(len(piece) for piece in pieces) // self.hop_samples)
        batch = np.zeros((len(pieces), 1, num_frames * self.hop_samples), np.float32)
        for row, piece in zip(batch, pieces, strict=True):
            row[0, : len(piece)] = piece
        return numpy(self.encode_frames(self.tensor(batch))).transpose(0, 2, 1)

    def encode_frames(self, samples: Float[Tensor, "batch 1 samples"]) -> Float[Tensor, "batch width time"]:
        return self.model.encoder(samples)

    def decode_frames(self, latents: Float[Tensor, "batch width time"]) -> Float[Tensor, "batch 1 samples"]:
        return self.model.decoder(latents)

    def stream(self) -> FrameStream:
        def encode(samples: np.ndarray, window: Window) -> np.ndarray:
            frames = self._encode([samples])[0]
            return frames[window.before : len(frames) - window.after]

        return BlockStream(self.encode_blocks, self.hop_samples, encode, self.no_frames)

    def decoder(self) -> BlockDecoder:
        return BlockDecoder(self.decode_blocks, self._decode)

    @exact()
    def _decode(self, blocks: Sequence[Block]) -> list[np.ndarray]:
        return self.decode_windows(blocks, lambda latents: numpy(
            self.decode_frames(self.tensor(latents.transpose(0, 2, 1)))[:, 0]))

    def quantize(self, latents: Float[Tensor, "batch width time"],
                 num_codebooks: int) -> Int[Tensor, "batch codebooks time"]:
        return self.model.quantizer(latents, num_codebooks)[1]

    def from_codes(self, codes: Int[Tensor, "batch codebooks time"]) -> Float[Tensor, "batch width time"]:
        with exact():
            return self.model.quantizer.from_codes(codes)[0]


def decode_blocks(reach: int) -> Blocks:
    return Blocks(_DECODE_FRAMES, reach, reach)


def frames_in_reach(ratios: Sequence[int]) -> int:
    """Frames on each side that one output of the encoder, or of the decoder behind it, can depend on."""
    hop, at, samples = int(np.prod(ratios)), 1, 3.0
    for ratio in ratios:
        samples += _RESIDUAL_REACH * at + ratio * at
        at *= ratio
    return int(np.ceil(samples / hop)) + 5
