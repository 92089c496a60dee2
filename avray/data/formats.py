"""The forms a data set comes in: which one is there, and its rows as they stand, before anything is checked.

Manifests are read as UTF-8, or as UTF-16 where they begin with its mark (PowerShell's ``>`` writes that). A line that
is not, or does not parse, is a row with a reason instead of fields, so that every line is accounted for.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from avray.data.embeddings import read_embeddings
from avray.data.fields import ALIASES, AUDIO_SUFFIXES, VIDEO_SUFFIXES
from avray.data.folders import read_folder, read_timed
from avray.data.sources import RawRow, Source, decode, lines
from avray.data.transcripts import TIMED_SUFFIXES
from avray.errors import DataError

_KNOWN = {alias for aliases in ALIASES.values() for alias in aliases}
_MANIFEST = re.compile(r"(metadata|manifest)\.(jsonl|csv|tsv|parquet)", re.IGNORECASE)
_PAIR = re.compile(r"(?P<stem>(.*/)?pair_\d+)_(?P<side>input|output)\.\w+", re.IGNORECASE)
_DIGIT = re.compile(r"(.*/)?(?P<digit>\d)_(?P<speaker>[a-z]+)_(?P<take>\d+)\.wav")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_MAX_ROW_GROUP_BYTES = 2**32


def detect(source: Source) -> tuple[str, Source]:
    """The form a data set has and the files to read it from. DataError where there is nothing to read."""
    if source.names:
        return _form_of(source, source.names[0]), source
    top = [name for name in source.files if "/" not in name]
    if {"content.jsonl", "audio.jsonl"} <= set(top):
        return "joined", source
    if named := sorted(filter(_MANIFEST.fullmatch, top)):
        return _form_of(source, named[0]), Source(source.store, (named[0],), source.texts)
    if transcripts := tuple(name for name in source.files if name.endswith(".trans.txt")):
        return "librispeech", Source(source.store, transcripts)
    if any(map(_PAIR.fullmatch, source.media)):
        return "pairs", source
    if source.media and all(map(_DIGIT.fullmatch, source.media)):
        return "digits", source
    if nested := [name for name in source.files if _MANIFEST.fullmatch(posixpath.basename(name))]:
        raise DataError(f"{source.store.root} holds data sets in folders ({', '.join(nested[:3])}): give data.path one "
                        "of them, or set data.format=folder to read the recordings without their texts.")
    if source.media:
        return "folder", source
    if tables := tuple(name for name in source.files if name.endswith(".parquet")):
        return "parquet", Source(source.store, tables)
    if vectors := tuple(name for name in top if name.endswith(".pt")):
        return "embeddings", replace(source, names=vectors)
    lists = [name for name in top if name.endswith(".jsonl")]
    if len(lists) == 1:
        return "jsonl", Source(source.store, (lists[0],))
    choice = f"; give data.path one of {', '.join(lists)}" if lists else ""
    raise DataError(f"{source.store.root} holds no recording, manifest or Parquet file{choice}.")


def forced(source: Source, form: str) -> Source:
    """The files to read when the form is given. ValueError for a form that does not exist."""
    if form not in FORMATS:
        raise ValueError(f"data.format is {form!r}; it is one of auto, {', '.join(FORMATS)}.")
    suffixes = {"jsonl": (".jsonl", ".json"), "csv": (".csv", ".tsv"), "ljspeech": (".csv",), "parquet": (".parquet",),
                "librispeech": (".trans.txt",), "text": (".txt",), "timed": TIMED_SUFFIXES,
                "embeddings": (".pt",)}.get(form)
    if source.names or not suffixes:
        return source
    return replace(source, names=tuple(name for name in source.files if name.lower().endswith(suffixes)))


def _form_of(source: Source, name: str) -> str:
    suffix = posixpath.splitext(name)[1].lower()
    if suffix == ".csv":
        head = _head(source, name)
        return "ljspeech" if _delimiter(head) == "|" and not _header_fields(head) & _KNOWN else "csv"
    by_suffix = {".jsonl": "jsonl", ".json": "jsonl", ".tsv": "csv", ".parquet": "parquet", ".txt": "text",
                 ".pt": "embeddings"}
    if suffix in by_suffix:
        return by_suffix[suffix]
    if suffix in TIMED_SUFFIXES:
        return "timed"
    if suffix in AUDIO_SUFFIXES + VIDEO_SUFFIXES:
        return "folder"
    raise DataError(f"{source.store.path(name)} is no form of data that avray reads; set data.format to one of "
                    f"{', '.join(FORMATS)}.")


# Text ------------------------------------------------------------------------------------------------------------

def _head(source: Source, name: str) -> str:
    return next((line or "" for _, line in lines(source, name)), "")


def read_jsonl(source: Source) -> Iterator[RawRow]:
    for name in source.names:
        for number, line in lines(source, name):
            yield _parse_json(name, number, line)


def _parse_json(name: str, number: int, line: str | None) -> RawRow:
    if line is None:
        return RawRow(name, number, reason="the line is not valid UTF-8 or UTF-16")
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        return RawRow(name, number, reason=f"the line is not JSON ({str(error)[:80]})")
    if not isinstance(fields, dict):
        return RawRow(name, number, reason="the line is not a JSON object")
    return RawRow(name, number, fields)


def read_text(source: Source) -> Iterator[RawRow]:
    """One example per line."""
    for name in source.names:
        for number, line in lines(source, name):
            yield RawRow(name, number, {"text": line} if line else {}, "" if line else "the line is not valid UTF-8")


# Tables ----------------------------------------------------------------------------------------------------------

def _delimiter(head: str) -> str:
    return max(",\t|;", key=head.count)


def _header_fields(head: str) -> set[str]:
    return {name.strip().strip('"').lower() for name in head.split(_delimiter(head))}


def read_csv(source: Source) -> Iterator[RawRow]:
    """CSV, TSV or the like with a header."""
    for name in source.names:
        head = _head(source, name)
        if not _header_fields(head) & _KNOWN:
            raise DataError(f"{source.store.path(name)} names no field that avray knows in its first line, "
                            f"{head[:80]!r}; see ALIASES in avray/data/fields.py.")
        text, sound = decode(source.store.read(name))
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(head))
        header: list[str] | None = None
        while True:
            try:
                values = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                yield RawRow(name, reader.line_num, reason=f"the line is not CSV ({error})")
                continue
            if not any(map(str.strip, values)):
                continue
            if header is None:
                header = [value.strip().lower() for value in values]
            elif len(values) != len(header):
                yield RawRow(name, reader.line_num, reason=f"the line has {len(values)} fields, not {len(header)}")
            elif not sound and any("\ufffd" in value for value in values):
                yield RawRow(name, reader.line_num, reason="the line is not valid UTF-8 or UTF-16")
            else:
                yield RawRow(name, reader.line_num, dict(zip(header, values, strict=True)))


def read_ljspeech(source: Source) -> Iterator[RawRow]:
    """``id|raw text|normalised text``, the recordings in ``wavs/`` or beside the table."""
    recordings = {posixpath.splitext(media.removeprefix("wavs/"))[0]: media for media in source.media}
    for name in source.names:
        for number, line in lines(source, name):
            values = [value.strip() for value in (line or "").split("|")]
            if line is None or len(values) not in (2, 3) or not values[0]:
                reason = "the line is not id|text or id|text|normalised text in UTF-8"
                yield RawRow(name, number, reason=reason)
                continue
            media = recordings.get(values[0], f"wavs/{values[0]}.wav")
            yield RawRow(name, number, {"id": values[0], "audio": media, "text": values[-1] or values[1]})


def read_parquet(source: Source) -> Iterator[RawRow]:
    """Rows of plain values. DataError for extension types, whose metadata may hold a pickle, and for media kept inside
    the table."""
    for name in source.names:
        path = source.store.path(name)
        try:
            with (open(path, "rb") if source.store.is_local else fsspec.open(path, "rb")) as file:
                table = pq.ParquetFile(file)
                _check_parquet(path, table)
                number = 0
                for batch in table.iter_batches(batch_size=1024):
                    for fields in batch.to_pylist():
                        number += 1
                        yield RawRow(name, number, fields)
        except DataError:
            raise
        except Exception as error:  # reading the schema runs whatever extension types are registered, Ray's for one
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"{path} cannot be read as Parquet: {reason}.") from error


def _check_parquet(path: str, table: pq.ParquetFile) -> None:
    for column in table.schema_arrow:
        stack = [column]
        while stack:
            part = stack.pop()
            extension = isinstance(part.type, pa.BaseExtensionType) or b"ARROW:extension:name" in (part.metadata or {})
            if extension:
                raise DataError(f"{path} holds the extension type {part.type} in column {column.name}, which may carry "
                                "code; write plain columns instead.")
            if "binary" in str(part.type):
                raise DataError(f"{path} holds bytes in column {column.name}; write media to files, and their paths "
                                "here.")
            stack += [part.type.field(index) for index in range(part.type.num_fields)]
    groups = range(table.metadata.num_row_groups)
    if any(table.metadata.row_group(index).total_byte_size > _MAX_ROW_GROUP_BYTES for index in groups):
        raise DataError(f"{path} has a row group of over {_MAX_ROW_GROUP_BYTES:,} bytes; write it in smaller ones.")


# Named layouts -------------------------------------------------------------------------------------------------------

def read_librispeech(source: Source) -> Iterator[RawRow]:
    """``<speaker>-<chapter>.trans.txt`` with lines ``<id> <TEXT>``, the recordings beside it. A recording that no
    transcript names is a row without text."""
    whole = Source(source.store)
    recordings = {posixpath.splitext(name)[0]: name for name in whole.media}
    for name in source.names:
        folder = posixpath.dirname(name)
        for number, line in lines(source, name):
            if line is None:
                yield RawRow(name, number, reason="the line is not valid UTF-8")
                continue
            utterance, _, text = line.strip().partition(" ")
            stem = posixpath.join(folder, utterance)
            audio = recordings.pop(stem, stem + ".flac")
            yield RawRow(name, number, {"id": utterance, "audio": audio, "text": text.strip(),
                                        "group": utterance.split("-")[0]})
    for stem, name in recordings.items():
        utterance = posixpath.basename(stem)
        yield RawRow(name, 0, {"id": utterance, "audio": name, "group": utterance.split("-")[0]})


def read_digits(source: Source) -> Iterator[RawRow]:
    """The Free Spoken Digit Dataset: ``7_jackson_32.wav`` is take 32 of a speaker's seven. Takes 0 to 9 validate."""
    for name in source.media:
        if match := _DIGIT.fullmatch(name):
            yield RawRow(name, 0, {"id": posixpath.splitext(name)[0], "audio": name,
                                   "text": _DIGITS[int(match["digit"])], "group": match["speaker"],
                                   "split": "validation" if int(match["take"]) < 10 else "train"})
        else:
            yield RawRow(name, reason="its name is not digit_speaker_take.wav")


def read_pairs(source: Source) -> Iterator[RawRow]:
    """``pair_0000_input.wav`` and ``pair_0000_output.wav``, as the original continuation project wrote them."""
    pairs: dict[str, dict[str, str]] = {}
    for name in source.media:
        if match := _PAIR.fullmatch(name):
            pairs.setdefault(match["stem"], {})[match["side"].lower()] = name
    for stem, sides in sorted(pairs.items()):
        missing = {"input", "output"} - sides.keys()
        fields = {"id": stem, "audio": sides.get("input"), "target_audio": sides.get("output")}
        yield RawRow(stem, 0, fields, f"its {missing.pop()} is missing" if missing else "")


def read_joined(source: Source) -> Iterator[RawRow]:
    """``content.jsonl`` and ``audio.jsonl``, joined on ``audio_id``. An id that one of them lacks, or has a second
    time, is rejected, and so is one of which both say something different."""
    sides: dict[str, dict[str, RawRow]] = {"content.jsonl": {}, "audio.jsonl": {}}
    for name, rows in sides.items():
        for number, line in lines(source, name):
            row = _parse_json(name, number, line)
            key = row.fields.get("audio_id")
            if row.reason or not isinstance(key, str | int):
                yield RawRow(name, number, reason=row.reason or "the line has no audio_id")
            elif str(key) in rows:
                yield RawRow(name, number, reason=f"audio_id {key} is in line {rows[str(key)].line} already")
            else:
                rows[str(key)] = row
    content, audio = sides.values()
    for key, row in content.items():
        if key in audio:
            other, own = audio[key], row.fields
            apart = next((name for name in own if own[name] != other.fields.get(name, own[name])), "")
            reason = f"content.jsonl and line {other.line} of audio.jsonl disagree on {apart}" if apart else ""
            yield RawRow(row.source, row.line, {**other.fields, **row.fields}, reason)
        else:
            yield RawRow(row.source, row.line, reason=f"audio_id {key} is missing from audio.jsonl")
    for key, row in audio.items():
        if key not in content:
            yield RawRow(row.source, row.line, reason=f"audio_id {key} is missing from content.jsonl")


FORMATS: dict[str, Callable[[Source], Iterator[RawRow]]] = {
    "folder": read_folder, "jsonl": read_jsonl, "csv": read_csv, "ljspeech": read_ljspeech,
    "librispeech": read_librispeech, "pairs": read_pairs, "joined": read_joined, "parquet": read_parquet,
    "text": read_text, "digits": read_digits, "timed": read_timed, "embeddings": read_embeddings,
}
