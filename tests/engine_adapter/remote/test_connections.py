"""Connections of an `HttpEngine`: limits, the server's key, redirects, and a server that stops answering."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from engine_adapter.engine import EngineEvents, EngineLost, EngineStartError, Receive, Scope, Send
from engine_adapter.remote import engine as engine_module
from engine_adapter.remote.engine import HttpEngine
from gateway.config.engines import HttpEngineConfig
from tests.fixtures.live_server import eventually, serve
from tests.fixtures.scripted_server import CHAT, DONE, Scripted, ScriptedStream, ask, chunk, proxied

pytestmark = pytest.mark.process

LONG_RESPONSE_S = 30.0


async def post(engine: HttpEngine, path: str = CHAT, **fields: Any) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
        return await client.post(path, json=ask(**fields))


def fast_probes(monkeypatch: pytest.MonkeyPatch, timeout_s: float = 0.3, down_after_s: float = 0.5) -> None:
    monkeypatch.setattr(engine_module, "PROBE_EVERY_S", 0.05)
    monkeypatch.setattr(engine_module, "PROBE_AGAIN_S", (0.05,))
    monkeypatch.setattr(engine_module, "PROBE_TIMEOUT_S", timeout_s)
    monkeypatch.setattr(engine_module, "DOWN_AFTER_S", down_after_s)


# --- connection limits ------------------------------------------------------------------------------------------------


async def test_as_many_streams_as_sequences_run_at_once() -> None:
    """1,500 streams with 2,048 sequences are 1,500 upstream connections."""
    streams = 1500
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 3 * streams:
        if hard < 3 * streams:
            pytest.skip("too few file descriptors")
        resource.setrlimit(resource.RLIMIT_NOFILE, (3 * streams, hard))
    open_streams, release = 0, asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal open_streams
        await reader.readuntil(b"\r\n\r\n")
        open_streams += 1
        await release.wait()
        data = chunk("a", "stop") + DONE
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(data))
        writer.write(data)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=4096)
    engine = HttpEngine("remote", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", max_num_seqs=2048)
    done = 0

    async def stream() -> None:
        nonlocal done
        scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "headers": []}
        messages = [{"type": "http.request", "body": b'{"stream": true}'}]

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message: Any) -> None: ...

        await engine.app(scope, receive, send)
        done += 1

    calls = [asyncio.create_task(stream()) for _ in range(streams)]
    await eventually(lambda: open_streams == streams, within_s=30)
    assert (engine.state.engine_running, engine.state.engine_waiting) == (streams, 0)
    release.set()
    await asyncio.gather(*calls)
    assert done == streams
    await engine.stop()
    server.close()


@pytest.mark.parametrize(
    ("options", "sequences"),
    [
        ({"max_num_seqs": 2048}, 2048),
        ({"max_num_seqs": 300, "max_connections": 4000}, 300),
        ({"max_num_seqs": 300, "max_connections": 100}, 99),
        ({"max_num_seqs": 300, "max_connections": 300}, 299),
        ({"max_num_seqs": 300, "max_connections": 301}, 300),
        ({"max_connections": 2}, 1),
    ],
)
def test_policies_see_no_more_sequences_than_connections(options: dict[str, int], sequences: int) -> None:
    assert HttpEngine("remote", "http://127.0.0.1:9", **options).state.max_num_seqs == sequences


def test_max_connections_is_a_setting() -> None:
    config = HttpEngineConfig(kind="http", base_url="http://h:1")
    assert config.max_connections is None
    assert HttpEngineConfig(kind="http", base_url="http://h:1", max_connections=50).max_connections == 50
    with pytest.raises(ValueError, match="max_connections"):
        HttpEngineConfig(kind="http", base_url="http://h:1", max_connections=1)


async def test_waiting_requests_do_not_count_as_running_and_are_freed() -> None:
    async with proxied(ScriptedStream([chunk("a"), LONG_RESPONSE_S]), max_connections=3) as (engine, _):
        calls = [asyncio.create_task(post(engine, stream=True)) for _ in range(5)]
        await eventually(lambda: engine.state.engine_waiting == 3)
        assert engine.state.engine_running == 2
        for call in calls[2:]:
            call.cancel()
        await eventually(lambda: engine.state.engine_waiting == 0)
        for call in calls[:2]:
            call.cancel()
        await eventually(lambda: engine.state.engine_running == 0)
        await asyncio.gather(*calls, return_exceptions=True)


async def test_pass_through_requests_leave_connections_to_scheduled_ones() -> None:
    stuck = asyncio.Event()

    async def slow_embeddings(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        if scope["path"] == "/v1/embeddings":
            await stuck.wait()
        kind, data = (b"text/event-stream", chunk("a", "stop") + DONE) if scope["path"] == CHAT else (b"", b"{}")
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": data})

    async with proxied(slow_embeddings, max_num_seqs=2, max_connections=4) as (engine, _):
        calls = [asyncio.create_task(post(engine, "/v1/embeddings")) for _ in range(6)]
        await eventually(lambda: engine.state.engine_waiting == 4)
        assert (await asyncio.wait_for(post(engine), 3)).status_code == 200
        stuck.set()
        assert [answer.status_code for answer in await asyncio.gather(*calls)] == [200] * 6
        assert (engine.state.engine_running, engine.state.engine_waiting) == (0, 0)


async def test_request_does_not_wait_forever_for_a_connection() -> None:
    async with serve(ScriptedStream([chunk("a"), LONG_RESPONSE_S])) as url:
        engine = HttpEngine("remote", url, max_connections=2, connect_timeout_s=0.2, read_timeout_s=0.3)
        first = asyncio.create_task(post(engine, stream=True))
        await eventually(lambda: engine.state.engine_running == 1)
        with pytest.raises(EngineLost):
            await asyncio.wait_for(post(engine, stream=True), 3)
        await asyncio.gather(first, return_exceptions=True)
        await engine.stop()


# --- the server's key -------------------------------------------------------------------------------------------------


class Guarded:
    """A server that wants ``key`` on ``/v1``, while ``/health`` is open."""

    def __init__(self, key: str, status: int = 401) -> None:
        self.key, self.status = key, status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        given = dict(scope["headers"]).get(b"authorization", b"").decode()
        allowed = scope["path"] == "/health" or given == f"Bearer {self.key}"
        await send({"type": "http.response.start", "status": 200 if allowed else self.status, "headers": []})
        await send({"type": "http.response.body", "body": b'{"data": [{"id": "m"}]}'})


@pytest.mark.parametrize("status", [401, 403])
async def test_start_fails_if_only_v1_wants_a_key(status: int) -> None:
    async with serve(Guarded("k", status)) as url:
        with pytest.raises(EngineStartError, match=rf"/v1/models returned {status}: set its api_key_env"):
            await HttpEngine("remote", url).start(EngineEvents())
        with pytest.raises(EngineStartError, match="check the key"):
            await HttpEngine("remote", url, api_key="wrong").start(EngineEvents())
        engine = HttpEngine("remote", url, api_key="k")
        await engine.start(EngineEvents())
        assert (engine.state.alive, engine.state.model) == (True, "m")
        await engine.stop()


async def test_key_that_stops_working_takes_the_engine_down_until_it_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fast_probes(monkeypatch, timeout_s=2)
    server = Guarded("k")
    async with serve(server) as url:
        engine = HttpEngine("remote", url, api_key="k")
        await engine.start(EngineEvents())
        server.key = "new"
        assert (await post(engine)).status_code == 401
        await eventually(lambda: not engine.state.alive)
        await asyncio.sleep(0.3)
        assert len([r for r in caplog.records if "api_key_env" in r.getMessage()]) == 1, "logged once"
        server.key = "k"
        await eventually(lambda: engine.state.alive)
        await engine.stop()


async def test_late_server_that_wants_a_key_stays_down(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fast_probes(monkeypatch, timeout_s=2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    engine = HttpEngine("remote", f"http://127.0.0.1:{port}")
    await engine.start(EngineEvents())
    server = await asyncio.start_server(_unauthorized, "127.0.0.1", port)
    await eventually(lambda: "api_key_env" in caplog.text)
    assert not engine.state.alive
    await engine.stop()
    server.close()


async def _unauthorized(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    status = b"200 OK" if b"/health" in head else b"401 Unauthorized"
    writer.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
    writer.close()


# --- why a server is not ready ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://127.0.0.1:9", "connection refused"),
        ("http://no-such-host.invalid:8000", "DNS error"),
        ("https://127.0.0.1:{port}", "TLS error"),
    ],
)
async def test_log_names_the_cause_of_a_failed_start(url: str, why: str, caplog: pytest.LogCaptureFixture) -> None:
    async with serve(Scripted(lambda _: (200, b"", b""))) as plain:
        engine = HttpEngine("far", url.replace("{port}", plain.rpartition(":")[2]))
        with caplog.at_level(logging.WARNING):
            await engine.start(EngineEvents())
        await engine.stop()
    assert f"engine far is not ready, waiting for it: engine far at {engine.base_url}: {why}" in caplog.text


@pytest.mark.parametrize("status", [500, 503, 302, 204])
async def test_log_names_the_status_of_an_unhealthy_server(status: int, caplog: pytest.LogCaptureFixture) -> None:
    async def unhealthy(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with serve(unhealthy) as url:
        engine = HttpEngine("far", url)
        await engine.start(EngineEvents())
        await engine.stop()
    assert f"/health returned {status}" in caplog.text
    assert not engine.state.alive


# --- redirects and headers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings", "/v1/messages"])
@pytest.mark.parametrize("stream", [True, False])
async def test_redirect_is_a_502_without_its_location(status: int, path: str, stream: bool) -> None:
    async def redirecting(scope: Scope, receive: Receive, send: Send) -> None:
        location = (b"location", b"http://10.0.0.7:8000/internal")
        await send({"type": "http.response.start", "status": status, "headers": [location]})
        await send({"type": "http.response.body", "body": b"see http://10.0.0.7"})

    async with proxied(redirecting) as (_, client):
        response = await client.post(path, json=ask(stream=stream))
    assert response.status_code == 502
    assert "engine remote" in response.text
    assert "10.0.0.7" not in response.text + str(response.headers)


async def test_not_modified_is_no_redirect() -> None:
    async with proxied(Scripted(lambda _: (304, b"", b""))) as (_, client):
        assert (await client.get("/v1/files/x")).status_code == 304


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings", "/v1/responses"])
async def test_date_and_server_of_the_upstream_are_dropped(path: str, stream: bool) -> None:
    """The server in front sets its own ``date``. The one of this test sets neither."""

    async def dated(scope: Scope, receive: Receive, send: Send) -> None:
        kind, data = (b"text/event-stream", chunk("a", "stop") + DONE) if path == CHAT else (b"", b"{}")
        headers = [(b"Date", b"yesterday"), (b"Server", b"nginx"), (b"content-type", kind), (b"x-other", b"1")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data})

    async with proxied(dated) as (_, client):
        headers = (await client.post(path, json=ask(stream=stream))).headers
    assert headers["x-other"] == "1"
    assert not {"date", "server"} & set(headers)


# --- a server that stops answering ------------------------------------------------------------------------------------

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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
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
        await eventually(lambda: engine.state.alive, within_s=20)
        paths = [CHAT, CHAT + "?silent=1", "/v1/messages", "/v1/embeddings"]
        calls = [asyncio.create_task(post(engine, path, stream=stream)) for path in paths for stream in (True, False)]
        await eventually(lambda: engine.state.engine_running == len(calls))
        await asyncio.sleep(1.5)
        assert not any(call.done() for call in calls), "a healthy server's requests go on"
        os.kill(pid, signal.SIGSTOP)
        began = time.monotonic()
        ends = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
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
        await eventually(lambda: engine.state.alive, within_s=20)
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
