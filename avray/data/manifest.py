"""Whatever a person has lying there, as rows: read, resolved, probed, named. Every row is used or rejected, and a
rejected one says why.

Nothing is converted and nothing is written but the memo of what was probed. Which forms there are is in
``formats.FORMATS``, which names they give their fields in ``fields.ALIASES``.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import fsspec

from avray.data.fields import MEDIA_FIELDS, Roots, Unusable, normalise
from avray.data.formats import FORMATS, detect, forced
from avray.data.probing import MediaFile, Probed, probe_all
from avray.data.sources import GroupBy, RawRow, Source
from avray.data.transcripts import TIMED_SUFFIXES
from avray.errors import DataError
from avray.family import Row
from avray.media import AudioInfo, Limits, is_url
from avray.store import Store

_VARYING = re.compile(r"'[^']*'|\S*[/\d]\S*")
SLACK_S = 0.1
"""How far a span may reach beyond its file before it is rejected; durations in manifests are rounded."""


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used: line ``line`` of ``source``, or with line 0 that file itself."""

    source: str
    line: int
    reason: str


@dataclass(frozen=True)
class Duplicate:
    """A row whose media and span are, byte for byte, those of an earlier row."""

    id: str
    same_as: str


@dataclass
class Manifest:
    """A data set's rows in the order they stand there.

    Each row has ``id``, ``group`` and, where there is media, absolute paths, ``start_s``, ``duration_s``,
    ``sample_rate_hz`` and ``channels`` (of ``audio``), ``audio_hash``, ``target_audio_hash``, ``video_hash``, besides
    what the input carried; from a list also its line, as ``manifest_line``.
    """

    path: str
    format: str
    rows: list[Row] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    duplicates: list[Duplicate] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    """The list that each row was read from, by its id."""

    def source_of(self, row: Row) -> str:
        """The list a row stands in, or its id where it stands in none."""
        name = str(row["id"])
        return self.sources.get(name, name) if "manifest_line" in row else name

    def write_rejects(self, path: str | os.PathLike[str]) -> None:
        """One JSON object a line: source, line, reason."""
        lines = "".join(json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in self.rejects)
        folder, name = os.path.split(os.path.abspath(path))
        Store(folder).write(name, lines.encode("utf-8", "surrogateescape"))

    def enforce(self, max_reject_fraction: float, rejects_path: str | os.PathLike[str] | None = None) -> None:
        """DataError when a larger share of the rows than that was rejected."""
        total = len(self.rows) + len(self.rejects)
        if not self.rejects or len(self.rejects) <= max_reject_fraction * total:
            return
        first = "; ".join(f"{where(reject)}: {reject.reason.rstrip('.')}" for reject in self.rejects[:3])
        listed = f" All are listed in {rejects_path}." if rejects_path is not None else ""
        raise DataError(
            f"{len(self.rejects)} of {total} rows of {self.path} cannot be used ({len(self.rejects) / total:.1%}, and "
            f"data.max_reject_fraction is {max_reject_fraction:.1%}): {first}.{listed}"
        )


def where(reject: Reject) -> str:
    """``list.jsonl line 7``, or the file's name."""
    return f"{reject.source} line {reject.line}" if reject.line else reject.source


def load_manifest(
    path: str | os.PathLike[str], *, texts: str | None = None, format: str = "auto",
    allowed_roots: Sequence[str] = (), limits: Limits | None = None, max_samples: int | None = None,
    memo_path: str | None = None, num_threads: int = 8, group_by: GroupBy = "talk",
) -> Manifest:
    """Read a data set in any of the forms of ``formats.FORMATS``, as it is.

    Args:
        path: a folder, a manifest, one recording, or a URL of one of these.
        texts: a second folder of ``.txt`` files or transcripts with the recordings' names, or one transcript of them.
        format: which form it is; ``auto`` looks.
        allowed_roots: folders or URLs, other than the manifest's own folder, that its paths may lead into.
        limits: bounds on each media file.
        max_samples: rows to take, the first in order; the others are not looked at.
        memo_path: a JSON file that remembers headers and hashes.
        group_by: what rows of a transcript with times are grouped by: the whole recording, or who speaks.

    Raises:
        DataError: there is nothing to read, or a table cannot be read at all.
        ValueError: ``format`` does not exist.
    """
    source = replace(_locate(os.fspath(path), texts), group_by=group_by)
    format, source = detect(source) if format == "auto" else (format, forced(source, format))
    manifest = Manifest(os.fspath(path), format)
    roots = Roots.of(source.store.root, tuple(allowed_roots))
    rows = _parse(FORMATS[format](source), roots, manifest.rejects, max_samples)
    media = [MediaFile(row[name], "video" if name == "video" else "audio")
             for _, row in rows for name in MEDIA_FIELDS if name in row]
    probed = probe_all(media, limits or Limits(), memo_path, num_threads)
    spans, sources = [], []
    for raw, row in rows:
        try:
            spans.append(_fill(row, probed))
            manifest.rows.append(row)
            sources.append(raw.source)
        except Unusable as error:
            manifest.rejects.append(Reject(raw.source, raw.line, str(error)))
    if not manifest.rows and not manifest.rejects:
        raise DataError(f"{path} holds no rows.")
    _name(manifest.rows, spans, roots)
    manifest.sources = {row["id"]: source for row, source in zip(manifest.rows, sources, strict=True)}
    _group(manifest.rows, roots)
    manifest.duplicates = _duplicates(manifest.rows)
    return manifest


def _locate(path: str, texts: str | None) -> Source:
    if texts and texts.lower().endswith(TIMED_SUFFIXES):
        folder, name = posixpath.split(texts if is_url(texts) else os.path.abspath(texts))
        if not Store(folder).exists(name):
            raise DataError(f"{texts} does not exist; set data.texts to a transcript or a folder of texts.")
        return replace(_locate(path, None), texts=Store(folder), text_names=(name,))
    text_store = Store(texts if is_url(texts) else os.path.abspath(texts)) if texts else None
    path = path.rstrip("/") if is_url(path) else os.path.abspath(path)
    fs, inner = fsspec.core.url_to_fs(path)
    if fs.isdir(inner):
        return Source(Store(path), texts=text_store)
    if not fs.exists(inner):
        raise DataError(f"{path} does not exist; set data.path to a folder, a manifest or a recording.")
    folder, name = posixpath.split(path)
    return Source(Store(folder), (name,), text_store)


def _parse(raw_rows: Iterator[RawRow], roots: Roots, rejects: list[Reject],
           max_samples: int | None) -> list[tuple[RawRow, Row]]:
    """Rows under our names, with an id that nobody has yet; the others become rejects."""
    rows: list[tuple[RawRow, Row]] = []
    lines: dict[str, RawRow] = {}
    for raw in raw_rows:
        if max_samples is not None and len(rows) == max_samples:
            break
        try:
            if raw.reason:
                raise Unusable(raw.reason)
            row = normalise(raw.fields, roots)
            if "id" in row and (earlier := lines.setdefault(row["id"], raw)) is not raw:
                raise Unusable(f"id {row['id']!r} is that of {where(Reject(earlier.source, earlier.line, ''))} already")
            if raw.line:
                row["manifest_line"] = raw.line
            rows.append((raw, row))
        except Unusable as error:
            rejects.append(Reject(raw.source, raw.line, str(error)))
    return rows


def _fill(row: Row, probed: dict[MediaFile, Probed | str]) -> str:
    """What the media's headers say, and the span they bound; the span's name, none for a whole file. Unusable where a
    file cannot be used."""
    main: Probed | None = None
    for name in MEDIA_FIELDS:
        if name not in row:
            continue
        found = probed[MediaFile(row[name], "video" if name == "video" else "audio")]
        if isinstance(found, str):
            raise Unusable(found)
        row[f"{name}_hash"] = found.hash
        main = main or found
    if main is None:
        return ""
    if isinstance(main.info, AudioInfo):
        row["sample_rate_hz"], row["channels"] = main.info.sample_rate_hz, main.info.channels
    seconds, start_s = main.info.duration_s, row.get("start_s", 0.0)
    stop_s = start_s + row["duration_s"] if "duration_s" in row else seconds
    if start_s >= seconds or stop_s > seconds + SLACK_S:
        raise Unusable(f"its span from {start_s:g} to {stop_s:g} s does not lie in the {seconds:.3f} s of the file")
    row["start_s"], row["duration_s"] = start_s, min(stop_s, seconds) - start_s
    return "" if start_s == 0 and stop_s >= seconds - SLACK_S else f"@{start_s:.3f}-{stop_s:.3f}"


def _name(rows: Sequence[Row], spans: Sequence[str], roots: Roots) -> None:
    """An id for each row without one: the path without its suffix, and the span where it is not the whole file. It
    does not change when rows come after it."""
    owners: dict[str, str | None] = {row["id"]: None for row in rows if "id" in row}
    for row, span in zip(rows, spans, strict=True):
        if "id" in row:
            continue
        path = next((row[name] for name in MEDIA_FIELDS if name in row), None)
        label = roots.label(path) if path else f"line-{row.get('manifest_line', 0):07d}"
        name = base = posixpath.splitext(label)[0] + span
        if owners.get(base, label) != label:  # a.wav and a.flac
            name = base = label + span
        count = 1
        while name in owners:
            count += 1
            name = f"{base}#{count}"
        row["id"] = name
        owners[name] = label


def _group(rows: Sequence[Row], roots: Roots) -> None:
    """A group for each row without one: its media file, shared by all rows whose media are linked by equal bytes (one
    pair's output is another's input), so that no sound stands on two sides of a split."""
    leader: dict[str, str] = {}

    def find(digest: str) -> str:
        while leader.setdefault(digest, digest) != digest:
            leader[digest] = leader[leader[digest]]
            digest = leader[digest]
        return digest

    hashes = [[row[f"{name}_hash"] for name in MEDIA_FIELDS if name in row] for row in rows]
    for first, *others in filter(None, hashes):
        for other in others:
            leader[find(other)] = find(first)
    names: dict[str, str] = {}
    for row, digests in zip(rows, hashes, strict=True):
        if "group" in row and digests:
            names.setdefault(find(digests[0]), row["group"])
    for row, digests in zip(rows, hashes, strict=True):
        if "group" not in row:
            path = next((row[name] for name in MEDIA_FIELDS if name in row), None)
            default = posixpath.splitext(roots.label(path))[0] if path else row["id"]
            row["group"] = names.setdefault(find(digests[0]), default) if digests else default


def _duplicates(rows: Sequence[Row]) -> list[Duplicate]:
    seen: dict[tuple[Any, ...], str] = {}
    duplicates = []
    for row in rows:
        digests = tuple(row.get(f"{name}_hash") for name in MEDIA_FIELDS)
        if any(digests):
            first = seen.setdefault((*digests, row["start_s"], row["duration_s"]), row["id"])
            if first != row["id"]:
                duplicates.append(Duplicate(row["id"], first))
    return duplicates


def count_reasons(rejects: Sequence[Reject]) -> dict[str, int]:
    """How often each kind of reason was given, the commonest first; paths, quotations and numbers left out."""
    kinds = Counter(_VARYING.sub("…", reject.reason.split(" (")[0]).rstrip(".") for reject in rejects)
    return dict(kinds.most_common())
