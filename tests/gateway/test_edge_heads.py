"""Limits of request heads, over real sockets: endless, slow and silent ones are cut."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from tests.fixtures.live_gateway import chat, live
from tests.fixtures.live_server import eventually
from tests.fixtures.raw_client import (
    CHUNKED,
    HEAD,
    LIMITS,
    code_of,
    raw,
    rss_mb,
)

pytestmark = pytest.mark.process

ENDLESS = {
    "header": (HEAD + b"a: ", b"x" * 65536, 431),
    "header name": (HEAD, b"x" * 65536, 431),
    "small headers": (HEAD, b"a: b\r\n" * 10000, 431),
    "target": (b"GET /", b"x" * 65536, 414),
    "blank lines": (b"\r\n", b"\r\n" * 10000, 431),
    "chunk extension": (CHUNKED + b"5;", b"x" * 65536, 431),
    "chunk trailer": (CHUNKED + b"0\r\na: ", b"x" * 65536, 431),
    "chunk trailers": (CHUNKED + b"0\r\n", b"a: b\r\n" * 10000, 431),
    "tiny chunks": (CHUNKED, b"1;aaaaaaa\r\nx\r\n" * 5000, 431),
}


@pytest.mark.parametrize("kind", ENDLESS)
async def test_endless_head_is_refused_and_closed(kind: str) -> None:
    start, part, status = ENDLESS[kind]
    async with live(limits=LIMITS) as antares, raw(antares) as client:
        before, started = rss_mb(), time.process_time()
        client.writer.write(start)
        sending = asyncio.create_task(client.flood(part, 64 << 20))
        answer = await client.rest()
        sending.cancel()
        assert code_of(answer)[0] == status
        assert rss_mb() - before < 60
        assert time.process_time() - started < 3
        assert (await antares.http.get("/health")).status_code == 200
        await eventually(lambda: len(antares.gateway.connections) <= 1 and antares.gateway.proxy.in_flight == 0)


async def test_head_below_the_limit_is_served_byte_by_byte() -> None:
    async with live() as antares, raw(antares) as client:
        request = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\na: " + b"x" * 3000 + b"\r\n\r\n"
        for index in range(0, len(request), 7):
            client.writer.write(request[index : index + 7])
            await asyncio.sleep(0)
        assert (await client.rest()).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("size", [60_000, 300_000])
async def test_head_limit_does_not_apply_to_a_body_in_the_same_packet(size: int) -> None:
    async with live() as antares, raw(antares) as client:
        body = json.dumps(chat("x" * size)).encode()
        client.writer.write(HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        answer = await client.rest()
        assert b"431" not in answer[:20]
        assert b"head_too_large" not in answer


@pytest.mark.parametrize(
    ("sent", "starts"),
    [
        (b"", b""),
        (b"GET /health HT", b"HTTP/1.1 408"),
        (HEAD, b"HTTP/1.1 408"),
        (HEAD + b"content-le", b"HTTP/1.1 408"),
    ],
)
async def test_silent_connection_and_half_head_are_cut(sent: bytes, starts: bytes) -> None:
    async with live(limits=LIMITS) as antares, raw(antares) as client:
        client.writer.write(sent)
        answer = await client.rest()
        assert answer.startswith(starts) and bool(answer) == bool(starts)


async def test_slow_head_is_cut_although_bytes_arrive() -> None:
    async with live(limits=LIMITS) as antares, raw(antares) as client:

        async def drip() -> None:
            client.writer.write(HEAD)
            while True:
                client.writer.write(b"a: b\r\n")
                await asyncio.sleep(0.1)

        dripping = asyncio.create_task(drip())
        assert code_of(await client.rest()) == (408, "head_timeout")
        dripping.cancel()


async def test_idle_connection_is_closed_and_half_second_head_too() -> None:
    async with live(limits={**LIMITS, "idle_timeout_s": 0.5}) as antares:
        async with raw(antares) as client:
            client.writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await client.rest()).startswith(b"HTTP/1.1 200")
        async with raw(antares) as client:
            client.writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /hea")
            assert b"HTTP/1.1 408" in await client.rest()
