"""Other people's weights: where they are, by hub name or local folder, and a name for what they hold.

Nothing is fetched unless ``download`` says so. The name comes from the weights themselves, so that the same ones in
another folder are the same.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from avray.errors import MissingDependency


def kept_path(source: str) -> str:
    """A local path made absolute, since a checkpoint keeps it and is opened from elsewhere; a hub name as it is."""
    local = Path(source).expanduser()
    return str(local.absolute()) if local.exists() else source


def find_weights(source: str, key: str, hub: str, revision: str | None = None, download: bool = False,
                 weights: str = "*.safetensors", folder: str = ".") -> Path:
    """The folder or file that ``source``, a path or a hub name, stands for. MissingDependency, naming setting ``key``
    and the fix, where there is none; ``hub`` is the repository to offer, ``weights`` what its weights' files are
    called, ``folder`` where in it they lie."""
    local = Path(source).expanduser()
    if local.exists():
        return local
    group = key.rpartition(".")[0]
    cure = f"set {key} to a folder with config.json and {weights}, or {group}.download=true to fetch {hub} once"
    if local.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise MissingDependency(f"{key} = {source} does not exist: {cure}.")
    inside = "" if folder == "." else f"{folder}/"
    return _snapshot(source, revision, download, [f"{inside}*.json", f"{inside}{weights}"], cure) / folder


def _snapshot(repository: str, revision: str | None, download: bool, patterns: list[str], cure: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=not download,
                                      allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        state = f"could not be fetched ({type(error).__name__})" if download else "are not on this machine"
        raise MissingDependency(f"The weights of {repository} {state}: {cure}.") from error


def digest(weights: Path, pattern: str = "*.safetensors") -> str:
    """16 hex digits of a folder's weights and config.json, or of a file; worked out once while they stay."""
    files = [*sorted(weights.glob(pattern)), weights / "config.json"] if weights.is_dir() else [weights]
    return _digest_of(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@functools.lru_cache(maxsize=32)
def _digest_of(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path, size, _ in files:
        digest.update(f"{path.suffix}:{size}".encode())
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
