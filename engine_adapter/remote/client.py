"""The HTTP/1.1 client behind `HttpEngine`: kept-alive connections to one server, with streamed responses.

It is small because it runs once per token: httptools parses, and there is no task, timer or lock per request or read.
It does only what a proxy needs: no redirects, cookies or proxies, and every wait for a response ends.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import time
from urllib.parse import urlsplit

import httpx

from engine_adapter.engine import EngineLost, EngineUnreachable
from engine_adapter.remote.connection import Connection
from engine_adapter.remote.request import Headers
from engine_adapter.remote.response import ClosedAtOnce, Response

IDLE_CONNECTION_S = 4.0
"""Seconds that an idle connection is kept for reuse.

Below the 5 s keep-alive of uvicorn, and so of vLLM: a connection that the server is closing must not be reused.
"""

_LATE = 0.01
"""Part of the read timeout by which a response may end late. So thousands of streams need few checks. Convention."""

_AT_ONCE = 0.0
"""A time of the event loop that is over."""

_UNPRINTABLE = re.compile(rb"[^\x21-\x7e]")


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
        self._fixed_headers = [(b"host", url.netloc.rpartition("@")[2].encode())]
        if not keep_alive:
            self._fixed_headers.append((b"connection", b"close"))
        self._keep_alive = keep_alive
        self._connect_timeout_s = connect_timeout_s
        self.read_timeout_s = read_timeout_s
        self.head_timeout_s = connect_timeout_s + 2 * read_timeout_s
        """Seconds within which a response must begin."""
        self._tls: ssl.SSLContext | None = None
        self._connecting: set[asyncio.Timeout] = set()
        self._active: set[Response] = set()
        self._idle: list[Connection] = []
        self._sweep: asyncio.TimerHandle | None = None
        self._check: asyncio.TimerHandle | None = None
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
        kept = self._take_idle()
        if kept is None:
            return await self._answered(await self._connect(), method, request)
        try:
            return await self._answered(kept, method, request)
        except ClosedAtOnce as lost:
            # The server probably closed the idle connection while the request was on its way.
            if self._closed:
                raise
            try:
                connection = await self._connect()
            except EngineUnreachable:
                # It is down. It may have had the request, so the error must not say that nothing was sent.
                raise lost from None
            return await self._answered(connection, method, request)

    async def _answered(self, connection: Connection, method: str, request: bytes) -> Response:
        """Send ``request``, and return its response once the head has arrived. Raises `EngineLost`."""
        response = Response(self, connection, method == "HEAD")
        self._active.add(response)
        if self._check is None:
            self._check_later(self.read_timeout_s)
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
        for timer in (self._sweep, self._check):
            if timer is not None:
                timer.cancel()
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

    def silent_s(self) -> float:
        """Seconds since any response got bytes, while the reader of a begun one waits for more; 0 if none waits."""
        if not any(response.awaited and response.status for response in self._active):
            return 0.0
        return time.monotonic() - max(response.read_at for response in self._active)

    def _check_later(self, in_s: float) -> None:
        self._check = asyncio.get_running_loop().call_later(in_s, self._check_times)

    def _check_times(self) -> None:
        """End the responses that take too long. One timer checks all, at most `_LATE` of the timeout late."""
        self._check, now = None, time.monotonic()
        if self._active:
            due = min([response.check_time(now) for response in list(self._active)])
            self._check_later(min(max(due - now, _LATE * self.read_timeout_s), self.read_timeout_s))

    def on_released(self, response: Response) -> None:
        """Note that ``response`` is no longer in use."""
        self._active.discard(response)

    def keep(self, connection: Connection) -> None:
        """Keep an open connection for the next request, or close it."""
        if self._closed or not self._keep_alive:
            connection.abort()
            return
        connection.idle_since = time.monotonic()
        self._idle.append(connection)
        if self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(IDLE_CONNECTION_S, self._close_idle)

    def _take_idle(self) -> Connection | None:
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

    async def _connect(self) -> Connection:
        """Return a new connection. Raises `EngineUnreachable`, or `EngineLost` if `end_requests` was called."""
        connection, limit = Connection(self.keep), asyncio.timeout(self._connect_timeout_s)
        self._connecting.add(limit)
        try:
            if self._secure and self._tls is None:
                # Loading the certificate store takes 50 ms, and plain HTTP does not need it. The environment may name
                # another one.
                self._tls = httpx.create_ssl_context()
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
        lines = [method.encode() + b" " + target + b" HTTP/1.1"]
        # Each header is a name and a value.
        lines += map(b": ".join, self._fixed_headers)
        lines += map(b": ".join, headers)
        if content or method not in ("GET", "HEAD"):
            lines.append(b"content-length: %d" % len(content))
        head = b"\r\n".join(lines)
        if not head.count(b"\n") == head.count(b"\r") == len(lines) - 1:
            raise ValueError("a header contains a line break")
        return head + b"\r\n\r\n" + content


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


def _escape(path: bytes) -> bytes:
    """``path`` with non-printable and non-ASCII bytes percent-encoded."""
    return _UNPRINTABLE.sub(lambda found: b"%%%02X" % found[0][0], path)
