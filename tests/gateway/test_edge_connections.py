"""Limits of connections, over real sockets."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

import pytest

from engine_adapter.step_time.linear_forms import StepTimes
from tests.fixtures.live_gateway import CHAT, chat, fast_engine, live
from tests.fixtures.live_server import HANG_S, eventually
from tests.fixtures.raw_client import (
    HEAD,
    WEBSOCKET,
    a_chat,
    code_of,
    descriptors,
    raw,
    reason_count,
)
from tests.fixtures.served_process import served

pytestmark = pytest.mark.process


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
        upgrade[1].write(WEBSOCKET)
        assert (await asyncio.wait_for(upgrade[0].read(12), HANG_S)) == b"HTTP/1.1 400"
        half[1].write(HEAD + b"content-length: 500\r\n\r\n{")
        stalled[1].transport.pause_reading()  # type: ignore[attr-defined]
        stalled[1].write(a_chat(stream=True, n=8).replace(b"x-slo-class: free\r\n", b""))
        async with asyncio.timeout(HANG_S):
            while "antares_ledger_open 1.0" not in (await http.get("/metrics")).text:
                await asyncio.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        log = (await asyncio.wait_for(process.stderr.read(), HANG_S)).decode()
        # The half body was cut when the drain ended.
        assert await process.wait() == 3
        assert "Traceback" not in log
        assert log.count("closed connections") <= 3
        for _, writer in [*opened, upgrade, stalled, half]:
            writer.transport.abort()
