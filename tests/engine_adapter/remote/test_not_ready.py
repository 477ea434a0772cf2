"""Servers that an `HttpEngine` finds down or refuses to start with, and the reason that it names."""

from __future__ import annotations

import asyncio
import logging

import pytest

from engine_adapter.engine import EngineEvents, EngineStartError, Receive, Scope, Send
from engine_adapter.remote.engine import HttpEngine
from tests.fixtures.live_server import eventually, serve
from tests.fixtures.ports import free_port
from tests.fixtures.scripted_server import Scripted, fast_probes, post

pytestmark = pytest.mark.process

LONG_RESPONSE_S = 30.0


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
    port = free_port()
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
    assert f"engine far is not ready, waiting for it: {engine.base_url}: {why}" in caplog.text


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
