"""API keys: who asks, and what they may ask for. Keys are kept as SHA-256 digests and compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.api.errors import ApiError


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key's rights. ``least_bounds`` maps a bound (ttft, tpot, e2e) to the strictest value it may ask for (s)."""

    tenant: str
    default_class: str
    sha256: str = ""
    allowed_classes: frozenset[str] | None = None
    least_bounds: dict[str, float] = field(default_factory=dict)


def hash_key(key: str) -> str:
    """The digest that a configuration file carries in place of the key.

    A plain hash is enough: keys are long random strings, not passwords, so there is nothing to stretch.
    """
    return hashlib.sha256(key.encode()).hexdigest()


class KeyRing:
    """The keys a gateway knows. With none configured everybody is the anonymous tenant."""

    def __init__(self, keys: Sequence[ApiKey], anonymous: ApiKey) -> None:
        self._keys = tuple(keys)
        self._anonymous = anonymous

    def authenticate(self, authorization: str | None) -> ApiKey:
        """The key that the ``Authorization`` header carries; raises `ApiError` 401 when it is none of ours."""
        if not self._keys:
            return self._anonymous
        scheme, _, presented = (authorization or "").partition(" ")
        if scheme.lower() == "bearer" and presented:
            digest = hash_key(presented.strip())
            found = None
            # Every key is compared, so that the time taken tells nothing about which one matched.
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
