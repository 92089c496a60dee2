"""Codecs by name: what ``codec=`` takes. Importing this opens no weights and no transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from avray.codecs.base import CodecConfig
from avray.codecs.pretrained import KINDS, Pretrained
from avray.codecs.spectral import Spectral
from avray.codecs.vocoder import Vocoder

CODEC_NAMES = ("spectral", "vocoder", *KINDS)


def codec_from_settings(settings: Mapping[str, Any]) -> CodecConfig:
    """``{"name": "spectral", "num_codebooks": 4}`` -> its configuration. ValueError for an unknown name or key."""
    name = settings.get("name")
    if name not in CODEC_NAMES:
        raise ValueError(f"codec.name = {name}: it is one of {', '.join(CODEC_NAMES)}.")
    kind = {"spectral": Spectral, "vocoder": Vocoder}.get(name, Pretrained)
    given = {key: value for key, value in settings.items() if key != "name" or kind is Pretrained}
    allowed = [field.name for field in fields(kind) if field.init]
    for key in given:
        if key not in allowed:
            raise ValueError(f"codec.{key} is no setting of codec {name}; it takes {', '.join(allowed)}.")
    return kind(**given)
