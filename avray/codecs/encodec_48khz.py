"""EnCodec at 48 kHz: stereo, one second at a time, each second brought to the same level first.

The network hears chunks of 150 frames, 148 frames apart, each divided by its own level, and lays their overlapping
10 ms over each other. It is fed mono on both channels, and its two channels are averaged. So that one frame stands for
one hop throughout, a chunk keeps its first 148 frames and borrows the last two from the next.

Latents are ``[129, time]`` at 150 Hz: the encoder's output before quantisation and, last, the natural logarithm of the
chunk's level, the same for all its frames. Codes have the level first, in steps of 0.17 dB, then the quantiser's own
codebooks: without a level there would be no sound to make of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from avray.codecs.blocks import Blocks, BlockStream, Window
from avray.codecs.encodec import codebooks_of
from avray.codecs.network import NetworkCodec, Rates, exact, mono, numpy
from avray.codecs.rvq import ResidualQuantizer
from avray.codecs.together import Block, BlockDecoder, in_batches
from avray.family import FrameStream

_OVERLAP_FRAMES = 2
_LOWEST, _HIGHEST = -18.5, 2.0
"""Of the natural logarithm of a level: digital silence is -18.4, a full-scale square wave 0."""
_BATCH = 8


class Encodec48kHz(NetworkCodec):
    """A ``Codec`` over an ``EncodecModel`` that works in normalised chunks."""

    def __init__(self, model: nn.Module, num_codebooks: int, device: torch.device, dtype: torch.dtype) -> None:
        config = model.config
        rates = Rates(config.sampling_rate, config.hop_length, config.hidden_size + 1, config.codebook_size)
        super().__init__(rates, num_codebooks, device, dtype)
        self.model, self.channels = model, config.audio_channels
        self.quantizer = ResidualQuantizer(codebooks_of(model, max(1, num_codebooks - 1)))
        self.blocks = Blocks(config.chunk_length // self.hop_samples - _OVERLAP_FRAMES, right=_OVERLAP_FRAMES)

    def encode_batch(self, recordings: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Chunks do not hear each other: all full ones are run in batches, the last of each recording alone."""
        recordings = [mono(samples) for samples in recordings]
        windows = [self.blocks.windows(len(samples), self.hop_samples) for samples in recordings]
        full = [samples[w.start * self.hop_samples : w.stop * self.hop_samples]
                for samples, found in zip(recordings, windows, strict=True) for w in found if not w.is_last]
        made = iter([frames for start in range(0, len(full), _BATCH)
                     for frames in self._encode(np.stack(full[start : start + _BATCH]))])
        results = []
        for samples, found in zip(recordings, windows, strict=True):
            rows = [self.no_frames]
            for w in found:
                if w.is_last:
                    rows.append(self._encode(samples[None, w.start * self.hop_samples :])[0])
                else:
                    rows.append(next(made)[: self.blocks.block])
            results.append(np.concatenate(rows))
        return results

    @exact()
    def _encode(self, chunks: np.ndarray) -> np.ndarray:
        """``[batch, samples]`` -> ``[batch, frames, width]``."""
        level = np.sqrt(np.mean(np.square(chunks), axis=1, keepdims=True)) + 1e-8
        heard = self.tensor(chunks / level)[:, None].expand(-1, self.channels, -1)
        frames = numpy(self.model.encoder(heard)).transpose(0, 2, 1)
        levels = np.broadcast_to(np.log(level)[:, None], (*frames.shape[:2], 1))
        return np.concatenate([frames, levels], axis=2, dtype=np.float32)

    def stream(self) -> FrameStream:
        def encode(samples: np.ndarray, window: Window) -> np.ndarray:
            frames = self._encode(samples[None])[0]
            return frames[: len(frames) - window.after]

        return BlockStream(self.blocks, self.hop_samples, encode, self.no_frames)

    def decoder(self) -> BlockDecoder:
        return BlockDecoder(self.blocks, self._decode, [np.zeros(0, np.float32)])

    @exact()
    def _decode(self, blocks: Sequence[Block]) -> list[np.ndarray]:
        """A block's state is the overlap that the block before it left, in a list of one."""
        made: list[np.ndarray] = []
        for rows, filled in in_batches(blocks, self.decode_rows):
            num_frames, window = len(rows[0].latents), rows[0].window
            assert window is not None
            core = num_frames - window.after
            sound = numpy(self.model.decoder(self.tensor(np.stack([row.latents[:, :-1].T for row in filled]))).mean(1))
            for row, samples in zip(rows, sound, strict=False):
                samples = samples * np.exp(row.latents[:core, -1].mean())
                before = row.state[0]
                fade = np.linspace(0, 1, len(before) + 2, dtype=np.float32)[1:-1]
                samples[: len(before)] = samples[: len(before)] * fade + before * (1 - fade)
                new, row.state[0] = np.split(samples[: num_frames * self.hop_samples], [core * self.hop_samples])
                made.append(new)
        return made

    def quantize(self, latents: Float[Tensor, "batch width time"],
                 num_codebooks: int) -> Int[Tensor, "batch codebooks time"]:
        place = (latents[:, -1:] - _LOWEST) / (_HIGHEST - _LOWEST)
        codes = [(place * (self.cardinality - 1)).round().long().clamp(0, self.cardinality - 1)]
        if num_codebooks > 1:
            codes.append(self.quantizer.encode(latents[:, :-1], num_codebooks - 1))
        return torch.cat(codes, dim=1)

    def from_codes(self, codes: Int[Tensor, "batch codebooks time"]) -> Float[Tensor, "batch width time"]:
        level = codes[:, :1] / (self.cardinality - 1) * (_HIGHEST - _LOWEST) + _LOWEST
        if codes.shape[1] == 1:
            silent = level.new_zeros(len(codes), self.width - 1, codes.shape[2])
            return torch.cat([silent, level], dim=1)
        return torch.cat([self.quantizer.decode(codes[:, 1:]), level], dim=1)
