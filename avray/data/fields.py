"""What the world calls the fields of a row, in one table, and where a row's media may lie.

Everything in a manifest was written by somebody else: a value of the wrong type, a path that leads out of the folder
and a link that does are each a reason to reject the row, not to stop.
"""

from __future__ import annotations

import math
import os
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from avray.family import Row
from avray.store import is_url

ALIASES: dict[str, tuple[str, ...]] = {
    "id": ("id", "utt_id", "item_id", "key", "audio_id"),
    "audio": ("audio", "audio_path", "audio_filepath", "audio_file", "wav", "wav_path", "file", "file_name", "filename",
              "path"),
    "target_audio": ("target_audio", "target_path", "target_audio_path"),
    "video": ("video", "video_path", "video_filepath", "video_file"),
    "text": ("text", "caption", "transcript", "transcription", "sentence", "normalized_text", "description", "content"),
    "instruction": ("instruction",),
    "input": ("input",),
    "output": ("output",),
    "embedding": ("embedding",),
    "task": ("task",),
    "start_s": ("start_s", "offset", "start", "start_time", "begin"),
    "end_s": ("end_s", "end", "end_time"),
    "duration_s": ("duration_s", "duration"),
    "group": ("group", "song", "song_id", "speaker", "speaker_id", "speaker_name", "talk", "talk_id", "album", "book"),
    "split": ("split",),
    "weight": ("weight",),
}
"""Our name → names it is read from, the first that is there. avray's own and the original multitask's JSONL, NeMo
(audio_filepath, offset, duration), AudioCraft (path), Hugging Face (file_name), LJSpeech, UniFlow-Audio (audio_id,
content). Fields named by none of them stay as they are."""

MEDIA_FIELDS = ("audio", "target_audio", "video")
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".aif", ".aiff", ".w64", ".au")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm")
SPLITS = {"train": "train", "training": "train", "test": "test",
          **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation")}

_TEXT_FIELDS = ("id", "text", "instruction", "input", "output", "task", "group", "split")
_NUMBER_FIELDS = ("start_s", "end_s", "duration_s", "weight")


class Unusable(Exception):
    """One row cannot be used; the message is its reason."""


@dataclass(frozen=True)
class Roots:
    """Where a manifest may point: its own folder, and what the user allowed besides. Folders with links resolved, or
    URLs without a slash at the end."""

    folder: str
    allowed: tuple[str, ...] = ()

    @classmethod
    def of(cls, folder: str, allowed: tuple[str, ...] = ()) -> Roots:
        return cls(_real(folder), tuple(map(_real, allowed)))

    def resolve(self, value: str) -> str:
        """The absolute path or URL that a media field names. Unusable where it lies outside; a path is followed
        through ``..`` and links first, and what is returned is where it leads."""
        if "\0" in value or "::" in value:
            raise Unusable(f"{value!r} is not a path")
        target = value if is_url(value) else os.path.join(self.folder, value)
        if not is_url(target):
            target = os.path.realpath(target)
        climbs = is_url(target) and ".." in unquote(target).replace("\\", "/").split("/")
        if climbs or not any(_inside(target, root) for root in (self.folder, *self.allowed)):
            raise Unusable(f"{value} lies outside the data set; add its folder to data.allowed_roots to allow it")
        return target

    def label(self, target: str) -> str:
        """A short name for a resolved path: relative to the root it lies in."""
        for root in (self.folder, *self.allowed):
            if _inside(target, root):
                relative = target[len(root.rstrip("/")) + 1:]
                return relative if root == self.folder else f"{posixpath.basename(root)}/{relative}"
        return target


def _real(root: str) -> str:
    return root.rstrip("/") if is_url(root) else os.path.realpath(root)


def _inside(target: str, root: str) -> bool:
    return target.startswith(root.rstrip("/") + "/")


def normalise(fields: Mapping[str, Any], roots: Roots) -> Row:
    """A row under our names, its media resolved. Empty values are left out; Unusable for one that makes no sense."""
    given = {name: value for name, value in fields.items() if value is not None and value != ""}
    row: Row = {}
    for name, aliases in ALIASES.items():
        alias = next((alias for alias in aliases if alias in given), None)
        if alias is not None:
            value = given.pop(alias)
            if name == "audio" and alias not in ("audio", "audio_path", "audio_filepath") and _is_video(value):
                name = "video"
            row.setdefault(name, value)
    plain = {name: value if isinstance(value, str | int | float | list | dict) else str(value)
             for name, value in given.items()}
    row = {**plain, **row}
    for name in _TEXT_FIELDS:
        if name in row:
            row[name] = _text(name, row[name])
    for name in _NUMBER_FIELDS:
        if name in row:
            row[name] = _number(name, row[name])
    if "split" in row:
        if row["split"].lower() not in SPLITS:
            raise Unusable(f"split {row['split']!r} is none of {', '.join(SPLITS)}")
        row["split"] = SPLITS[row["split"].lower()]
    if (end_s := row.pop("end_s", None)) is not None:
        row.setdefault("duration_s", end_s - row.get("start_s", 0.0))
    if row.get("start_s", 0.0) < 0 or row.get("duration_s", 1.0) <= 0 or row.get("weight", 0.0) < 0:
        raise Unusable("start_s and weight must be 0 or more, and duration_s above 0")
    if "embedding" in row and not isinstance(row["embedding"], list):
        raise Unusable(f"embedding must be a list of numbers, not {type(row['embedding']).__name__}")
    for name in MEDIA_FIELDS:
        if name in row:
            row[name] = roots.resolve(_media(name, row[name]))
    if not any(name in row for name in (*MEDIA_FIELDS, "text", "notes", "output", "embedding")):
        raise Unusable("it names no audio, video, text, notes, output or embedding")
    return row


def _is_video(value: Any) -> bool:
    return isinstance(value, str) and value.lower().endswith(VIDEO_SUFFIXES)


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Unusable(f"{name} must be a string, not {type(value).__name__}")
    return _encodable(name, str(value))


def _encodable(name: str, value: str) -> str:
    """Unusable for half a surrogate pair, which JSON can spell and no file can hold."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unusable(f"{name} is not valid Unicode") from None
    return value


def _number(name: str, value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise Unusable(f"{name} must be a finite number, not {str(value)[:40]!r}")
    return number


def _media(name: str, value: Any) -> str:
    if isinstance(value, dict) and isinstance(value.get("path"), str) and not value.get("bytes"):
        value = value["path"]
    if not isinstance(value, str):
        raise Unusable(f"{name} must be the path of a file, not {type(value).__name__}")
    return _encodable(name, value)
