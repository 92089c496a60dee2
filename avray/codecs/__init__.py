"""Codecs by name: what ``codec=`` takes. Importing this opens no weights and no transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from avray.codecs.base import CodecConfig
from avray.codecs.spectral import Spectral


def codec_from_settings(settings: Mapping[str, Any]) -> CodecConfig:
    """``{"name": "spectral", "num_codebooks": 4}`` -> its configuration. ValueError for an unknown name or key."""
    given = dict(settings)
    name = given.pop("name", None)
    if name == "spectral":
        kind, fixed = Spectral, {}
    else:
        raise ValueError(f"codec.name = {name}: it is one of {', '.join(CODEC_NAMES)}.")
    allowed = [f.name for f in fields(kind) if f.init and f.name not in fixed]
    for key in given:
        if key not in allowed:
            raise ValueError(f"codec.{key} is no setting of codec {name}; it takes {', '.join(allowed)}.")
    return kind(**given, **fixed)


CODEC_NAMES = ("spectral",)
