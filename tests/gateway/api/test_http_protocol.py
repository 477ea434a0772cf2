"""Requests that offer an upgrade to HTTP/2, over a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import uvicorn

from engine_adapter.engine import ASGIApp, Receive, Scope, Send
from gateway.api.connections import CONNECTION_KEY
from gateway.api.http_protocol import HttpProtocol
from tests.fixtures.live_server import HANG_S

MOST = 64
"""Largest body (bytes) that `echo_arrived` takes at once."""

BODY = b"not the head:\r\nupgrade: h2c\r\n\r\n"
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body = b""
    while (message := await receive()).get("more_body"):
        body += message["body"]
    body += message.get("body", b"")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def echo_arrived(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the body if it has arrived as a whole, else with how it came: its first part, then the rest."""
    body = scope[CONNECTION_KEY].arrived_body(MOST)
    if body is None:
        parts = []
        while (message := await receive()).get("more_body"):
            parts.append(message["body"])
        body = b"in parts: " + b"|".join([*parts, message.get("body", b"")])
    else:
        assert scope[CONNECTION_KEY].arrived_body(MOST) == b"", "it is taken once"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def connected(app: ASGIApp = echo) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a server of ``app``."""
    config = uvicorn.Config(app, http=HttpProtocol, lifespan="off", log_level="critical")
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
    async with asyncio.timeout(HANG_S), connected() as (reader, writer):
        # Twice: the connection stays usable.
        for _ in range(2):
            writer.write(a_post(offer))
            assert await answer(reader) == (b"HTTP/1.1 200 OK", BODY)


async def test_body_that_arrives_later_is_unchanged() -> None:
    async with asyncio.timeout(HANG_S), connected() as (reader, writer):
        request = a_post(OFFER)
        writer.write(request[: -len(BODY)])
        await asyncio.sleep(0.05)
        writer.write(BODY)
        assert await answer(reader) == (b"HTTP/1.1 200 OK", BODY)


async def test_body_that_has_arrived_is_taken_at_once() -> None:
    async with asyncio.timeout(HANG_S), connected(echo_arrived) as (reader, writer):
        for body in (BODY, b"", b"x" * MOST, BODY):
            writer.write(a_post(body=body))
            assert await answer(reader) == (b"HTTP/1.1 200 OK", body)
        # Two requests in one packet: each has its own body.
        writer.write(a_post(body=b"first") + a_post(body=b"second"))
        assert [(await answer(reader))[1] for _ in range(2)] == [b"first", b"second"]


async def test_body_that_is_incomplete_or_large_is_received_in_parts() -> None:
    async with asyncio.timeout(HANG_S), connected(echo_arrived) as (reader, writer):
        request = a_post(body=b"a" * MOST)
        writer.write(request[:-10])
        await asyncio.sleep(0.05)
        writer.write(request[-10:])
        assert (await answer(reader))[1] == b"in parts: " + b"a" * (MOST - 10) + b"|" + b"a" * 10
        writer.write(a_post(body=b"b" * (MOST + 1)))
        assert (await answer(reader))[1] == b"in parts: " + b"b" * (MOST + 1)
