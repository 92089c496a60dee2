"""Clips to vectors. One every two seconds: DCT coefficients, which need no weights, or what a pretrained network of
transformers says of them: VideoMAE and TimeSformer of some frames together, CLIP of each, averaged. Or one for each
picture, 25 a second, where a sound has to fall on the moment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avray.checkpoint.foreign import digest, find_weights, kept_path
from avray.codecs import clip_dct
from avray.encoders.opening import cannot_be_opened, open_network
from avray.media import Video

HUB = "MCG-NJU/videomae-base"
KINDS = ("videomae", "timesformer", "clip", "clip_vision_model")
CLIP_FRAMES = 8
"""That CLIP sees of two seconds; the others' configurations say how many."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, where a folder has no preprocessor_config.json."""


class ClipNetwork:
    """Frames ``[time, size, size, 3]`` at ``sampling_hz`` -> vectors ``[n, width]``, one for every ``num_frames``, the
    last frame held to the end. ``frame_rate_hz`` is of vectors."""

    sampling_hz: float
    frame_rate_hz = 1 / clip_dct.CLIP_S
    sample_rate_hz = 0
    size: int
    num_frames: int
    width: int

    def encode_batch(self, recordings: Sequence[Video]) -> list[np.ndarray]:
        return [np.stack([self.embed(window) for window in windows(clip.frames, self.num_frames)])
                for clip in recordings]

    def embed(self, frames: np.ndarray) -> np.ndarray:
        """``[num_frames, size, size, 3]`` uint8 -> ``[width]`` float32."""
        raise NotImplementedError


def windows(frames: np.ndarray, length: int) -> list[np.ndarray]:
    """In runs of ``length``; a rest under half of it is left out, another is filled up with the last frame."""
    number = max(1, int(len(frames) / length + 0.5))
    short = number * length - len(frames)
    if short > 0:
        frames = np.concatenate([frames, np.repeat(frames[-1:], short, 0)])
    return [frames[i * length : (i + 1) * length] for i in range(number)]


@dataclass(frozen=True)
class ClipNumbers:
    """The encoder of ``avray.codecs.clip_dct``."""

    def column_id(self) -> str:
        return "dct256-v1"

    def load(self, device: torch.device | str) -> ClipNetwork:
        return _Numbers()


class _Numbers(ClipNetwork):
    sampling_hz, size, num_frames, width = (clip_dct.FRAME_RATE_HZ, clip_dct.SIZE, clip_dct.NUM_FRAMES, clip_dct.WIDTH)

    def embed(self, frames: np.ndarray) -> np.ndarray:
        return clip_dct.encode_clip(frames)


@dataclass(frozen=True)
class PictureNumbers:
    """Each picture as 8 x 8 levels of luma, 4 x 4 of each colour difference (BT.601), and 8 x 8 of how much luma
    changed since the picture before: 160 numbers of the size of a pixel (0 to 1)."""

    def column_id(self) -> str:
        return "pictures160-v1"

    def load(self, device: torch.device | str) -> ClipNetwork:
        return _Pictures()


class _Pictures(ClipNetwork):
    sampling_hz = frame_rate_hz = 25.0
    size, num_frames, width = 64, 1, 160

    def encode_batch(self, recordings: Sequence[Video]) -> list[np.ndarray]:
        return [self._numbers(clip.frames) for clip in recordings]

    def _numbers(self, frames: np.ndarray) -> np.ndarray:
        pixels = frames.astype(np.float32) / 255
        luma = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
        blue, red = (pixels[..., 2] - luma) / 1.772, (pixels[..., 0] - luma) / 1.402
        change = np.abs(np.diff(luma, axis=0, prepend=luma[:1]))
        planes = [_cells(luma, 8), _cells(blue, 4), _cells(red, 4), _cells(change, 8)]
        return np.concatenate(planes, 1)


def _cells(plane: np.ndarray, count: int) -> np.ndarray:
    """``[time, size, size]`` -> means of ``count`` x ``count`` cells, ``[time, count²]``."""
    time, size, _ = plane.shape
    return plane.reshape(time, count, size // count, count, size // count).mean((2, 4)).reshape(time, -1)


@dataclass(frozen=True)
class ClipStates:
    """VideoMAE, TimeSformer or CLIP of transformers."""

    path: str = HUB
    """A local folder (config.json and *.safetensors) or a hub name."""
    revision: str | None = None
    download: bool = False
    """Fetch the weights from the hub where they are not at hand."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", kept_path(self.path))

    def column_id(self) -> str:
        """MissingDependency where the weights are not at hand: it is their digest."""
        return f"clip-{digest(self._weights())}"

    def _weights(self) -> Path:
        return find_weights(self.path, "family.video_encoder.path", HUB, self.revision, self.download)

    def load(self, device: torch.device | str) -> ClipNetwork:
        """ValueError for a network that is none of the three, CheckpointError for one that lacks weights."""
        from transformers import AutoConfig, AutoModel, CLIPVisionModelWithProjection

        folder, setting = self._weights(), f"family.video_encoder.path = {self.path}"
        try:
            kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        except OSError as error:
            raise cannot_be_opened(setting, error) from error
        if kind not in KINDS:
            raise ValueError(f"{setting}: a {kind} does not see clips; take VideoMAE, TimeSformer or CLIP.")
        model = open_network(CLIPVisionModelWithProjection if kind.startswith("clip") else AutoModel, folder, setting)
        front = folder / "preprocessor_config.json"
        settings = json.loads(front.read_text()) if front.is_file() else {}
        return _States(model.to(device), kind.startswith("clip"), settings)


class _States(ClipNetwork):
    """The mean of a network's last states; of CLIP, the mean of the frames' projected vectors."""

    def __init__(self, model: Any, is_clip: bool, settings: dict[str, Any]) -> None:
        self.model, self.is_clip, config = model, is_clip, model.config
        self.size = config.image_size
        self.num_frames = CLIP_FRAMES if is_clip else config.num_frames
        self.sampling_hz = self.num_frames / clip_dct.CLIP_S
        self.width = config.projection_dim if is_clip else config.hidden_size
        self.mean = torch.tensor(settings.get("image_mean", MEAN))[:, None, None]
        self.deviation = torch.tensor(settings.get("image_std", DEVIATION))[:, None, None]

    @torch.inference_mode()
    def embed(self, frames: np.ndarray) -> np.ndarray:
        pixels = (torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255 - self.mean) / self.deviation
        pixels = pixels.to(next(self.model.parameters()).device)
        if self.is_clip:
            vector = self.model(pixel_values=pixels).image_embeds.mean(0)
        else:
            vector = self.model(pixel_values=pixels[None]).last_hidden_state[0].mean(0)
        return vector.float().cpu().numpy()
