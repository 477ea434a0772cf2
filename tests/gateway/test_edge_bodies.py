"""Limits of request bodies, over real sockets: slow, half-sent and compressed ones."""

from __future__ import annotations

import asyncio
import gzip
import json
import time

import pytest

from engine_adapter.step_time.linear_forms import StepTimes
from tests.fixtures.live_gateway import CHAT, chat, fast_engine, live
from tests.fixtures.live_server import eventually
from tests.fixtures.raw_client import (
    HEAD,
    LIMITS,
    raw,
    reason_count,
    rss_mb,
)

pytestmark = pytest.mark.process


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
        assert time.monotonic() - started < 12, "stall_s is 1 s here, and 30 s by default"


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
        assert time.monotonic() - started < 2.5, "stall_s is 3 s"
        large = await antares.ask({"input": "x" * (1 << 20)}, "/v1/embeddings")
        assert large.status_code != 503, "the half-sent ones lose their memory"
        # Includes what the clients in this process have not sent yet: 4 MiB each.
        assert rss_mb() - before < 250
        answers = await asyncio.gather(*(client.rest(25) for client in opened))
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
