"""Who may read the operator's pages: a key with ``operator: true``, as Bearer, ``x-api-key`` or password of Basic.

Basic is for browsers, which ask for it and then send it with every request of the page. Its event source cannot send
other headers.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable

from starlette.datastructures import Headers

from gateway.api.auth import KeyRing
from gateway.api.errors import ApiError

UNGUARDED = frozenset(("/health", "/ready", "/reload"))
"""Operator's routes without this check. Load balancers and containers ask for the first two.

NOTE: `/reload` checks the key itself and takes no Basic, which a browser also sends for pages of other sites."""

_CHALLENGE = [(b"www-authenticate", b'Basic realm="Antares", charset="UTF-8"'), (b"cache-control", b"no-store")]


def check_operator_key(raw: Iterable[tuple[bytes, bytes]], keys: KeyRing) -> None:
    """Raise `ApiError` 401 or 403 unless a request with the headers ``raw`` has the key of an operator."""
    headers = Headers(raw=list(raw))
    given = headers.get("authorization", "")
    password = _password(given)
    try:
        key = keys.authenticate(given if password is None else f"Bearer {password}", headers.get("x-api-key"))
    except ApiError as error:
        raise ApiError(
            401,
            "This page needs the API key of an operator: as 'Authorization: Bearer <key>', or in a browser as the "
            "password, with any user name. `antares key new --operator` makes one.",
            error.type,
            error.code,
            headers=_CHALLENGE,
        ) from error
    if not key.operator:
        raise not_an_operator("This API key is not an operator's: `antares key new --operator` makes one.")


def not_an_operator(message: str) -> ApiError:
    """403: the key may not do what only operators may."""
    return ApiError(403, message, "permission_error", "not_an_operator")


def _password(authorization: str) -> str | None:
    """Return the password of Basic credentials; None for another scheme, "" if they are malformed."""
    scheme, _, credentials = authorization.strip().partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        decoded = base64.b64decode(credentials.strip(), validate=True).decode()
    except (binascii.Error, ValueError):
        return ""
    return decoded.partition(":")[2]
