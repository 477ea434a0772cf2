"""Cross-origin requests of browsers: preflights, and the headers that let a page read a response."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware

from engine_adapter.engine import ASGIApp, Receive, Scope, Send

METHODS = ("GET", "POST", "DELETE")
EXPOSED = (
    "x-request-id",
    "retry-after",
    "x-should-retry",
    "x-ratelimit-limit-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-requests",
    "x-ratelimit-reset-tokens",
    "x-antares-queue-ms",
    "x-antares-predicted-ttft-ms",
    "x-antares-ttft-ms",
)
"""Response headers that a page's script may read."""


class Cors:
    """Wraps ``app``: requests with an ``Origin`` go through Starlette's middleware, all others directly to ``app``.

    Browsers never send credentials of their own (cookies): ``Access-Control-Allow-Credentials`` is never set.
    """

    def __init__(
        self, app: ASGIApp, allow_origins: Sequence[str], allow_headers: Sequence[str], max_age_s: int
    ) -> None:
        self._app = app
        self._cross_origin = CORSMiddleware(
            app,
            allow_origins=allow_origins,
            allow_methods=METHODS,
            allow_headers=allow_headers,
            expose_headers=EXPOSED,
            max_age=max_age_s,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""
        if any(name == b"origin" for name, _ in scope["headers"]):
            await self._cross_origin(scope, receive, send)
        else:
            await self._app(scope, receive, send)
