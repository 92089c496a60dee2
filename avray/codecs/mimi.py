"""Mimi: EnCodec's network with a small transformer in its middle, at 12.5 frames a second.

Latents are the encoder's output before quantisation, ``[512, time]``; codes ``[codebooks, time]``, the first one
semantic (distilled from WavLM), the others residual and acoustic (Défossez et al. 2024, "Moshi"). All of it is causal:
convolutions keep their last inputs and the transformer its keys and values from block to block, so blocks give what
the whole gives. The last frame is filled with silence, as Kyutai's own code does it.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from avray.codecs.blocks import Blocks, BlockStream, Window
from avray.codecs.network import NetworkCodec, Rates, exact, numpy
from avray.codecs.seanet import Convolution, Streams, layers_of, run
from avray.family import FrameStream

_ENCODE_FRAMES = 16
_DECODE_FRAMES = 4
"""0.32 s: what a listener waits for."""


class Mimi(NetworkCodec):
    """A ``Codec`` over a ``MimiModel``."""

    def __init__(self, model: nn.Module, num_codebooks: int, device: torch.device, dtype: torch.dtype) -> None:
        config = model.config
        rates = Rates(config.sampling_rate, config.frame_size, config.hidden_size, config.codebook_size)
        super().__init__(rates, num_codebooks, device, dtype)
        self.model = model
        self.encoder = layers_of(model.encoder.encoder_seanet)
        self.decoder_layers = layers_of(model.decoder.decoder_seanet)
        self.downsample = [Convolution(model.encoder.downsample.conv, False, model.encoder.downsample.pad_mode)]
        self.ratio = model.decoder.upsample.conv.stride[0]

    def stream(self) -> FrameStream:
        streams, shrinking, attention = Streams(1), Streams(1), Attention(self.model.encoder.encoder_transformer)

        @exact()
        def encode(samples: np.ndarray, window: Window) -> np.ndarray:
            filled = np.zeros(((window.stop - window.start) * self.hop_samples, 1), np.float32)
            filled[: len(samples), 0] = samples
            frames = attention(run(self.encoder, self.tensor(filled)[None], [None], streams))
            return numpy(run(self.downsample, frames, [None], shrinking)[0])

        return BlockStream(Blocks(_ENCODE_FRAMES), self.hop_samples, encode, self.no_frames)

    def decoder(self) -> FrameStream:
        streams, attention = Streams(1), Attention(self.model.decoder.decoder_transformer)
        before = self.tensor(np.zeros((1, self.width, 0), np.float32))

        @exact()
        def decode(latents: np.ndarray, window: Window) -> np.ndarray:
            nonlocal before
            joined = torch.cat([before, self.tensor(latents.T)[None]], dim=2)
            frames = self.model.decoder.upsample(joined)[:, :, before.shape[2] * self.ratio :]
            before = joined[:, :, -1:]
            samples = run(self.decoder_layers, attention(frames.transpose(1, 2)), [None], streams)
            return numpy(samples[0, :, 0])

        return BlockStream(Blocks(_DECODE_FRAMES), 1, decode, self.no_samples)

    def quantize(self, latents: Float[Tensor, "batch width time"],
                 num_codebooks: int) -> Int[Tensor, "batch codebooks time"]:
        return self.model.quantizer.encode(latents, num_codebooks).transpose(0, 1)

    def from_codes(self, codes: Int[Tensor, "batch codebooks time"]) -> Float[Tensor, "batch width time"]:
        with exact():
            return self.model.quantizer.decode(codes)


class Attention:
    """A Mimi transformer that remembers as many frames as it looks back on."""

    def __init__(self, transformer: nn.Module) -> None:
        from transformers import DynamicCache

        self.transformer = transformer
        self.cache = DynamicCache(config=transformer.config)

    def __call__(self, frames: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        return self.transformer(frames, past_key_values=self.cache, use_cache=True).last_hidden_state
