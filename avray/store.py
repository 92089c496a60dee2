"""A folder that may be local or any fsspec URL: writes that are whole or absent, reads, a listing.

Notable: fsspec would remember listings, and so miss what other processes have written since; here it never does.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import fsspec

from avray.errors import DataError, MissingDependency

MARK = ".avray-"
"""What names of files begin with that are there for a moment, to see whether and by whom a folder can be used."""
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""avray's extra for a scheme."""
CURE = ("look at the bucket's name, the credentials of this machine and, where there is one, the endpoint "
        "(AWS_ENDPOINT_URL)")


def is_url(path: str | Path) -> bool:
    """True for ``scheme://…``, which fsspec opens."""
    return "://" in str(path)


@dataclass(frozen=True)
class Store:
    """``root`` is an absolute local folder or ``scheme://…``."""

    root: str

    @property
    def is_local(self) -> bool:
        return not is_url(self.root)

    @cached_property
    def fs(self) -> Any:
        """fsspec's file system of a URL. MissingDependency where its package is not installed."""
        try:
            return fsspec.core.url_to_fs(self.root, use_listings_cache=False)[0]
        except ImportError as error:
            scheme = self.root.partition("://")[0]
            cure = f'pip install "avray[{EXTRAS[scheme]}]"' if scheme in EXTRAS else str(error)
            raise MissingDependency(f"{self.root} cannot be opened without the package for {scheme}://: {cure}."
                                    ) from error

    def path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def inner(self, name: str) -> str:
        """The path as the file system itself has it, without a scheme."""
        return self.path(name) if self.is_local else str(self.fs._strip_protocol(self.path(name)))

    def arrow(self) -> Any:
        """The file system as Arrow takes it; None for a local one."""
        if self.is_local:
            return None
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        return PyFileSystem(FSSpecHandler(self.fs))

    def exists(self, name: str) -> bool:
        return os.path.exists(self.path(name)) if self.is_local else bool(self.fs.exists(self.path(name)))

    def kind(self) -> Literal["folder", "file"] | None:
        """What lies at the root itself. DataError where a URL's store does not answer, or lets nobody look."""
        if self.is_local:
            return "folder" if os.path.isdir(self.root) else "file" if os.path.exists(self.root) else None
        try:
            return "folder" if self.fs.isdir(self.root) else "file" if self.fs.exists(self.root) else None
        except MissingDependency:
            raise
        except Exception as error:  # each store has errors of its own
            raise DataError(f"{self.root} cannot be read ({reason(error)}): {CURE}.") from error

    def read(self, name: str, at_most: int | None = None) -> bytes:
        """All of it, or the first ``at_most`` bytes. FileNotFoundError where it is not there."""
        if self.is_local:
            with open(self.path(name), "rb") as file:
                return file.read(at_most)
        return bytes(self.fs.cat_file(self.path(name), end=at_most))

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Whole or absent, also when killed: a temporary name and a rename, or an object store's single put."""
        target = self.path(name)
        if not self.is_local:
            self.fs.pipe_file(target, bytes(content))
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
                self.fs.rm_file(self.path(name))

    def list(self, folder: str) -> set[str]:
        """Every file below a folder, relative to the store's root."""
        if not self.is_local:
            return set(self.sizes(folder))
        base = Path(self.path(folder))
        return {str(p.relative_to(self.root)) for p in base.rglob("*") if p.is_file()} if base.exists() else set()

    def sizes(self, folder: str) -> dict[str, int]:
        """The same with the bytes of each; of a URL."""
        if not self.fs.exists(self.path(folder)):
            return {}
        prefix = self.fs._strip_protocol(self.root).rstrip("/") + "/"
        found = self.fs.find(self.path(folder), detail=True)
        return {name.removeprefix(prefix): info["size"] for name, info in found.items()}

    def upload(self, name: str, file: Path) -> None:
        """A local file, whole or absent; of a URL."""
        self.fs.put_file(str(file), self.path(name))

    def download(self, name: str, file: Path) -> None:
        """To a local file, in pieces; of a URL."""
        self.fs.get_file(self.path(name), str(file))

    def check_writable(self, setting: str) -> None:
        """Write, read and remove a small file. ValueError, naming ``setting`` and the cure, where that fails."""
        name = f"{MARK}check-{secrets.token_hex(4)}"
        try:
            self.write(name, b"avray")
            if self.read(name) != b"avray":
                raise OSError("what was read is not what was written")
            self.remove(name)
        except MissingDependency:
            raise
        except Exception as error:  # each store has errors of its own
            cure = "give another place" if self.is_local else f"{CURE}, or give another place"
            raise ValueError(f"{setting}={self.root} cannot be written ({reason(error)}): {cure}.") from error


def reason(error: Exception) -> str:
    """A store's error for the middle of a sentence."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
