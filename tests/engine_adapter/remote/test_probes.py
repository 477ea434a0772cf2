"""How an `HttpEngine` finds its server up or down, and what it refuses to start with."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from engine_adapter.engine import (
    EngineEvents,
    EngineStartError,
    EngineUnreachable,
    Receive,
    Scope,
    Send,
)
from engine_adapter.remote import engine as engine_module
from engine_adapter.remote.client import Upstream
from engine_adapter.remote.engine import HttpEngine
from engine_adapter.remote.response import Response
from engine_adapter.simulated.engine import SimulatedEngine
from tests.fixtures.live_server import eventually, serve
from tests.fixtures.scripted_server import CHAT, ask, proxied

SIX_TOKENS = {"max_tokens": 6, "ignore_eos": True}


async def test_health_probe_detects_server_down_and_up_again(
    simulated: SimulatedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PROBE_EVERY_S", 0.02)
    alive: list[bool] = []
    async with serve(simulated.app) as url:
        engine = HttpEngine("remote", url)
        await engine.start(EngineEvents(on_alive=alive.append))
        assert engine.state.alive
        simulated.crash()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
            assert (await client.get("/v1/models")).status_code == 500
        await eventually(lambda: not engine.state.alive)
        await eventually(lambda: engine.state.alive)
        await engine.stop()
    assert alive == [True, False, True]


async def test_failed_connection_marks_the_server_down_at_once(simulated: SimulatedEngine) -> None:
    alive: list[bool] = []
    async with serve(simulated.app) as url:
        engine = HttpEngine("remote", url)
        await engine.start(EngineEvents(on_alive=alive.append))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
        for _ in range(2):
            with pytest.raises(EngineUnreachable):
                await client.post(CHAT, json=ask())
            assert alive == [True, False], "down before the caller can retry"
    await engine.stop()


async def test_server_is_up_again_at_once_after_a_momentary_outage(
    simulated: SimulatedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PROBE_EVERY_S", 60.0)
    monkeypatch.setattr(engine_module, "PROBE_AGAIN_S", (60.0,))
    send, refused = Upstream.send, []

    async def refuse_first_post(upstream: Upstream, method: str, *arguments: Any) -> Response:
        if method == "POST" and not refused:
            refused.append(method)
            raise EngineUnreachable("connection refused")
        return await send(upstream, method, *arguments)

    monkeypatch.setattr(Upstream, "send", refuse_first_post)
    async with serve(simulated.app) as url:
        engine = HttpEngine("remote", url)
        await engine.start(EngineEvents())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
            with pytest.raises(EngineUnreachable):
                await client.post(CHAT, json=ask())
            assert not engine.state.alive
            await eventually(lambda: engine.state.alive)
            assert (await client.post(CHAT, json=ask(max_tokens=1))).status_code == 200
        await engine.stop()


class ProbeLog:
    """An ASGI app in front of ``engine`` that records the client address of each health probe."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self.engine = engine
        self.peers: list[Any] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/health":
            self.peers.append(scope["client"])
        await self.engine.app(scope, receive, send)


async def test_busy_server_is_not_reported_dead(simulated: SimulatedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "PROBE_EVERY_S", 0.02)
    app, alive = ProbeLog(simulated), []
    async with serve(app) as url:
        engine = HttpEngine("remote", url, max_connections=3, connect_timeout_s=2)
        await engine.start(EngineEvents(on_alive=alive.append))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
            endless = ask(stream=True, max_tokens=5000, ignore_eos=True)
            calls = [asyncio.create_task(client.post(CHAT, json=endless)) for _ in range(4)]
            await eventually(lambda: simulated.state.engine_running == 2)
            assert (engine.state.engine_running, engine.state.engine_waiting) == (2, 2)
            probes = len(app.peers)
            await eventually(lambda: len(app.peers) >= probes + 3)
            assert simulated.state.engine_running == 2, "the third request still waits for a connection"
            assert (await client.get("/v1/models")).status_code == 200, "one connection is kept for other routes"
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        await engine.stop()
    assert alive == [True]


async def test_each_probe_uses_a_new_connection(simulated: SimulatedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "PROBE_EVERY_S", 0.02)
    app = ProbeLog(simulated)
    async with proxied(app):
        await eventually(lambda: len(app.peers) >= 3)
    assert len(set(app.peers)) == len(app.peers)


async def test_server_without_health_route_is_probed_by_its_models() -> None:
    async def only_models(scope: Scope, receive: Receive, send: Send) -> None:
        status, data = (
            (200, b'{"data":[{"id":"m","max_model_len":777}]}') if scope["path"] == "/v1/models" else (404, b"no")
        )
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": data})

    async with proxied(only_models) as (engine, _):
        assert engine.state.alive
        assert engine.state.max_model_len == 777
        assert engine.state.model == "m"
        assert not engine.takes_xargs, "the server may not support the field"


@pytest.mark.parametrize("status", [404, 405, 501])
async def test_server_with_neither_health_nor_models_is_up_if_its_models_are_configured(status: int) -> None:
    async def only_chats(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b'{"detail":"no"}'})

    async with proxied(only_chats, models=["m"]) as (engine, _):
        assert engine.state.alive
        assert engine.state.model == "m"
    async with proxied(only_chats) as (engine, _):
        assert not engine.state.alive, "nothing says which models it serves"


async def test_server_that_loses_its_health_route_is_down_although_its_models_are_configured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A load balancer answers 404 while the server behind it is gone."""
    monkeypatch.setattr(engine_module, "PROBE_EVERY_S", 0.03)
    status = 200

    async def behind_a_balancer(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async with proxied(behind_a_balancer, models=["m"]) as (engine, _):
        assert engine.state.alive
        status = 404
        await eventually(lambda: not engine.state.alive)


@pytest.mark.parametrize("send_slo", [True, False])
async def test_engine_takes_xargs_only_if_the_slo_is_sent(simulated: SimulatedEngine, send_slo: bool) -> None:
    async with proxied(simulated.app, send_slo=send_slo) as (engine, _):
        assert engine.takes_xargs is send_slo


async def test_start_fails_for_a_rejected_key_but_not_for_a_missing_server() -> None:
    async def unauthorized(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with serve(unauthorized) as url:
        with pytest.raises(EngineStartError, match="api_key"):
            await HttpEngine("remote", url).start(EngineEvents())
    engine = HttpEngine("remote", "http://127.0.0.1:9")
    await engine.start(EngineEvents())
    assert not engine.state.alive
    await engine.stop()


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "",
        "http://",
        "http:h",
        "//h",
        "ftp://h",
        "http://h:x",
        "http://h:99999",
        "http://[::1",
        "http://h\\x",
    ],
)
def test_base_url_must_be_http(url: str) -> None:
    with pytest.raises(ValueError, match="http://host:8000"):
        HttpEngine("remote", url)
