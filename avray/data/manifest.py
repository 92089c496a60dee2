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
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

from avray.data.fields import MEDIA_FIELDS, Roots, Unusable, normalise
from avray.data.formats import FORMATS, detect, forced
from avray.data.naming import SPAN, Duplicate, Naming
from avray.data.packed import Rows
from avray.data.probing import MediaFile, Probed, Prober
from avray.data.sources import GroupBy, RawRow, Source
from avray.data.transcripts import TIMED_SUFFIXES
from avray.errors import DataError
from avray.family import Row
from avray.media import AudioInfo, Limits
from avray.store import Store, is_url

_VARYING = re.compile(r"'[^']*'|\S*[/\d]\S*")
SLACK_S = 0.1
"""How far a span may reach beyond its file before it is rejected; durations in manifests are rounded."""
PROBED_ROWS = 4096
"""At a time."""
_SOURCE = "\0source"


@dataclass(frozen=True)
class Reject:
    """A row that cannot be used: line ``line`` of ``source``, or with line 0 that file itself."""

    source: str
    line: int
    reason: str


@dataclass
class Manifest:
    """A data set's rows in the order they stand there.

    Each row has ``id``, ``group`` and, where there is media, absolute paths, ``start_s``, ``duration_s``,
    ``sample_rate_hz`` and ``channels`` (of ``audio``), ``audio_hash``, ``target_audio_hash``, ``video_hash``, besides
    what the input carried; from a list also its line, as ``manifest_line``.
    """

    path: str
    format: str
    rows: Rows = field(default_factory=Rows)
    rejects: list[Reject] = field(default_factory=list)
    duplicates: list[Duplicate] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)
    list_of: array[int] = field(default_factory=lambda: array("I"))
    """For each row the list, by its place in ``lists``, that it was read from."""

    def source_of(self, place: int, row: Row) -> str:
        """The list that the row at this place stands in, or its id where it stands in none."""
        return self.lists[self.list_of[place]] if self.list_of and "manifest_line" in row else str(row["id"])

    def keep(self, places: array[int]) -> None:
        """Only the rows at these places."""
        self.rows = self.rows.pick(places)
        self.list_of = array("I", (self.list_of[place] for place in places)) if self.list_of else self.list_of

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
    parsed = _parse(FORMATS[format](source), roots, manifest.rejects, max_samples)
    filled = _filled(parsed, manifest, Prober(limits or Limits(), memo_path, num_threads))
    if not filled and not manifest.rejects:
        raise DataError(f"{path} holds no rows.")
    naming = Naming(roots)
    naming.look(filled)
    manifest.rows = Rows(naming.name(filled))
    manifest.duplicates = naming.duplicates
    return manifest


def _locate(path: str, texts: str | None) -> Source:
    if texts and texts.lower().endswith(TIMED_SUFFIXES):
        folder, name = posixpath.split(texts if is_url(texts) else os.path.abspath(texts))
        if not Store(folder).exists(name):
            raise DataError(f"{texts} does not exist; set data.texts to a transcript or a folder of texts.")
        return replace(_locate(path, None), texts=Store(folder), text_names=(name,))
    text_store = Store(texts if is_url(texts) else os.path.abspath(texts)) if texts else None
    path = path.rstrip("/") if is_url(path) else os.path.abspath(path)
    kind = Store(path).kind()
    if kind == "folder":
        return Source(Store(path), texts=text_store)
    if kind is None:
        raise DataError(f"{path} does not exist; set data.path to a folder, a manifest or a recording.")
    folder, name = posixpath.split(path)
    return Source(Store(folder), (name,), text_store)


def _parse(raw_rows: Iterable[RawRow], roots: Roots, rejects: list[Reject], max_samples: int | None) -> Rows:
    """Rows under our names, with an id that nobody has yet, and where they stood; the others become rejects."""
    rows = Rows()
    places: dict[int, int] = {}  # by the hash of an id
    for raw in raw_rows:
        if max_samples is not None and len(rows) == max_samples:
            break
        try:
            if raw.reason:
                raise Unusable(raw.reason)
            row = normalise(raw.fields, roots)
            if "id" in row and (place := places.setdefault(hash(row["id"]), len(rows))) < len(rows):
                earlier = rows[place]
                if earlier.get("id") == row["id"]:
                    known = where(Reject(earlier[_SOURCE], earlier.get("manifest_line", 0), ""))
                    raise Unusable(f"id {row['id']!r} is that of {known} already")
            if raw.line:
                row["manifest_line"] = raw.line
            rows.append({**row, _SOURCE: raw.source})
        except Unusable as error:
            rejects.append(Reject(raw.source, raw.line, str(error)))
    return rows


def _filled(parsed: Rows, manifest: Manifest, prober: Prober) -> Rows:
    """Rows with what their media say, and the name of their span; the others become rejects."""
    filled, lists = Rows(), dict[str, int]()
    for begin in range(0, len(parsed), PROBED_ROWS):
        rows = parsed[begin : begin + PROBED_ROWS]
        probed = prober.probe(MediaFile(row[name], "video" if name == "video" else "audio")
                              for row in rows for name in MEDIA_FIELDS if name in row)
        for row in rows:
            source, line = row.pop(_SOURCE), row.get("manifest_line", 0)
            try:
                row[SPAN] = _fill(row, probed)
                filled.append(row)
                manifest.list_of.append(lists.setdefault(source, len(lists)) if line else 0)
            except Unusable as error:
                manifest.rejects.append(Reject(source, line, str(error)))
    prober.remember()
    manifest.lists = list(lists)
    return filled


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


def count_reasons(rejects: Sequence[Reject]) -> dict[str, int]:
    """How often each kind of reason was given, the commonest first; paths, quotations and numbers left out."""
    kinds = Counter(_VARYING.sub("…", reject.reason.split(" (")[0]).rstrip(".") for reject in rejects)
    return dict(kinds.most_common())
