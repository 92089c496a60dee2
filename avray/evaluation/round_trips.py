"""``pipelines/evaluate.py codec=…``: what a codec alone does to recordings, as latents and at 1, 2, 4, 8 codebooks.

The table to look at before any training: bits a second against what is lost, with every round trip to listen to. A
codec whose codes are learnt (``spectral``) learns them on the training split and is heard on held-out rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from avray.codecs import codec_from_settings
from avray.codecs.base import Codec, CodecConfig
from avray.codecs.round_trip import round_trip_table
from avray.config import EvaluateSettings
from avray.data.dataset import read_rows
from avray.devices import device_of
from avray.family import Fitted, Row
from avray.media import Audio, read_audio, write_audio
from avray.metrics.pictures import comparison_png
from avray.mirror import mirrored
from avray.store import Store

MAX_SECONDS = 10.0
FIT_SECONDS = 600.0


def round_trips(settings: EvaluateSettings) -> str:
    """Write WAVs, a page of spectrograms, ``round_trips.md`` and ``summary.json``; returns the folder."""
    with mirrored(settings.run.dir) as folder:
        write_round_trips(folder, settings)
    return settings.run.dir


def write_round_trips(run_dir: Path, settings: EvaluateSettings) -> None:
    """Into a local folder."""
    config = codec_from_settings(settings.codec)
    rows = [row for row in read_rows(settings.data).rows if row.get("audio")]
    held_out = [row for row in rows if row["split"] != "train"] or rows
    chosen = [held_out[i] for i in np.unique(np.linspace(0, len(held_out) - 1, settings.num_samples or 1).astype(int))]
    codec = loaded(config, [row for row in rows if row["split"] == "train"], device_of(settings.device), settings.seed)
    originals = [Audio(sound(row, codec)[None], codec.sample_rate_hz) for row in chosen]
    depths = [0, *(k for k in settings.num_codebooks if k <= codec.num_codebooks)]
    trips = [round_trip_table(codec, original, depths) for original in originals]
    (run_dir / "samples").mkdir(exist_ok=True)
    names = [f"{index:02d}-{Path(row['audio']).stem}" for index, row in enumerate(chosen)]
    for name, original, made in zip(names, originals, trips, strict=True):
        write_audio(run_dir / "samples" / f"{name}.original.wav", original)
        for trip in made:
            write_audio(run_dir / "samples" / f"{name}.{label(trip.codebooks)}.wav", trip.audio)
    shown = list(zip(names, originals, trips, strict=True))[:8]
    comparison_png(run_dir / "spectrograms.png", [(name, None, sound, made[-1].audio) for name, sound, made in shown])
    means = [{"codebooks": column[0].codebooks, "bits_per_second": column[0].bits_per_second,
              "spectral_distance_db": float(np.mean([trip.spectral_distance_db for trip in column]))}
             for column in zip(*trips, strict=True)]
    table = markdown(config, means)
    (run_dir / "round_trips.md").write_text(table, encoding="utf-8")
    summary = {"codec": config.name, "recordings": len(chosen), "round_trips": means}
    Store(str(run_dir)).write("summary.json", json.dumps(summary, indent=2).encode())
    print(table)


def loaded(config: CodecConfig, train: Sequence[Row], device: str, seed: int) -> Codec:
    """The codec, its codebooks learnt from ten minutes of the training rows where it has none of its own."""
    if not config.needs_fit:
        return config.load(device)
    codec, seconds, frames = config.load(device), 0.0, []
    for row in train:
        if seconds < FIT_SECONDS:
            frames += codec.encode_batch([sound(row, codec)])
            seconds += len(frames[-1]) / codec.frame_rate_hz
    fitted: Fitted = config.fit(np.concatenate(frames), seed)
    return config.load(device, fitted)


def sound(row: Row, codec: Codec) -> np.ndarray:
    """At most ten seconds of a row, mono at the codec's rate."""
    return read_audio(row["audio"], start_s=row.get("start_s") or 0.0,
                      duration_s=min(row["duration_s"], MAX_SECONDS), sample_rate_hz=codec.sample_rate_hz).samples[0]


def markdown(config: CodecConfig, means: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"| {config.name} | bits a second | log-spectral distance, dB |", "|---|---|---|"]
    lines += [f"| {label(row['codebooks'])} | {row['bits_per_second']:,.0f} | {row['spectral_distance_db']:.2f} |"
              for row in means]
    return "\n".join(lines) + "\n"


def label(codebooks: int) -> str:
    """0 codebooks are the continuous latents."""
    return "continuous" if codebooks == 0 else f"{codebooks}-codebook{'s' if codebooks > 1 else ''}"
