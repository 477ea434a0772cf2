"""uvicorn's HTTP protocol with limits on what a client may send, and how slowly.

The usual request costs a few comparisons here.
"""

from __future__ import annotations

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from gateway.api.connections import CONNECTION_KEY
from gateway.api.errors import ApiError, bad_request
from gateway.api.head_buffer import HeadBuffer
from gateway.api.http_connection import HttpConnection

MAX_TARGET_BYTES = 16 << 10
"""Longest request target (bytes); above it 414. Convention; browsers send 2 to 64 KiB, API clients less than one."""

MAX_PIPELINED = 16
"""Requests that may wait on one connection behind the one that is served. Convention; few clients send any."""

MAX_DISCARDED = 16 << 20
"""Bytes of a body that are read although its request was answered already. Convention."""


class HttpProtocol(HttpConnection):
    """The requests that a client sends on one connection.

    Every protocol error is answered in OpenAI's format, and closes the connection.

    An offer to upgrade to HTTP/2 (``Upgrade: h2c``), which Java's HTTP client sends by default, is ignored, as RFC 9110
    allows. Any other upgrade is refused. NOTE: httptools skips the body of every request with an upgrade, so a request
    with an ignored offer is parsed again without it.
    """

    # --- what the client sends ----------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Receive bytes from the client."""
        if self._closing:
            return
        if self._in_body:
            self._receive_body(data)
            return
        room = self._limits.max_head_bytes - self._head_bytes
        if len(data) <= room:
            self._head_bytes += len(data)
            self._feed(data)
            if self._in_head and not self._head_since:
                self._head_since = self.loop.time()
            return
        # Most of it may be a body, which the head's limit does not apply to.
        self._head_bytes = self._limits.max_head_bytes
        self._feed(data[:room])
        if self._closing:
            return
        if self._head_bytes == self._limits.max_head_bytes:
            self._refuse(_head_too_large(self._limits.max_head_bytes))
            return
        self.data_received(data[room:])

    def _receive_body(self, data: bytes) -> None:
        cycle, before = self.cycle, self._body_bytes
        self._feed(data)
        if not self._in_body or self._closing or self.cycle is not cycle:
            return
        self._overhead += len(data) - (self._body_bytes - before)
        if self._overhead > self._limits.max_head_bytes + self._body_bytes:
            self._refuse(_head_too_large(self._limits.max_head_bytes, "chunk extensions and trailers"))
        elif cycle.response_complete and self._body_bytes > MAX_DISCARDED:
            self.cut("slow_body")

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_offer(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self._refuse(self._error or _malformed(error))

    def _ignore_offer(self, rest: bytes) -> None:
        """Parse the request again, without its offer to upgrade. ``rest``: what followed its head."""
        head = [self.parser.get_method(), b" ", self.url, b" HTTP/1.1\r\n"]
        for name, value in self.headers:
            if name == b"connection":
                kept = [token for token in value.split(b",") if token.strip().lower() not in _OFFER]
                head += [b"connection: ", b",".join(kept), b"\r\n"]
            elif name not in _OFFER:
                head += [name, b": ", value, b"\r\n"]
        self.parser = httptools.HttpRequestParser(self)
        self._feed(b"".join([*head, b"\r\n", rest]))

    # --- callbacks of the parser --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self.scope[CONNECTION_KEY] = self  # type: ignore[literal-required]
        self._in_head = True
        if len(self.pipeline) >= MAX_PIPELINED:
            self._fail("Too many requests at once on one connection. Wait for responses.", "too_many_pipelined", 429)

    def on_url(self, url: bytes) -> None:
        """Receive a part of the request target."""
        self.url += url
        if len(self.url) > MAX_TARGET_BYTES:
            self._fail(f"The request target is longer than {MAX_TARGET_BYTES} bytes.", "uri_too_long", 414)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Receive a header. Trailers are dropped, since no route has any."""
        if self._in_head:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Start to serve the request, or refuse it."""
        self._in_head = False
        self._head_bytes = 0
        self._head_since = 0.0
        if self.parser.should_upgrade():
            if (self._get_upgrade() or b"").strip() != b"h2c":
                self._fail("The gateway upgrades no connection. Use HTTP/1.1.", "upgrade_not_supported")
            return
        self._check_head()
        self._in_body = True
        self._body_bytes = self._overhead = 0
        super().on_headers_complete()
        self.cycle.transport = HeadBuffer(self.transport, self.loop)  # type: ignore[assignment]

    def _check_head(self) -> None:
        """Refuse a request that another server might read differently, and note whether it waits for a 100."""
        if not self.url.startswith(b"/") and self.url != b"*":
            self._fail("The request target must be a path. The gateway is not a proxy.", "invalid_target")
        by_name = dict(self.headers)
        self.expect_100_continue = by_name.get(b"expect", b"").lower() == b"100-continue"
        if len(by_name) < len(self.headers) and [name for name, _ in self.headers].count(b"host") > 1:
            self._fail("More than one host header.", "invalid_http")
        if b"transfer-encoding" in by_name:
            if self.parser.get_http_version() != "1.1":
                self._fail("transfer-encoding needs HTTP/1.1.", "invalid_http")
            if any(
                name == b"transfer-encoding" and value.strip().lower() != b"chunked" for name, value in self.headers
            ):
                self._fail("transfer-encoding: only chunked is supported.", "unsupported_transfer_encoding", 501)

    def on_body(self, body: bytes) -> None:
        """Receive a part of the body."""
        # As in uvicorn, without its checks for upgrades, which never get here.
        self._body_bytes += len(body)
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.body += body
            if len(cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            cycle.message_event.set()

    def on_message_complete(self) -> None:
        """Note the end of the request."""
        if self._in_body:
            self._in_body = False
            cycle = self.cycle
            if not cycle.response_complete:
                cycle.more_body = False
                cycle.message_event.set()

    def _fail(self, message: str, code: str, status: int = 400) -> None:
        """Raise the error that the client is answered with."""
        self._error = bad_request(message, None, code, status)
        raise self._error


_OFFER = frozenset((b"upgrade", b"http2-settings"))


def _head_too_large(limit: int, part: str = "The request head") -> ApiError:
    return bad_request(f"More than {limit} bytes: {part}.", None, "head_too_large", 431)


def _malformed(error: httptools.HttpParserError) -> ApiError:
    # NOTE: the parser's message names the rule, and quotes nothing of the request.
    return bad_request(f"The request is not valid HTTP/1.1: {error}.", None, "invalid_http")
