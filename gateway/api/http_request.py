"""One HTTP request at the gateway's edge, and what was sent in response to it so far."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from os import urandom

from starlette.datastructures import Headers as HeaderView

from engine_adapter.engine import Message, Receive, Scope, Send
from gateway.api.connections import CONNECTION_KEY, SLOW_READER_REASONS
from gateway.api.errors import Headers
from gateway.api.routes.table import Route
from gateway.api.shared_limit import ONLY_SHARER, Sharer
from gateway.observability.ledger import Entry
from gateway.tenants.limits import TenantLimiter

_REQUEST_ID = b"x-request-id"
_STREAM_TYPE = b"text/event-stream"
STREAM_HEADERS = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
"""Headers of every event stream: caches must not store it, and nginx must not hold its events back."""

LARGEST_ADAPTED = 64 << 10
"""Largest error document of an engine (bytes) that is changed to the format of the API. Larger ones pass unchanged."""

_OF_BODY = frozenset((b"content-type", b"content-length"))
"""Headers of a response that change with its body."""

_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestHeaders(HeaderView):
    """Request headers with lookup in constant time. Starlette's own search takes a microsecond for each name.

    ``get`` returns the first value of a header, whose name must be in lower case: a dozen are asked for per request.
    """

    def __init__(self, raw: list[tuple[bytes, bytes]]) -> None:
        super().__init__(raw=raw)
        # Of several values of a name the first one counts, as in Starlette.
        self._first = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(raw)}
        self.get = self._first.get  # type: ignore[method-assign]

    def __getitem__(self, key: str) -> str:
        return self._first[key.lower()]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and key.lower() in self._first


@dataclass(slots=True, eq=False)
class HttpRequest:
    """One request to ``/v1/*``, with the ASGI arguments of the call. ``arrival_s``: monotonic seconds.

    ``status`` is the status in metrics: that of the response, and 500 before a response started. `Proxy` sets 499 if
    the client disconnected before its response was complete; on routes that are not scheduled, before it started.
    ``streaming``: an event stream has started. ``entry``: its ledger entry, once it is accepted for scheduling.
    ``tenant``: its key's, once that is known. ``sharer``: whose part of the shared limits it counts to. ``limiter``:
    what counts this request, if its tenant has limits. ``limited``: it exceeded one of them. ``rate_headers``: returns
    the headers about them. Every response gets the header ``x-request-id``.
    """

    scope: Scope
    receive: Receive
    client_send: Send
    arrival_s: float
    route: Route
    status: int = 500
    response_started: bool = False
    streaming: bool = False
    entry: Entry | None = None
    tenant: str = ""
    sharer: Sharer = ONLY_SHARER
    limiter: TenantLimiter | None = None
    limited: bool = False
    rate_headers: Callable[[], Headers] | None = None
    headers: RequestHeaders = field(init=False)
    request_id: bytes = field(init=False)
    _error_start: Message | None = None
    _error_body: bytes = b""

    def __post_init__(self) -> None:
        self.headers = RequestHeaders(list(self.scope["headers"]))
        self.request_id = _request_id(self.headers.get("x-request-id"))

    @property
    def client_is_slow(self) -> bool:
        """Whether the connection was cut because the client did not read its response."""
        connection = self.scope.get(CONNECTION_KEY)
        return connection is not None and connection.cut_reason in SLOW_READER_REASONS

    @property
    def disconnected(self) -> asyncio.Future[None] | None:
        """A future that is done when the client is gone or has its response; None if the server has none."""
        connection = self.scope.get(CONNECTION_KEY)
        return None if connection is None else connection.disconnected()

    def belongs_to(self, sharer: Sharer) -> None:
        """Note whose part of the shared limits the request counts to."""
        self.sharer = sharer
        connection = self.scope.get(CONNECTION_KEY)
        if connection is not None:
            connection.sharer = sharer

    def cut(self, reason: str) -> None:
        """Close the client's connection because of ``reason``."""
        connection = self.scope.get(CONNECTION_KEY)
        if connection is not None:
            connection.cut(reason)

    def arrived_body(self, most: int) -> bytes | None:
        """Return the whole body, once, if it has arrived and is at most ``most`` bytes; None otherwise."""
        connection = self.scope.get(CONNECTION_KEY)
        return None if connection is None else connection.arrived_body(most)

    def event_writer(self) -> Callable[[bytes], bool] | None:
        """Return what writes an event of a stream that has begun, as `HttpConnection.event_writer`; None without it."""
        connection = self.scope.get(CONNECTION_KEY)
        return None if connection is None else connection.event_writer(self.client_send)

    def give_up_body(self) -> None:
        """Close the connection after the response if the rest of the body has not arrived by then."""
        connection = self.scope.get(CONNECTION_KEY)
        if connection is not None:
            connection.give_up_body()

    def send(self, message: Message) -> Awaitable[None]:
        """Send ``message`` to the client, and note the response's status."""
        if message["type"] == "http.response.start":
            return self._send_start(message)
        if self._error_start is not None:
            return self._send_error_body(message)
        # NOTE: a coroutine less for each event to pass through.
        return self.client_send(message)

    async def _send_start(self, message: Message) -> None:
        self.status, self.response_started = message["status"], True
        headers, self.streaming = client_headers(message.get("headers", ()))
        if self.rate_headers is not None:
            # The tenant's limits are the gateway's, not those of the engine's server.
            headers = [header for header in headers if not header[0].lower().startswith(b"x-ratelimit-")]
            headers += self.rate_headers()
        message = {**message, "headers": [*headers, (_REQUEST_ID, self.request_id)]}
        if self.status >= 400 and self.route.errors.adapted is not None and not self.streaming and _is_plain(headers):
            self._error_start = message
            return
        await self.client_send(message)

    async def _send_error_body(self, message: Message) -> None:
        """Collect the body of an engine's error, and send it in the format of the API."""
        self._error_body += message.get("body", b"")
        if message.get("more_body") and len(self._error_body) < LARGEST_ADAPTED:
            return
        start, adapted = self._error_start, self.route.errors.adapted
        assert start is not None
        assert adapted is not None
        self._error_start = None
        body = self._error_body
        if not message.get("more_body"):
            body = adapted(body, self.status, self.request_id)
            headers = [header for header in start["headers"] if header[0].lower() not in _OF_BODY]
            headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
            start = {**start, "headers": headers}
        await self.client_send(start)
        await self.client_send({**message, "body": body})


def _is_plain(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether the body of a response with ``headers`` is not compressed."""
    return all(name.lower() != b"content-encoding" or value.lower() == b"identity" for name, value in headers)


def is_event_stream(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a response with ``headers`` is an event stream."""
    for name, value in headers:
        if name.lower() == b"content-type":
            return value.startswith(_STREAM_TYPE)
    return False


def client_headers(headers: Iterable[tuple[bytes, bytes]]) -> tuple[Headers, bool]:
    """Return response headers for the client, and whether they open an event stream, which gets `STREAM_HEADERS`.

    An engine's cross-origin rules and its request id are dropped: the gateway has its own.
    """
    kept = [
        header
        for header in headers
        if (name := header[0].lower()) != _REQUEST_ID and not name.startswith(b"access-control-")
    ]
    streams = is_event_stream(kept)
    if streams:
        names = {header[0].lower() for header in kept}
        kept += [header for header in STREAM_HEADERS if header[0] not in names]
    return kept, streams


def _request_id(given: str | None) -> bytes:
    """Return the client's own id if its characters are safe in headers and logs, else a new one."""
    if given and _SAFE_ID.fullmatch(given := given.strip()):
        return given.encode()
    return urandom(16).hex().encode()
