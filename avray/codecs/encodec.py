"""EnCodec at 24 kHz: whole-file codes from blocks, because its LSTM keeps its state from one to the next.

Latents are the encoder's output before quantisation, ``[128, time]`` at 75 Hz; codes are its residual quantiser's,
``[codebooks, time]``, 1024 each, 0.75 kbps a codebook. Both are those of ``transformers``' ``EncodecModel`` on the
whole recording (latents within 2e-7 of it in float32 where they reach 0.07) whatever it was cut into.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from avray.codecs.blocks import Blocks, BlockStream, Window
from avray.codecs.network import NetworkCodec, Rates, exact, mono, numpy
from avray.codecs.rvq import ResidualQuantizer
from avray.codecs.seanet import Streams, layers_of, run
from avray.codecs.together import Block, BlockDecoder, in_batches
from avray.family import FrameStream

_BLOCK_FRAMES = 100
"""Frames of all rows together in one block: 20 MB of activations at 24 kHz, which the outer cache still holds."""
_LEAST_FRAMES = 25
_MOST_ROWS = 16
"""Abreast. More rows made it no faster (one core: 18.8 s of sound a second with 1, 20.9 with 4, 21.5 with 16)."""
_DECODE_FRAMES = 12
"""0.16 s: what a listener waits for, and above the 7 that the widest convolution reflects."""


class Encodec24kHz(NetworkCodec):
    """A ``Codec`` over an ``EncodecModel`` without weight norm; causal, one channel, no chunks."""

    def __init__(self, model: nn.Module, num_codebooks: int, device: torch.device, dtype: torch.dtype) -> None:
        config = model.config
        rates = Rates(config.sampling_rate, config.hop_length, config.hidden_size, config.codebook_size)
        super().__init__(rates, num_codebooks, device, dtype)
        if config.audio_channels != 1 or not config.use_causal_conv or config.chunk_length_s is not None:
            raise ValueError("codec.name = encodec_24khz: it takes a causal network of one channel without chunks.")
        self.quantizer = ResidualQuantizer(codebooks_of(model, num_codebooks))
        self.encoder, self.decoder_layers = layers_of(model.encoder), layers_of(model.decoder)

    def encode_batch(self, recordings: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Recordings of like length run abreast; one that ends leaves the others."""
        recordings = [mono(samples) for samples in recordings]
        order = sorted(range(len(recordings)), key=lambda index: -len(recordings[index]))
        found = [self.no_frames] * len(recordings)
        for start in range(0, len(order), _MOST_ROWS):
            chosen = order[start : start + _MOST_ROWS]
            for index, frames in zip(chosen, self._abreast([recordings[i] for i in chosen]), strict=True):
                found[index] = frames
        return found

    @exact()
    def _abreast(self, recordings: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Longest first."""
        block = max(_LEAST_FRAMES, _BLOCK_FRAMES // len(recordings)) * self.hop_samples
        found: list[list[np.ndarray]] = [[self.no_frames] for _ in recordings]
        streams = Streams(len(recordings))
        for start in range(0, len(recordings[0]), block):
            pieces = [samples[start : start + block] for samples in recordings if len(samples) > start]
            ends = [len(samples) - start if len(samples) <= start + block else None for samples in recordings]
            frames = self._encode(pieces, ends[: len(pieces)], block, streams)
            for rows, made in zip(found, frames, strict=False):
                rows.append(made)
        return [np.concatenate(rows) for rows in found]

    def _encode(self, pieces: Sequence[np.ndarray], ends: Sequence[int | None], block: int,
                streams: Streams) -> list[np.ndarray]:
        """One block of at most ``block`` samples a row. A later block is only as long as its longest piece needs."""
        longest = -(-max(len(piece) for piece in pieces) // self.hop_samples) * self.hop_samples
        batch = np.zeros((len(pieces), block if streams.is_first else longest, 1), np.float32)
        for row, piece in zip(batch, pieces, strict=True):
            row[: len(piece), 0] = piece
        frames = numpy(run(self.encoder, self.tensor(batch), ends, streams))
        return [row[: -(-len(piece) // self.hop_samples)] for row, piece in zip(frames, pieces, strict=True)]

    def stream(self) -> FrameStream:
        streams, block = Streams(1), _BLOCK_FRAMES * self.hop_samples

        @exact()
        def encode(piece: np.ndarray, window: Window) -> np.ndarray:
            return self._encode([piece], [len(piece) if window.is_last else None], block, streams)[0]

        return BlockStream(Blocks(_BLOCK_FRAMES), self.hop_samples, encode, self.no_frames)

    def decoder(self) -> BlockDecoder:
        return BlockDecoder(Blocks(_DECODE_FRAMES), self._decode, Streams(1))

    @exact()
    def _decode(self, blocks: Sequence[Block]) -> list[np.ndarray]:
        made: list[np.ndarray] = []
        for rows, filled in in_batches(blocks, self.decode_rows):
            num_frames = len(rows[0].latents)
            batch = np.zeros((len(filled), _DECODE_FRAMES, self.width), np.float32)
            batch[:, :num_frames] = [row.latents for row in filled]
            streams = Streams.joined([row.state for row in filled])
            assert rows[0].window is not None
            ends = [num_frames if rows[0].window.is_last else None] * len(filled)
            samples = numpy(run(self.decoder_layers, self.tensor(batch), ends, streams)[:, :, 0])
            for index, row in enumerate(rows):
                row.state.take(streams, index)
            made += [row[: num_frames * self.hop_samples] for row in samples[: len(rows)]]
        return made

    def quantize(self, latents: Float[Tensor, "batch width time"],
                 num_codebooks: int) -> Int[Tensor, "batch codebooks time"]:
        return self.quantizer.encode(latents, num_codebooks)

    def from_codes(self, codes: Int[Tensor, "batch codebooks time"]) -> Float[Tensor, "batch width time"]:
        return self.quantizer.decode(codes)


def codebooks_of(model: nn.Module, num_codebooks: int) -> Float[Tensor, "codebooks cardinality width"]:
    layers = model.quantizer.layers if hasattr(model.quantizer, "layers") else model.quantizer.quantizers
    return torch.stack([layer.codebook.embed for layer in layers[:num_codebooks]]).float()
