"""Opening a checkpoint: every file is hashed before its first byte is believed, and nothing in it can run.

Hashing takes about 0.6 s a GB and core. The trainer's state, twice the weights' size, is hashed only when it
is asked for, so that serving does not read it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from avray.checkpoint import store
from avray.checkpoint.remote import fetch
from avray.checkpoint.state import unflatten_state
from avray.checkpoint.store import (
    EMA,
    FORMAT_VERSION,
    MANIFEST,
    TRAINER,
    WEIGHTS,
    base_path,
    offer,
    read_json,
    read_manifest,
    resolve,
)
from avray.checkpoint.writing import MAX_HEADER_BYTES, refuse_code
from avray.errors import CheckpointError
from avray.family import Fitted
from avray.store import is_url

Which = Literal["best", "model", "ema"]
Documents = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Weights and trainer state are read when asked for."""

    path: Path
    step: int
    family: Mapping[str, Any]
    fitted: Fitted
    settings: Mapping[str, Any]
    figures: Mapping[str, Any]
    manifest: Mapping[str, Any]
    verify: bool

    @classmethod
    def open(cls, path: Path | str, verify: bool = True) -> Checkpoint:
        """Open a run, a link or a folder (see :func:`avray.checkpoint.resolve`), and check the SHA-256 of
        each file that generating needs unless ``verify`` is off. CheckpointError names the file that is
        damaged, and another checkpoint of the run where there is one; that one is never taken instead. Of a URL,
        this node's copy is opened, fetched first where it is not there."""
        if is_url(path):
            copy = fetch(str(path))
            try:
                return cls._open(copy, verify)
            except CheckpointError as error:
                raise CheckpointError(f"{error} It is a copy of {path}: remove it to have it fetched again.") from error
        folder = resolve(path)
        try:
            return cls._open(folder, verify)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{offer(folder.parent.parent, besides=folder)}") from error

    @classmethod
    def _open(cls, folder: Path, verify: bool) -> Checkpoint:
        documents: Documents = {MANIFEST: read_manifest(folder)}
        version, files = documents[MANIFEST]["format_version"], documents[MANIFEST]["files"]
        if not 1 <= version <= FORMAT_VERSION:
            raise CheckpointError(
                f"{folder} has format {version} and this avray reads 1 to {FORMAT_VERSION}: upgrade avray."
            )
        if missing := [name for name in WEIGHTS if name not in files]:
            raise CheckpointError(f"{folder} lacks {', '.join(missing)}.")
        if strange := [name for name in files if name not in (*WEIGHTS, EMA, *TRAINER)]:
            raise CheckpointError(
                f"{folder / MANIFEST} lists {', '.join(strange)}, which no checkpoint of avray holds."
            )
        if verify:
            store.verify(folder, documents[MANIFEST], [name for name in files if name not in TRAINER])
        for name in ("family.json", "fitted.json", "settings.json"):
            documents[name] = read_json(folder / name)
        for old in range(version, FORMAT_VERSION):
            MIGRATIONS[old](folder, documents)
        try:
            refuse_code(documents["family.json"])
        except ValueError as error:
            raise CheckpointError(f"{folder / 'family.json'} is refused: {error}") from error
        tensors = _read_tensors(folder / "fitted.safetensors")
        return cls(
            path=folder,
            step=documents[MANIFEST]["step"],
            family=documents["family.json"],
            fitted=Fitted({name: t.numpy().copy() for name, t in tensors.items()}, documents["fitted.json"]),
            settings=documents["settings.json"],
            figures=documents[MANIFEST].get("figures", {}),
            manifest=documents[MANIFEST],
            verify=verify,
        )

    def weights(self, which: Which = "best") -> dict[str, Tensor]:
        """Tensors by the module's names, tied ones under each of theirs: ``model`` as the optimiser left
        them, ``ema`` their average, ``best`` the average where the run kept one."""
        has_average = EMA in self.manifest["files"]
        if which == "ema" and not has_average:
            raise CheckpointError(f"{self.path} keeps no average of the weights: take its model or best weights.")
        own = _read_tensors(self.path / (EMA if has_average and which != "model" else "model.safetensors"))
        return own if self.base is None else _read_tensors(self.base) | own

    @property
    def base(self) -> Path | None:
        """The file of the weights that this run never changes, if it has one: a copy elsewhere needs it too."""
        base = self.manifest.get("base")
        return None if base is None else base_path(self.path, base["name"])

    def load_into(self, module: nn.Module, which: Which = "best") -> None:
        """Fill a module, which may be on the meta device (it comes out on the CPU; move it afterwards).

        CheckpointError names what is missing, left over or of another shape; the module is then untouched.
        """
        state = self.weights(which)
        expected = module.state_dict(keep_vars=True)
        both = expected.keys() & state.keys()
        complaints = {
            "lacks": expected.keys() - both,
            "has, unknown to the model,": state.keys() - both,
            "has in another shape": {
                f"{name} {[*state[name].shape]} (model: {[*expected[name].shape]})"
                for name in both
                if state[name].shape != expected[name].shape
            },
        }
        if any(complaints.values()):
            text = "; ".join(f"{verb} {_some(sorted(names))}" for verb, names in complaints.items() if names)
            raise CheckpointError(f"{self.path} does not fit the model: it {text}.")
        on_meta = any(tensor.is_meta for tensor in expected.values())
        module.load_state_dict(_as_parameters(state, expected) if on_meta else state, assign=on_meta)
        if empty := [name for name, buffer in module.named_buffers() if buffer.is_meta]:
            raise CheckpointError(
                f"{_some(empty)} of the model is neither in {self.path} nor made by the model itself."
            )

    def trainer_state(self) -> dict[str, Any] | None:
        """The nested state that training goes on from; None for a copy that holds weights alone."""
        if not all(name in self.manifest["files"] and (self.path / name).exists() for name in TRAINER):
            return None
        if self.verify:
            try:
                store.verify(self.path, self.manifest, TRAINER)
            except CheckpointError as error:
                raise CheckpointError(f"{error}{offer(self.path.parent.parent, besides=self.path)}") from error
        state: dict[str, Any] = unflatten_state(
            _read_tensors(self.path / TRAINER[0]), read_json(self.path / TRAINER[1])
        )
        return state


def _version_1(folder: Path, documents: Documents) -> None:
    """Version 1 kept the figures in trainer.json, where a copy for serving loses them."""
    trainer = folder / TRAINER[1]
    documents[MANIFEST]["figures"] = read_json(trainer).get("figures", {}) if trainer.exists() else {}


def _version_2(folder: Path, documents: Documents) -> None:
    """Version 2 kept all weights in each checkpoint."""


MIGRATIONS: dict[int, Callable[[Path, Documents], None]] = {1: _version_1, 2: _version_2}
"""Each turns the documents of its version, in place, into those of the next."""


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, mapped rather than copied. The header is bounded before the library sees it."""
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > min(MAX_HEADER_BYTES, path.stat().st_size - 8):
        raise CheckpointError(f"{path} is refused: it claims a header of {header_bytes} bytes.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            shared = json.loads((file.metadata() or {}).get("shared", "{}"))
        return tensors | {name: tensors[first] for name, first in shared.items()}
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is no safetensors file of avray: {error}.") from error


def _as_parameters(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One Parameter for each tensor, so that weights that were tied are tied again; buffers as they are."""
    made: dict[int, nn.Parameter] = {}
    filled: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if isinstance(expected[name], nn.Parameter):
            if id(tensor) not in made:
                made[id(tensor)] = nn.Parameter(tensor.to(expected[name].dtype), expected[name].requires_grad)
            filled[name] = made[id(tensor)]
        else:
            filled[name] = tensor.to(expected[name].dtype)
    return filled


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
