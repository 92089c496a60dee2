"""A folder of recordings and their texts: one text each, or transcripts with times, whose utterances are rows.

A transcript belongs to the recordings it names (STM, CTM), else to the one that has its name, beside it or in a folder
of its own. Rows that may be joined to longer windows have the same ``turn``: one speaker's where rows are grouped by
speaker, else everything between stretches that the transcript sets aside; ``word_times`` are [start, end, word] where
words have times.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from avray.data.fields import AUDIO_SUFFIXES, VIDEO_SUFFIXES, Unusable
from avray.data.sources import GroupBy, RawRow, Source, decode
from avray.data.transcripts import TIMED_SUFFIXES, Flaw, Utterance, parse
from avray.store import Store

_ABOUT = {"readme", "license", "licence", "copying", "copyright", "attribution", "changelog", "notes", "credits"}


@dataclass
class Texts:
    """The ``.txt`` files that go with recordings: beside them, in ``texts/``, or in a second folder. In a folder of
    their own they are found by their bare name too, where only one has it. One that is left over is a fault, unless it
    lies beside recordings that have none, or says what the folder is."""

    store: Store
    folder: str
    stems: dict[str, str]
    unused: set[str]
    apart: bool
    """In a folder of their own."""
    timed: tuple[str, ...] = ()
    """Transcripts with times."""

    @classmethod
    def of(cls, source: Source) -> Texts:
        store = source.texts or source.store
        files = source.files if source.texts is None else list(source.text_names) or sorted(store.list(""))
        folder = "texts/" if source.texts is None and any(name.startswith("texts/") for name in files) else ""
        names = [name for name in files if name.startswith(folder) and name.endswith(".txt")]
        timed = tuple(name for name in files if name.lower().endswith(TIMED_SUFFIXES))
        stems = {name[len(folder):-4]: name for name in names}
        if source.names:
            unused = set()
        elif source.texts or folder:
            unused = set(names)
        else:
            folders = {posixpath.dirname(name) for name in source.media if posixpath.splitext(name)[0] in stems}
            unused = {name for stem, name in stems.items() if posixpath.dirname(name) in folders
                      and posixpath.basename(stem).lower() not in _ABOUT}
        return cls(store, folder, stems, unused, bool(source.texts or folder), timed)

    @cached_property
    def bare(self) -> dict[str, str | None]:
        """Bare name → file, or None where several have it."""
        names: dict[str, str | None] = {}
        for stem, name in self.stems.items():
            names[posixpath.basename(stem)] = None if posixpath.basename(stem) in names else name
        return names if self.apart else {}

    def find(self, stem: str) -> str | None:
        name = self.stems.get(stem) or self.bare.get(posixpath.basename(stem))
        self.unused.discard(name or "")
        return name

    def read(self, name: str) -> str:
        return self.content(name).strip()

    def content(self, name: str) -> str:
        """Unusable for a file that is not text, or that a link leads out to."""
        root = os.path.realpath(self.store.root)
        if self.store.is_local and not os.path.realpath(self.store.path(name)).startswith(root + os.sep):
            raise Unusable(f"its text {name} lies outside the data set")
        text, sound = decode(self.store.read(name))
        if not sound:
            raise Unusable(f"its text {name} is not valid UTF-8 or UTF-16")
        return text.replace("\r\n", "\n")


def read_folder(source: Source) -> Iterator[RawRow]:
    """Recordings, each with its utterances where a transcript has their times, else with the ``.txt`` of its name if
    there is one."""
    texts, timed = Texts.of(source), Timed.of(source, source.names or source.media)
    for name in source.names or source.media:
        stem = posixpath.splitext(name)[0]
        text = texts.find(stem)
        if name in timed.rows:
            yield from timed.rows[name]
            continue
        fields: dict[str, Any] = {"video" if name.lower().endswith(VIDEO_SUFFIXES) else "audio": name}
        reason = ""
        if text:
            try:
                fields["text"] = texts.read(text)
            except Unusable as error:
                reason = str(error)
        yield RawRow(name, 0, fields, reason)
    for name in sorted(texts.unused):
        yield RawRow(name, reason="no recording has the name of this text")
    yield from timed.rejects


def read_timed(source: Source) -> Iterator[RawRow]:
    """The utterances of transcripts that are the data set themselves, their recordings beside or below them."""
    timed = Timed.of(source, source.media)
    for name in source.media:
        yield from timed.rows.get(name, [])
    yield from timed.rejects


@dataclass
class Timed:
    """Rows of transcripts with times, by recording, and what of them is none."""

    recordings: Sequence[str]
    group_by: GroupBy
    alone: bool
    """Whether a transcript of other recordings is a fault."""
    rows: dict[str, list[RawRow]] = field(default_factory=dict)
    rejects: list[RawRow] = field(default_factory=list)

    @classmethod
    def of(cls, source: Source, recordings: Sequence[str]) -> Timed:
        given = tuple(name for name in source.names if name.lower().endswith(TIMED_SUFFIXES))
        timed = cls(recordings, source.group_by, alone=bool(given) or not source.names)
        texts = Texts.of(source)
        for name in given or texts.timed:
            try:
                entries = parse(name, texts.content(name))
            except Unusable as error:
                timed.rejects.append(RawRow(name, reason=str(error).replace("its text", "the transcript")))
                continue
            timed.add(name, name.removeprefix(texts.folder), entries)
        return timed

    @cached_property
    def by_stem(self) -> dict[str, str | None]:
        """Path without suffix, and bare name, → recording; None where several have it."""
        found: dict[str, str | None] = {posixpath.splitext(name)[0]: name for name in self.recordings}
        bare: dict[str, str | None] = {}
        for stem, name in found.items():
            bare[posixpath.basename(stem)] = None if posixpath.basename(stem) in bare else name
        return bare | found

    def add(self, source: str, label: str, entries: Sequence[Utterance | Flaw]) -> None:
        """The entries of one transcript, each to the recording it names, else to the one that has its ``label``."""
        stem = posixpath.splitext(label)[0]
        own = self.by_stem.get(stem) or self.by_stem.get(posixpath.basename(stem))
        said: dict[str, list[Utterance]] = {}
        for entry in entries:
            if isinstance(entry, Flaw):
                if self.alone or own:
                    self.rejects.append(RawRow(source, entry.line, reason=entry.reason))
                continue
            named = posixpath.basename(entry.recording)
            if named.lower().endswith(AUDIO_SUFFIXES):
                named = posixpath.splitext(named)[0]
            recording = (self.by_stem.get(named) if named else None) or own
            if recording is not None:
                said.setdefault(recording, []).append(entry)
            elif self.alone and entry.text:
                reason = f"no recording, or more than one, has the name {named or posixpath.basename(stem)!r}"
                self.rejects.append(RawRow(source, entry.line, reason=reason))
        for recording, utterances in said.items():
            if recording in self.rows:
                self.rejects.append(RawRow(source, reason=f"{recording} has a transcript with times already"))
                continue
            self.rows[recording] = list(self._rows(source, recording, utterances))
            if not self.rows[recording]:
                self.rejects.append(RawRow(source, reason=f"it sets all of {recording} aside"))

    def _rows(self, source: str, recording: str, utterances: Sequence[Utterance]) -> Iterator[RawRow]:
        turn, before = 0, None
        kind = "video" if recording.lower().endswith(VIDEO_SUFFIXES) else "audio"
        for one in sorted(utterances, key=lambda one: (one.start_s, one.line)):
            speaker = one.speaker if self.group_by == "speaker" else ""
            turn += before is not None and (speaker != before or not one.text)
            before = speaker
            if not one.text:
                continue
            fields: dict[str, Any] = {kind: recording, "text": one.text, "start_s": one.start_s, "end_s": one.end_s,
                                      "turn": str(turn)}
            if one.words:
                fields["word_times"] = [[word.start_s, word.end_s, word.text] for word in one.words]
            if one.speaker:
                fields["said_by"] = one.speaker
            yield RawRow(source, one.line, {**fields, "group": speaker or None})
