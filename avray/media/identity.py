"""A name for what a file holds."""

from __future__ import annotations

import hashlib

import fsspec

from avray.errors import DataError
from avray.store import is_url


def content_hash(path: str) -> str:
    """32 hex digits that change when the file does: of its bytes, or for a URL of what the store says of it (ETag or
    checksum, and size; else all that it says, the address included). DataError if it is not there."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        if not is_url(path):
            with open(path, "rb") as file:
                return hashlib.file_digest(file, lambda: digest).hexdigest()
        fs, inner = fsspec.core.url_to_fs(path)
        info = fs.info(inner)
        tags = (info.get(name) for name in ("ETag", "etag", "md5Hash", "content_md5", "checksum"))
        tag = next(filter(None, tags), None)
        digest.update(f"{tag or fs.ukey(inner)}|{info.get('size')}".encode())
        return digest.hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
