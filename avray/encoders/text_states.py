"""Texts as a frozen text encoder of transformers reads them (T5, BERT and the like): one vector a token.

As a column they are worked out once and kept in the cache; a request's are worked out as it comes, by the same network.
Each text goes through alone, so its vectors do not depend on the texts beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avray.checkpoint.foreign import digest, find_weights, kept_path
from avray.encoders.opening import cannot_be_opened, open_network

HUB = "google/flan-t5-base"


@dataclass(frozen=True)
class TextStates:
    """The last hidden states of an encoder, at most ``max_tokens`` a text."""

    path: str = HUB
    """A local folder (config.json, *.safetensors and a tokeniser) or a hub name."""
    max_tokens: int = 128
    revision: str | None = None
    download: bool = False
    """Fetch the weights from the hub where they are not at hand."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"family.text_encoder.max_tokens must be at least 1, got {self.max_tokens}.")
        object.__setattr__(self, "path", kept_path(self.path))

    def column_id(self) -> str:
        """MissingDependency where the weights are not at hand: it is their digest."""
        return f"text{self.max_tokens}-{digest(self._weights())}"

    def _weights(self) -> Path:
        return find_weights(self.path, "family.text_encoder.path", HUB, self.revision, self.download)

    def load(self, device: torch.device | str) -> TextNetwork:
        from transformers import AutoConfig, AutoModel, AutoTokenizer, T5EncoderModel

        folder, setting = self._weights(), f"family.text_encoder.path = {self.path}"
        try:
            tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise cannot_be_opened(setting, error, "config.json, *.safetensors and a tokeniser") from error
        kind = T5EncoderModel if config.model_type == "t5" else AutoModel
        return TextNetwork(open_network(kind, folder, setting, spare="pooler").to(device), tokens, self.max_tokens)


class TextNetwork:
    """A ``family.Network`` for texts: ``encode_batch(texts)`` -> ``[tokens, width]`` of each."""

    sample_rate_hz, frame_rate_hz = 0, 0.0

    def __init__(self, model: Any, tokens: Any, max_tokens: int) -> None:
        self.model, self.tokens, self.max_tokens = model, tokens, max_tokens
        self.width = int(model.config.hidden_size)

    @torch.inference_mode()
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:  # type: ignore[override]
        device, found = next(self.model.parameters()).device, []
        for text in texts:
            ids = self.tokens(text, truncation=True, max_length=self.max_tokens, return_tensors="pt").to(device)
            found.append(self.model(**ids).last_hidden_state[0].float().cpu().numpy())
        return found

    def stream(self) -> Any:
        raise ValueError("A text is no stream.")
