"""Clients that read slowly or not at all, over real sockets: they cost only themselves."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engine_adapter.engine import EngineEvents
from engine_adapter.remote.engine import HttpEngine
from engine_adapter.step_time.linear_forms import StepTimes
from tests.fixtures.live_gateway import Live, fast_engine, live
from tests.fixtures.live_server import HANG_S, eventually, serve
from tests.fixtures.raw_client import (
    a_chat,
    raw,
    reason_count,
)

pytestmark = pytest.mark.process


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


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", ["simulated", "http"])
async def test_clients_that_read_nothing_free_their_slots_when_the_engine_is_done(kind: str, stream: bool) -> None:
    async with gateway_of(kind, slots=16, stall_s=3.0, idle_timeout_s=3.0) as antares:
        clients = [raw(antares, 4096) for _ in range(4)]
        for client in clients:
            opened = await client.__aenter__()
            opened.reader._transport.pause_reading()  # type: ignore[attr-defined]
            opened.writer.write(a_chat(n=4, stream=stream))
        await eventually(lambda: len(antares.gateway.engine_queues[0].running) == 4)
        await eventually(lambda: antares.gateway.ledger.open_count == 0)
        assert antares.outcomes["finished"] == 4
        assert (await antares.ask()).status_code == 200
        # What they do not read is cut.
        await eventually(lambda: len(antares.gateway.connections) <= 1, 25)
        for client in clients:
            await client.__aexit__(None, None, None)
        await eventually(lambda: len(antares.gateway.connections) <= 1)


async def test_client_that_reads_nothing_of_a_long_stream_is_cancelled() -> None:
    limits = {"stall_s": 1.0, "response_buffer_bytes": 1 << 16}
    engine = fast_engine(times=StepTimes(d=0.0001), max_model_len=200_000)
    async with live(engine, limits=limits) as antares, raw(antares, 4096) as client:
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]
        client.writer.write(a_chat(stream=True, n=8).replace(b'"max_tokens": 2000', b'"max_tokens":90000'))
        await eventually(lambda: antares.outcomes["cancelled"] == 1, 25)
        await eventually(antares.is_idle)
        exposition = antares.gateway.metrics.exposition().decode()
        assert 'reason="client_slow"' in exposition
        await eventually(lambda: len(antares.gateway.connections) == 0)


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
        await eventually(lambda: reason_count(antares, "response_memory") >= 5)
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
            async with asyncio.timeout(25):
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
        async with asyncio.timeout(HANG_S):
            while part := await client.reader.read(1 << 17):
                received += len(part)
                await asyncio.sleep(0.03)
        assert received > 7 << 20
