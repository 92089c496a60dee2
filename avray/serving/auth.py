"""Who may ask. Keys come from AVRAY_API_KEYS (commas between); only their SHA-256 travels through Ray."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import os
from dataclasses import dataclass

ENVIRONMENT = "AVRAY_API_KEYS"


@dataclass(frozen=True)
class Keys:
    """Digests of the keys that are let in; with none, everybody is (on loopback alone, see ``launch``)."""

    digests: tuple[str, ...] = ()

    @classmethod
    def from_environment(cls) -> Keys:
        keys = [key.strip() for key in os.environ.get(ENVIRONMENT, "").split(",")]
        return cls(tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys if key))

    def owner(self, authorization: bytes | None, is_page: bool = False) -> str | None:
        """Who a header's key belongs to (16 hex digits), "" where no key is needed, None for a wrong or missing one.
        A page, which a browser fetches by itself, also takes the key as the password of Basic."""
        if not self.digests:
            return ""
        scheme, _, key = (authorization or b"").partition(b" ")
        if is_page and scheme.lower() == b"basic":
            with contextlib.suppress(binascii.Error):
                scheme, key = b"bearer", base64.b64decode(key, validate=True).partition(b":")[2]
        given = hashlib.sha256(key.strip()).hexdigest()
        matches = [hmac.compare_digest(given, digest) for digest in self.digests]  # all of them, in constant time
        return given[:16] if scheme.lower() == b"bearer" and any(matches) else None
