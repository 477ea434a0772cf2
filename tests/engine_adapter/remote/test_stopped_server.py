"""A server that stops answering, behind an `HttpEngine`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from engine_adapter.engine import EngineEvents, EngineLost, Receive, Scope, Send
from engine_adapter.remote.engine import HttpEngine
from tests.fixtures.live_server import eventually
from tests.fixtures.ports import free_port
from tests.fixtures.scripted_server import CHAT, DONE, ScriptedStream, ask, chunk, fast_probes, post, proxied

pytestmark = pytest.mark.process

LONG_RESPONSE_S = 30.0


STOPPABLE = """
import asyncio, sys, uvicorn

async def app(scope, receive, send):
    await receive()
    kind = b"text/event-stream" if scope["method"] == "POST" else b"application/json"
    silent = b"silent" in scope["query_string"]
    if not silent:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
    if scope["method"] == "POST":
        token = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\\n\\n'
        for _ in range(3000):
            if not silent:
                await send({"type": "http.response.body", "body": token, "more_body": True})
            await asyncio.sleep(0.02)
    await send({"type": "http.response.body", "body": b"{}"})
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), lifespan="off", log_level="critical")
"""


@asynccontextmanager
async def server_process() -> AsyncIterator[tuple[int, str]]:
    """A server of endless streams in its own process. Yields (process id, URL)."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", STOPPABLE, str(port))
    try:
        yield process.pid, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        await process.wait()


async def test_stopped_process_ends_what_is_in_flight_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fast_probes(monkeypatch)
    async with server_process() as (pid, url):
        engine = HttpEngine("remote", url)
        await engine.start(EngineEvents())
        await eventually(lambda: engine.state.alive)
        paths = [CHAT, CHAT + "?silent=1", "/v1/messages", "/v1/embeddings"]
        calls = [asyncio.create_task(post(engine, path, stream=stream)) for path in paths for stream in (True, False)]
        await eventually(lambda: engine.state.engine_running == len(calls))
        await asyncio.sleep(1.5)
        assert not any(call.done() for call in calls), "a healthy server's requests go on"
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        ends = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 30)
        assert [type(end) for end in ends] == [EngineLost] * len(calls)
        assert "down" in str(ends[0])
        assert time.monotonic() - began > 0.5
        assert (engine.state.alive, engine.state.engine_running) == (False, 0)
        os.kill(pid, signal.SIGCONT)
        await eventually(lambda: engine.state.alive)
        await engine.stop()


async def test_short_pause_of_the_process_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fast_probes(monkeypatch, down_after_s=5.0)
    async with server_process() as (pid, url):
        engine = HttpEngine("remote", url)
        await engine.start(EngineEvents())
        await eventually(lambda: engine.state.alive)
        call = asyncio.create_task(post(engine, stream=True))
        await eventually(lambda: engine.state.engine_running == 1)
        os.kill(pid, signal.SIGSTOP)
        await eventually(lambda: not engine.state.alive)
        os.kill(pid, signal.SIGCONT)
        await eventually(lambda: engine.state.alive)
        assert not call.done()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await engine.stop()


async def test_unhealthy_server_that_still_streams_keeps_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is stopping may refuse probes while it completes its streams."""
    fast_probes(monkeypatch, down_after_s=0.1)
    healthy, probes = True, 0
    upstream = ScriptedStream([*[step for _ in range(40) for step in (chunk("a"), 0.02)], chunk("b", "stop"), DONE])

    async def unhealthy(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal probes
        if scope["path"] != "/health":
            await upstream(scope, receive, send)
            return
        probes += 1
        await send({"type": "http.response.start", "status": 200 if healthy else 503, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with proxied(unhealthy) as (engine, client):
        call = asyncio.create_task(client.post(CHAT, json=ask()))
        await eventually(lambda: engine.state.engine_running == 1)
        healthy = False
        await eventually(lambda: not engine.state.alive)
        response = await call
        assert response.status_code == 200
        assert probes > 4
