"""Checkpoints on an object store: fetched whole into this node's copy before they are opened, mirrored from it after
they are whole.

    s3://bucket/runs/a/checkpoints/step-00000100/…     as on a disk, and copied to one it opens from there
    s3://bucket/runs/a/best, last                      small objects with a path, in place of links

A store has no rename. So a checkpoint's files go first and its manifest last, once a listing has shown them whole, and
it is removed in the other order: what has no manifest does not exist. The store is what counts, not a node's copy: a
copy that differs is fetched anew, and a group of workers that begins on another node finds all that it needs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avray.checkpoint import store as local
from avray.checkpoint.store import (
    FOLDER,
    LINKS,
    MANIFEST,
    MAX_JSON_BYTES,
    MAX_POINTER_BYTES,
    TRAINER,
    follow,
    listed,
    parse_json,
    pointed,
    read_manifest,
    spent,
    step_of,
)
from avray.errors import CheckpointError, MissingDependency
from avray.mirror import working_copy
from avray.store import CURE, Store, is_url, reason

_STEP = re.compile(rf"{FOLDER}/(step-\d+)/(.+)")


@dataclass(frozen=True)
class Found:
    """A checkpoint by URL: ``name`` is its folder's, below the run or, copied elsewhere, the folder around it."""

    store: Store
    name: str

    @property
    def url(self) -> str:
        return self.store.path(self.name)

    @property
    def copy(self) -> Path:
        return working_copy(self.store.root) / self.name


def find(path: str) -> Found:
    """What a URL of a run (its best, else its newest), of its best or last, or of a checkpoint's folder stands for.

    CheckpointError where there is none; no other checkpoint is taken in its place.
    """
    url = path.rstrip("/")
    parent, _, last = url.rpartition("/")
    with reaching(url):
        if Store(url).exists(MANIFEST):
            run = re.fullmatch(rf"(.+)/({FOLDER}/step-\d+)", url)
            return Found(Store(run[1]), run[2]) if run else Found(Store(parent), last)
        if Store(url).sizes(FOLDER):
            name = _follow(Store(url), "best") or newest(url)
            if name is None:
                raise CheckpointError(f"{url} has no finished checkpoint yet.")
            return _existing(Store(url), name, f"{url}/best")
        name = _follow(Store(parent), last)
        if name is None:
            some = bool(Store(url).sizes(""))
            why = f"has no {MANIFEST}, so it is no checkpoint or was never finished" if some else "does not exist"
            raise CheckpointError(f"{url} {why}.{_offer(Store(url.partition(f'/{FOLDER}/')[0]))}")
        return _existing(Store(parent), name, url)


def _existing(store: Store, name: str, link: str) -> Found:
    if not store.exists(f"{name}/{MANIFEST}"):
        raise CheckpointError(f"{link} leads to {store.path(name)}, which is gone.{_offer(store)}")
    return Found(store, name)


def _follow(store: Store, link: str) -> str | None:
    try:
        return pointed(store.read(link, MAX_POINTER_BYTES), store.path(link))
    except FileNotFoundError:
        return None


def _offer(store: Store) -> str:
    whole = [name for name in _steps(store) if _is_whole(store, name)]
    return f" The newest other one is {store.path(whole[-1])}: give it as checkpoint= to use it." if whole else ""


def _is_whole(store: Store, name: str) -> bool:
    try:
        return bool(_manifest(store, name))
    except (CheckpointError, FileNotFoundError):
        return False


def _steps(store: Store) -> dict[str, dict[str, int]]:
    """Each checkpoint's folder, oldest first by its step, and its files with their sizes; half-written ones too."""
    found: dict[str, dict[str, int]] = {}
    for path, num_bytes in store.sizes(FOLDER).items():
        if match := _STEP.fullmatch(path):
            found.setdefault(f"{FOLDER}/{match[1]}", {})[match[2]] = num_bytes
    return dict(sorted(found.items(), key=lambda item: step_of(item[0].rpartition("/")[2])))


def newest(run_dir: str) -> str | None:
    """``checkpoints/step-…`` with the highest step, from a folder or a URL; None where there is none. CheckpointError
    where the newest is damaged, as of a local one."""
    if not is_url(run_dir):
        found = local.newest(run_dir)
        return None if found is None else f"{FOLDER}/{found.name}"
    store = Store(run_dir)
    with reaching(run_dir):
        for name, files in reversed(_steps(store).items()):
            if MANIFEST in files:
                try:
                    _manifest(store, name)
                except CheckpointError as error:
                    raise CheckpointError(f"{error} To resume from an older one, remove {store.path(name)}.") from error
                return name
    return None


def _manifest(store: Store, name: str) -> tuple[bytes, dict[str, Any]]:
    """A checkpoint's manifest as it lies there and as it reads, its digest and its files' sizes checked."""
    where = store.path(f"{name}/{MANIFEST}")
    content = store.read(f"{name}/{MANIFEST}", MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise CheckpointError(f"{where} is larger than {MAX_JSON_BYTES} bytes.")
    manifest = parse_json(content, where)
    sizes = store.sizes(name)
    for file, num_bytes in listed(manifest, where).items():
        have = sizes.get(f"{name}/{file}")
        if have is None and file in TRAINER:
            continue
        if have != num_bytes:
            raise CheckpointError(f"{store.path(name)}/{file} has {have or 0} bytes in place of {num_bytes}.")
    return content, manifest


# ── from the store ───────────────────────────────────────


def fetch(path: str, trainer: bool = False) -> Path:
    """This node's copy of the checkpoint that a URL stands for, what is missing brought here: with ``trainer`` its
    optimiser's state too, twice the weights' size. CheckpointError where there is none, or an object is damaged."""
    return _fetched(find(path), trainer)


def _fetched(found: Found, trainer: bool) -> Path:
    store, name, folder = found.store, found.name, found.copy
    with reaching(found.url), _alone(working_copy(store.root)):
        content, manifest = _manifest(store, name)
        if not (folder / MANIFEST).is_file() or (folder / MANIFEST).read_bytes() != content:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        files = manifest["files"]
        wanted = [file for file in files if not (folder / file).exists() and (trainer or file not in TRAINER)]
        wanted = [file for file in wanted if file not in TRAINER or store.exists(f"{name}/{file}")]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda file: _bring(store, f"{name}/{file}", folder / file, files[file]["sha256"]), wanted))
        if (base := manifest.get("base")) is not None:
            _bring_base(store, name, base, folder)
        if not (folder / MANIFEST).exists():
            partial = folder / f".{MANIFEST}"
            partial.write_bytes(content)
            os.replace(partial, folder / MANIFEST)
        read_manifest(folder)
    return folder


def _bring(store: Store, name: str, file: Path, sha256: str) -> None:
    partial = file.with_name(f".{file.name}")
    store.download(name, partial)
    with open(partial, "rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != sha256:
            raise CheckpointError(f"{store.path(name)} is damaged: its SHA-256 is not the manifest's.")
    os.replace(partial, file)


def _bring_base(store: Store, name: str, base: dict[str, Any], folder: Path) -> None:
    """The weights that a run never changes lie beside its checkpoints or, copied along, in one."""
    if any((place / base["name"]).is_file() for place in (folder.parent, folder)):
        return
    parent = name.rpartition("/")[0]
    for place, here in ((f"{parent}/" if parent else "", folder.parent), (f"{name}/", folder)):
        if store.exists(place + base["name"]):
            sha256 = base["name"].removeprefix("base-").removesuffix(".safetensors")
            return _bring(store, place + base["name"], here / base["name"], sha256)
    raise CheckpointError(f"{store.path(name)} needs {base['name']}, the weights it shares with the run's other "
                          "checkpoints: copy that file beside it or into it.")


def restore(run_dir: str) -> None:
    """Before workers look what to go on from: this node's copy has the newest checkpoint of the store, all of it, and
    none that the store lacks. Nothing to do for a local run."""
    if not is_url(run_dir):
        return
    name, copy = newest(run_dir), working_copy(run_dir)
    with reaching(run_dir), _alone(copy):
        there = _steps(Store(run_dir))
        for folder in (copy / FOLDER).glob("step-*"):
            if MANIFEST not in there.get(f"{FOLDER}/{folder.name}", {}):
                shutil.rmtree(folder)
        for link in LINKS:
            (copy / link).unlink(missing_ok=True)
    if name is not None:
        _fetched(Found(Store(run_dir), name), trainer=True)


def restore_file(run_dir: str, name: str) -> None:
    """A file beside the checkpoints as the store has it, or none."""
    if is_url(run_dir):
        file = working_copy(run_dir) / name
        file.unlink(missing_ok=True)
        with reaching(run_dir):
            if Store(run_dir).exists(name):
                file.parent.mkdir(parents=True, exist_ok=True)
                Store(run_dir).download(name, file)


# ── to the store ─────────────────────────────────────────


def publish(run_dir: str, folder: Path) -> None:
    """A checkpoint that is whole in this node's copy: its files, its manifest, then best and last where they lead to
    it. CheckpointError where the store fails, or another run writes there; the checkpoints before it are kept. Nothing
    to do for a local run, here and below."""
    if not is_url(run_dir):
        return
    store, name = Store(run_dir), f"{FOLDER}/{folder.name}"
    manifest = read_manifest(folder)
    files = list(manifest["files"])
    with reaching(run_dir, "Saving to"):
        store.remove(f"{name}/{MANIFEST}")
        if (base := manifest.get("base")) is not None and not store.exists(f"{FOLDER}/{base['name']}"):
            store.upload(f"{FOLDER}/{base['name']}", folder.parent / base["name"])
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda file: store.upload(f"{name}/{file}", folder / file), files))
        sizes = store.sizes(name)
        if wrong := [file for file in files if sizes.get(f"{name}/{file}") != manifest["files"][file]["bytes"]]:
            raise CheckpointError(f"{store.path(name)}/{wrong[0]} is not what was written: another run writes there.")
        store.upload(f"{name}/{MANIFEST}", folder / MANIFEST)
        for link in LINKS:
            if (target := follow(working_copy(run_dir), link)) is not None and target.name == folder.name:
                store.write(link, f"{name}\n".encode())


def prune(run_dir: str, keep_last: int, keep_every: int = 0, protect: Iterable[Path] = ()) -> list[str]:
    """As :func:`avray.checkpoint.prune`, on the store; returns the names that were removed."""
    if not is_url(run_dir):
        return []
    store = Store(run_dir)
    with reaching(run_dir):
        steps = _steps(store)
        whole = [name.rpartition("/")[2] for name, files in steps.items() if MANIFEST in files]
        links = [name.rpartition("/")[2] for link in LINKS if (name := _follow(store, link)) is not None]
        removed = spent(whole, keep_last, keep_every, {*links, *(path.name for path in protect)})
        for step in removed:
            _remove(store, f"{FOLDER}/{step}", steps[f"{FOLDER}/{step}"])
    return removed


def sweep(run_dir: str) -> list[str]:
    """Remove what dead writers left half-written, for the start of a run; returns what was there."""
    if not is_url(run_dir):
        return []
    store = Store(run_dir)
    with reaching(run_dir):
        found = {name: files for name, files in _steps(store).items() if MANIFEST not in files}
        for name, files in found.items():
            _remove(store, name, files)
    return list(found)


def _remove(store: Store, name: str, files: Iterable[str]) -> None:
    store.remove(f"{name}/{MANIFEST}")
    for file in files:
        store.remove(f"{name}/{file}")


@contextlib.contextmanager
def reaching(url: str, doing: str = "Reaching") -> Iterator[None]:
    """A store's own errors as one sentence."""
    try:
        yield
    except (CheckpointError, MissingDependency):
        raise
    except Exception as error:
        raise CheckpointError(f"{doing} {url} failed ({reason(error)}): {CURE}.") from error


@contextlib.contextmanager
def _alone(copy: Path) -> Iterator[None]:
    """One process of this node at a time, so that a group of workers fetches once."""
    copy.mkdir(parents=True, exist_ok=True)
    with open(copy / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
