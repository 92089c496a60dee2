"""What each media file's header and bytes say, found by many threads and remembered between runs.

A memo keyed by path, size and time of change makes a second look at an unchanged data set a matter of ``stat`` calls:
hashing is what costs (280 MB/s a thread on two busy cores), and the cache's keys are made of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

from avray.errors import DataError
from avray.media import AudioInfo, Limits, VideoInfo, content_hash, probe, probe_video
from avray.store import Store, is_url

_VERSION = 1


@dataclass(frozen=True)
class MediaFile:
    """A resolved path or URL, and what it is read as."""

    path: str
    kind: Literal["audio", "video"]


@dataclass(frozen=True)
class Probed:
    info: AudioInfo | VideoInfo
    hash: str


class Prober:
    """Probes files some at a time, with one memo for all."""

    def __init__(self, limits: Limits, memo_path: str | None = None, num_threads: int = 8) -> None:
        self.limits, self.memo_path, self.num_threads = limits, memo_path, num_threads
        self._memo = _load(memo_path)
        self._known = len(self._memo)
        self._failed: dict[MediaFile, str] = {}

    def probe(self, files: Iterable[MediaFile]) -> dict[MediaFile, Probed | str]:
        """Each file's header and content hash, or the reason why it cannot be used."""
        wanted = list(dict.fromkeys(files))
        todo = [file for file in wanted if file not in self._failed]
        with ThreadPoolExecutor(self.num_threads) as pool:
            found = dict(zip(todo, pool.map(lambda file: _probe(file, self.limits, self._memo), todo), strict=True))
        self._failed |= {file: reason for file, reason in found.items() if isinstance(reason, str)}
        return {file: found.get(file) or self._failed[file] for file in wanted}

    def remember(self) -> None:
        """Write the memo where it has grown."""
        if self.memo_path is not None and len(self._memo) > self._known:
            folder, name = os.path.split(self.memo_path)
            Store(folder).write(name, json.dumps({"version": _VERSION, "files": self._memo}).encode())
            self._known = len(self._memo)


def _probe(file: MediaFile, limits: Limits, memo: dict[str, Any]) -> Probed | str:
    try:
        digest = content_hash(file.path) if is_url(file.path) else None
        stat = None if digest else os.stat(file.path)
        key = f"{file.kind}:{file.path}:{digest or f'{stat.st_size}:{stat.st_mtime_ns}'}"  # type: ignore[union-attr]
        if (entry := memo.get(key)) is not None:
            info = (AudioInfo if file.kind == "audio" else VideoInfo)(**entry["info"])
            limits.check_audio(file.path, info) if isinstance(info, AudioInfo) else limits.check_video(file.path, info)
            return Probed(info, entry["hash"])
        found = probe(file.path, limits) if file.kind == "audio" else probe_video(file.path, limits)
        digest = digest or content_hash(file.path)
        memo[key] = {"info": asdict(found), "hash": digest}
        return Probed(found, digest)
    except FileNotFoundError:
        return f"{file.path} does not exist."
    except (DataError, OSError) as error:
        return str(error)


def _load(memo_path: str | None) -> dict[str, Any]:
    """Empty where there is none, or none that can be read: it only saves work."""
    try:
        with open(memo_path or "", encoding="utf-8") as file:
            content = json.load(file)
        return dict(content["files"]) if content["version"] == _VERSION else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
