"""A folder on an object store, worked in through a copy on each node: what changes in the copy is brought to the store.

Programs append to files, rename and link, which a store cannot; so they do it in ``<AVRAY_CACHE>/runs/…``, a folder for
each URL. The store is what counts: a copy begins empty, or with what its user fetches into it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from avray.errors import DataError
from avray.store import CURE, Store, is_url, reason

CHECKPOINTS = "checkpoints"
"""In a run's folder; avray.checkpoint.remote looks after them."""


def working_copy(folder: str) -> Path:
    """A local folder itself; of a URL, this node's copy."""
    if not is_url(folder):
        return Path(folder)
    url, cache = folder.rstrip("/"), os.environ.get("AVRAY_CACHE", "")
    home = Path("~/.cache/avray" if not cache or is_url(cache) else cache).expanduser().absolute()
    return home / "runs" / hashlib.sha256(url.encode()).hexdigest()[:16] / url.rpartition("/")[2]


class Mirror:
    """Brings what changes in a working copy from now on to its URL; nothing to do for a local folder. ``only`` are how
    the names begin that are looked at, checkpoints apart."""

    def __init__(self, folder: str, only: tuple[str, ...] = ("",)) -> None:
        self.folder, self.copy, self.only = folder, working_copy(folder), only
        self.known = self._now()

    def _now(self) -> dict[str, tuple[int, int]]:
        """Size and time of each file."""
        if not is_url(self.folder) or not self.copy.is_dir():
            return {}
        found = {}
        for path in self.copy.rglob("*"):
            name = path.relative_to(self.copy).as_posix()
            hidden = any(part.startswith(".") for part in name.split("/"))
            if not hidden and name.startswith(self.only) and not name.startswith(f"{CHECKPOINTS}/"):
                with contextlib.suppress(FileNotFoundError):
                    stat = path.lstat()
                    if path.is_file() and not path.is_symlink():
                        found[name] = (stat.st_size, stat.st_mtime_ns)
        return found

    def push(self) -> None:
        """A file that is written meanwhile goes again the next time. DataError where the store fails."""
        store = Store(self.folder)
        for name, state in self._now().items():
            if self.known.get(name) != state and (self.copy / name).exists():
                try:
                    store.upload(name, self.copy / name)
                except Exception as error:  # each store has errors of its own
                    raise DataError(f"{store.path(name)} cannot be written ({reason(error)}): {CURE}.") from error
                self.known[name] = state


@contextlib.contextmanager
def mirrored(folder: str, setting: str = "run.dir", only: tuple[str, ...] = ("",)) -> Iterator[Path]:
    """Where to work in place of ``folder``, which is given what was changed there when the block ends, also when it
    fails. ValueError, naming ``setting``, where it cannot be written."""
    Store(folder).check_writable(setting)
    copy = working_copy(folder)
    if is_url(folder):
        copy.mkdir(parents=True, exist_ok=True)
        for path in copy.iterdir():
            if path.name != CHECKPOINTS and not path.name.startswith("."):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    mirror = Mirror(folder, only)
    try:
        yield copy
    except BaseException:
        with contextlib.suppress(Exception):
            mirror.push()
        raise
    mirror.push()
