"""A folder that may be a local path or any fsspec URL, with the three things the cache needs of it: a write that is
whole or absent, a read that is checked, and a listing."""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec


@dataclass(frozen=True)
class Store:
    """``root`` is an absolute local folder or ``scheme://…``."""

    root: str

    @property
    def is_local(self) -> bool:
        return "://" not in self.root

    @cached_property
    def _fs(self) -> Any:
        return fsspec.core.url_to_fs(self.root)[0]

    def path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def exists(self, name: str) -> bool:
        return os.path.exists(self.path(name)) if self.is_local else bool(self._fs.exists(self.path(name)))

    def read(self, name: str) -> bytes:
        """FileNotFoundError where it is not there."""
        if self.is_local:
            return Path(self.path(name)).read_bytes()
        return bytes(self._fs.cat_file(self.path(name)))

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Whole or absent, also when killed: a temporary name and a rename, or an object store's single put."""
        target = self.path(name)
        if not self.is_local:
            self._fs.pipe_file(target, bytes(content))
            return
        folder = os.path.dirname(target)
        os.makedirs(folder, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".writing-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self.is_local:
                os.unlink(self.path(name))
            else:
                self._fs.rm_file(self.path(name))

    def list(self, folder: str) -> set[str]:
        """Every file below a folder, relative to the store's root."""
        if self.is_local:
            base = Path(self.path(folder))
            return {str(p.relative_to(self.root)) for p in base.rglob("*") if p.is_file()} if base.exists() else set()
        if not self._fs.exists(self.path(folder)):
            return set()
        prefix = self._fs._strip_protocol(self.root).rstrip("/") + "/"
        return {name.removeprefix(prefix) for name in self._fs.find(self.path(folder))}
