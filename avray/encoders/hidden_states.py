"""Frames of meaning from a pretrained speech encoder of transformers: Wav2Vec2, HuBERT, WavLM and their like.

Recordings go through in blocks of 20 s with 2 s of context on both sides, so that memory is bounded and a stream is
the whole; these networks attend everywhere, so where the blocks lie is part of what they say. All frames are kept,
320 samples each at 16 kHz: the sound is padded by what the first convolutions would lose.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avray.checkpoint.foreign import digest, find_weights, kept_path
from avray.codecs.blocks import Blocks, BlockStream, Window
from avray.encoders.opening import open_network

HUB = "facebook/wav2vec2-base"
BLOCK_S, CONTEXT_S = 20.0, 2.0


@dataclass(frozen=True)
class HiddenStates:
    """``layer`` 0 is what the first transformer layer gets, n what the n-th gives, -1 the last one's output."""

    path: str = HUB
    """A local folder (config.json and *.safetensors) or a hub name."""
    layer: int = -1
    revision: str | None = None
    download: bool = False
    """Fetch the weights from the hub where they are not at hand."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", kept_path(self.path))

    def column_id(self) -> str:
        """MissingDependency where the weights are not at hand: it is their digest."""
        return f"hidden{self.layer}-{digest(self._weights())}"

    def _weights(self) -> Path:
        return find_weights(self.path, "family.encoder.path", HUB, self.revision, self.download)

    def load(self, device: torch.device | str) -> HiddenNetwork:
        """ValueError for a network without convolutions over samples, or a layer it has not."""
        from transformers import AutoModel

        folder = self._weights()
        model = open_network(AutoModel, folder, f"family.encoder.path = {self.path}", spare="masked_spec_embed")
        if not hasattr(model.config, "conv_stride"):
            raise ValueError(f"family.encoder.path = {self.path}: a {model.config.model_type} does not read samples; "
                             "take Wav2Vec2, HuBERT, WavLM or one like them.")
        layers = model.config.num_hidden_layers
        if not -layers - 1 <= self.layer <= layers:
            raise ValueError(f"family.encoder.layer = {self.layer}, but the network has {layers} layers.")
        front = folder / "preprocessor_config.json"
        settings = json.loads(front.read_text()) if front.is_file() else {}
        return HiddenNetwork(model.to(device), self.layer, settings)


class HiddenNetwork:
    """A ``family.Network`` whose frames are hidden states ``[time, width]``."""

    def __init__(self, model: Any, layer: int, settings: dict[str, Any]) -> None:
        self.model, self.layer = model, layer
        config = model.config
        self.sample_rate_hz = int(settings.get("sampling_rate", 16_000))
        self.normalise = bool(settings.get("do_normalize", True))
        self.hop_samples = int(np.prod(config.conv_stride))
        self.frame_rate_hz = self.sample_rate_hz / self.hop_samples
        self.width = config.hidden_size
        reach, hop = 1, 1
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            reach, hop = reach + (kernel - 1) * hop, hop * stride
        self.lost = reach - self.hop_samples
        context = round(CONTEXT_S * self.frame_rate_hz)
        self.blocks = Blocks(round(BLOCK_S * self.frame_rate_hz), context, context)

    def encode_batch(self, recordings: Sequence[np.ndarray]) -> list[np.ndarray]:
        frames = []
        for samples in recordings:
            stream = self.stream()
            frames.append(np.concatenate([stream.push(samples), stream.finish()]))
        return frames

    def stream(self) -> BlockStream:
        return BlockStream(self.blocks, self.hop_samples, self._run, np.zeros((0, self.width), np.float32))

    @torch.inference_mode()
    def _run(self, samples: np.ndarray, window: Window) -> np.ndarray:
        if self.normalise:
            samples = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
        before = self.lost // 2
        after = self.lost - before + -len(samples) % self.hop_samples
        padded = torch.from_numpy(np.pad(samples, (before, after)).astype(np.float32))
        device = next(self.model.parameters()).device
        states = self.model(padded[None].to(device), output_hidden_states=True).hidden_states[self.layer]
        frames = states[0].float().cpu().numpy()
        return frames[window.before : len(frames) - window.after]
