"""One HTML page that says how good a model is: its loss beside the baselines', its figures, and what it made,
to be seen and heard beside what was wanted.

Notable: no script, no template engine, nothing from elsewhere; all links are relative, so the folder can be
copied or served as it is. Everything that came from data (names, texts) is escaped.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avray.family import Media
from avray.media import Audio, Video, write_audio, write_video
from avray.metrics.pictures import comparison_png, curve_png

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.5em 0}th,td{text-align:left;padding:.25em .9em .25em
0;border-bottom:1px solid #ddd}
td.n{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}audio{width:290px;height:34px}
.best{font-weight:600}.small{color:#666;font-size:13px}figure{margin:.3em 1em .3em 0;display:inline-block}
blockquote{white-space:pre-wrap;background:#f6f6f6;margin:.3em 0;padding:.5em .8em}"""


@dataclass(frozen=True)
class ReportExample:
    """One row of the page. ``figures`` are this example's own."""

    id: str
    prompt: Media | None
    target: Media | None
    generated: Media
    figures: Mapping[str, float] | None = None


def write_report(run_dir: str | Path, summary: Mapping[str, Any], examples: Sequence[ReportExample], *,
                 details: Mapping[str, Mapping[str, Any]] | None = None,
                 curves: Mapping[str, Sequence[tuple[float, float]]] | None = None,
                 title: str = "Evaluation") -> Path:
    """Write ``report.html``, and beside it ``samples/`` (WAV, MP4), ``spectrograms.png`` (a page of all
    sounds, target beside prediction) and, with ``curves``, ``loss.png``. Returns the page's path.

    ``summary`` is ``summary.json``'s content: ``validation_loss``, ``baselines`` and ``metrics`` (name →
    value) get tables of their own, every other plain value a line at the end. ``details`` is what a metric
    must be quoted with (a Metric's ``details()``); ``curves`` is name → (step, value), drawn over the
    baselines. A file of an earlier report is written over.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    parts = [f"<h1>{_escaped(title)}</h1>", _losses(summary)]
    parts.append(_metrics(summary.get("metrics", {}), details or {}))
    parts.append(_tasks(summary.get("tasks", {})))
    if curves:
        curve_png(run_dir / "loss.png", curves, summary.get("baselines", {}))
        parts.append('<h2>Training</h2><img src="loss.png" alt="Loss over steps, baselines as dashed lines">')
    parts.append(_examples(run_dir, examples))
    parts.append(_rest(summary))
    page = ('<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>{_escaped(title)}</title><style>{_STYLE}</style>{''.join(parts)}</html>\n")
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _losses(summary: Mapping[str, Any]) -> str:
    """The model and every baseline, best first; the last column compares each baseline with the model."""
    loss = summary.get("validation_loss", summary.get("best_validation_loss"))
    if loss is None:
        return ""
    rows = [("this model", float(loss), "")]
    for name, value in summary.get("baselines", {}).items():
        below = 100 * (1 - loss / value) if value > 0 and math.isfinite(value) else math.nan
        compared = f"the model is {abs(below):.1f} % {'below' if below >= 0 else 'above'}"
        rows.append((f"baseline: {name}", float(value), "" if math.isnan(below) else compared))
    rows.sort(key=lambda row: (math.isnan(row[1]), row[1]))
    return "<h2>Validation loss</h2>" + _table([
        f"<tr{' class=best' if not compared and name == 'this model' else ''}><td>{_escaped(name)}</td>"
        f"<td class=n>{_number(value)}</td><td>{compared}</td></tr>" for name, value, compared in rows])


def _metrics(metrics: Mapping[str, float], details: Mapping[str, Mapping[str, Any]]) -> str:
    if not metrics:
        return ""
    rows = []
    for name, value in metrics.items():
        quoted = details.get(name, {})
        beside = ", ".join(f"{key.replace('_', ' ')} {_number(item)}" for key, item in quoted.items())
        rows.append(f"<tr><td>{_escaped(name)}</td><td class=n>{_number(value)}</td>"
                    f"<td class=small>{_escaped(beside)}</td></tr>")
    return "<h2>Figures</h2>" + _table(rows)


def _tasks(tasks: Mapping[str, Mapping[str, float]]) -> str:
    """A line a figure and a column a task."""
    if not tasks:
        return ""
    names = dict.fromkeys(name for figures in tasks.values() for name in figures)
    rows = ["<tr><th></th>" + "".join(f"<th>{_escaped(task)}</th>" for task in tasks) + "</tr>"]
    rows += [f"<tr><td>{_escaped(name)}</td>" + "".join(
        f"<td class=n>{_number(figures[name]) if name in figures else ''}</td>" for figures in tasks.values()) + "</tr>"
        for name in names]
    return "<h2>By task</h2>" + _table(rows)


def _examples(run_dir: Path, examples: Sequence[ReportExample]) -> str:
    if not examples:
        return ""
    parts = ["<h2>Examples</h2>"]
    heard = [example for example in examples if isinstance(example.generated, Audio)]
    if heard:
        comparison_png(run_dir / "spectrograms.png",
                       [(example.id, example.prompt, example.target, example.generated) for example in heard])
        parts.append('<img src="spectrograms.png" alt="Spectrograms, one row an example">')
    for index, example in enumerate(examples):
        stem = f"{index:03d}-{re.sub(r'[^A-Za-z0-9_.-]+', '_', example.id)[-60:]}"
        figures = ", ".join(f"{name} {_number(value)}" for name, value in (example.figures or {}).items())
        parts.append(f"<h3>{_escaped(example.id)} <span class=small>{_escaped(figures)}</span></h3>")
        for role in ("prompt", "target", "generated"):
            media = getattr(example, role)
            if media is not None:
                parts.append(f"<figure><figcaption class=small>{role}</figcaption>"
                             f"{_shown(run_dir, f'{stem}.{role}', media)}</figure>")
    return "".join(parts)


def _shown(run_dir: Path, stem: str, media: Media) -> str:
    """Write one medium and return the element that plays it."""
    if isinstance(media, str):
        return f"<blockquote>{_escaped(media)}</blockquote>"
    folder = run_dir / "samples"
    folder.mkdir(exist_ok=True)
    if isinstance(media, Video):
        write_video(folder / f"{stem}.mp4", media)
        return f'<video controls preload="none" src="samples/{stem}.mp4"></video>'
    if not media.samples.size or not np.isfinite(media.samples).all():
        return f"<blockquote>{'not finite' if media.samples.size else 'empty'}: nothing to play</blockquote>"
    write_audio(folder / f"{stem}.wav", media)
    return (f'<audio controls preload="none" src="samples/{stem}.wav"></audio> '
            f"<span class=small>{media.seconds:.1f} s, {media.sample_rate_hz:,} Hz</span>")


def _rest(summary: Mapping[str, Any]) -> str:
    rows = []
    for key, value in summary.items():
        if key in ("validation_loss", "baselines", "metrics", "tasks") or value is None:
            continue
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {_number(item)}" for name, item in value.items())
        rows.append(f"<tr><td>{_escaped(key.replace('_', ' '))}</td><td>{_escaped(_number(value))}</td></tr>")
    return "<h2>Run</h2>" + _table(rows) if rows else ""


def _table(rows: Sequence[str]) -> str:
    return f"<table>{''.join(rows)}</table>"


def _number(value: Any) -> str:
    """Four significant digits for what was measured, all of them for what was counted."""
    if isinstance(value, np.floating):
        value = float(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)
