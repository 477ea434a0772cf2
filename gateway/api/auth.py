"""API keys and their rights. Keys are stored as SHA-256 digests and compared in constant time.

A client sends its key as ``Authorization: Bearer``, as OpenAI's clients do, or as ``x-api-key``, as Anthropic's do.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gateway.api.errors import ApiError


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key's rights.

    ``least_bounds`` maps a bound (ttft, tpot, e2e) to the strictest value (s) that it may set. ``allowed_fields``: the
    guarded body fields that it may send (`gateway.api.body_fields`). ``operator``: it may reload the configuration.
    ``sha256`` is empty for anonymous requests. ``expires_s``: Unix time from which the key is refused. ``weight``: the
    tenant's share of an engine, relative to other tenants.
    """

    tenant: str
    default_class: str
    sha256: str = ""
    allowed_classes: frozenset[str] | None = None
    least_bounds: dict[str, float] = field(default_factory=dict)
    allowed_fields: frozenset[str] = frozenset()
    expires_s: float | None = None
    allowed_models: frozenset[str] | None = None
    weight: float = 1.0
    operator: bool = False


def hash_key(key: str) -> str:
    """Return the digest that a configuration file holds in place of the key.

    A plain hash is enough, because keys are long random strings. Only passwords need key stretching.
    """
    return hashlib.sha256(key.encode()).hexdigest()


def key_id(sha256: str) -> str:
    """Return what names a key in lists and logs: the first digits of its digest."""
    return sha256[:12]


class KeyRing:
    """The configured keys. Without any, every request belongs to the anonymous tenant, unless a key is ``required``."""

    def __init__(
        self,
        keys: Sequence[ApiKey],
        anonymous: ApiKey,
        wall_clock: Callable[[], float] = time.time,
        *,
        required: bool = False,
    ) -> None:
        self._secret = secrets.token_bytes(32)
        self._keys = {self._tag(key.sha256): key for key in keys}
        self.tenants = len({key.tenant for key in keys})
        """Number of tenants that have keys."""
        self.required = required or bool(keys)
        self._anonymous = anonymous
        self._wall_clock = wall_clock

    def authenticate(self, authorization: str | None, x_api_key: str | None = None) -> ApiKey:
        """Return the key in the ``Authorization`` or ``x-api-key`` header.

        Raises `ApiError` 401 for a missing, unknown or expired key, and for two different keys.
        """
        if not self.required:
            return self._anonymous
        presented, other = _bearer_token(authorization), (x_api_key or "").strip()
        if presented and other and not hmac.compare_digest(presented.encode(), other.encode()):
            raise _unauthorized(
                "The headers 'authorization' and 'x-api-key' hold different API keys. Send one of them."
            )
        digest = hash_key(presented or other)
        found = self._keys.get(self._tag(digest))
        if found is None or not (presented or other) or not hmac.compare_digest(digest, found.sha256):
            raise _unauthorized("Missing or unknown API key. Send 'Authorization: Bearer <key>' or 'x-api-key: <key>'.")
        if found.expires_s is not None and self._wall_clock() >= found.expires_s:
            raise _unauthorized("This API key has expired. Ask the operator for a new one.")
        return found

    def _tag(self, sha256: str) -> bytes:
        """Return the index of a digest.

        The secret makes tags unpredictable, so the time of a look-up says nothing about the digests of the keys.
        """
        return hashlib.blake2b(sha256.encode(), key=self._secret, digest_size=16).digest()


def _bearer_token(authorization: str | None) -> str:
    """Return the key in an ``Authorization`` header; "" for another scheme."""
    scheme, _, token = (authorization or "").strip().partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, "authentication_error", "invalid_api_key", headers=[(b"www-authenticate", b"Bearer")])
