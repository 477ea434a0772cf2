"""The HTTP client behind `HttpEngine`: one server, many connections, answers as they come.

aiohttp, because it runs once for every token: its parser is C, and its pool does not look at every connection there is.
What it leaves to chance is seen to here: nobody waits for ever for an answer that cannot come.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any
from weakref import WeakKeyDictionary

import aiohttp
import httpx
from yarl import URL

from engine_adapter.engine import EngineLost, EngineUnreachable
from engine_adapter.remote.request import Headers

IDLE_CONNECTION_S = 4.0
"""Below uvicorn's (and so vLLM's) five: a connection that the server is just closing must not be reused."""

_LONGEST_LINE = 1 << 16
"""Bytes of a status line or header of an answer."""

_CLOSING_S = 1.0
"""Seconds that connections have to end in order."""

_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_NEVER_SENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
_NOT_BY_ITSELF = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
"""Headers that aiohttp would add: what the client did not say is not for us to say."""


class Upstream:
    """Requests to the server at ``base_url``.

    ``name``: what it is called in errors. ``connections``: how many at once; further requests wait for one.
    ``connect_timeout_s``, ``read_timeout_s``: seconds until a connection, and until the next byte, is given up. What
    passes until an answer begins, sending included, is no more than the first and twice the second.
    """

    def __init__(
        self, name: str, base_url: str, connections: int, connect_timeout_s: float, read_timeout_s: float
    ) -> None:
        self.where = f"engine {name} at {base_url}"
        """For errors: ours, and those of who reads the answers."""
        self._base = base_url
        self._connections = connections
        self._timeout = aiohttp.ClientTimeout(sock_connect=connect_timeout_s, sock_read=read_timeout_s)
        self._beginning_s = connect_timeout_s + 2 * read_timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._beginning: set[asyncio.Task[aiohttp.ClientResponse]] = set()
        self._answers: set[aiohttp.ClientResponse] = set()
        self._endings = _Endings()
        self._closed = False

    @asynccontextmanager
    async def answer(
        self, method: str, path: bytes, headers: Headers, content: bytes, timeout_s: float | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The server's answer, its body unread and as it was encoded; leaving closes it, which ends its generation.

        ``path``: raw, with the query. ``timeout_s``: for all of it, in place of the timeouts.

        Raises:
            EngineUnreachable: no connection came about, so that nothing was sent.
            EngineLost: the connection broke, inside the block too; or `close` was called.
            TimeoutError: ``timeout_s`` have passed.
        """
        limits = self._timeout if timeout_s is None else aiohttp.ClientTimeout(timeout_s)
        try:
            response = await self._begin(method, path, headers, content, limits)
            self._answers.add(response)
            try:
                async with response:
                    with self._endings.heard_by(response):
                        yield response
            finally:
                self._answers.discard(response)
        except _NEVER_SENT as error:
            raise EngineUnreachable(self._said(error)) from error
        except aiohttp.ClientError as error:
            raise EngineLost(self._said(error)) from error

    async def close(self) -> None:
        """Close every connection; requests in flight get `EngineLost`. Idempotent."""
        self._closed = True
        # Whoever waits for a connection or for bytes would not hear of it from aiohttp.
        for beginning in list(self._beginning):
            beginning.cancel()
        for answer in list(self._answers):
            answer.close()
        if self._session is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSING_S):
                    await self._session.close()

    async def _begin(
        self, method: str, path: bytes, headers: Headers, content: bytes, limits: aiohttp.ClientTimeout
    ) -> aiohttp.ClientResponse:
        """The answer's head. In a task of its own, which ends when time is up or `close` is called."""
        if self._closed:
            raise EngineLost(f"{self.where} was stopped")
        if self._session is None:
            self._session = self._open()
        url = URL(f"{self._base}{'' if path.startswith(b'/') else '/'}{_printable(path)}", encoded=True)
        sent: dict[str, Any] = {
            "headers": [(_text(name), _text(value)) for name, value in headers],
            "data": content or None,
        }
        asking = self._session.request(method, url, allow_redirects=False, timeout=limits, **sent)
        beginning = asyncio.ensure_future(asking)
        self._beginning.add(beginning)
        try:
            await asyncio.wait({beginning}, timeout=self._beginning_s)
        except asyncio.CancelledError:
            await _abandoned(beginning)
            raise
        finally:
            self._beginning.discard(beginning)
        if not beginning.done():
            await _abandoned(beginning)
            raise EngineLost(f"{self.where}: no answer began within {self._beginning_s:.0f} s")
        if beginning.cancelled():
            raise EngineLost(f"{self.where} was stopped")
        return beginning.result()

    def _open(self) -> aiohttp.ClientSession:
        # Loading the certificate store takes 50 ms and serves nobody on a plain connection.
        secure = URL(self._base).scheme == "https"
        trusted: ssl.SSLContext | bool = httpx.create_ssl_context(trust_env=False) if secure else True
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=IDLE_CONNECTION_S, ssl=trusted),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_NOT_BY_ITSELF,
            auto_decompress=False,
            max_line_size=_LONGEST_LINE,
            max_field_size=_LONGEST_LINE,
        )

    def _said(self, error: aiohttp.ClientError) -> str:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return f"{self.where}: {reason}"


def plain_chunks(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The body as it comes, decoded: a server may compress in spite of being asked not to.

    What is encoded in a way that we cannot read comes as it is. Raises `aiohttp.ClientPayloadError` when it is not
    encoded as it says.
    """
    encoding = response.headers.get("content-encoding", "").lower()
    chunks = response.content.iter_any()
    return _unpacked(chunks, encoding) if encoding in ("gzip", "x-gzip", "deflate") else chunks


async def _unpacked(chunks: AsyncIterator[bytes], encoding: str) -> AsyncIterator[bytes]:
    unpack = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        async for chunk in chunks:
            yield unpack.decompress(chunk)
    except zlib.error as error:
        raise aiohttp.ClientPayloadError(f"the answer is not {encoding} as it says: {error}") from error


async def _abandoned(beginning: asyncio.Task[aiohttp.ClientResponse]) -> None:
    """End it; an answer that came all the same frees its connection."""
    beginning.cancel()
    await asyncio.wait({beginning}, timeout=_CLOSING_S)
    if beginning.done() and not beginning.cancelled() and beginning.exception() is None:
        beginning.result().close()


class _Endings:
    """However a connection ends, who reads a body from it hears of it.

    NOTE: aiohttp (3.14) closes a connection on which it cannot parse the next chunk, and tells nobody; its read timeout
    ends with that.
    """

    def __init__(self) -> None:
        # By what tells that a connection has ended; it serves many answers, one after the other.
        self._bodies: WeakKeyDictionary[asyncio.Future[None], aiohttp.StreamReader | None] = WeakKeyDictionary()

    @contextlib.contextmanager
    def heard_by(self, response: aiohttp.ClientResponse) -> Iterator[None]:
        """Inside the block, reading the body raises `aiohttp.ClientPayloadError` if its connection is gone."""
        protocol = None if response.connection is None else response.connection.protocol
        ended = None if protocol is None else protocol.closed
        if ended is None:
            _gone(response.content)
            yield
            return
        if ended not in self._bodies:
            ended.add_done_callback(self._on_ended)
        self._bodies[ended] = response.content
        try:
            yield
        finally:
            self._bodies[ended] = None

    def _on_ended(self, ended: asyncio.Future[None]) -> None:
        if not ended.cancelled():
            ended.exception()  # heard, or asyncio would log it
        body = self._bodies.get(ended)
        if body is not None:
            _gone(body)


def _gone(body: aiohttp.StreamReader) -> None:
    """Nothing more will come of it."""
    if not body.is_eof() and body.exception() is None:
        body.set_exception(aiohttp.ClientPayloadError("the connection ended before the answer did"))


def _printable(path: bytes) -> str:
    """A path as it came, what HTTP has no place for escaped."""
    return "".join(chr(byte) if 0x20 < byte < 0x7F else f"%{byte:02X}" for byte in path)


def _text(value: bytes) -> str:
    """What aiohttp encodes to ``value`` again, where that is UTF-8."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")
