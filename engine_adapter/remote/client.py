"""The HTTP/1.1 client behind `HttpEngine`: kept-alive connections to one server, with streamed responses.

It is small because it runs once per token: httptools parses, and there is no task, timer or lock per request or read.
It does only what a proxy needs: no redirects, cookies or environment settings, and every wait for a response ends.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import time
import zlib
from collections.abc import Callable
from types import TracebackType
from typing import cast
from urllib.parse import urlsplit

import httptools
import httpx

from engine_adapter.engine import EngineLost, EngineUnreachable
from engine_adapter.remote.request import Headers

IDLE_CONNECTION_S = 4.0
"""Seconds that an idle connection is kept for reuse.

Below the 5 s keep-alive of uvicorn, and so of vLLM: a connection that the server is closing must not be reused.
"""

LAST_BYTES_S = 0.02
"""Seconds that a server has to end a response after its last event. Its connection is closed otherwise.

The client has its answer by then. Most servers send both at once."""

_AT_ONCE = 0.0
"""A time of the event loop that is over."""

_MAX_HEAD_BYTES = 1 << 17
"""Largest accepted head of a response, in bytes."""

_MAX_UNREAD_BYTES = 1 << 18
"""Bytes of a body that are kept before they are read. Beyond that, the server has to wait."""

_MAX_DOCUMENT_BYTES = 8 << 20
"""Largest body that is read as a whole, in bytes."""

_UNPRINTABLE = re.compile(rb"[^\x21-\x7e]")
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_COMPRESSED = frozenset(("gzip", "x-gzip", "deflate"))
READABLE_ENCODINGS = _COMPRESSED | {"identity", ""}
"""Values of ``content-encoding`` whose bodies `Response.read_plain` returns as they were before."""


class Upstream:
    """HTTP client for the server at ``base_url``. Its user limits the number of requests in flight.

    Args:
        name: the engine's name in error messages.
        base_url: the server's URL, without a trailing slash.
        connect_timeout_s: maximum time to establish a connection.
        read_timeout_s: maximum time between two reads. A response must begin within
            ``connect_timeout_s + 2 * read_timeout_s``, sending the request included.
        keep_alive: use a connection again after its response is complete.
    """

    def __init__(
        self, name: str, base_url: str, connect_timeout_s: float, read_timeout_s: float, keep_alive: bool = True
    ) -> None:
        self.where = f"engine {name} at {base_url}"
        """The engine's name and URL, as a prefix of error messages."""
        url = urlsplit(base_url)
        self._secure = url.scheme.lower() == "https"
        self._host = url.hostname or ""
        self._port = url.port or (443 if self._secure else 80)
        self._prefix = _escape(url.path.encode())
        self._fixed_headers = b"host: " + url.netloc.rpartition("@")[2].encode() + b"\r\n"
        if not keep_alive:
            self._fixed_headers += b"connection: close\r\n"
        self._keep_alive = keep_alive
        self._connect_timeout_s = connect_timeout_s
        self.read_timeout_s = read_timeout_s
        self.head_timeout_s = connect_timeout_s + 2 * read_timeout_s
        """Seconds within which a response must begin."""
        self._tls: ssl.SSLContext | None = None
        self._connecting: set[asyncio.Timeout] = set()
        self._active: set[Response] = set()
        self._idle: list[_Connection] = []
        self._sweep: asyncio.TimerHandle | None = None
        self._end_reason = ""
        self._closed = False

    async def send(self, method: str, path: bytes, headers: Headers, content: bytes) -> Response:
        """Send a request and return its response once the head has arrived. Leaving ``with response`` closes it.

        Args:
            method: the HTTP method.
            path: the raw path with the query.
            headers: the request headers, without ``host``, ``connection`` and ``content-length``.
            content: the request body; empty for none.

        Raises:
            EngineUnreachable: no connection was established, so nothing was sent.
            EngineLost: the connection broke, the response did not begin in time, or `close` was called.
        """
        request = self._encoded(method, path, headers, content)
        if self._closed:
            raise EngineLost(f"{self.where}: the engine was stopped")
        connection = self._take_idle() or await self._connect()
        response = Response(self, connection, method == "HEAD")
        self._active.add(response)
        try:
            connection.send(response, request)
            await response.head()
        except BaseException:
            response.close()
            raise
        return response

    async def close(self) -> None:
        """Close every connection; requests in flight get `EngineLost`. Idempotent."""
        self._closed = True
        self.end_requests("the engine was stopped")
        if self._sweep is not None:
            self._sweep.cancel()
        while self._idle:
            self._idle.pop().abort()
        # The transports close their sockets in the next iteration of the event loop.
        await asyncio.sleep(0)

    def end_requests(self, reason: str) -> int:
        """End every request in flight with `EngineLost`. Returns their number."""
        ended = len(self._connecting) + len(self._active)
        self._end_reason = reason
        for limit in self._connecting:
            if not limit.expired():
                limit.reschedule(_AT_ONCE)
        for response in list(self._active):
            response.fail(EngineLost(f"{self.where}: {reason}"))
        return ended

    def on_released(self, response: Response) -> None:
        """Note that ``response`` is no longer in use."""
        self._active.discard(response)

    def keep(self, connection: _Connection) -> None:
        """Keep an open connection for the next request, or close it."""
        if self._closed or not self._keep_alive:
            connection.abort()
            return
        connection.idle_since = time.monotonic()
        self._idle.append(connection)
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(IDLE_CONNECTION_S, self._close_idle)

    def _take_idle(self) -> _Connection | None:
        """Return the connection that was used last, if it can be used again."""
        expired = time.monotonic() - IDLE_CONNECTION_S
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and connection.idle_since > expired:
                return connection
            connection.abort()
        return None

    def _close_idle(self) -> None:
        now = time.monotonic()
        kept = []
        for connection in self._idle:
            if connection.usable and now - connection.idle_since < IDLE_CONNECTION_S:
                kept.append(connection)
            else:
                connection.abort()
        self._idle = kept
        self._sweep = None
        if kept:
            again_in_s = kept[0].idle_since + IDLE_CONNECTION_S - now
            self._sweep = asyncio.get_running_loop().call_later(again_in_s, self._close_idle)

    async def _connect(self) -> _Connection:
        """Return a new connection. Raises `EngineUnreachable`, or `EngineLost` if `end_requests` was called."""
        if self._secure and self._tls is None:
            # Loading the certificate store takes 50 ms, and plain HTTP does not need it.
            self._tls = httpx.create_ssl_context(trust_env=False)
        connection, limit = _Connection(self), asyncio.timeout(self._connect_timeout_s)
        self._connecting.add(limit)
        try:
            async with limit:
                loop = asyncio.get_running_loop()
                await loop.create_connection(lambda: connection, self._host, self._port, ssl=self._tls)
        except BaseException as error:
            # It may have been established in the turn of the event loop that cancelled this.
            connection.abort()
            if isinstance(error, TimeoutError) and limit.when() == _AT_ONCE:
                raise EngineLost(f"{self.where}: {self._end_reason}") from None
            if isinstance(error, OSError):
                raise EngineUnreachable(f"{self.where}: {_described(error)}") from error
            raise
        finally:
            self._connecting.discard(limit)
        return connection

    def _encoded(self, method: str, path: bytes, headers: Headers, content: bytes) -> bytes:
        """The request as bytes. Raises ValueError for a header that would become two."""
        target = self._prefix + (b"" if path.startswith(b"/") else b"/") + _escape(path)
        lines = [method.encode() + b" " + target + b" HTTP/1.1\r\n" + self._fixed_headers]
        for name, value in headers:
            lines += (name, b": ", value, b"\r\n")
        if content or method not in ("GET", "HEAD"):
            lines.append(b"content-length: %d\r\n" % len(content))
        head = b"".join(lines)
        expected = 1 + self._fixed_headers.count(b"\n") + len(headers) + (len(lines) - 1) % 4
        if head.count(b"\n") != expected or head.count(b"\r") != expected:
            raise ValueError("a header contains a line break")
        return head + b"\r\n" + content


class Response:
    """The server's response. Leaving its ``with`` block closes it, which ends its generation.

    Attributes:
        status: the HTTP status.
        headers: the headers, with names in lower case.
        read_at: when bytes last arrived (monotonic s).
    """

    __slots__ = (
        "_complete",
        "_connection",
        "_decompressor",
        "_error",
        "_head_arrived",
        "_is_head",
        "_timer",
        "_unread",
        "_unread_bytes",
        "_upstream",
        "_waiter",
        "headers",
        "read_at",
        "status",
    )

    def __init__(self, upstream: Upstream, connection: _Connection, is_head: bool) -> None:
        self.status = 0
        self.headers: Headers = []
        self.read_at = time.monotonic()
        self._upstream = upstream
        self._connection: _Connection | None = connection
        self._is_head = is_head
        self._head_arrived = self._complete = False
        self._unread: list[bytes] = []
        self._unread_bytes = 0
        self._error: EngineLost | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._decompressor: Callable[[bytes], bytes] | None = None
        first_check_s = min(upstream.head_timeout_s, upstream.read_timeout_s)
        self._timer = asyncio.get_running_loop().call_later(first_check_s, self._check_time, self.read_at)

    def __enter__(self) -> Response:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def where(self) -> str:
        """The engine's name and URL, as a prefix of error messages."""
        return self._upstream.where

    @property
    def complete(self) -> bool:
        """Whether the whole response has arrived."""
        return self._complete

    def header(self, name: bytes) -> str:
        """The value of a header in lower case; "" without it."""
        return next((value.decode("latin-1").lower() for key, value in self.headers if key == name), "")

    async def read(self) -> bytes:
        """The bytes of the body that arrived since the last call, still encoded; b"" at its end. Raises `EngineLost`.

        What arrived before a connection broke is returned first.
        """
        while not self._unread:
            if self._error is not None:
                raise self._error
            if self._complete:
                return b""
            await self._wait()
        data = self._unread[0] if len(self._unread) == 1 else b"".join(self._unread)
        self._unread.clear()
        if self._unread_bytes > _MAX_UNREAD_BYTES and self._connection is not None:
            self._connection.resume()
        self._unread_bytes = 0
        return data

    async def read_plain(self) -> bytes:
        """As `read`, but decompressed if the body is gzip or deflate. Other encodings pass unchanged.

        A server may compress although the request asks for ``identity``.
        """
        if self._decompressor is None:
            packed = self.header(b"content-encoding") in _COMPRESSED
            self._decompressor = zlib.decompressobj(_GZIP_OR_ZLIB).decompress if packed else _unchanged
        while data := await self.read():
            try:
                # NOTE: the first bytes of a compressed body may give no output yet.
                if plain := self._decompressor(data):
                    return plain
            except zlib.error as error:
                raise self._lost("the response body is not valid gzip or deflate") from error
        return b""

    async def read_all(self) -> bytes:
        """The whole body, still encoded, of at most `_MAX_DOCUMENT_BYTES`. Raises `EngineLost`."""
        body = bytearray()
        while data := await self.read():
            body += data
            if len(body) > _MAX_DOCUMENT_BYTES:
                raise self._lost("the response is too large")
        return bytes(body)

    async def head(self) -> None:
        """Wait for the status and the headers. Raises `EngineLost`."""
        while not self._head_arrived:
            if self._error is not None:
                raise self._error
            await self._wait()

    def close(self) -> None:
        """Free the connection, and close it unless it can be used again. Idempotent."""
        connection = self._detach()
        if connection is not None:
            connection.finish(self._complete)

    def close_after_last_bytes(self) -> None:
        """As `close`, but give the server `LAST_BYTES_S` to complete a response whose last event has arrived."""
        connection = self._detach()
        if connection is not None:
            connection.finish(self._complete, wait_s=LAST_BYTES_S)

    def fail(self, error: EngineLost) -> None:
        """End the response with ``error``, unless it is complete, and close its connection."""
        if self._complete or self._error is not None:
            return
        self._error = error
        if self._connection is not None:
            self._connection.abort()
        self._wake()

    def on_head(self, status: int) -> bool:
        """Take the status; the headers are complete. Returns whether a body follows. Called by the connection."""
        self.status, self._head_arrived = status, True
        if self._is_head:
            self._complete = True
        self._wake()
        return not self._is_head

    def on_body(self, data: bytes) -> None:
        """Take bytes of the body. Called by the connection."""
        self._unread.append(data)
        self._unread_bytes += len(data)
        if self._unread_bytes > _MAX_UNREAD_BYTES and self._connection is not None:
            self._connection.pause()
        if self._waiter is not None:
            self._wake()

    def on_complete(self) -> None:
        """Note that the body is complete. Called by the connection."""
        self._complete = True
        self._wake()

    def on_lost(self, reason: str) -> None:
        """Note that the connection broke. Called by the connection."""
        if not self._complete and self._error is None:
            self._error = self._lost(reason)
        self._wake()

    def _lost(self, reason: str) -> EngineLost:
        return EngineLost(f"{self._upstream.where}: {reason}")

    def _detach(self) -> _Connection | None:
        self._timer.cancel()
        connection, self._connection = self._connection, None
        self._upstream.on_released(self)
        return connection

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _check_time(self, began: float) -> None:
        """End the response if nothing arrived for too long. While the reader is slow, the server need not send."""
        upstream, now = self._upstream, time.monotonic()
        if not self._head_arrived:
            due = began + upstream.head_timeout_s
            late = f"no response began within {upstream.head_timeout_s:.0f} s"
        else:
            due = (now if self._unread else self.read_at) + upstream.read_timeout_s
            late = f"no data for {upstream.read_timeout_s:.0f} s"
        if now >= due:
            self.fail(self._lost(late))
            return
        again_in_s = min(due - now, upstream.read_timeout_s)
        self._timer = asyncio.get_running_loop().call_later(again_in_s + 0.001, self._check_time, began)


class _Connection(asyncio.Protocol):
    """One connection to the server: parses the responses, one at a time.

    INVARIANT: ``usable`` is False once the bytes that follow are unknown, so that no response gets another one's bytes.
    """

    def __init__(self, upstream: Upstream) -> None:
        self.usable = False
        self.idle_since = 0.0
        self._upstream = upstream
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        # As lenient as browsers and other clients, which real servers are tested with.
        self._parser.set_dangerous_leniencies(
            lenient_headers=True, lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True
        )
        self._response: Response | None = None
        self._finishing: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._interim = False
        self._reusable = self._ends_with_connection = False
        self._headers: Headers = []

    # --- used by `Upstream` and `Response` ---

    def send(self, response: Response, request: bytes) -> None:
        """Write a request whose answer is ``response``."""
        assert self._transport is not None
        self.usable = False
        self._response = response
        self._head_bytes = 0
        self._headers = []
        self._reusable = self._ends_with_connection = False
        self._transport.write(request)

    def finish(self, complete: bool, wait_s: float = 0.0) -> None:
        """Detach the response. Keep the connection for another request if it is complete, now or within ``wait_s``."""
        self._response = None if complete else self._response
        if complete and self._reusable:
            self._release()
        elif not complete and wait_s and self._transport is not None and not self._transport.is_closing():
            self.resume()
            self._finishing = asyncio.get_running_loop().call_later(wait_s, self.abort)
        else:
            self.abort()

    def abort(self) -> None:
        """Close the connection at once. Idempotent."""
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    def pause(self) -> None:
        """Let the server wait."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _release(self) -> None:
        self._response = None
        self.usable = True
        self._upstream.keep(self)

    # --- called by the event loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self._transport = cast(asyncio.Transport, transport)
        self.usable = True

    def data_received(self, data: bytes) -> None:
        """Parse bytes of the response."""
        response = self._response
        if response is None:
            # Bytes that belong to no request, such as a 408 for an idle connection.
            self.abort()
            return
        response.read_at = time.monotonic()
        if not response.status:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            # NOTE: its text may quote the response.
            self._broken(f"{type(error).__name__}: the server broke the protocol")
            return
        if self._head_bytes > _MAX_HEAD_BYTES and not response.status:
            self._broken("ProtocolError: the head of the response is too large")

    def connection_lost(self, error: Exception | None) -> None:
        """End the response."""
        self.usable = False
        if self._finishing is not None:
            self._finishing.cancel()
        response, self._response = self._response, None
        if response is None:
            return
        if self._ends_with_connection and error is None:
            response.on_complete()
            return
        name = "ConnectionError" if error is None else type(error).__name__
        response.on_lost(f"{name}: the connection closed before the response was complete")

    def _broken(self, reason: str) -> None:
        self.usable = self._ends_with_connection = False
        response, self._response = self._response, None
        self.abort()
        if response is not None:
            response.on_lost(reason)

    # --- called by the parser ---

    def on_message_begin(self) -> None:
        """Close the connection if the server sends a second response."""
        if self._response is None or self._response.complete:
            self._reusable = False
            self.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one header. A trailer after the body is dropped."""
        response = self._response
        if response is not None and not response.status:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Take the head, unless it belongs to an interim response."""
        response = self._response
        if response is None or response.status:
            return
        status = self._parser.get_status_code()
        self._interim = 100 <= status < 200
        if self._interim:
            self._headers = []
            return
        names = dict(self._headers)
        self._reusable = self._parser.should_keep_alive()
        has_length = b"content-length" in names or b"transfer-encoding" in names
        self._ends_with_connection = not has_length
        response.headers = self._headers
        if not response.on_head(status):
            # The parser waits for a body that a HEAD request does not get.
            self._reusable = False

    def on_body(self, data: bytes) -> None:
        """Take bytes of the body."""
        response = self._response
        if response is not None and not response.complete:
            response.on_body(data)

    def on_message_complete(self) -> None:
        """Note that the response is complete."""
        if self._interim:
            self._interim = False
            return
        response = self._response
        if response is None or response.complete:
            return
        response.on_complete()
        if self._finishing is not None:
            self._finishing.cancel()
            self._finishing = None
            if self._reusable:
                self._release()
            else:
                self.abort()


def _described(error: OSError) -> str:
    """What an operator calls this error, if there is a common name, and the system's own words."""
    words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, ssl.SSLError):
        return f"TLS error ({words})"
    if isinstance(error, socket.gaierror):
        return f"DNS error: the host is unknown ({words})"
    if isinstance(error, ConnectionRefusedError):
        return f"connection refused ({words})"
    if isinstance(error, TimeoutError):
        return f"no connection in time ({words})"
    return words


def _unchanged(data: bytes) -> bytes:
    return data


def _escape(path: bytes) -> bytes:
    """``path`` with non-printable and non-ASCII bytes percent-encoded."""
    return _UNPRINTABLE.sub(lambda found: b"%%%02X" % found[0][0], path)
