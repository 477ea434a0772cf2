"""One HTTP request at the gateway's edge, and what was sent in response to it so far."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers as HeaderView

from engine_adapter.engine import Message, Receive, Scope, Send
from gateway.api.errors import Headers

CHAT_ROUTE, COMPLETION_ROUTE = "/v1/chat/completions", "/v1/completions"

_STREAM_TYPE = b"text/event-stream"
STREAM_HEADERS = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
"""Headers of every event stream: caches must not store it, and nginx must not hold its events back."""

_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestHeaders(HeaderView):
    """Request headers with lookup in constant time. Starlette's own search takes a microsecond for each name."""

    def __init__(self, raw: list[tuple[bytes, bytes]]) -> None:
        super().__init__(raw=raw)
        # Of several values of a name the first one counts, as in Starlette.
        self._first = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(raw)}

    def __getitem__(self, key: str) -> str:
        return self._first[key.lower()]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and key.lower() in self._first

    def get(self, key: str, default: Any = None) -> Any:
        """Return the first value of the header ``key``."""
        return self._first.get(key.lower(), default)


@dataclass(slots=True, eq=False)
class HttpRequest:
    """One request to ``/v1/*``, with the ASGI arguments of the call. ``arrival_s``: monotonic seconds.

    ``status`` is the status in metrics: that of the response, and 500 before a response started. `Proxy` sets 499 if
    the client disconnected before its response was complete; on routes that are not scheduled, before it started.
    ``streams``: the response is an event stream.
    """

    scope: Scope
    receive: Receive
    client_send: Send
    arrival_s: float
    status: int = 500
    response_started: bool = False
    streams: bool = False
    headers: RequestHeaders = field(init=False)
    request_id: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.headers = RequestHeaders(list(self.scope["headers"]))
        self.request_id = _request_id(self.headers.get("x-request-id"))

    @property
    def is_chat(self) -> bool:
        """Whether the route is the chat completions route."""
        return bool(self.scope["path"] == CHAT_ROUTE)

    @property
    def is_scheduled(self) -> bool:
        """Whether the request generates tokens and so passes the scheduling pipeline."""
        return self.route != "/v1/*" and self.scope["method"] == "POST"

    @property
    def route(self) -> str:
        """The route as a metric label: one of the scheduled routes, or ``/v1/*``."""
        path: str = self.scope["path"]
        return path if path in (CHAT_ROUTE, COMPLETION_ROUTE) else "/v1/*"

    async def send(self, message: Message) -> None:
        """Send ``message`` to the client, and note the response's status."""
        if message["type"] == "http.response.start":
            self.status, self.response_started = message["status"], True
            headers, self.streams = client_headers(message.get("headers", ()))
            message = {**message, "headers": headers}
        await self.client_send(message)


def client_headers(headers: Iterable[tuple[bytes, bytes]]) -> tuple[Headers, bool]:
    """Return response headers for the client, and whether they open an event stream.

    An event stream gets `STREAM_HEADERS`. An engine's cross-origin rules are removed.
    """
    kept: Headers = []
    streams, names = False, set()
    for name, value in headers:
        lower = name.lower()
        if not lower.startswith(b"access-control-"):
            kept.append((name, value))
            names.add(lower)
            streams |= lower == b"content-type" and value.startswith(_STREAM_TYPE)
    if streams:
        kept += [(name, value) for name, value in STREAM_HEADERS if name not in names]
    return kept, streams


def _request_id(given: str | None) -> bytes:
    """Return the client's own id if its characters are safe in headers and logs, else a new one."""
    given = (given or "").strip()
    if _SAFE_ID.fullmatch(given):
        return given.encode()
    return uuid.uuid4().hex.encode()
