"""X-Codec: DAC's acoustic encoder beside a HuBERT, so that the first codebooks carry meaning.

Latents are both encoders' outputs joined and projected, before quantisation, ``[1024, time]`` at 50 Hz of 16 kHz;
codes ``[codebooks, time]`` of 1024 each (Ye et al. 2024). HuBERT attends to all it is given and normalises over it,
so the codes of a recording depend on how long it is: here blocks of 20 s, with 2 s around each that are thrown away,
*are* the definition, for a file as for a stream; up to 22 s it is the very encoding of the whole.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from avray.codecs.blocks import Blocks
from avray.codecs.dac import Dac, decode_blocks, frames_in_reach
from avray.codecs.encodec import codebooks_of
from avray.codecs.network import NetworkCodec, Rates
from avray.codecs.rvq import ResidualQuantizer

_BLOCK_S, _CONTEXT_S = 20, 2


class Xcodec(Dac):
    """A ``Codec`` over an ``XcodecModel`` without weight norm."""

    def __init__(self, model: nn.Module, num_codebooks: int, device: torch.device, dtype: torch.dtype) -> None:
        config = model.config
        rates = Rates(config.sample_rate, config.hop_length, config.hidden_size, config.codebook_size)
        NetworkCodec.__init__(self, rates, num_codebooks, device, dtype)
        self.model = model
        self.quantizer = ResidualQuantizer(codebooks_of(model, num_codebooks))
        block, context = (round(seconds * self.frame_rate_hz) for seconds in (_BLOCK_S, _CONTEXT_S))
        self.encode_blocks = Blocks(block, context, context)
        self.decode_blocks = decode_blocks(frames_in_reach(config.acoustic_model_config.downsampling_ratios[::-1]))

    def encode_frames(self, samples: Float[Tensor, "batch 1 samples"]) -> Float[Tensor, "batch width time"]:
        """As ``XcodecModel.encode`` up to its quantiser."""
        model = self.model
        semantic = model.encoder_semantic(model._extract_semantic_features(samples).transpose(1, 2))
        acoustic = model.acoustic_encoder(samples)
        if acoustic.shape[2] != semantic.shape[2]:
            acoustic = model.acoustic_encoder(nn.functional.pad(samples, (model.pad, model.pad)))
        return model.fc(torch.cat([acoustic, semantic], dim=1).transpose(1, 2)).transpose(1, 2)

    def decode_frames(self, latents: Float[Tensor, "batch width time"]) -> Float[Tensor, "batch 1 samples"]:
        return self.model.acoustic_decoder(self.model.fc2(latents.transpose(1, 2)).transpose(1, 2))

    def quantize(self, latents: Float[Tensor, "batch width time"],
                 num_codebooks: int) -> Int[Tensor, "batch codebooks time"]:
        return self.quantizer.encode(latents, num_codebooks)

    def from_codes(self, codes: Int[Tensor, "batch codebooks time"]) -> Float[Tensor, "batch width time"]:
        return self.quantizer.decode(codes)
