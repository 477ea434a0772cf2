"""Limits of the HTTP edge, over real sockets: what an abuser sends or does not read costs only itself."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from engine_adapter.engine import EngineEvents
from engine_adapter.remote.engine import HttpEngine
from engine_adapter.step_time.linear_forms import StepTimes
from tests.fixtures.live_gateway import CHAT, Live, chat, fast_engine, live
from tests.fixtures.live_server import eventually, serve
from tests.fixtures.served_process import served

pytestmark = pytest.mark.process

LIMITS: dict[str, Any] = {"head_timeout_s": 0.5, "stall_s": 1.0, "idle_timeout_s": 2.0}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


def reason_count(antares: Live, reason: str) -> float:
    return antares.gateway.metrics.connections_closed.labels(reason)._value.get()


class Raw:
    """A raw client connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def rest(self, within_s: float = 5.0) -> bytes:
        """Everything until the gateway closes the connection."""
        async with asyncio.timeout(within_s):
            try:
                return await self.reader.read()
            except ConnectionError:
                return b""

    async def flood(self, part: bytes, size: int) -> None:
        """Send ``part`` again and again, up to ``size`` bytes, as long as the gateway lets it."""
        try:
            for _ in range(size // len(part)):
                self.writer.write(part)
                await self.writer.drain()
                if self.reader.at_eof():
                    return
        except ConnectionError:
            pass


@asynccontextmanager
async def raw(antares: Live, receive_buffer: int | None = None) -> AsyncIterator[Raw]:
    host, port = antares.url.removeprefix("http://").split(":")
    client = socket.socket()
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=client, limit=1 << 16)
    try:
        yield Raw(reader, writer)
    finally:
        writer.transport.abort()


def rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def code_of(answer: bytes) -> tuple[int, str]:
    """Status and code of the one response in ``answer``."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert answer.count(b"HTTP/1.1 ") == 1, answer[:2000]
    return int(head.split()[1]), json.loads(body)["error"]["code"]


# --- the request head -------------------------------------------------------------------------------------------------

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
        await eventually(lambda: len(antares.gateway.connections) <= 1 and antares.gateway.proxy.in_flight == 0, 5)


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
        answer = await client.rest(4)
        assert answer.startswith(starts) and bool(answer) == bool(starts)


async def test_slow_head_is_cut_although_bytes_arrive() -> None:
    async with live(limits=LIMITS) as antares, raw(antares) as client:

        async def drip() -> None:
            client.writer.write(HEAD)
            while True:
                client.writer.write(b"a: b\r\n")
                await asyncio.sleep(0.1)

        dripping = asyncio.create_task(drip())
        assert code_of(await client.rest(4)) == (408, "head_timeout")
        dripping.cancel()


async def test_idle_connection_is_closed_and_half_second_head_too() -> None:
    async with live(limits={**LIMITS, "idle_timeout_s": 0.5}) as antares:
        async with raw(antares) as client:
            client.writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await client.rest(4)).startswith(b"HTTP/1.1 200")
        async with raw(antares) as client:
            client.writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET /hea")
            assert b"HTTP/1.1 408" in await client.rest(4)


# --- ambiguous requests -----------------------------------------------------------------------------------------------

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
    "websocket": (HEAD + b"connection: upgrade\r\nupgrade: websocket\r\ncontent-length: 2\r\n\r\n{}", 400),
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
        answer = await client.rest(10)
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


# --- bodies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/embeddings"])
@pytest.mark.parametrize("framing", [b"content-length: 500000\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n"])
async def test_slow_body_gets_408(path: str, framing: bytes) -> None:
    async with live(limits=LIMITS) as antares, raw(antares) as client:
        client.writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\n" % path.encode() + framing)

        async def drip() -> None:
            while True:
                client.writer.write(b"1\r\n{\r\n" if b"chunked" in framing else b"{")
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        started = time.monotonic()
        answer = await client.rest()
        dripping.cancel()
        assert answer.startswith(b"HTTP/1.1 408") and b"body_timeout" in answer
        assert time.monotonic() - started < 4


async def test_body_that_follows_its_answer_slowly_is_cut() -> None:
    async with live(limits=LIMITS) as antares, raw(antares) as client:
        client.writer.write(b"POST /none HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\nx")
        assert (await client.rest()).startswith(b"HTTP/1.1 404")
        assert reason_count(antares, "slow_body") == 1


async def test_half_sent_bodies_take_bounded_memory_and_give_it_back() -> None:
    limits = {"body_memory_bytes": 16 << 20, "stall_s": 3.0}
    async with live(limits=limits) as antares:
        before = rss_mb()
        half = HEAD + b"content-length: %d\r\n\r\n" % (8 << 20) + b" " * (4 << 20)
        clients = [raw(antares) for _ in range(20)]
        opened = [await client.__aenter__() for client in clients]
        for client in opened:
            client.writer.write(half)
        await asyncio.sleep(1)
        assert antares.gateway.proxy.bodies.used <= 16 << 20
        started = time.monotonic()
        assert (await antares.ask()).status_code == 200, "a small body waits for nothing"
        assert time.monotonic() - started < 1
        large = await antares.ask({"input": "x" * (1 << 20)}, "/v1/embeddings")
        assert large.status_code != 503, "the half-sent ones lose their memory"
        # Includes what the clients in this process have not sent yet: 4 MiB each.
        assert rss_mb() - before < 250
        answers = await asyncio.gather(*(client.rest(15) for client in opened))
        assert {answer[9:12] for answer in answers} <= {b"408", b"503"}
        for client in clients:
            await client.__aexit__(None, None, None)
        await eventually(lambda: antares.gateway.proxy.bodies.used == 0 and antares.gateway.proxy.in_flight == 0)


async def test_body_memory_counts_decompressed_bytes() -> None:
    async with live(limits={"body_memory_bytes": 1 << 16}) as antares:
        body = gzip.compress(json.dumps(chat("x" * (1 << 20))).encode())
        assert len(body) < 4096
        headers = {"content-encoding": "gzip", "content-type": "application/json"}
        answer = await antares.http.post(CHAT, content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "body_memory_full")
        assert int(answer.headers["retry-after"]) >= 1


async def test_client_that_half_closes_frees_its_request() -> None:
    async with live(fast_engine(times=StepTimes(d=0.02))) as antares, raw(antares) as client:
        body = json.dumps(chat(max_tokens=4000, ignore_eos=True)).encode()
        client.writer.write(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        await eventually(lambda: antares.gateway.ledger.open_count == 1)
        client.writer.write_eof()
        await eventually(antares.is_idle)


# --- slow readers -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def gateway_of(kind: str, slots: int, **limits: Any) -> AsyncIterator[Live]:
    engine = fast_engine(times=StepTimes(d=0.001), max_num_seqs=slots)
    if kind == "simulated":
        async with live(engine, limits=limits) as antares:
            yield antares
        return
    await engine.start(EngineEvents())
    async with serve(engine.app) as url, live(HttpEngine("remote", url, max_num_seqs=slots), limits=limits) as antares:
        yield antares
    await engine.stop()


def a_chat(**fields: Any) -> bytes:
    body = json.dumps(chat(max_tokens=2000, ignore_eos=True, **fields)).encode()
    return HEAD + b"x-slo-class: free\r\ncontent-length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", ["simulated", "http"])
async def test_clients_that_read_nothing_free_their_slots_when_the_engine_is_done(kind: str, stream: bool) -> None:
    async with gateway_of(kind, slots=16, stall_s=3.0, idle_timeout_s=3.0) as antares:
        clients = [raw(antares, 4096) for _ in range(4)]
        for client in clients:
            opened = await client.__aenter__()
            opened.reader._transport.pause_reading()  # type: ignore[attr-defined]
            opened.writer.write(a_chat(n=4, stream=stream))
        await eventually(lambda: len(antares.gateway.engine_queues[0].running) == 4, 10)
        await eventually(lambda: antares.gateway.ledger.open_count == 0, 20)
        assert antares.outcomes["finished"] == 4
        assert (await antares.ask()).status_code == 200
        # What they do not read is cut.
        await eventually(lambda: len(antares.gateway.connections) <= 1, 15)
        for client in clients:
            await client.__aexit__(None, None, None)
        await eventually(lambda: len(antares.gateway.connections) <= 1, 10)


async def test_client_that_reads_nothing_of_a_long_stream_is_cancelled() -> None:
    limits = {"stall_s": 1.0, "response_buffer_bytes": 1 << 16}
    engine = fast_engine(times=StepTimes(d=0.0001), max_model_len=200_000)
    async with live(engine, limits=limits) as antares, raw(antares, 4096) as client:
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]
        client.writer.write(a_chat(stream=True, n=8).replace(b'"max_tokens": 2000', b'"max_tokens":90000'))
        await eventually(lambda: antares.outcomes["cancelled"] == 1, 20)
        await eventually(antares.is_idle)
        exposition = antares.gateway.metrics.exposition().decode()
        assert 'reason="client_slow"' in exposition
        await eventually(lambda: len(antares.gateway.connections) == 0, 5)


async def test_total_of_buffered_responses_is_bounded() -> None:
    limits = {"response_memory_bytes": 1 << 20, "stall_s": 60.0}
    async with live(limits=limits) as antares:

        async def large(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x" * (6 << 20)})

        antares.engine.stub = large
        clients = [raw(antares, 4096) for _ in range(6)]
        for client in clients:
            opened = await client.__aenter__()
            opened.reader._transport.pause_reading()  # type: ignore[attr-defined]
            opened.writer.write(b"GET /v1/responses/resp_1 HTTP/1.1\r\nhost: x\r\n\r\n")
        await eventually(lambda: reason_count(antares, "response_memory") >= 5, 5)
        assert antares.gateway.connections.buffered <= 1 << 20
        assert antares.gateway.proxy.in_flight == 0
        for client in clients:
            await client.__aexit__(None, None, None)


async def test_client_that_reads_a_byte_at_a_time_is_cut() -> None:
    async with live(limits={"stall_s": 1.0, "min_bytes_per_s": 100_000}) as antares:

        async def large(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x" * (7 << 20)})

        antares.engine.stub = large
        host, port = antares.url.removeprefix("http://").split(":")
        loop = asyncio.get_running_loop()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await loop.sock_connect(client, (host, int(port)))
            await loop.sock_sendall(client, b"GET /v1/responses/resp_1 HTTP/1.1\r\nhost: x\r\n\r\n")
            async with asyncio.timeout(10):
                # What the kernel has received can still be read after the reset.
                while not reason_count(antares, "slow_reader"):
                    assert await loop.sock_recv(client, 1)
                    await asyncio.sleep(0.02)


async def test_slow_but_steady_client_gets_everything() -> None:
    async with live(limits={"stall_s": 1.0}) as antares, raw(antares) as client:

        async def large(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"x" * (7 << 20)})

        antares.engine.stub = large
        client.writer.write(b"GET /v1/responses/resp_1 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        received = 0
        async with asyncio.timeout(20):
            while part := await client.reader.read(1 << 17):
                received += len(part)
                await asyncio.sleep(0.03)
        assert received > 7 << 20


# --- connections ------------------------------------------------------------------------------------------------------


async def test_idle_connections_make_room_for_new_ones() -> None:
    async with live(limits={"max_connections": 20, "max_connections_per_client": 20}) as antares:
        before = descriptors()
        clients = [raw(antares) for _ in range(100)]
        for client in clients:
            await client.__aenter__()
        assert (await antares.http.get("/health")).status_code == 200
        assert len(antares.gateway.connections) <= 20
        assert reason_count(antares, "connection_limit") >= 80
        for client in clients:
            await client.__aexit__(None, None, None)
        await eventually(lambda: descriptors() <= before + 3)


async def test_connections_above_the_limit_are_refused_while_all_are_busy() -> None:
    engine = fast_engine(times=StepTimes(d=0.02))
    limits = {"max_connections": 8, "max_connections_per_client": 3}
    async with live(engine, limits=limits) as antares:
        clients = [raw(antares) for _ in range(4)]
        for client in clients[:3]:
            (await client.__aenter__()).writer.write(a_chat(stream=True))
        await eventually(lambda: antares.gateway.ledger.open_count == 3)
        answer = await (await clients[3].__aenter__()).rest()
        assert code_of(answer) == (429, "too_many_connections")
        for client in clients:
            await client.__aexit__(None, None, None)
        await eventually(antares.is_idle)


async def test_trusted_proxy_has_no_limit_of_its_own() -> None:
    limits = {"max_connections_per_client": 1, "trusted_proxies": ["127.0.0.0/8", "::1"]}
    async with live(limits=limits) as antares, raw(antares) as first, raw(antares) as second:
        for client in (first, second):
            client.writer.write(b"GET /health HTTP/1.0\r\n\r\n")
        assert (await first.rest()).endswith(b"ok")
        assert (await second.rest()).endswith(b"ok")


SERVED = """\
server: {port: 0, drain_s: 1}
engines: [{kind: simulated, step_times: {d: 0.005}}]
predictor: {enabled: false}
classes: {chat: {}}
default_class: chat
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sets a limit on descriptors, and sends SIGTERM")
async def test_serve_answers_with_600_idle_connections_and_exits_in_time(tmp_path: Path) -> None:
    async with served(tmp_path, SERVED, descriptors=256) as (process, http):
        port = http.base_url.port
        opened = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", port) for _ in range(600)))
        assert (await http.get("/health")).status_code == 200
        assert (await http.post(CHAT, json=chat(max_tokens=3))).status_code == 200
        # What is open at SIGTERM: an upgrade, a client that reads nothing, half a body.
        upgrade, stalled, half = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        upgrade[1].write(AMBIGUOUS["websocket"][0])
        assert (await asyncio.wait_for(upgrade[0].read(12), 5)) == b"HTTP/1.1 400"
        stalled[1].transport.pause_reading()  # type: ignore[attr-defined]
        stalled[1].write(a_chat(stream=True, n=8).replace(b"x-slo-class: free\r\n", b""))
        half[1].write(HEAD + b"content-length: 500\r\n\r\n{")
        await asyncio.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        log = (await asyncio.wait_for(process.stderr.read(), 15)).decode()
        # The half body was cut when the drain ended.
        assert await process.wait() == 3
        assert "Traceback" not in log
        assert log.count("closed connections") <= 3
        for _, writer in [*opened, upgrade, stalled, half]:
            writer.transport.abort()
