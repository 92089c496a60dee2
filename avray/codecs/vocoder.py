"""A HiFi-GAN of ``transformers`` in Griffin-Lim's place: log-mel frames in, as the vocoder learnt to take them, its
sound out (Kong, Kim and Bae, 2020).

Latents are ``[bands, time]``: log-mel frames by the vocoder's own settings, taken from its folder's
``preprocessor_config.json`` where it has one (that of ``SpeechT5FeatureExtractor``), else from ``codec.*``, else those
of SpeechT5 and of ESPnet's FastSpeech 2: 80 bands of Slaney's from 80 to 7,600 Hz, of magnitudes under a Hann window of
1,024, logarithms to the base of ten. Frame t is centred on sample ``hop * t``, the ends mirrored. The network itself
normalises them, by the mean and scale in its weights, as its config says.

Nothing is fetched unless ``download`` says so, nothing is unpickled, and a checkpoint that lacks a weight is refused.
The name of its column comes from its weights: a model trained with one vocoder is never opened with another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from avray.checkpoint.foreign import digest, find_weights, kept_path
from avray.codecs.blocks import Blocks, BlockStream, Window
from avray.codecs.network import NetworkCodec, Rates, exact, mono, numpy
from avray.codecs.pretrained import open_network
from avray.codecs.rvq import ResidualKMeans, ResidualQuantizer
from avray.codecs.together import Block, BlockDecoder
from avray.errors import MissingDependency
from avray.family import Fitted, FrameStream

HUB = "microsoft/speecht5_hifigan"
RATES_HZ = {"speecht5_hifigan": 16_000, "fastspeech2_conformer_hifigan": 22_050}
"""Where nobody says it; FastSpeech 2's config does not: that of LJ Speech."""
_ENCODE_FRAMES, _DECODE_FRAMES = 128, 32


@dataclass(frozen=True)
class Vocoder:
    """``SpeechT5HifiGan`` or ``FastSpeech2ConformerHifiGan``. None is what its folder says, or its kind's."""

    path: str = HUB
    """A local folder (config.json and *.safetensors) or a hub name."""
    revision: str | None = None
    """Of the hub repository: a branch, tag or commit."""
    download: bool = False
    """Fetch the weights from the hub where they are not at hand."""
    sample_rate_hz: int | None = None
    window_samples: int | None = None
    lowest_hz: float | None = None
    highest_hz: float | None = None
    floor: float | None = None
    """Below it a magnitude counts as it."""
    log: Literal["log10", "ln"] = "log10"
    num_codebooks: int = 8
    """Stages of residual k-means."""
    cardinality: int = 1024
    """Centroids a stage, at most."""
    frames_per_centroid: int = 256
    """What it takes to place one."""
    name: str = field(default="vocoder", init=False)

    def __post_init__(self) -> None:
        for setting in ("sample_rate_hz", "window_samples", "highest_hz", "floor", "num_codebooks", "cardinality",
                        "frames_per_centroid"):
            if getattr(self, setting) is not None and getattr(self, setting) <= 0:
                raise ValueError(f"codec.{setting} = {getattr(self, setting)} must be above 0.")
        if self.log not in ("log10", "ln"):
            raise ValueError(f"codec.log = {self.log}: it is log10 or ln.")
        object.__setattr__(self, "path", kept_path(self.path))

    @property
    def needs_fit(self) -> bool:
        return True

    def fit(self, latents: Float[np.ndarray, "time width"], seed: int = 0) -> Fitted:
        return ResidualKMeans(self.num_codebooks, self.cardinality, self.frames_per_centroid).fit(latents, seed)

    def column_id(self) -> str:
        """MissingDependency where the weights are not at hand: it is their digest."""
        folder, config = self._opened()
        return f"vocoder-{digest(folder)}-{self._mel(folder, config).key()}"

    def _opened(self) -> tuple[Path, dict[str, Any]]:
        """Its folder and what its config says. ValueError for a network that is no vocoder."""
        folder = find_weights(self.path, "codec.path", HUB, self.revision, self.download)
        settings = folder / "config.json"
        if not settings.is_file():
            raise MissingDependency(f"codec.path = {folder}: it takes a folder with config.json and *.safetensors.")
        config = json.loads(settings.read_text())
        if config.get("model_type") not in RATES_HZ:
            raise ValueError(f"codec.path = {folder}: it holds a network of type {config.get('model_type')}, and the "
                             f"vocoders are {', '.join(RATES_HZ)}.")
        return folder, config

    def load(self, device: torch.device | str = "cpu", fitted: Fitted | None = None) -> VocoderCodec:
        """ValueError for a network that is no vocoder, or mel settings that are not its own."""
        folder, config = self._opened()
        model = open_network(folder, config["model_type"])
        mel = self._mel(folder, {**model.config.to_dict(), **config})
        return VocoderCodec(model.eval().requires_grad_(False).to(device), mel, fitted, torch.device(device))

    def _mel(self, folder: Path, config: dict[str, Any]) -> MelSettings:
        front = folder / "preprocessor_config.json"
        said = json.loads(front.read_text()) if front.is_file() else {}
        rate = _agreed("sample_rate_hz", RATES_HZ[config["model_type"]], self.sample_rate_hz,
                       said.get("sampling_rate"), config.get("sampling_rate"))
        hop = math.prod(config["upsample_rates"])
        if "hop_length" in said and said["hop_length"] * rate // 1000 != hop:
            raise ValueError(f"{front}: its hop of {said['hop_length']} ms is not the network's of {hop} samples.")
        window = said["win_length"] * rate // 1000 if "win_length" in said else None
        mel = MelSettings(int(rate), hop, int(_agreed("bands", 80, said.get("num_mel_bins"), config["model_in_dim"])),
                          int(_agreed("window_samples", 1024, self.window_samples, window)),
                          _agreed("lowest_hz", 80.0, self.lowest_hz, said.get("fmin")),
                          _agreed("highest_hz", 7600.0, self.highest_hz, said.get("fmax")),
                          _agreed("floor", 1e-10, self.floor, said.get("mel_floor")), self.log)
        if not 0 <= mel.lowest_hz < mel.highest_hz <= mel.sample_rate_hz / 2 or mel.window_samples < hop:
            raise ValueError(f"codec: bands from {mel.lowest_hz:g} to {mel.highest_hz:g} Hz at {mel.sample_rate_hz} Hz "
                             f"under a window of {mel.window_samples} samples, {hop} apart, cannot be.")
        return mel


def _agreed(name: str, default: float, *said: float | None) -> float:
    """What all who say something say. ValueError where two differ."""
    values = [value for value in said if value is not None]
    for value in values:
        if value != values[0]:
            raise ValueError(f"codec.{name} = {values[0]:g}, but the vocoder's own files say {value:g}.")
    return values[0] if values else default


@dataclass(frozen=True)
class MelSettings:
    """Of the frames that a vocoder takes."""

    sample_rate_hz: int
    hop_samples: int
    bands: int
    window_samples: int
    lowest_hz: float
    highest_hz: float
    floor: float
    log: str

    def key(self) -> str:
        return "-".join(f"{value:g}" if isinstance(value, float) else str(value) for value in vars(self).values())

    def basis(self) -> np.ndarray:
        from transformers.audio_utils import mel_filter_bank

        return mel_filter_bank(self.window_samples // 2 + 1, self.bands, self.lowest_hz, self.highest_hz,
                               self.sample_rate_hz, norm="slaney", mel_scale="slaney")


class VocoderCodec(NetworkCodec):
    """A ``Codec`` (see ``base``)."""

    def __init__(self, model: nn.Module, mel: MelSettings, fitted: Fitted | None, device: torch.device) -> None:
        self.quantizer = ResidualQuantizer.of(fitted, device)
        rates = Rates(mel.sample_rate_hz, mel.hop_samples, mel.bands, self.quantizer.cardinality)
        super().__init__(rates, self.quantizer.num_codebooks, device, torch.float32)
        self.model, self.mel = model, mel
        self.window = torch.hann_window(mel.window_samples, device=device)
        self.basis = torch.tensor(mel.basis(), dtype=torch.float32, device=device)
        reach = math.ceil(mel.window_samples / 2 / mel.hop_samples)
        self.encode_blocks = Blocks(_ENCODE_FRAMES, reach, reach)
        reach = frames_in_reach(model.config)
        self.decode_blocks = Blocks(_DECODE_FRAMES, reach, reach)

    def stream(self) -> FrameStream:
        return BlockStream(self.encode_blocks, self.hop_samples, self._encode, self.no_frames)

    @torch.inference_mode()
    def _encode(self, samples: np.ndarray, window: Window) -> np.ndarray:
        """Beyond the ends of the recording its mirror image; elsewhere what mirrors is thrown away."""
        half, num_frames = self.mel.window_samples // 2, -(-len(samples) // self.hop_samples)
        padded = np.pad(mono(samples), (half, half + self.hop_samples), mode="reflect")
        frames = self.tensor(padded).unfold(0, self.mel.window_samples, self.hop_samples)[:num_frames]
        bands = (torch.fft.rfft(frames * self.window).abs() @ self.basis).clamp_min(self.mel.floor)
        latents = numpy(bands.log10() if self.mel.log == "log10" else bands.log())
        return latents[window.before : len(latents) - window.after]

    def decoder(self) -> BlockDecoder:
        return BlockDecoder(self.decode_blocks, self._decode)

    @exact()
    def _decode(self, blocks: Sequence[Block]) -> list[np.ndarray]:
        return self.decode_windows(blocks, lambda latents: numpy(self.model(self.tensor(latents))))

    def quantize(self, latents: Float[Tensor, "batch width time"],
                 num_codebooks: int) -> Int[Tensor, "batch codebooks time"]:
        return self.quantizer.encode(latents, num_codebooks)

    def from_codes(self, codes: Int[Tensor, "batch codebooks time"]) -> Float[Tensor, "batch width time"]:
        return self.quantizer.decode(codes)


def frames_in_reach(config: Any) -> int:
    """Frames on each side that a sample depends on. ValueError where a frame would not become ``hop`` samples."""
    reach, rate = 3.0, 1
    for stride, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
        if kernel < stride or (kernel - stride) % 2:
            raise ValueError(f"codec.path: an upsampling of {stride} by a kernel of {kernel} does not keep time.")
        reach += kernel / 2 / stride / rate
        rate *= stride
        kinds = zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
        reach += max((size - 1) / 2 * sum(dilation + 1 for dilation in dilations) for size, dilations in kinds) / rate
    return math.ceil(reach + 3 / rate)
