"""Ambiguous and pipelined requests, over real sockets: none hides another request."""

from __future__ import annotations

import asyncio
import json
import socket
import struct

import pytest

from engine_adapter.step_time.linear_forms import StepTimes
from tests.fixtures.live_gateway import chat, fast_engine, live
from tests.fixtures.live_server import eventually
from tests.fixtures.raw_client import (
    CHUNKED,
    HEAD,
    LIMITS,
    WEBSOCKET,
    code_of,
    raw,
    reason_count,
)

pytestmark = pytest.mark.process

SMUGGLED = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
AMBIGUOUS = {
    "both lengths": (HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "both lengths, reversed": (HEAD + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n", 400),
    "equal lengths": (HEAD + b"content-length: 2\r\ncontent-length: 2\r\n\r\n{}", 400),
    "two lengths": (HEAD + b"content-length: 2\r\ncontent-length: 20\r\n\r\n{}", 400),
    "signed length": (HEAD + b"content-length: +2\r\n\r\n{}", 400),
    "bare LF": (b"GET /health HTTP/1.1\nhost: x\n\n", 400),
    "bare LF in header": (b"GET /health HTTP/1.1\r\nhost: x\na: b\r\n\r\n", 400),
    "folded": (b"GET /health HTTP/1.1\r\nhost: x\r\na: b\r\n c\r\n\r\n", 400),
    "NUL": (b"GET /health HTTP/1.1\r\nhost: x\r\na: b\0\r\n\r\n", 400),
    "space before colon": (HEAD + b"content-length : 2\r\n\r\n{}", 400),
    "bad chunk size": (CHUNKED + b"zz\r\n", 400),
    "negative chunk size": (CHUNKED + b"-1\r\n", 400),
    "huge chunk size": (CHUNKED + b"fffffffffffffffff\r\n", 400),
    "chunk without end": (CHUNKED + b"1\r\n{}\r\n0\r\n\r\n", 400),
    "chunked twice": (HEAD + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "chunked in HTTP/1.0": (CHUNKED.replace(b"/1.1", b"/1.0") + b"0\r\n\r\n", 400),
    "gzip, chunked": (HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "two hosts": (b"GET /health HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n", 400),
    "absolute target": (b"GET http://x/health HTTP/1.1\r\nhost: x\r\n\r\n", 400),
    "CONNECT": (b"CONNECT x:443 HTTP/1.1\r\nhost: x\r\n\r\n", 400),
    "lower-case method": (b"get /health HTTP/1.1\r\nhost: x\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00", 400),
    "websocket": (WEBSOCKET, 400),
    "websocket GET": (b"GET /x HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n", 400),
}


@pytest.mark.parametrize("kind", AMBIGUOUS)
async def test_ambiguous_request_is_refused_and_nothing_after_it_is_served(kind: str) -> None:
    request, status = AMBIGUOUS[kind]
    async with live(limits=LIMITS) as antares, raw(antares) as client:
        client.writer.write(request + SMUGGLED)
        answer = await client.rest()
        assert code_of(answer)[0] == status
        assert b"content-type: application/json" in answer
        assert b"connection: close" in answer
        await eventually(lambda: antares.gateway.proxy.in_flight == 0)
        assert antares.gateway.ledger.accepted == 0


async def test_request_after_connection_close_is_not_served() -> None:
    async with live() as antares, raw(antares) as client:
        client.writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" + SMUGGLED)
        assert (await client.rest()).count(b"HTTP/1.1 ") == 1


async def test_trailers_do_not_become_headers() -> None:
    async with live() as antares, raw(antares) as client:
        body = json.dumps(chat()).encode()
        request = CHUNKED + b"%x\r\n%b\r\n0\r\nx-slo-class: none-such\r\n\r\n" % (len(body), body)
        client.writer.write(request.replace(b"host: x", b"host: x\r\nconnection: close"))
        assert (await client.rest()).startswith(b"HTTP/1.1 200")


async def test_malformed_request_behind_a_response_does_not_corrupt_it() -> None:
    async with live(fast_engine(times=StepTimes(d=0.02))) as antares, raw(antares) as client:
        body = json.dumps(chat(stream=True, max_tokens=10, ignore_eos=True)).encode()
        client.writer.write(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body + b"zz zz\r\n\r\n")
        answer = await client.rest()
        assert answer.count(b"HTTP/1.1 ") == 1
        assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_pipelined_flood_is_cut() -> None:
    async with live(limits=LIMITS) as antares, raw(antares) as client:
        sending = asyncio.create_task(client.flood(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" * 1000, 8 << 20))
        answer = await client.rest()
        sending.cancel()
        assert answer.count(b"HTTP/1.1 200") <= 40
        assert reason_count(antares, "too_many_pipelined") == 1


async def test_few_pipelined_requests_are_served_in_order() -> None:
    async with live() as antares, raw(antares) as client:
        client.writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /none HTTP/1.1\r\nhost: x\r\n\r\n" * 3)
        client.writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = await client.rest()
        statuses = [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]]
        assert statuses == [b"200", b"404"] * 3 + [b"200"]


async def test_pipelined_stream_ends_when_the_client_resets() -> None:
    async with live(fast_engine(times=StepTimes(d=0.02))) as antares:
        async with raw(antares) as client:
            body = json.dumps(chat(stream=True, max_tokens=4000, ignore_eos=True)).encode()
            request = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
            client.writer.write(request + SMUGGLED)
            await client.reader.readuntil(b"data: ")
            linger = struct.pack("ii", 1, 0)
            client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        await eventually(antares.is_idle)
        assert antares.outcomes["cancelled"] == 1


async def test_http_1_0_client_is_served() -> None:
    async with live() as antares, raw(antares) as client:
        client.writer.write(b"GET /health HTTP/1.0\r\n\r\n")
        answer = await client.rest()
        assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"ok")
