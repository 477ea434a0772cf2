"""Who may use the operator's routes: a key with ``operator: true``, as Bearer, ``x-api-key`` or password of Basic.

Basic is for browsers, which ask for it and then send it with every request of the page. Its event source cannot send
other headers.
"""

from __future__ import annotations

import base64
import binascii

from starlette.datastructures import Headers
from starlette.requests import Request

from gateway.api.addresses import is_loopback
from gateway.api.auth import KeyRing
from gateway.api.errors import ApiError

UNGUARDED = frozenset(("/health", "/ready", "/reload"))
"""Operator's routes without this check. Load balancers and containers ask for the first two.

NOTE: `/reload` checks the key itself, even where the pages need none."""

_CHALLENGE = [(b"www-authenticate", b'Basic realm="Antares", charset="UTF-8"'), (b"cache-control", b"no-store")]


def check_operator(headers: Headers, keys: KeyRing, *, accept_basic: bool = True) -> None:
    """Raise `ApiError` 401 or 403 unless a request with ``headers`` has the key of an operator.

    NOTE: a route that changes something must not ``accept_basic``: a browser also sends that for pages of other sites.
    """
    authorization = headers.get("authorization", "")
    password = _password(authorization) if accept_basic else None
    if password is not None:
        authorization = f"Bearer {password}"
    try:
        key = keys.authenticate(authorization, headers.get("x-api-key"))
    except ApiError as error:
        if not accept_basic:
            raise
        raise ApiError(
            401,
            "This page needs the API key of an operator: as 'Authorization: Bearer <key>', or in a browser as the "
            "password, with any user name. `antares key new --operator` makes one.",
            error.type,
            error.code,
            headers=_CHALLENGE,
        ) from error
    if not key.operator:
        raise _not_an_operator("This API key is not an operator's: `antares key new --operator` makes one.")


def check_local(request: Request) -> None:
    """Raise `ApiError` 403 unless ``request`` is of a program on this machine, which no web page is."""
    if "origin" in request.headers or request.client is None or not is_loopback(request.client.host):
        raise _not_an_operator(
            "Without keys, only programs on this machine may do this. Configure a key with operator: true."
        )


def _not_an_operator(message: str) -> ApiError:
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
