"""The HTTP client behind `HttpEngine`: one server, many connections, answers as they come.

aiohttp, because it runs once for every token: its parser is C, and its pool does not look at every connection there is.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import httpx
from multidict import CIMultiDict
from yarl import URL

from engine_adapter.engine import EngineLost, EngineUnreachable
from engine_adapter.http_request import Headers

IDLE_CONNECTION_S = 4.0
"""Below uvicorn's (and so vLLM's) five: a connection that the server is just closing must not be reused."""

_LONGEST_LINE = 1 << 16
"""Bytes of a status line or header of an answer."""

_NEVER_SENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
_NOT_BY_ITSELF = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
"""Headers that aiohttp would add: what the client did not say is not for us to say."""


class Upstream:
    """Requests to the server at ``base_url``.

    ``name``: what it is called in errors. ``connections``: how many at once; further requests wait for one.
    ``connect_timeout_s``, ``read_timeout_s``: seconds until a connection, and until the next byte, is given up.
    """

    def __init__(
        self, name: str, base_url: str, connections: int, connect_timeout_s: float, read_timeout_s: float
    ) -> None:
        self._where = f"engine {name} at {base_url}"
        self._base = base_url
        self._connections = connections
        self._timeout = aiohttp.ClientTimeout(sock_connect=connect_timeout_s, sock_read=read_timeout_s)
        self._session: aiohttp.ClientSession | None = None
        self._answers: set[aiohttp.ClientResponse] = set()
        self._closed = False

    @asynccontextmanager
    async def answer(
        self, method: str, path: bytes, headers: Headers, content: bytes, timeout_s: float | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The server's answer, its body still unread; leaving closes it, which stops its generation.

        ``path``: raw, with the query. ``timeout_s``: for all of it. A body that is encoded is decoded.

        Raises:
            EngineUnreachable: no connection came about, so that nothing was sent.
            EngineLost: the connection broke, inside the block too; or `close` was called.
        """
        if self._closed:
            raise EngineLost(f"{self._where} was stopped")
        if self._session is None:
            self._session = self._open()
        timeout = self._timeout if timeout_s is None else aiohttp.ClientTimeout(timeout_s)
        url = URL(self._base + _printable(path), encoded=True)
        sent = CIMultiDict((_text(name), _text(value)) for name, value in headers)
        try:
            async with self._session.request(
                method, url, headers=sent, data=content or None, allow_redirects=False, timeout=timeout
            ) as response:
                self._answers.add(response)
                try:
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
        for answer in list(self._answers):
            answer.close()  # or who reads it would never hear of it
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        # Loading the certificate store takes 50 ms and serves nobody on a plain connection.
        secure = self._base.startswith("https")
        trusted: ssl.SSLContext | bool = httpx.create_ssl_context(trust_env=False) if secure else False
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=IDLE_CONNECTION_S, ssl=trusted),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=_NOT_BY_ITSELF,
            max_line_size=_LONGEST_LINE,
            max_field_size=_LONGEST_LINE,
        )

    def _said(self, error: aiohttp.ClientError) -> str:
        return (
            f"{self._where}: {type(error).__name__}: {error}"
            if str(error)
            else f"{self._where}: {type(error).__name__}"
        )


def _printable(path: bytes) -> str:
    """A path as it came, what HTTP has no place for escaped."""
    return "".join(chr(byte) if 0x20 < byte < 0x7F else f"%{byte:02X}" for byte in path)


def _text(value: bytes) -> str:
    """What aiohttp encodes to ``value`` again, where that is UTF-8."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")
