"""SpeechTokenizer: EnCodec's network with an LSTM that runs both ways, the first codebook taught by HuBERT's units.

Latents are the encoder's output before quantisation, ``[1024, time]`` at 50 Hz of 16 kHz; codes ``[8, time]`` of 1024
each, the first of them semantic (Zhang et al. 2024). The network is that of its own package, which asks for torchaudio:
an extra. Because its LSTM runs over all it is given, the codes of a recording depend on how long it is: here, as with
X-Codec, blocks of 20 s with 2 s around each *are* the definition, for a file as for a stream; up to 22 s it is the very
encoding of the whole.
"""

from __future__ import annotations

import json
import pickle  # noqa: TID251 (for the name of its error: nothing is unpickled)
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from avray.codecs.blocks import Blocks
from avray.codecs.dac import Dac
from avray.codecs.network import NetworkCodec, Rates
from avray.codecs.rvq import ResidualQuantizer
from avray.errors import CheckpointError, MissingDependency

_BLOCK_S, _CONTEXT_S = 20, 2
_DECODE_BLOCKS = Blocks(32, 100, 10)
"""Frames: two seconds before a block warm the decoder's LSTM, its convolutions see less than ten frames ahead."""


class SpeechTokenizer(Dac):
    """A ``Codec`` over the package's own ``SpeechTokenizer``."""

    def __init__(self, model: nn.Module, num_codebooks: int, device: torch.device, dtype: torch.dtype) -> None:
        config = model.config
        rates = Rates(config.sample_rate, config.hop_length, config.hidden_size, config.codebook_size)
        NetworkCodec.__init__(self, rates, num_codebooks, device, dtype)
        self.model = model
        codebooks = [layer.codebook.detach().float() for layer in model.quantizer.vq.layers[:num_codebooks]]
        self.quantizer = ResidualQuantizer(torch.stack(codebooks))
        block, context = (round(seconds * self.frame_rate_hz) for seconds in (_BLOCK_S, _CONTEXT_S))
        self.encode_blocks, self.decode_blocks = Blocks(block, context, context), _DECODE_BLOCKS

    def quantize(self, latents: Float[Tensor, "batch width time"],
                 num_codebooks: int) -> Int[Tensor, "batch codebooks time"]:
        return self.quantizer.encode(latents, num_codebooks)

    def from_codes(self, codes: Int[Tensor, "batch codebooks time"]) -> Float[Tensor, "batch width time"]:
        return self.quantizer.decode(codes)


def read_speechtokenizer(folder: Path) -> nn.Module:
    """The package's model with the weights of a folder (``config.json`` and one ``.pt`` of plain tensors).
    MissingDependency without the package, CheckpointError for weights that are not its."""
    try:
        from speechtokenizer.model import SpeechTokenizer as Network
    except ImportError as error:
        raise MissingDependency(f"codec speechtokenizer needs its own package, which cannot be imported ({error}): "
                                "pip install 'avray[speechtokenizer]'.") from error
    files, settings = sorted(folder.glob("*.pt")), folder / "config.json"
    if len(files) != 1 or not settings.is_file():
        raise MissingDependency(f"codec.path = {folder}: SpeechTokenizer takes a config.json and one .pt file.")
    given = json.loads(settings.read_text())
    try:
        state = torch.load(files[0], map_location="cpu", weights_only=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its weight norm is torch's old one
            model = Network(given)
            model.load_state_dict(state)
            for module in model.modules():
                if hasattr(module, "weight_g"):
                    nn.utils.remove_weight_norm(module)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{files[0]}: these are not the weights of a SpeechTokenizer ({error}).") from error
    hop, width = int(model.downsample_rate), given["dimension"]
    model.config = SimpleNamespace(sample_rate=model.sample_rate, hop_length=hop, hidden_size=width,
                                   codebook_size=given["codebook_size"], n_codebooks=model.n_q,
                                   frame_rate=model.sample_rate / hop)
    return model
