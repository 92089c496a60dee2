"""Spectrograms and curves as PNGs, and as pixels for TensorBoard.

Notable: one fixed colour scale, -100 to -20 dB relative to a full-scale sine, for every picture, so that a
model that is too quiet looks too quiet, beside its target and from one step to the next. Figures are made
without pyplot: it keeps global state and every figure, and threads share it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8

from avray.family import Media
from avray.media import Audio, Video
from avray.metrics.spectral import decibels, magnitudes, mel, mel_bands, window_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RANGE_DB = (-100.0, -20.0)
_NUM_BANDS = 96  # more would leave bands without a bin at 16 kHz
_MOST_FRAMES = 4000
_TICKS_HZ = (125, 500, 1000, 2000, 4000, 8000, 16_000)


def mel_spectrogram_db(audio: Audio) -> Float[np.ndarray, "frames bands"]:
    """96 mel bands in dB, of all channels mixed to mono; at most 4,000 frames, further apart in a longer
    sound."""
    mono = np.nan_to_num(audio.samples.mean(axis=0)) if audio.samples.size else np.zeros(0, np.float32)
    window = window_for(audio.sample_rate_hz)
    hop = max(window // 4, len(mono) // _MOST_FRAMES)
    bands = mel_bands(audio.sample_rate_hz, window, _NUM_BANDS)
    return decibels(np.square(magnitudes(mono, window, hop)) @ bands)


def spectrogram_png(path: str | Path, audio: Audio, title: str = "") -> None:
    """One spectrogram with its axes."""
    _spectrogram(audio, title).savefig(path)


def spectrogram_rgb(audio: Audio, title: str = "") -> UInt8[np.ndarray, "height width 3"]:
    """The same picture as pixels, for ``Logger.image``."""
    figure = _spectrogram(audio, title)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]


def comparison_png(path: str | Path, rows: Sequence[tuple[str, Media | None, Media | None, Media]]) -> None:
    """A page with a row for each (label, prompt, target, generated): target beside generated, all on one time
    axis, one frequency axis and one colour scale. Text is shown as text; a column that no row has is left
    out."""
    if not rows:
        raise ValueError("There is nothing to compare: give at least one row.")
    named = zip(("prompt", "target", "generated"), list(zip(*rows, strict=True))[1:], strict=True)
    columns = [(name, media) for name, media in named if any(item is not None for item in media)]
    sounds = [item for _, media in columns for item in media if isinstance(item, Audio)]
    seconds = max((sound.seconds for sound in sounds), default=1.0)
    top_hz = max((sound.sample_rate_hz / 2 for sound in sounds), default=1.0)
    figure = _figure(1.0 + 4.0 * len(columns), 0.7 + 1.7 * len(rows))
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True)
    image = None
    for column, (name, media) in enumerate(columns):
        grid[0][column].set_title(name, fontsize=10)
        grid[-1][column].set_xlabel("s", fontsize=8)
        for row, item in enumerate(media):
            image = _panel(grid[row][column], item, seconds, top_hz) or image
    for row, (label, *_) in enumerate(rows):
        grid[row][0].set_ylabel(_shortened(label) + "\nHz", fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=grid, label="dB", fraction=0.02, pad=0.01)
    figure.savefig(path)


def curve_png(path: str | Path, curves: Mapping[str, Sequence[tuple[float, float]]],
              baselines: Mapping[str, float] | None = None, title: str = "", label: str = "loss") -> None:
    """Curves of (step, value), and each baseline as a labelled line. The axis is logarithmic where all is
    above 0 and spans more than a factor of 20. Values that are not finite leave a gap."""
    figure = _figure(8.0, 4.5)
    axes = figure.subplots()
    values = [value for curve in curves.values() for _, value in curve] + list((baselines or {}).values())
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) > 20 * min(finite):
        axes.set_yscale("log")
    for name, curve in curves.items():
        points = np.asarray(curve, dtype=float).reshape(-1, 2)
        marker = "o" if len(points) < 30 else ""
        axes.plot(points[:, 0], points[:, 1], label=name, marker=marker, markersize=3, linewidth=1.4)
    for name, value in (baselines or {}).items():
        if math.isfinite(value):
            axes.axhline(value, linestyle="--", linewidth=1, color="grey")
            axes.annotate(f"{name} {value:.3g}", (0.995, value), xycoords=("axes fraction", "data"),
                          ha="right", va="bottom", fontsize=8, color="dimgrey")
    axes.set(xlabel="step", ylabel=label, title=title)
    axes.grid(alpha=0.25)
    if curves:
        axes.legend(fontsize=8)
    figure.savefig(path)


def _figure(width_in: float, height_in: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width_in, height_in), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _spectrogram(audio: Audio, title: str) -> Figure:
    figure = _figure(8.0, 3.0)
    axes = figure.subplots()
    image = _panel(axes, audio, audio.seconds, audio.sample_rate_hz / 2)
    axes.set(xlabel="s", ylabel="Hz", title=title)
    figure.colorbar(image, ax=axes, label="dB", pad=0.01)
    return figure


def _panel(axes: Axes, media: Media | None, seconds: float, top_hz: float) -> Any:
    """Fill one panel; the image, where it is one. The y axis is in mel with ticks in Hz."""
    axes.set_xlim(0, max(seconds, 1e-3))
    axes.tick_params(labelsize=7)
    if not isinstance(media, Audio):
        axes.set_yticks([])
        text = {type(None): "none", Video: "video"}.get(type(media)) or textwrap.fill(str(media)[:400], 50)
        axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=8, transform=axes.transAxes,
                  parse_math=False)
        return None
    image = axes.imshow(mel_spectrogram_db(media).T, origin="lower", aspect="auto", cmap="magma",
                        vmin=_RANGE_DB[0], vmax=_RANGE_DB[1],
                        extent=(0, media.seconds, 0, mel(media.sample_rate_hz / 2)))
    axes.set(xlim=(0, max(seconds, 1e-3)), ylim=(0, mel(top_hz)), facecolor="0.9")
    ticks = [tick for tick in _TICKS_HZ if tick <= top_hz]
    axes.set_yticks([mel(tick) for tick in ticks], [f"{tick:,}" for tick in ticks])
    return image


def _shortened(label: str) -> str:
    return label if len(label) <= 24 else "…" + label[-23:]
