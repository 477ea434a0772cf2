"""Requests that offer an upgrade to HTTP/2, over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn

from engine_adapter.engine import Receive, Scope, Send
from gateway.api.http_protocol import HttpProtocol

BODY = b"not the head:\r\nupgrade: h2c\r\n\r\n"
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body = b""
    while (message := await receive()).get("more_body"):
        body += message["body"]
    body += message.get("body", b"")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a server of `echo`."""
    config = uvicorn.Config(echo, http=HttpProtocol, lifespan="off", log_level="critical")
    config.load()
    state = uvicorn.server.ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: HttpProtocol(config=config, server_state=state, app_state={}), "127.0.0.1", 0
    )
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        try:
            yield reader, writer
        finally:
            writer.close()


def a_post(headers: bytes = b"", body: bytes = BODY) -> bytes:
    return b"POST / HTTP/1.1\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n%b" % (headers, len(body), body)


async def answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """The status line and the body of the next response."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]
    return head.split(b"\r\n")[0], await reader.readexactly(int(length))


@pytest.mark.parametrize("offer", [OFFER, OFFER.lower(), OFFER.replace(b": h2c", b":h2c  "), b""])
async def test_request_that_offers_http2_is_served_with_its_body(offer: bytes) -> None:
    async with asyncio.timeout(5), connected() as (reader, writer):
        # Twice: the connection stays usable.
        for _ in range(2):
            writer.write(a_post(offer))
            assert await answer(reader) == (b"HTTP/1.1 200 OK", BODY)


async def test_body_that_arrives_later_is_unchanged() -> None:
    async with asyncio.timeout(5), connected() as (reader, writer):
        request = a_post(OFFER)
        writer.write(request[: -len(BODY)])
        await asyncio.sleep(0.05)
        writer.write(BODY)
        assert await answer(reader) == (b"HTTP/1.1 200 OK", BODY)
