"""What a classifier, or a model of text and sound, says of what was generated. Each is given, none is fetched."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from jaxtyping import Float

from avray.errors import MissingDependency
from avray.family import Media, Row
from avray.media import Audio

Probabilities = Float[np.ndarray, " labels"]
Others = Float[np.ndarray, " target_labels"]  # of a number of its own: two numbers are refused with a sentence


def kl_divergence(generated: Probabilities, target: Others) -> float:
    """Σ target × ln(target / generated) in nats, both brought to a sum of 1 and held above 1e-6, as AudioGen and
    AudioLDM report it. ValueError for two numbers of labels."""
    if generated.shape != target.shape:
        raise ValueError(f"{len(generated)} and {len(target)} labels do not compare.")
    ours, theirs = (np.maximum(np.asarray(p, np.float64) / np.sum(p), 1e-6) for p in (generated, target))
    return float((theirs * np.log(theirs / ours)).sum())


@dataclass
class LabelDivergence:
    """A Metric: the mean divergence between what ``classify`` says of a sound and of its target."""

    classify: Callable[[Audio], Probabilities]
    classifier: str
    total: float = 0.0
    agreed: int = 0
    count: int = 0

    def update(self, generated: Media, target: Media | None, row: Row) -> None:
        if isinstance(generated, Audio) and isinstance(target, Audio):
            ours, theirs = self.classify(generated), self.classify(target)
            self.total += kl_divergence(ours, theirs)
            self.agreed += int(ours.argmax() == theirs.argmax())
            self.count += 1

    def merge(self, other: LabelDivergence) -> None:
        self.total += other.total
        self.agreed += other.agreed
        self.count += other.count

    def value(self) -> float:
        return self.total / self.count if self.count else math.nan

    def details(self) -> dict[str, object]:
        agreement = self.agreed / self.count if self.count else math.nan
        return {"unit": "nats", "classifier": self.classifier, "count": self.count, "agreement": agreement}


@dataclass
class TextAudioSimilarity:
    """A Metric: the mean cosine between a sound's vector and its text's (``row["text"]``), as CLAP's score is made."""

    embed_audio: Callable[[Audio], np.ndarray]
    embed_text: Callable[[str], np.ndarray]
    embedding: str
    total: float = 0.0
    count: int = 0

    def update(self, generated: Media, target: Media | None, row: Row) -> None:
        if isinstance(generated, Audio) and row.get("text"):
            sound, text = self.embed_audio(generated), self.embed_text(str(row["text"]))
            self.total += float(sound @ text / max(np.linalg.norm(sound) * np.linalg.norm(text), 1e-12))
            self.count += 1

    def merge(self, other: TextAudioSimilarity) -> None:
        self.total += other.total
        self.count += other.count

    def value(self) -> float:
        return self.total / self.count if self.count else math.nan

    def details(self) -> dict[str, object]:
        return {"unit": "cosine", "embedding": self.embedding, "count": self.count}


def clap_similarity(folder: str | Path) -> Callable[[], TextAudioSimilarity]:
    """The similarity by a CLAP in a local folder of transformers'. MissingDependency where it holds none."""
    import torch
    from transformers import ClapModel, ClapProcessor

    try:
        model = ClapModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        processor: Any = ClapProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise MissingDependency(f"{folder} holds no CLAP of transformers': give a folder with config.json, "
                                "*.safetensors, its tokeniser and its feature extractor.") from error
    rate = processor.feature_extractor.sampling_rate

    @torch.inference_mode()
    def audio(sound: Audio) -> np.ndarray:
        samples = soxr.resample(sound.samples.mean(0), sound.sample_rate_hz, rate)
        inputs = processor(audio=samples, sampling_rate=rate, return_tensors="pt")
        return vectors(model.get_audio_features(**inputs))

    @torch.inference_mode()
    def text(words: str) -> np.ndarray:
        return vectors(model.get_text_features(**processor(text=[words], return_tensors="pt")))

    def vectors(found: Any) -> np.ndarray:
        return getattr(found, "pooler_output", found)[0].numpy()

    return lambda: TextAudioSimilarity(audio, text, f"CLAP {Path(folder).name}")
