"""Paths: which ones the gateway passes to an engine, and what it says about the others.

Only plain paths reach an engine. A server that resolves ``..`` or ``%2e`` differently from the gateway would otherwise
serve another route than the one that was judged.
"""

from __future__ import annotations

import re
from difflib import get_close_matches

from engine_adapter.engine import Scope
from gateway.api.errors import ApiError, not_found

API_PREFIX = "/v1/"

_MODEL_PREFIX = "/v1/models/"
"""A model's name may contain a slash, and clients encode it."""

_KNOWN_ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/models",
    "/v1/requests",
    "/v1/responses",
    "/health",
    "/ready",
    "/metrics",
    "/status",
    "/dashboard",
    "/docs",
)
"""Routes to suggest: those that clients and operators mean."""

# An empty, "." or ".." segment (some servers ignore what follows a ";"), a backslash, a control character, and a "%"
# that is left after decoding.
_UNSAFE = re.compile(r"//|/\.{0,2}(;[^/]*)?(/|$)|[\\%\x00-\x1f\x7f]")
_ENCODED_SLASH = re.compile(rb"%(2f|5c)", re.IGNORECASE)

_LONGEST_SHOWN = 128
"""Characters of a path that an error message repeats."""


def check_path(scope: Scope) -> None:
    """Raise `ApiError` 404 for a path under ``/v1/`` that servers may read in different ways."""
    path: str = scope["path"]
    if _UNSAFE.search(path) or path.startswith("/v1/v1/"):
        raise unknown_path(path)
    # NOTE: `path` is decoded, but an engine receives the raw path too. Both must have the same segments.
    encoded = _ENCODED_SLASH.search(scope.get("raw_path") or b"")
    if encoded and not path.startswith(_MODEL_PREFIX):
        raise unknown_path(path)


def unknown_path(path: str) -> ApiError:
    """404 that suggests the route that the client probably meant."""
    shown = "".join(c if c.isprintable() else "?" for c in path[:_LONGEST_SHOWN])
    known = _suggestion(path)
    return not_found(f"No route {shown}." + (f" Did you mean {known}?" if known else ""))


def _suggestion(path: str) -> str | None:
    """Return the known route that ``path`` ends with, that it is a part of, or that it resembles."""
    plain = "/" + "/".join(part for part in path[:_LONGEST_SHOWN].lower().split("/") if part)
    # The base URL of a client may lack the prefix, have it twice, or have another one in front.
    for known in _KNOWN_ROUTES:
        if plain == known or plain == known.removeprefix("/v1") or plain.endswith(known):
            return known
    close = get_close_matches(plain, _KNOWN_ROUTES, n=1, cutoff=0.8)
    return close[0] if close else None
