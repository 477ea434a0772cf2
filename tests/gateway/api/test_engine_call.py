"""A client that leaves, or that has its response, frees the engine, whatever the engine's app does."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from engine_adapter.engine import OBSERVER_KEY, Receive, Scope, Send
from gateway.api import scheduled
from tests.fixtures.live_gateway import Live, StubbedEngine, chat, fast_engine, live
from tests.fixtures.live_server import eventually

BODY = orjson.dumps(chat(max_tokens=3000, ignore_eos=True))
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%b" % (len(BODY), BODY)
)


class SlowlyRenderingEngine(StubbedEngine):
    """A simulated engine that renders a prompt once it has been told to. `rendering` is set when one waits for that."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.rendering, self.may_render = asyncio.Event(), asyncio.Event()

    async def render(self, *arguments: Any, **options: Any) -> Any:
        self.rendering.set()
        await self.may_render.wait()
        return await super().render(*arguments, **options)


async def connect(antares: Live) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = antares.url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def test_request_of_a_client_that_leaves_while_its_prompt_is_measured_never_reaches_the_engine() -> None:
    engine = SlowlyRenderingEngine(times=fast_engine().state.step_time.times, output_tokens=3000, restart_s=0.3)
    async with live(engine) as antares:
        received = antares.record_bodies()
        _, writer = await connect(antares)
        writer.write(REQUEST)
        await writer.drain()
        await engine.rendering.wait()
        writer.transport.abort()
        await eventually(lambda: not antares.gateway.connections)
        engine.may_render.set()
        await eventually(lambda: antares.outcomes["cancelled"] == 1 and antares.is_idle())
        assert not received


async def answer(scope: Scope, send: Send) -> None:
    observer = scope.get(OBSERVER_KEY)
    if observer is not None:
        observer.on_prompt("0", 3)
        observer.on_tokens("0", 1, asyncio.get_running_loop().time())
    headers = [(b"content-type", b"application/json"), (b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"{}"})


async def lingering(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that does not return after its response."""
    await receive()
    await answer(scope, send)
    await asyncio.sleep(60)


async def listening(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that waits for the disconnect after its response, as ASGI allows."""
    await receive()
    await answer(scope, send)
    while (await receive())["type"] != "http.disconnect":
        pass


@pytest.mark.parametrize(
    ("app", "path"),
    [(lingering, "/v1/chat/completions"), (listening, "/v1/chat/completions"), (listening, "/v1/embeddings")],
)
async def test_request_ends_with_its_response(app: Any, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduled, "LEAVE_GRACE_S", 0.05)
    async with live() as antares:
        antares.engine.stub = app
        body = chat() if "chat" in path else {"model": "simulated", "input": "a"}
        # The connection stays open.
        assert (await antares.http.post(path, json=body)).status_code == 200
        await eventually(lambda: antares.gateway.proxy.in_flight == 0)
        assert antares.gateway.proxy.open_requests.used == 0


async def swallowing(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that catches its cancellation and returns."""
    await receive()
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        return


async def test_shutdown_answers_a_request_whose_app_swallows_its_cancellation() -> None:
    async with live() as antares:
        antares.engine.stub = swallowing
        asking = asyncio.create_task(antares.http.post("/v1/chat/completions", json=chat()))
        await eventually(lambda: antares.gateway.engine_queues[0].running)
        antares.gateway.proxy.stopping = True
        await antares.gateway.proxy.cut()
        response = await asking
        assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
        assert antares.outcomes["cancelled"] == 1
        antares.gateway.proxy.stopping = False
