"""API keys and their rights. Keys are stored as SHA-256 digests and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.api.errors import ApiError


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key's rights. ``least_bounds`` maps a bound (ttft, tpot, e2e) to the strictest value (s) that it may set."""

    tenant: str
    default_class: str
    sha256: str = ""
    allowed_classes: frozenset[str] | None = None
    least_bounds: dict[str, float] = field(default_factory=dict)


def hash_key(key: str) -> str:
    """Return the digest that a configuration file holds in place of the key.

    A plain hash is enough, because keys are long random strings. Only passwords need key stretching.
    """
    return hashlib.sha256(key.encode()).hexdigest()


class KeyRing:
    """The configured keys. Without any, every request belongs to the anonymous tenant."""

    def __init__(self, keys: Sequence[ApiKey], anonymous: ApiKey) -> None:
        self._keys = tuple(keys)
        self._anonymous = anonymous

    def authenticate(self, authorization: str | None) -> ApiKey:
        """Return the key in the ``Authorization`` header. Raises `ApiError` 401 for a missing or unknown key."""
        if not self._keys:
            return self._anonymous
        scheme, _, presented = (authorization or "").partition(" ")
        if scheme.lower() == "bearer" and presented:
            digest = hash_key(presented.strip())
            found = None
            # Compare with every key, so that the time taken does not depend on which one matches.
            for key in self._keys:
                if hmac.compare_digest(digest, key.sha256):
                    found = key
            if found is not None:
                return found
        raise ApiError(
            401,
            "Missing or unknown API key. Send 'Authorization: Bearer <key>'.",
            "authentication_error",
            "invalid_api_key",
            headers=[(b"www-authenticate", b"Bearer")],
        )
