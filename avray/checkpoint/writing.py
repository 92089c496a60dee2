"""Writing one checkpoint: hashed on the way to the disk, never read back.

A tensor goes from where it lives through the hash into the file in pieces of 8 MB, so saving takes one tensor
of memory besides the model, and one pass. The files are written side by side, since hashing and writing let
go of the GIL.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avray.checkpoint.state import flatten_state
from avray.checkpoint.store import (
    EMA,
    FORMAT_VERSION,
    MANIFEST,
    MAX_JSON_BYTES,
    TRAINER,
    beside,
    digest,
    point,
    step_folder,
    sync,
)
from avray.errors import CheckpointError
from avray.family import Fitted

MAX_HEADER_BYTES = 16 << 20
"""Of a safetensors file: about 100,000 tensors. The library's own limit of 100 MB lets a file of mere names
fill a gigabyte of memory."""

_CHUNK_BYTES = 8 << 20
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.bool: "BOOL",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
}
_CURES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some space there",
    errno.EFBIG: "raise the limit on file sizes",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
}


@dataclass(frozen=True)
class Content:
    """Everything one checkpoint holds.

    ``family`` is the model's name and settings, plain data (a ``_target_`` in it is refused); ``settings``
    the run's resolved configuration; ``figures`` numbers such as the validation loss; ``card`` the model card
    in Markdown. ``unchanging`` names tensors of ``model`` (and ``ema``) that training does not touch: they are
    written once a run, beside the checkpoints, under their hash. ``trainer`` is nested state as
    :func:`avray.checkpoint.flatten_state` takes it; None keeps weights alone, enough to generate and to serve.
    Tuples in JSON parts come back as lists.
    """

    model: Mapping[str, Tensor]
    family: Mapping[str, Any]
    fitted: Fitted = field(default_factory=Fitted)
    settings: Mapping[str, Any] = field(default_factory=dict)
    ema: Mapping[str, Tensor] | None = None
    trainer: Mapping[str, Any] | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)
    card: str = ""
    unchanging: frozenset[str] = frozenset()


def save(run_dir: Path | str, step: int, content: Content, links: Sequence[str] = ("last",)) -> Path:
    """Write ``checkpoints/step-…`` under ``run_dir``, then point ``links`` (``"best"``, ``"last"``) at it.

    A checkpoint of the same step is replaced. ValueError for content that cannot be stored, CheckpointError
    when the store refuses (full, read-only); either way the checkpoints before it and the links stay as they
    were.
    """
    folder = step_folder(run_dir, step)
    temporary = beside(folder, "tmp")
    try:
        files = _files(content)
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        base = _write_base(temporary, content) if content.unchanging else {}
        _write_folder(temporary, step, content.figures, files, base)
        _publish(temporary, folder)
        for name in links:
            point(run_dir, name, folder)
    except OSError as error:
        cure = _CURES.get(error.errno or 0, "look at the file system")
        raise CheckpointError(
            f"Saving {folder} failed: {error.strerror or error}; {cure} or choose another run.dir. "
            "The checkpoints before it are kept."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def refuse_code(family: Any) -> None:
    """ValueError for a family's settings that name something to call or to look up: they are data."""
    for path, value in _walk(family, "family"):
        if isinstance(value, Mapping) and "_target_" in value:
            raise ValueError(
                f"{path} has a _target_, which could run anything: a checkpoint keeps a family's name and "
                "settings, so register the class and give its name."
            )
        if isinstance(value, str) and "${" in value:
            raise ValueError(f"{path} holds the interpolation {value!r}: resolve the settings before they are saved.")


def _files(content: Content) -> dict[str, Iterable[Any]]:
    """The pieces of each file; tensors are touched only when theirs are asked for."""
    refuse_code(content.family)
    arrays = {name: torch.from_numpy(np.array(array)) for name, array in content.fitted.arrays.items()}
    tensors: dict[str, Mapping[str, Tensor]] = {
        "model.safetensors": _changing(content, content.model),
        "fitted.safetensors": arrays,
    }
    documents = {
        "family.json": content.family,
        "fitted.json": content.fitted.data,
        "settings.json": content.settings,
    }
    if content.ema is not None:
        tensors[EMA] = _changing(content, content.ema)
    if content.trainer is not None:
        flat = flatten_state(content.trainer)
        tensors[TRAINER[0]], documents[TRAINER[1]] = flat.tensors, flat.tree
    files: dict[str, Iterable[Any]] = {name: _safetensors(name, named) for name, named in tensors.items()}
    files |= {name: [_json(name, document)] for name, document in documents.items()}
    return files | {"README.md": [content.card.encode()]}


def _changing(content: Content, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in content.unchanging}


def _write_base(temporary: Path, content: Content) -> dict[str, Any]:
    """What does not change, beside the checkpoints and under its hash; nothing is written where it is there already.
    Hashing costs 0.6 s a GB at each save, in the background."""
    unchanging = {name: tensor for name, tensor in content.model.items() if name in content.unchanging}
    sha256 = hashlib.sha256()
    for piece in _safetensors("the base", unchanging):
        sha256.update(piece)
    name = f"base-{sha256.hexdigest()}.safetensors"
    place = temporary.parent / name
    if not place.exists():
        _write(temporary / name, _safetensors("the base", unchanging))
        os.replace(temporary / name, place)
        sync(place.parent)
    return {"base": {"name": name, "bytes": place.stat().st_size}}


def _write_folder(folder: Path, step: int, figures: Mapping[str, Any], files: Mapping[str, Iterable[Any]],
                  base: Mapping[str, Any]) -> None:
    with ThreadPoolExecutor(4) as pool:
        entries = pool.map(_write, (folder / name for name in files), files.values())
        written = dict(zip(files, entries, strict=True))
    manifest = {"format_version": FORMAT_VERSION, "step": step, "figures": _plain(figures), "files": written, **base}
    sync(folder)
    _write(folder / MANIFEST, [_json(MANIFEST, manifest | {"sha256": digest(manifest)})])
    sync(folder)


def _publish(temporary: Path, folder: Path) -> None:
    """A folder cannot be replaced in one rename, so an old one of the same step steps aside first; should we
    be killed between the two renames, sweep puts it back."""
    old = beside(folder, "old")
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(temporary, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write(path: Path, pieces: Iterable[Any]) -> dict[str, Any]:
    sha256, num_bytes = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for piece in pieces:
            view = memoryview(piece)
            for start in range(0, len(view), _CHUNK_BYTES):
                sha256.update(view[start : start + _CHUNK_BYTES])
                file.write(view[start : start + _CHUNK_BYTES])
            num_bytes += len(view)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": num_bytes, "sha256": sha256.hexdigest()}


def _safetensors(file_name: str, tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """The pieces of a safetensors file: header, then each tensor. Tensors that are one and the same are
    stored once, and the others named in the metadata."""
    firsts: dict[Any, str] = {}
    shared = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES or tensor.is_meta or name == "__metadata__":
            raise ValueError(f"{name} in {file_name} is {tensor.dtype} on {tensor.device}, which cannot be stored.")
        if (first := firsts.setdefault(identity(tensor), name)) != name:
            shared[name] = first
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "shared": json.dumps(shared)}}
    offset = 0
    kept = sorted(firsts.values(), key=lambda name: (-tensors[name].element_size(), name))  # wide first: aligned
    for name in kept:
        start, offset = offset, offset + tensors[name].numel() * tensors[name].element_size()
        header[name] = {
            "dtype": _DTYPES[tensors[name].dtype],
            "shape": [*tensors[name].shape],
            "data_offsets": [start, offset],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"{file_name} would need a header over {MAX_HEADER_BYTES} bytes for its {len(kept)} tensors.")
    yield len(text).to_bytes(8, "little") + text
    for name in kept:
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def identity(tensor: Tensor) -> Any:
    """Equal for tensors that are the very same memory read the same way, as tied weights are."""
    if tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _json(name: str, document: Any) -> bytes:
    try:
        text = json.dumps(_plain(document, name), indent=1).encode()
    except ValueError as error:
        raise ValueError(f"{name} cannot be kept: {error}") from error
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{name} would be {len(text)} bytes of JSON; keep large things in arrays.")
    return text


def _plain(value: Any, path: str = "figures") -> Any:
    """Plain JSON data: NumPy's numbers become Python's, tuples lists. ValueError, naming the place, for the
    rest."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{path}: {key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}: {index}") for index, item in enumerate(value)]
    kind = "dictionary with keys that are not text" if isinstance(value, Mapping) else type(value).__name__
    raise ValueError(f"{path} is a {kind}, which JSON cannot hold.")


def _walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, value
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f"{path}: {key}")
