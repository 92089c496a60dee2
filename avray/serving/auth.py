"""Who may ask. Keys come from AVRAY_API_KEYS (commas between); only their SHA-256 travels through Ray."""

from __future__ import annotations

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

    def owner(self, authorization: bytes | None) -> str | None:
        """Who a header's key belongs to (16 hex digits), "" where no key is needed, None for a wrong or missing one.
        Every digest is compared, in constant time."""
        if not self.digests:
            return ""
        scheme, _, key = (authorization or b"").partition(b" ")
        given = hashlib.sha256(key.strip()).hexdigest()
        matches = [hmac.compare_digest(given, digest) for digest in self.digests]
        return given[:16] if scheme.lower() == b"bearer" and any(matches) else None
