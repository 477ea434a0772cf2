"""The HTTP client behind `HttpEngine`: pooled connections to one server, with streamed responses.

It uses aiohttp because this code runs once per token: aiohttp's parser is written in C, and its pool does not scan
all connections. This module adds what aiohttp lacks: every wait for a response ends when the response can no longer
arrive.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any
from weakref import WeakKeyDictionary

import aiohttp
import httpx
from yarl import URL

from engine_adapter.engine import EngineLost, EngineUnreachable
from engine_adapter.remote.request import Headers

IDLE_CONNECTION_S = 4.0
"""Seconds that an idle connection is kept for reuse.

Below the 5 s keep-alive of uvicorn, and so of vLLM: a connection that the server is closing must not be reused.
"""

_MAX_LINE_BYTES = 1 << 16
"""Largest accepted status line or header line of a response, in bytes."""

_CLOSE_TIMEOUT_S = 1.0
"""Seconds that connections get for an orderly close."""

_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_COMPRESSED = frozenset(("gzip", "x-gzip", "deflate"))
READABLE_ENCODINGS = _COMPRESSED | {"identity", ""}
"""Values of ``content-encoding`` whose bodies `plain_chunks` returns as they were before."""

_CONNECT_ERRORS = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
_SKIPPED_AUTO_HEADERS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
"""Headers that aiohttp adds by default. The proxy sends only what the client sent."""


class Upstream:
    """HTTP client for the server at ``base_url``.

    Args:
        name: the engine's name in error messages.
        base_url: the server's URL, without a trailing slash.
        connections: maximum open connections; further requests wait for one.
        connect_timeout_s: maximum time to establish a connection.
        read_timeout_s: maximum time between two reads. A response must begin within
            ``connect_timeout_s + 2 * read_timeout_s``, sending the request included.
    """

    def __init__(
        self, name: str, base_url: str, connections: int, connect_timeout_s: float, read_timeout_s: float
    ) -> None:
        self.where = f"engine {name} at {base_url}"
        """The engine's name and URL, as a prefix of error messages."""
        self._base = base_url
        self._connections = connections
        self._timeout = aiohttp.ClientTimeout(sock_connect=connect_timeout_s, sock_read=read_timeout_s)
        self.head_timeout_s = connect_timeout_s + 2 * read_timeout_s
        """Seconds within which a response must begin."""
        self._session: aiohttp.ClientSession | None = None
        self._pending: set[asyncio.Task[aiohttp.ClientResponse]] = set()
        self._responses: set[aiohttp.ClientResponse] = set()
        self._connection_loss = ConnectionLossMonitor()
        self._closed = False

    @asynccontextmanager
    async def answer(
        self, method: str, path: bytes, headers: Headers, content: bytes, timeout_s: float | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The server's response, with a body that is unread and still encoded.

        Leaving the context closes the response, which ends its generation.

        Args:
            method: the HTTP method.
            path: the raw path with the query.
            headers: the request headers.
            content: the request body; empty for none.
            timeout_s: a limit for the whole response, in place of the connect and read timeouts.

        Raises:
            EngineUnreachable: no connection was established, so nothing was sent.
            EngineLost: the connection broke, also inside the ``async with`` block; or `close` was called.
            TimeoutError: ``timeout_s`` passed.
        """
        limits = self._timeout if timeout_s is None else aiohttp.ClientTimeout(timeout_s)
        try:
            response = await self._request(method, path, headers, content, limits)
            self._responses.add(response)
            try:
                async with response:
                    with self._connection_loss.propagate_to(response):
                        yield response
            finally:
                self._responses.discard(response)
        except _CONNECT_ERRORS as error:
            raise EngineUnreachable(self._describe(error)) from error
        except aiohttp.ClientError as error:
            raise EngineLost(self._describe(error)) from error

    async def close(self) -> None:
        """Close every connection; requests in flight get `EngineLost`. Idempotent."""
        self._closed = True
        # Closing an aiohttp session does not end waits for a connection or for the next bytes.
        self.end_requests("the engine was stopped")
        if self._session is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self._session.close()

    def end_requests(self, reason: str) -> int:
        """End every request in flight with `EngineLost`. Returns their number."""
        ended = len(self._pending) + len(self._responses)
        for task in list(self._pending):
            task.cancel()
        for response in list(self._responses):
            # NOTE: closing it does not wake its reader while the connection has bytes to send.
            _fail(response.content, reason)
            response.close()
        return ended

    async def _request(
        self, method: str, path: bytes, headers: Headers, content: bytes, limits: aiohttp.ClientTimeout
    ) -> aiohttp.ClientResponse:
        """Send a request and return its response once the head has arrived.

        The request runs in its own task, so that a timeout or `close` can end it.
        """
        if self._closed:
            raise EngineLost(f"{self.where}: the engine was stopped")
        if self._session is None:
            self._session = self._open_session()
        url = URL(f"{self._base}{'' if path.startswith(b'/') else '/'}{_escape(path)}", encoded=True)
        arguments: dict[str, Any] = {
            "headers": [(_decode(name), _decode(value)) for name, value in headers],
            "data": content or None,
        }
        request = self._session.request(method, url, allow_redirects=False, timeout=limits, **arguments)
        task = asyncio.ensure_future(request)
        self._pending.add(task)
        try:
            await asyncio.wait({task}, timeout=self.head_timeout_s)
        except asyncio.CancelledError:
            await _cancel(task)
            raise
        finally:
            self._pending.discard(task)
        if not task.done():
            await _cancel(task)
            raise EngineLost(f"{self.where}: no response began within {self.head_timeout_s:.0f} s")
        if task.cancelled():
            raise EngineLost(f"{self.where}: {'the engine was stopped' if self._closed else 'it is down'}")
        return task.result()

    def _open_session(self) -> aiohttp.ClientSession:
        # Loading the certificate store takes 50 ms, and plain HTTP does not need it.
        secure = URL(self._base).scheme == "https"
        context: ssl.SSLContext | bool = httpx.create_ssl_context(trust_env=False) if secure else True
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=IDLE_CONNECTION_S, ssl=context),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_SKIPPED_AUTO_HEADERS,
            auto_decompress=False,
            max_line_size=_MAX_LINE_BYTES,
            max_field_size=_MAX_LINE_BYTES,
        )

    def _describe(self, error: aiohttp.ClientError) -> str:
        # NOTE: other errors may quote the response.
        said = str(error) if isinstance(error, OSError | BodyLost) else ""
        reason = f"{type(error).__name__}: {said}" if said else type(error).__name__
        cause = _cause(error)
        return f"{self.where}: {cause} ({reason})" if cause else f"{self.where}: {reason}"


class BodyLost(aiohttp.ClientPayloadError):
    """The rest of a response body will not be read. The message says why, without quoting it."""


def _cause(error: aiohttp.ClientError) -> str:
    """What an operator calls this error; empty if there is no common name."""
    if isinstance(error, aiohttp.ClientSSLError):
        return "TLS error"
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "DNS error: the host is unknown"
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return "no connection in time"
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, ConnectionRefusedError):
        return "connection refused"
    return ""


def plain_chunks(response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
    """The response body, decompressed if it is gzip or deflate; other encodings pass unchanged.

    A server may compress although the request asks for ``identity``.

    Raises:
        aiohttp.ClientPayloadError: the body does not have the encoding that its header names.
    """
    encoding = response.headers.get("content-encoding", "").lower()
    chunks = _chunks(response.content)
    return _decompress(chunks, encoding) if encoding in _COMPRESSED else chunks


async def _chunks(body: aiohttp.StreamReader) -> AsyncGenerator[bytes, None]:
    """The chunks of ``body``. If its connection broke, the chunks that arrived before come first.

    NOTE: aiohttp (3.14) raises as soon as the connection is lost, although unread chunks may hold the whole response.
    """
    try:
        while chunk := await body.readany():
            yield chunk
    except aiohttp.ClientError:
        unread = b"".join(getattr(body, "_buffer", ()))[getattr(body, "_buffer_offset", 0) :]
        if unread:
            yield unread
        raise


async def _decompress(chunks: AsyncIterator[bytes], encoding: str) -> AsyncGenerator[bytes, None]:
    decompressor = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        async for chunk in chunks:
            yield decompressor.decompress(chunk)
    except zlib.error as error:
        raise BodyLost(f"the response body is not valid {encoding}: {error}") from error


async def _cancel(task: asyncio.Task[aiohttp.ClientResponse]) -> None:
    """Cancel a request. If its response arrives anyway, close it, which frees its connection."""
    task.cancel()
    await asyncio.wait({task}, timeout=_CLOSE_TIMEOUT_S)
    if task.done() and not task.cancelled() and task.exception() is None:
        task.result().close()


class ConnectionLossMonitor:
    """Propagates the loss of a connection to the reader of its response body.

    NOTE: aiohttp (3.14) closes a connection if it cannot parse the next chunk, but does not notify the body reader. Its
    read timeout no longer runs then, so the reader would wait forever.
    """

    def __init__(self) -> None:
        # Keyed by the connection's `closed` future. A connection serves many responses, one at a time.
        self._bodies: WeakKeyDictionary[asyncio.Future[None], aiohttp.StreamReader | None] = WeakKeyDictionary()

    @contextlib.contextmanager
    def propagate_to(self, response: aiohttp.ClientResponse) -> Iterator[None]:
        """Inside the block, reading the body raises `aiohttp.ClientPayloadError` if its connection is lost."""
        protocol = None if response.connection is None else response.connection.protocol
        closed = None if protocol is None else protocol.closed
        if closed is None:
            _fail(response.content)
            yield
            return
        if closed not in self._bodies:
            closed.add_done_callback(self._on_closed)
        self._bodies[closed] = response.content
        try:
            yield
        finally:
            self._bodies[closed] = None

    def _on_closed(self, closed: asyncio.Future[None]) -> None:
        if not closed.cancelled():
            closed.exception()  # asyncio logs an exception that is never retrieved
        body = self._bodies.get(closed)
        if body is not None:
            _fail(body)


def _fail(body: aiohttp.StreamReader, reason: str = "the connection closed before the response was complete") -> None:
    """Make reads of an incomplete body raise."""
    if not body.is_eof() and body.exception() is None:
        body.set_exception(BodyLost(reason))


def _escape(path: bytes) -> str:
    """``path`` with non-printable and non-ASCII bytes percent-encoded."""
    return "".join(chr(byte) if 0x20 < byte < 0x7F else f"%{byte:02X}" for byte in path)


def _decode(value: bytes) -> str:
    """The header value as text that aiohttp encodes back to ``value`` if that is UTF-8; otherwise as Latin-1."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")
