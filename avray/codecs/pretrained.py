"""Codecs with weights, from a hub name or a local folder: EnCodec, Mimi, DAC and X-Codec through ``transformers``,
SpeechTokenizer through its own package.

Nothing is fetched unless ``download`` says so, nothing is unpickled (safetensors only, and Meta's ``.th`` files and
SpeechTokenizer's ``.pt`` as plain tensors), and a checkpoint that lacks a weight is refused, where ``transformers``
would fill it with noise. Weight norm is folded into the weights. The name of a column comes from the weights
themselves, so that the same ones in another folder find the same cache.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from avray.checkpoint.foreign import digest, find_weights, kept_path
from avray.codecs.bfloat16 import check_convolutions
from avray.codecs.dac import Dac
from avray.codecs.encodec import Encodec24kHz
from avray.codecs.encodec_48khz import Encodec48kHz
from avray.codecs.encodec_import import read_meta_checkpoint
from avray.codecs.mimi import Mimi
from avray.codecs.network import NetworkCodec
from avray.codecs.speechtokenizer import SpeechTokenizer, read_speechtokenizer
from avray.codecs.xcodec import Xcodec
from avray.errors import CheckpointError, MissingDependency
from avray.family import Fitted
from avray.progress import no_weight_bars


@dataclass(frozen=True)
class Kind:
    """What stands behind a codec's name."""

    hub: str
    model_type: str
    sample_rate_hz: int
    codec: Callable[[nn.Module, int, torch.device, torch.dtype], NetworkCodec]
    num_added: int = 0
    """Codebooks that the codec puts before the network's own."""
    folder: str = "."
    """Of the repository, where config and weights lie."""
    weights: str = "*.safetensors"


KINDS = {
    "encodec_24khz": Kind("facebook/encodec_24khz", "encodec", 24_000, Encodec24kHz),
    "encodec_48khz": Kind("facebook/encodec_48khz", "encodec", 48_000, Encodec48kHz, num_added=1),
    "mimi": Kind("kyutai/mimi", "mimi", 24_000, Mimi),
    "dac_16khz": Kind("descript/dac_16khz", "dac", 16_000, Dac),
    "dac_24khz": Kind("descript/dac_24khz", "dac", 24_000, Dac),
    "dac_44khz": Kind("descript/dac_44khz", "dac", 44_100, Dac),
    "xcodec": Kind("hf-audio/xcodec-hubert-general-balanced", "xcodec", 16_000, Xcodec),
    "speechtokenizer": Kind("fnlp/SpeechTokenizer", "speechtokenizer", 16_000, SpeechTokenizer,
                            folder="speechtokenizer_hubert_avg", weights="*.pt"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Pretrained:
    """A codec whose weights somebody trained."""

    name: str
    """One of ``KINDS``."""
    path: str | None = None
    """A local folder (config.json and *.safetensors), Meta's ``.th`` file, or another hub name."""
    revision: str | None = None
    """Of the hub repository: a branch, tag or commit."""
    download: bool = False
    """Fetch the weights from the hub where they are not at hand."""
    num_codebooks: int | None = None
    """The first so many; None for all."""
    bandwidth_kbps: float | None = None
    """Instead of num_codebooks: as many as fit into it."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the network but its quantiser; bfloat16 is refused on a CPU whose convolutions are wrong in it."""

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise ValueError(f"codec.name = {self.name}: the codecs with weights are {', '.join(KINDS)}.")
        if self.path is not None:
            object.__setattr__(self, "path", kept_path(self.path))
        if self.dtype not in DTYPES:
            raise ValueError(f"codec.dtype = {self.dtype}: it is one of {', '.join(DTYPES)}.")
        if self.num_codebooks is not None and self.bandwidth_kbps is not None:
            raise ValueError("codec.num_codebooks and codec.bandwidth_kbps say the same thing: give one of them.")

    @property
    def needs_fit(self) -> bool:
        return False

    def fit(self, latents: np.ndarray, seed: int = 0) -> Fitted:
        raise ValueError(f"codec {self.name} has codes of its own: there is nothing to fit.")

    def column_id(self) -> str:
        """MissingDependency where the weights are not at hand: it is their digest."""
        return f"{self.name}-{digest(self.weights(), KINDS[self.name].weights)}-{self.dtype}"

    def weights(self) -> Path:
        """The folder or ``.th`` file. MissingDependency, naming the fix, where there is none."""
        kind = KINDS[self.name]
        return find_weights(self.path or kind.hub, "codec.path", kind.hub, self.revision, self.download, kind.weights,
                            kind.folder)

    def load(self, device: torch.device | str = "cpu", fitted: Fitted | None = None) -> NetworkCodec:
        kind, weights = KINDS[self.name], self.weights()
        if weights.suffix == ".th":
            if kind.model_type != "encodec":
                raise ValueError(f"codec.path = {weights}: Meta's .th files hold EnCodec, not {self.name}.")
            model = read_meta_checkpoint(weights)
        elif kind.model_type == "speechtokenizer":
            model = read_speechtokenizer(weights)
        else:
            model = open_network(weights, kind.model_type)
        self._check_rate(model.config, weights)
        num_codebooks = self._codebooks(model.config)
        fold_weight_norm(model)
        model = model.eval().requires_grad_(False).to(torch.device(device))
        for name, part in model.named_children():
            if name != "quantizer":
                part.to(DTYPES[self.dtype])
        if self.dtype == "bfloat16" and torch.device(device).type == "cpu":
            check_convolutions(model)
        return kind.codec(model, num_codebooks, torch.device(device), DTYPES[self.dtype])

    def _check_rate(self, config: Any, weights: Path) -> None:
        rate_hz = config.sample_rate if hasattr(config, "sample_rate") else config.sampling_rate
        if rate_hz != KINDS[self.name].sample_rate_hz:
            raise ValueError(f"codec.name = {self.name}, but the network in {weights} works at {rate_hz} Hz: give the "
                             f"name of that one ({', '.join(KINDS)}).")

    def _codebooks(self, config: Any) -> int:
        added = KINDS[self.name].num_added
        available = (config.n_codebooks if hasattr(config, "n_codebooks") else config.num_quantizers) + added
        asked = self.num_codebooks
        if self.bandwidth_kbps is not None:
            each = config.frame_rate * math.log2(config.codebook_size) / 1000
            asked = int(self.bandwidth_kbps / each + 1e-6) + added
            if asked == added:
                raise ValueError(f"codec.bandwidth_kbps = {self.bandwidth_kbps}: one codebook takes {each:.3g} kbps.")
        if asked is not None and not 1 <= asked <= available:
            raise ValueError(f"codec {self.name} has {available} codebooks, but {asked} are asked for.")
        return available if asked is None else asked


def fold_weight_norm(model: nn.Module) -> None:
    """Put the product of direction and length in their place, so that it is worked out once."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")


def open_network(folder: Path, model_type: str) -> nn.Module:
    """A network of transformers with every weight in place. MissingDependency, ValueError or CheckpointError, saying
    what is wrong with the folder."""
    import transformers
    from safetensors import SafetensorError

    models = {"encodec": transformers.EncodecModel, "mimi": transformers.MimiModel, "dac": transformers.DacModel,
              "xcodec": transformers.XcodecModel, "speecht5_hifigan": transformers.SpeechT5HifiGan,
              "fastspeech2_conformer_hifigan": transformers.FastSpeech2ConformerHifiGan}
    settings = folder / "config.json"
    if not settings.is_file() or not list(folder.glob("*.safetensors")):
        raise MissingDependency(f"codec.path = {folder}: it takes a config.json and *.safetensors (pickled weights are "
                                "not read).")
    found = json.loads(settings.read_text()).get("model_type")
    if found != model_type:
        raise ValueError(f"codec.path = {folder}: it holds a network of type {found}, not {model_type}.")
    try:
        with no_weight_bars():
            model, info = models[model_type].from_pretrained(folder, output_loading_info=True, local_files_only=True,
                                                             use_safetensors=True, dtype=torch.float32)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder}: the weights cannot be read ({error}).") from error
    lacking = sorted(info["missing_keys"])
    if lacking:
        raise CheckpointError(f"{folder}: {len(lacking)} weights are missing, {lacking[0]} among them.")
    return model
