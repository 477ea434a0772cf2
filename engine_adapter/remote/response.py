"""One response of an upstream server, read as its bytes arrive. Every wait for it ends."""

from __future__ import annotations

import asyncio
import math
import time
import zlib
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Protocol

from engine_adapter.engine import EngineLost
from engine_adapter.remote.connection import Connection
from engine_adapter.remote.request import Headers

LAST_BYTES_S = 0.02
"""Seconds that a server has to end a response after its last event. Its connection is closed otherwise.

The client has its answer by then. Most servers send both at once."""

_AT_ONCE_S = 0.3
"""Seconds after its request in which a connection is lost that the server had closed before: a long round trip."""

_MAX_UNREAD_BYTES = 1 << 18
"""Bytes of a body that are kept before they are read. Beyond that, the server has to wait."""

_MAX_DOCUMENT_BYTES = 8 << 20
"""Largest body that is read as a whole, in bytes."""

_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_COMPRESSED = frozenset(("gzip", "x-gzip", "deflate"))
READABLE_ENCODINGS = _COMPRESSED | {"identity", ""}
"""Values of ``content-encoding`` whose bodies `Response.plain_reader` reads as they were before."""


class ClosedAtOnce(EngineLost):
    """The connection closed soon after the request, and before any byte of a response."""


class Owner(Protocol):
    """The client that a response belongs to."""

    where: str
    read_timeout_s: float
    head_timeout_s: float

    def on_released(self, response: Response) -> None:
        """Note that ``response`` is no longer in use."""


class Response:
    """The server's response. Leaving its ``with`` block closes it, which ends its generation.

    Attributes:
        complete: whether the whole response has arrived.
        status: the HTTP status.
        headers: the headers, with names in lower case.
        read_at: when bytes last arrived (monotonic s).
    """

    __slots__ = (
        "_began",
        "_by_name",
        "_connection",
        "_decompressor",
        "_error",
        "_head_arrived",
        "_is_head",
        "_loop",
        "_take",
        "_unread",
        "_unread_bytes",
        "_upstream",
        "_waiter",
        "complete",
        "headers",
        "read_at",
        "status",
    )

    def __init__(self, upstream: Owner, connection: Connection, is_head: bool) -> None:
        self.status = 0
        self.headers: Headers = []
        self._by_name: dict[bytes, bytes] | None = None
        self.read_at = self._began = time.monotonic()
        self._upstream = upstream
        self._connection: Connection | None = connection
        self._is_head = is_head
        self._loop = asyncio.get_running_loop()
        self._head_arrived = self.complete = False
        self._unread: list[bytes] = []
        self._unread_bytes = 0
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._decompressor: Callable[[bytes], bytes] | None = None
        self._take: Callable[[bytes], bool] | None = None

    def __enter__(self) -> Response:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def where(self) -> str:
        """The engine's name and URL, as a prefix of error messages."""
        return self._upstream.where

    @property
    def awaited(self) -> bool:
        """Whether a reader waits for bytes. If not, its client is slow, and the server need not send."""
        return self._waiter is not None

    def header(self, name: bytes) -> str:
        """The first value of a header in lower case; "" without it. The head must have arrived."""
        if self._by_name is None:
            self._by_name = dict(reversed(self.headers))
        return self._by_name.get(name, b"").decode("latin-1").lower()

    async def read(self) -> bytes:
        """The bytes of the body that arrived since the last call, still encoded; b"" at its end. Raises `EngineLost`.

        What arrived before a connection broke is returned first.
        """
        while not self._unread:
            if self._error is not None:
                raise self._error
            if self.complete:
                return b""
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        # NOTE: a single part is not copied.
        data = b"".join(self._unread)
        self._unread.clear()
        if self._unread_bytes > _MAX_UNREAD_BYTES and self._connection is not None:
            self._connection.resume()
        self._unread_bytes = 0
        return data

    def plain_reader(self) -> Callable[[], Awaitable[bytes]]:
        """Return what reads as `read`, but decompresses a gzip or deflate body. Other encodings pass unchanged.

        A server may compress although the request asks for ``identity``. The head must have arrived.
        """
        return self._read_decompressed if self.header(b"content-encoding") in _COMPRESSED else self.read

    async def _read_decompressed(self) -> bytes:
        if self._decompressor is None:
            self._decompressor = zlib.decompressobj(_GZIP_OR_ZLIB).decompress
        while data := await self.read():
            try:
                # NOTE: the first bytes of a compressed body may give no output yet.
                if plain := self._decompressor(data):
                    return plain
            except zlib.error as error:
                raise self._lost("the response body is not valid gzip or deflate") from error
        return b""

    async def read_all(self, most: int = _MAX_DOCUMENT_BYTES) -> bytes:
        """The whole body, still encoded, of at most ``most`` bytes. Raises `EngineLost`."""
        body = bytearray()
        while data := await self.read():
            body += data
            if len(body) > most:
                raise self._lost("the response is too large")
        return bytes(body)

    async def head(self) -> None:
        """Wait for the status and the headers. Raises `EngineLost`."""
        while not self._head_arrived:
            if self._error is not None:
                raise self._error
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def close(self) -> None:
        """Free the connection, and close it unless it can be used again. Idempotent."""
        connection = self._detach()
        if connection is not None:
            connection.finish(self.complete)

    def close_after_last_bytes(self) -> None:
        """As `close`, but give the server `LAST_BYTES_S` to complete a response whose last event has arrived."""
        connection = self._detach()
        if connection is not None:
            connection.finish(self.complete, wait_s=LAST_BYTES_S)

    def fail(self, error: EngineLost) -> None:
        """End the response with ``error``, unless it is complete, and close its connection."""
        if self.complete or self._error is not None:
            return
        self._error = error
        if self._connection is not None:
            self._connection.abort()
        self._wake()

    def on_head(self, status: int) -> bool:
        """Take the status; the headers are complete. Returns whether a body follows. Called by the connection."""
        self.status, self._head_arrived = status, True
        if self._is_head:
            self.complete = True
        self._wake()
        return not self._is_head

    def on_awaited_body(self, take: Callable[[bytes], bool]) -> None:
        """Offer bytes of the body to ``take`` first if a reader waits for them. What it takes (True) is not read.

        What ``take`` raises, `read` raises. Compressed bytes are not offered. The head must have arrived.
        """
        if self.header(b"content-encoding") not in _COMPRESSED:
            self._take = take

    def on_body(self, data: bytes) -> None:
        """Take bytes of the body. Called by the connection."""
        # NOTE: what is unread comes first, and a reader that does not wait still sends what came before.
        waiter, take = self._waiter, self._take
        if take is not None and not self._unread and waiter is not None and not waiter.done():
            try:
                if take(data):
                    return
            except Exception as error:
                # It is the reader's, not the connection's.
                self._take, self._error = None, error
                waiter.set_result(None)
                return
        self._unread.append(data)
        self._unread_bytes += len(data)
        if self._unread_bytes > _MAX_UNREAD_BYTES and self._connection is not None:
            self._connection.pause()
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def on_complete(self) -> None:
        """Note that the body is complete. Called by the connection."""
        self.complete = True
        self._wake()

    def on_lost(self, reason: str) -> None:
        """Note that the connection broke. Called by the connection."""
        if not self.complete and self._error is None:
            self._error = self._lost(reason)
            if self.read_at == self._began and time.monotonic() < self._began + _AT_ONCE_S:
                self._error = ClosedAtOnce(*self._error.args)
        self._wake()

    def _lost(self, reason: str) -> EngineLost:
        return EngineLost(f"{self._upstream.where}: {reason}")

    def _detach(self) -> Connection | None:
        connection, self._connection = self._connection, None
        self._take = None
        self._upstream.on_released(self)
        return connection

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def check_time(self, now: float) -> float:
        """End the response if nothing arrived for too long at ``now``; return when to check again (monotonic s).

        While the reader is slow, the server need not send.
        """
        upstream = self._upstream
        if self.complete or self._error is not None:
            return math.inf
        if not self._head_arrived:
            due = self._began + upstream.head_timeout_s
            late = f"no response began within {upstream.head_timeout_s:.0f} s"
        else:
            due = (now if self._unread else self.read_at) + upstream.read_timeout_s
            late = f"no data for {upstream.read_timeout_s:.0f} s"
        if now >= due:
            self.fail(self._lost(late))
            return math.inf
        return min(due, now + upstream.read_timeout_s)
