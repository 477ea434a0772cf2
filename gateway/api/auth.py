"""API keys and their rights. Keys are stored as SHA-256 digests and compared in constant time.

A client sends its key as ``Authorization: Bearer``, as OpenAI's clients do, or as ``x-api-key``, as Anthropic's do.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.api.errors import ApiError


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key's rights.

    ``least_bounds`` maps a bound (ttft, tpot, e2e) to the strictest value (s) that it may set. ``allowed_fields``: the
    guarded body fields that it may send (`gateway.api.body_fields`). ``operator``: it may reload the configuration.
    ``sha256`` is empty for anonymous requests.
    """

    tenant: str
    default_class: str
    sha256: str = ""
    allowed_classes: frozenset[str] | None = None
    least_bounds: dict[str, float] = field(default_factory=dict)
    allowed_fields: frozenset[str] = frozenset()
    operator: bool = False


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

    def authenticate(self, authorization: str | None, x_api_key: str | None = None) -> ApiKey:
        """Return the key in the ``Authorization`` or ``x-api-key`` header.

        Raises `ApiError` 401 for a missing or unknown key, and for two different keys.
        """
        if not self._keys:
            return self._anonymous
        presented, other = _bearer_token(authorization), (x_api_key or "").strip()
        if presented and other and not hmac.compare_digest(presented.encode(), other.encode()):
            raise _unauthorized(
                "The headers 'authorization' and 'x-api-key' hold different API keys. Send one of them."
            )
        digest = hash_key(presented or other)
        found = None
        # Compare with every key, so that the time taken does not depend on which one matches.
        for key in self._keys:
            if hmac.compare_digest(digest, key.sha256):
                found = key
        if found is None or not (presented or other):
            raise _unauthorized("Missing or unknown API key. Send 'Authorization: Bearer <key>' or 'x-api-key: <key>'.")
        return found


def _bearer_token(authorization: str | None) -> str:
    """Return the key in an ``Authorization`` header; "" for another scheme."""
    scheme, _, token = (authorization or "").strip().partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, "authentication_error", "invalid_api_key", headers=[(b"www-authenticate", b"Bearer")])
