"""Opens a frozen network of transformers with every weight in place, or says what is wrong with its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from avray.errors import CheckpointError, MissingDependency
from avray.progress import no_weight_bars


def cannot_be_opened(setting: str, error: Exception, takes: str = "config.json and *.safetensors") -> MissingDependency:
    """``setting`` is its key and value."""
    return MissingDependency(f"{setting} cannot be opened ({error}): it takes a folder with {takes}.")


def open_network(kind: Any, folder: Path, setting: str, spare: str = "") -> Any:
    """A network of class ``kind`` from its folder, float32, frozen. MissingDependency where it cannot be opened,
    CheckpointError where a weight is missing (other than those with ``spare`` in their names), which transformers
    would fill with noise."""
    try:
        with no_weight_bars():
            model, info = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True,
                                               use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise cannot_be_opened(setting, error) from error
    lacking = sorted(key for key in info["missing_keys"] if not spare or spare not in key)
    if lacking:
        raise CheckpointError(f"{folder}: {len(lacking)} weights are missing, {lacking[0]} among them.")
    return model.eval().requires_grad_(False)
