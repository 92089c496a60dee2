"""Which checkpoints a run has: its manifests, its two links, what is pruned and what is swept away.

A manifest is checked here by its own digest and by the sizes of its files, which costs one small read; the
files' SHA-256 are checked when a checkpoint is opened.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from avray.errors import CheckpointError
from avray.mirror import CHECKPOINTS

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
FOLDER = CHECKPOINTS
MAX_JSON_BYTES = 64 << 20
MAX_POINTER_BYTES = 200
WEIGHTS = (
    "model.safetensors",
    "fitted.safetensors",
    "family.json",
    "fitted.json",
    "settings.json",
    "README.md",
)
EMA = "ema.safetensors"
TRAINER = ("trainer.safetensors", "trainer.json")

LINKS = ("best", "last")
BASE = re.compile(r"base-[0-9a-f]{64}\.safetensors")
"""Weights that do not change during a run, beside its checkpoints and named by their SHA-256."""

_STALE_S = 3600.0
_PICKLES = (".pt", ".pth", ".pt2", ".th", ".bin", ".ckpt", ".pkl", ".pickle", ".tar", ".npy", ".npz")
_STEP = re.compile(r"step-(\d+)")
_LEFTOVER = re.compile(r"(?P<name>.+)\.(?P<kind>tmp|old)-(?P<host>.+)-(?P<pid>\d+)")


def step_folder(run_dir: Path | str, step: int) -> Path:
    return Path(run_dir) / FOLDER / f"step-{step:08d}"


def checkpoints(run_dir: Path | str) -> list[Path]:
    """The run's whole checkpoints, oldest first by their step's number."""
    return [path for path in _step_folders(run_dir) if _is_whole(path)]


def newest(run_dir: Path | str) -> Path | None:
    """The checkpoint with the highest step, to resume from; None where there is none.

    A folder without a manifest was never finished and does not count. CheckpointError where the newest has one and is
    damaged: to go on from an older one unasked would lose its steps.
    """
    for folder in reversed(_step_folders(run_dir)):
        if (folder / MANIFEST).exists():
            try:
                read_manifest(folder)
            except CheckpointError as error:
                other = offer(Path(run_dir), besides=folder)
                raise CheckpointError(f"{error}{other} To resume from an older one, remove {folder}.") from error
            return folder
    return None


def _step_folders(run_dir: Path | str) -> list[Path]:
    try:
        paths = [*(Path(run_dir) / FOLDER).iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((path for path in paths if _STEP.fullmatch(path.name)), key=_step)


def _step(folder: Path) -> int:
    return step_of(folder.name)


def step_of(name: str) -> int:
    """Of ``step-00000100``."""
    return int(name.removeprefix("step-"))


def _is_whole(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except CheckpointError:
        return False
    return True


def _is_intact(folder: Path) -> bool:
    try:
        verify(folder, read_manifest(folder))
    except CheckpointError:
        return False
    return True


def read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest, its own digest and its files' sizes checked. CheckpointError names what is wrong.

    ``trainer.*`` may have been left out of a copy. A newer format's manifest is returned as well: it exists,
    and opening it says that avray has to be upgraded.
    """
    manifest = read_json(folder / MANIFEST)
    for name, num_bytes in listed(manifest, str(folder / MANIFEST)).items():
        path = folder / name
        if name in TRAINER and not path.exists():
            continue
        if not path.is_file():
            raise CheckpointError(f"{path} is missing.")
        if path.stat().st_size != num_bytes:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes in place of {num_bytes}.")
    if (base := manifest.get("base")) is not None:
        base_path(folder, base["name"])
    return manifest


def listed(manifest: Mapping[str, Any], where: str) -> dict[str, int]:
    """The files that a manifest lists and their bytes. CheckpointError where it is damaged, or names what is no file of
    its own folder."""
    try:
        if manifest["sha256"] != digest(manifest):
            raise CheckpointError(f"{where} is damaged: its SHA-256 does not fit.")
        if not isinstance(manifest["format_version"], int) or not isinstance(manifest["step"], int):
            raise TypeError("format_version and step are whole numbers")
        sizes = {name: int(entry["bytes"]) for name, entry in manifest["files"].items()}
        base = manifest.get("base")
        if base is not None and not BASE.fullmatch(base["name"]):
            raise ValueError(f"{base['name']!r} is no name of a base")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{where} is no manifest of avray: {error!r}.") from error
    for name in sizes:
        if Path(name).name != name or name == "..":
            raise CheckpointError(f"{where} names {name!r}, which is not a file of this folder.")
    return sizes


def base_path(folder: Path, name: str) -> Path:
    """Where a checkpoint's base lies: beside its folder or, copied along, in it. CheckpointError where it is not."""
    for place in (folder.parent, folder):
        if (place / name).is_file():
            return place / name
    raise CheckpointError(f"{folder} needs {name}, the weights it shares with the run's other checkpoints: copy that "
                          f"file beside it or into it.")


def verify(folder: Path, manifest: Mapping[str, Any], names: Iterable[str] | None = None) -> None:
    """Hash files of a checkpoint (all that are there), side by side. CheckpointError names those that are
    damaged."""
    files = manifest["files"]
    names = [name for name in files if (folder / name).exists()] if names is None else list(names)

    def sha256(name: str) -> str:
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(sha256, names))
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}.") from error
    damaged = [str(folder / name) for name, sha in zip(names, found, strict=True) if sha != files[name].get("sha256")]
    base = manifest.get("base")
    if base is not None and names:
        path = base_path(folder, base["name"])
        with open(path, "rb") as file:
            if f"base-{hashlib.file_digest(file, 'sha256').hexdigest()}.safetensors" != base["name"]:
                damaged.append(str(path))
    if damaged:
        raise CheckpointError(f"{', '.join(damaged)} is damaged: its SHA-256 is not the manifest's.")


def digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of all of a manifest but its own ``sha256``."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint, bounded in size."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing.")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_JSON_BYTES} bytes.")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} cannot be read: {error}.") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{where} holds no JSON object.")
    return document


# ── links ────────────────────────────────────────────────


def point(run_dir: Path | str, name: str, folder: Path) -> None:
    """Make ``run_dir/name`` lead to a checkpoint of the same run, in one rename: the old or the new, never
    neither."""
    link = Path(run_dir) / name
    target = f"{FOLDER}/{folder.name}"
    temporary = beside(link, "tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        temporary.write_text(target + "\n")
    os.replace(temporary, link)
    sync(link.parent)


def follow(run_dir: Path | str, name: str) -> Path | None:
    """Where ``best`` or ``last`` leads, link or pointer file, whether or not that folder exists; None without
    one."""
    link = Path(run_dir) / name
    if link.is_symlink():
        return link.parent / os.readlink(link)
    return _read_pointer(link) if link.is_file() else None


def _read_pointer(path: Path) -> Path:
    """A pointer file holds one path of one shape, so that it cannot lead out of its run."""
    with open(path, "rb") as file:
        return path.parent / pointed(file.read(MAX_POINTER_BYTES), str(path))


def pointed(content: bytes, where: str) -> str:
    """What a pointer file holds, relative to its run."""
    text, suffix = content.decode("ascii", "replace").strip(), Path(where).suffix
    if suffix in _PICKLES or not re.fullmatch(rf"{FOLDER}/{_STEP.pattern}", text):
        kind = "is no checkpoint"
        if suffix in _PICKLES or text.startswith(("PK", "\ufffd")):
            kind = "may be a pickle, which can run code, so avray does not open it"
        elif suffix == ".safetensors":
            kind = "is weights without the model they belong to"
        raise CheckpointError(f"{where} {kind}: give a run, its best or last, or a checkpoint folder.")
    return text


def resolve(path: Path | str) -> Path:
    """The checkpoint folder that a run (its best, else its newest), a link, a pointer file or a folder stands
    for.

    CheckpointError, naming what is wrong, where there is none; no other checkpoint is taken in its place.
    """
    place = Path(path).expanduser()
    if place.is_symlink() and not place.exists():
        raise CheckpointError(f"{place} leads to {os.readlink(place)}, which is gone.{offer(place.parent)}")
    if place.is_file():
        place = _read_pointer(place)
    if not place.exists():
        raise CheckpointError(f"{place} does not exist.{offer(place.parent.parent)}")
    if (place / FOLDER).is_dir():
        best = follow(place, "best")
        if best is None and (best := newest(place)) is None:
            raise CheckpointError(f"{place} has no finished checkpoint yet.")
        if not best.is_dir():
            raise CheckpointError(f"{place / 'best'} leads to {best}, which is gone.{offer(place)}")
        place = best
    if not (place / MANIFEST).is_file():
        raise CheckpointError(
            f"{place} has no {MANIFEST}, so it is no checkpoint or was never finished.{offer(place.parent.parent)}"
        )
    return place.resolve()


def offer(run_dir: Path, besides: Path | None = None) -> str:
    """A sentence naming the newest other checkpoint of the run, for an error message; empty where there is
    none."""
    for path in reversed(checkpoints(run_dir)):
        if (besides is None or path.name != besides.name) and _is_intact(path):
            return f" The newest other one that is intact is {path}: give it as checkpoint= to use it."
    return ""


# ── pruning and sweeping ────────────────────────────────────────────────


def prune(run_dir: Path | str, keep_last: int, keep_every: int = 0, protect: Iterable[Path] = ()) -> list[Path]:
    """Remove whole checkpoints but the newest ``keep_last``, those at multiples of ``keep_every`` steps (0:
    none), those that ``best`` and ``last`` lead to and those in ``protect``. Returns what was removed."""
    found = checkpoints(run_dir)
    links = [target.name for name in LINKS if (target := follow(run_dir, name))]
    kept = {*links, *(path.name for path in protect)}
    names = spent([path.name for path in found], keep_last, keep_every, kept)
    removed = [path for path in found if path.name in names]
    for path in removed:
        doomed = beside(path, "tmp")  # renamed first, so that no half of it is ever seen
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return removed


def spent(names: Sequence[str], keep_last: int, keep_every: int, kept: set[str]) -> list[str]:
    """Of checkpoints in order of their steps, those that :func:`prune` removes."""
    if keep_last < 1:
        raise ValueError(f"keep_last={keep_last} would remove the newest checkpoint; give 1 or more.")
    return [name for name in names[:-keep_last]
            if name not in kept and not (keep_every and step_of(name) % keep_every == 0)]


def sweep(run_dir: Path | str) -> list[Path]:
    """Remove what dead writers left half-written, and put back what one had set aside. For the start of a
    run, before this process saves anything. Returns what was there.

    A writer is dead when its process is gone from this host or is ourselves (a container's process has the
    same number each time), or when nothing has changed for an hour.
    """
    run_dir = Path(run_dir)
    found = []
    for folder in (run_dir, run_dir / FOLDER):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            match = _LEFTOVER.fullmatch(path.name)
            is_link = folder == run_dir  # the temporary of best or last; no folder beside checkpoints/ is ours
            if match is None or is_link == _is_folder(path) or _is_alive(path, match):
                continue
            found.append(path)
            if is_link:
                path.unlink()
            elif match["kind"] == "old" and not (folder / match["name"]).exists():
                os.rename(path, folder / match["name"])
            else:
                shutil.rmtree(path)
    return found


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_alive(path: Path, writer: re.Match[str]) -> bool:
    if writer["host"] == socket.gethostname():
        if int(writer["pid"]) == os.getpid():
            return False
        try:
            os.kill(int(writer["pid"]), 0)
        except ProcessLookupError:
            return False
        except (PermissionError, OverflowError):
            pass
    try:
        inside = path.iterdir() if _is_folder(path) else ()
        return time.time() - max(each.lstat().st_mtime for each in (path, *inside)) < _STALE_S
    except FileNotFoundError:  # its writer has just renamed it
        return True


def beside(path: Path, kind: str) -> Path:
    """A name next to ``path`` that says who is writing it."""
    return path.with_name(f"{path.name}.{kind}-{socket.gethostname()}-{os.getpid()}")


def sync(folder: Path) -> None:
    """Bring a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
