"""``pipelines/evaluate.py codec=…``: what a codec alone does to recordings, as latents and at 1, 2, 4, 8 codebooks.

The table to look at before any training: bits a second against what is lost, with every round trip to listen to. A
codec whose codes are learnt (``spectral``) learns them on the training split and is heard on held-out rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from avray.codecs import codec_from_settings
from avray.codecs.base import Codec, CodecConfig, decode_all
from avray.config import EvaluateSettings
from avray.data.dataset import read_rows
from avray.data.store import Store
from avray.devices import device_of
from avray.family import Fitted, Row
from avray.media import Audio, read_audio, write_audio
from avray.metrics.pictures import comparison_png
from avray.metrics.spectral import log_mel_distance, log_spectral_distance

MAX_SECONDS = 10.0
FIT_SECONDS = 600.0


@dataclass(frozen=True)
class RoundTrip:
    """Means over the recordings; ``codebooks`` None is the continuous latents."""

    codebooks: int | None
    bits_per_s: float | None
    log_spectral_distance_db: float
    log_mel_distance_db: float


def round_trips(settings: EvaluateSettings) -> str:
    """Write WAVs, a page of spectrograms, ``round_trips.md`` and ``summary.json``; returns the folder."""
    run_dir = Path(settings.run.dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    config = codec_from_settings(settings.codec)
    rows = [row for row in read_rows(settings.data).rows if row.get("audio")]
    held_out = [row for row in rows if row["split"] != "train"] or rows
    chosen = [held_out[i] for i in np.unique(np.linspace(0, len(held_out) - 1, settings.num_samples or 1).astype(int))]
    codec = loaded(config, [row for row in rows if row["split"] == "train"], device_of(settings.device), settings.seed)
    recordings = [sound(row, codec) for row in chosen]
    originals = [Audio(samples[None], codec.sample_rate_hz) for samples in recordings]
    latents = codec.encode_batch(recordings)
    depths = [None, *(k for k in settings.num_codebooks if k <= codec.num_codebooks)]
    table, made = [], {}
    for depth in depths:
        made[depth] = [decoded(codec, frames, depth, len(samples))
                       for frames, samples in zip(latents, recordings, strict=True)]
        table.append(measured(codec, depth, originals, made[depth]))
    names = [f"{index:02d}-{Path(row['audio']).stem}" for index, row in enumerate(chosen)]
    for index, name in enumerate(names):
        write_audio(prepared(run_dir / "samples" / f"{name}.original.wav"), originals[index])
        for depth in depths:
            write_audio(run_dir / "samples" / f"{name}.{label(depth)}.wav", made[depth][index])
    comparison_png(run_dir / "spectrograms.png", [
        (name, None, originals[i], made[depths[-1]][i]) for i, name in enumerate(names[:8])])
    (run_dir / "round_trips.md").write_text(markdown(config, table), encoding="utf-8")
    summary = {"codec": config.name, "recordings": len(chosen), "round_trips": [asdict(row) for row in table]}
    Store(str(run_dir)).write("summary.json", json.dumps(summary, indent=2).encode())
    print(markdown(config, table))
    return str(run_dir)


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


def decoded(codec: Codec, frames: np.ndarray, depth: int | None, num_samples: int) -> Audio:
    if depth is not None:
        codes = codec.to_codes(torch.from_numpy(np.ascontiguousarray(frames.T))[None], depth)
        frames = codec.from_codes(codes)[0].T.cpu().numpy()
    return Audio(decode_all(codec, frames)[None, :num_samples], codec.sample_rate_hz)


def measured(codec: Codec, depth: int | None, originals: Sequence[Audio], made: Sequence[Audio]) -> RoundTrip:
    rate = codec.sample_rate_hz
    pairs = [(a.samples[0], b.samples[0]) for a, b in zip(originals, made, strict=True)]
    bits = None if depth is None else depth * math.log2(codec.cardinality) * codec.frame_rate_hz
    return RoundTrip(depth, bits, float(np.mean([log_spectral_distance(a, b, rate) for a, b in pairs])),
                     float(np.mean([log_mel_distance(a, b, rate) for a, b in pairs])))


def markdown(config: CodecConfig, table: Sequence[RoundTrip]) -> str:
    lines = [f"| {config.name} | bits a second | log-spectral distance, dB | log-mel distance, dB |",
             "|---|---|---|---|"]
    lines += [f"| {label(row.codebooks)} | {'' if row.bits_per_s is None else f'{row.bits_per_s:,.0f}'} | "
              f"{row.log_spectral_distance_db:.2f} | {row.log_mel_distance_db:.2f} |" for row in table]
    return "\n".join(lines) + "\n"


def label(depth: int | None) -> str:
    return "continuous" if depth is None else f"{depth}-codebook{'s' if depth > 1 else ''}"


def prepared(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
