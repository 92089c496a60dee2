"""What a data set holds, for a person to read before hours are spent on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from avray.data.manifest import Manifest, count_reasons, where
from avray.data.splits import SplitChoice
from avray.family import Row

_FIELDS = ("audio", "target_audio", "video", "text", "output", "embedding")


def describe(manifest: Manifest, rows: Sequence[Row] | None = None,
             choice: SplitChoice | None = None) -> dict[str, Any]:
    """A data set's figures, fit for JSON. ``rows`` are the manifest's with their splits, ``choice`` says how they came
    to them."""
    rows = manifest.rows if rows is None else rows
    report: dict[str, Any] = {
        "path": manifest.path, "format": manifest.format,
        "rows": {"used": len(manifest.rows), "rejected": len(manifest.rejects)},
        "hours": _hours(manifest.rows),
        "longest_s": max((row.get("duration_s", 0.0) for row in manifest.rows), default=0.0),
        "groups": len({row["group"] for row in manifest.rows}),
        "fields": _counts(name for row in manifest.rows for name in _FIELDS if row.get(name)),
        "tasks": _counts(row["task"] for row in manifest.rows if row.get("task")),
        "dimensions": _counts(f"{row.get('task') or 'no task'}: {_dimensions(row['embedding'])}"
                              for row in manifest.rows if row.get("embedding")),
        "sample_rates_hz": _counts(row["sample_rate_hz"] for row in manifest.rows if "sample_rate_hz" in row),
        "channels": _counts(row["channels"] for row in manifest.rows if "channels" in row),
        "duplicates": len(manifest.duplicates),
        "first_duplicates": [f"{pair.id} = {pair.same_as}" for pair in manifest.duplicates[:3]],
        "reject_reasons": count_reasons(manifest.rejects),
        "first_rejects": [f"{where(reject)}: {reject.reason}" for reject in manifest.rejects[:5]],
    }
    if rows and all("split" in row for row in rows):
        by_split: dict[str, list[Row]] = {}
        for row in rows:
            by_split.setdefault(row["split"], []).append(row)
        report["split_by"] = f"{choice.by} ({choice.reason})" if choice else ""
        report["splits"] = {name: {"rows": len(part), "hours": _hours(part), "groups": len({r["group"] for r in part})}
                            for name, part in sorted(by_split.items())}
        report["hours_in_no_split"] = max(0.0, report["hours"] - _hours(rows))
        report["recordings_on_two_sides"] = _straddling(rows)
    return report


def render(report: dict[str, Any], width: int | None = None) -> str:
    """The report as text, a table for the splits."""
    console = Console(width=width or 100, color_system=None)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    rows = report["rows"]
    table.add_row("data", f"{report['path']} (read as {report['format']})")
    table.add_row("rows", f"{rows['used']:,} used, {rows['rejected']:,} rejected")
    table.add_row("media", f"{_time(report['hours'])}, the longest {_time(report['longest_s'] / 3600)}")
    table.add_row("groups", f"{report['groups']:,}")
    labels = {"fields": "with", "tasks": "tasks", "dimensions": "embeddings", "sample_rates_hz": "rates in Hz",
              "channels": "channels"}
    for name, label in labels.items():
        if report[name]:
            table.add_row(label, ", ".join(f"{key} ({count:,})" for key, count in report[name].items()))
    table.add_row("duplicates", _listed(report["duplicates"], report["first_duplicates"]))
    for reason, count in list(report["reject_reasons"].items())[:10]:
        table.add_row(f"rejected {count:,}", reason)
    for line in report["first_rejects"]:
        table.add_row("", line)
    if "splits" in report:
        if report["split_by"]:
            table.add_row("split by", report["split_by"])
        for name, split in report["splits"].items():
            table.add_row(name, f"{split['rows']:,} rows, {_time(split['hours'])}, {split['groups']:,} groups")
        table.add_row("in no split", f"{_time(report['hours_in_no_split'])} (guards)")
        table.add_row("on two sides", f"{report['recordings_on_two_sides']} recordings in pieces that overlap")
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _dimensions(embedding: Sequence[Any]) -> str:
    if isinstance(embedding[0], list):
        return f"{len(embedding[0])} numbers, in sequences"
    return f"{len(embedding)} numbers"


def _hours(rows: Iterable[Row]) -> float:
    return sum(row.get("duration_s", 0.0) for row in rows) / 3600


def _time(hours: float) -> str:
    minutes = hours * 60
    return f"{hours:.1f} h" if hours >= 2 else f"{minutes:.1f} min" if minutes >= 2 else f"{minutes * 60:.1f} s"


def _counts(values: Iterable[Any]) -> dict[str, int]:
    return {str(value): count for value, count in Counter(values).most_common()}


def _listed(count: int, first: Sequence[str]) -> str:
    return f"{count:,}" + (f": {', '.join(first)}{' …' if count > len(first) else ''}" if first else "")


def _straddling(rows: Iterable[Row]) -> int:
    """Recordings (by their bytes) of which some second is on two sides: a group's fault, or a copy's in another."""
    spans: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        for name in ("audio_hash", "target_audio_hash", "video_hash"):
            if name in row:
                start_s = row["start_s"]
                spans.setdefault(row[name], []).append((start_s, start_s + row["duration_s"], row["split"]))
    count = 0
    for parts in spans.values():
        parts.sort()
        ends: dict[str, float] = {}
        for start_s, stop_s, split in parts:
            if any(end > start_s + 1e-6 for other, end in ends.items() if other != split):
                count += 1
                break
            ends[split] = max(stop_s, ends.get(split, 0.0))
    return count
