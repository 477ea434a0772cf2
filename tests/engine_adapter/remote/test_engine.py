"""`HttpEngine`: requests and responses, token observation, and the loss of the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import pytest

from engine_adapter.engine import (
    EngineEvents,
    EngineLost,
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
from engine_adapter.step_time.linear_forms import StepTimes
from tests.fixtures.live_server import Recorder, eventually, observed, serve
from tests.fixtures.scripted_server import CHAT, TEXT, Scripted, ask, events, proxied

SIX_TOKENS = {"max_tokens": 6, "ignore_eos": True}


@pytest.fixture
async def simulated() -> AsyncIterator[SimulatedEngine]:
    engine = SimulatedEngine(times=StepTimes(b=0, d=2e-3, alpha=1e-5), restart_s=0.3)
    await engine.start(EngineEvents())
    yield engine
    await engine.stop()


def without_identity(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key not in ("id", "created")}


async def test_stream_passes_through_and_its_tokens_are_observed(simulated: SimulatedEngine) -> None:
    recorder = Recorder()
    async with proxied(simulated.app, recorder) as (_, client):
        response = await client.post(CHAT, json=ask(stream=True, **SIX_TOKENS))
    assert response.text.count("data: ") == 1 + 6 + 1
    assert response.text.endswith("data: [DONE]\n\n")
    assert recorder.count() == 6
    assert recorder.prompts == {"0": 3}
    times = [at for _, _, at in recorder.tokens]
    assert times == sorted(times)
    assert times[-1] > times[0]


@pytest.mark.parametrize("requested", [True, False])
async def test_client_gets_usage_chunk_only_if_requested(simulated: SimulatedEngine, requested: bool) -> None:
    recorder = Recorder()
    options = {"stream_options": {"include_usage": True}} if requested else {}
    async with proxied(simulated.app, recorder) as (_, client):
        response = await client.post(CHAT, json=ask(stream=True, vllm_xargs={"simulated_output_tokens": 5}, **options))
    assert ('"choices":[]' in response.text) is requested
    assert recorder.count() == 5, "the end-of-sequence token counts although its event is empty"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, ask()),
        (CHAT, ask(n=3, max_tokens=12)),
        (TEXT, {"prompt": ["a b", "c"], "max_tokens": 12}),
    ],
)
async def test_assembled_response_equals_the_upstream_response(
    simulated: SimulatedEngine, path: str, body: dict[str, Any]
) -> None:
    recorder = Recorder()
    async with proxied(simulated.app, recorder) as (_, client), serve(simulated.app) as direct:
        assembled = await client.post(path, json=body)
        original = await client.post(direct + path, json=body)
    assert assembled.headers["content-type"] == "application/json"
    assert without_identity(assembled.json()) == without_identity(original.json())
    assert sum(count for _, count, _ in recorder.tokens) == original.json()["usage"]["completion_tokens"]
    assert len({at for _, _, at in recorder.tokens}) > 2, "tokens are observed as they arrive"
    assert not recorder.unobserved


async def test_request_that_cannot_be_rebuilt_is_sent_unchanged() -> None:
    plain = orjson.dumps({"id": "1", "choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 7}})
    upstream, recorder = Scripted(lambda _: (200, b"application/json", plain)), Recorder()
    async with proxied(upstream, recorder) as (_, client):
        response = await client.post(TEXT, json={"prompt": "x", "best_of": 2})
    assert response.content == plain
    assert upstream.bodies == [{"prompt": "x", "best_of": 2}]
    assert [(name, count) for name, count, _ in recorder.tokens] == [("0", 7)], "all tokens are reported at the end"
    assert recorder.unobserved


async def test_first_token_none_requests_no_stream(simulated: SimulatedEngine) -> None:
    recorder = Recorder()
    async with proxied(simulated.app, recorder, first_token="none") as (_, client):
        response = await client.post(CHAT, json=ask(**SIX_TOKENS))
    assert response.json()["usage"]["completion_tokens"] == 6
    assert len(recorder.tokens) == 1


async def test_tool_calls_are_assembled_from_deltas() -> None:
    def call(arguments: str, finish: str | None = None, **more: Any) -> dict[str, Any]:
        delta = {"tool_calls": [{"index": 0, "function": {"arguments": arguments}, **more}]}
        return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    usage = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 12}}
    stream = events(call('{"a"', id="call_1", type="function"), call(":1}", "tool_calls"), usage)
    recorder = Recorder()
    async with proxied(Scripted(lambda _: (200, b"text/event-stream", stream)), recorder) as (_, client):
        body = (await client.post(CHAT, json=ask(tools=[{"type": "function"}]))).json()
    (assembled,) = body["choices"][0]["message"]["tool_calls"]
    assert assembled == {"function": {"arguments": '{"a":1}'}, "id": "call_1", "type": "function"}
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    assert body["object"] == "chat.completion"
    assert recorder.count() == 12, "the usage overrides the number of events"


async def test_stream_options_are_dropped_once_the_upstream_rejects_them() -> None:
    def answer(body: dict[str, Any]) -> tuple[int, bytes, bytes]:
        if "stream_options" in body:
            return 400, b"application/json", b'{"error": {"message": "unknown field stream_options"}}'
        chunk = {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": None}]}
        return 200, b"text/event-stream", events(chunk)

    upstream = Scripted(answer)
    async with proxied(upstream) as (_, client):
        responses = [await client.post(CHAT, json=ask(stream=True)) for _ in range(2)]
    assert [response.status_code for response in responses] == [200, 200]
    assert ["stream_options" in body for body in upstream.bodies] == [True, False, False]


@pytest.mark.parametrize("status", [400, 404, 422, 429, 500, 503])
@pytest.mark.parametrize("stream", [True, False])
async def test_upstream_errors_pass_through(status: int, stream: bool) -> None:
    error = b'{"error":{"message":"no"}}'
    upstream = Scripted(lambda _: (status, b"application/json", error))
    async with proxied(upstream) as (_, client):
        response = await client.post(CHAT, json=ask(stream=stream))
    assert (response.status_code, response.content) == (status, error)
    assert len(upstream.bodies) == 1


async def test_empty_5xx_means_engine_lost_except_503() -> None:
    upstream = Scripted(lambda body: (body["want"], b"text/plain", b""))
    async with serve(upstream) as url:
        engine = HttpEngine("remote", url)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
            with pytest.raises(EngineLost, match="502 with no body"):
                await client.post(CHAT, json=ask(want=502))
            assert (await client.post(CHAT, json=ask(want=503))).status_code == 503
        await engine.stop()


@pytest.mark.parametrize("stream", [True, False])
async def test_upstream_death_during_a_request_raises_engine_lost(simulated: SimulatedEngine, stream: bool) -> None:
    recorder = Recorder()
    async with serve(simulated.app) as url:
        engine = HttpEngine("remote", url)
        app = observed(engine.app, recorder)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://e") as client:
            call = asyncio.create_task(client.post(CHAT, json=ask(stream=stream, max_tokens=5000, ignore_eos=True)))
            await eventually(lambda: recorder.count() > 2)
            assert engine.state.engine_running == 1
            simulated.crash()
            with pytest.raises(EngineLost, match="remote"):
                await call
        assert engine.state.engine_running == 0
        await engine.stop()


async def test_missing_server_raises_engine_lost() -> None:
    engine = HttpEngine("remote", "http://127.0.0.1:9")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
        for path in (CHAT, "/v1/models"):
            with pytest.raises(EngineLost, match="connection refused"):
                await client.post(path, json=ask())
        await engine.stop()
        with pytest.raises(EngineLost, match="stopped"):
            await client.post(CHAT, json=ask())


@pytest.mark.parametrize("stream", [True, False])
async def test_stop_ends_requests_in_flight(simulated: SimulatedEngine, stream: bool) -> None:
    async with serve(simulated.app) as url:
        engine = HttpEngine("remote", url)
        await engine.start(EngineEvents())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
            call = asyncio.create_task(client.post(CHAT, json=ask(stream=stream, max_tokens=5000, ignore_eos=True)))
            await eventually(lambda: simulated.state.engine_running == 1)
            await engine.stop()
            await engine.stop()
            with pytest.raises(EngineLost):
                await call
        await eventually(lambda: simulated.state.engine_running == 0)


async def test_stop_ends_requests_that_wait_for_a_response() -> None:
    received = asyncio.Event()

    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        received.set()
        await receive()  # until the client disconnects

    async with serve(silent) as url:
        engine = HttpEngine("remote", url)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
            call = asyncio.create_task(client.post(CHAT, json=ask()))
            await received.wait()
            await engine.stop()
            with pytest.raises(EngineLost):
                await asyncio.wait_for(call, 5)


@pytest.mark.parametrize("stream", [True, False])
async def test_client_disconnect_frees_the_upstream(simulated: SimulatedEngine, stream: bool) -> None:
    async with proxied(simulated.app) as (engine, client):
        call = asyncio.create_task(client.post(CHAT, json=ask(stream=stream, max_tokens=5000, ignore_eos=True)))
        await eventually(lambda: simulated.state.engine_running == 1)
        call.cancel()
        await eventually(lambda: simulated.state.engine_running == 0, within_s=1)
        assert engine.state.engine_running == 0


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


@pytest.mark.process
async def test_step_times_are_learned_from_streams() -> None:
    steps: list[None] = []
    # Steps are long, because a busy machine is late by some milliseconds.
    slow = SimulatedEngine(times=StepTimes(b=0.0, d=0.012))
    await slow.start(EngineEvents())
    async with serve(slow.app) as url:
        engine = HttpEngine("remote", url)
        await engine.start(EngineEvents(on_step=lambda: steps.append(None)))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
            body = ask(stream=True, max_tokens=100, ignore_eos=True)
            await asyncio.gather(*(client.post(CHAT, json=body) for _ in range(3)))
            await client.post(CHAT, json=body | {"max_tokens": 40})
        await engine.stop()
    await slow.stop()
    model = engine.state.step_time
    assert 13 <= model.steps_seen == len(steps) <= 25, "one sample per 20 tokens, and one for the single prefill"
    model.refit()
    assert model.itl(3, 100) == pytest.approx(0.012, rel=0.5)


@pytest.mark.parametrize(("times", "resets"), [({"d": 0.1, "alpha": 1e-4}, True), ({"d": 0.001, "alpha": 1e-4}, False)])
async def test_probe_resets_step_times_only_if_the_initial_ones_are_faster(
    times: dict[str, float], resets: bool
) -> None:
    initial, learned = StepTimes(), StepTimes(**times)
    engine = HttpEngine("remote", "http://127.0.0.1:9", step_times=initial)
    engine.state.step_time.start_over(learned)
    await engine.probe()
    assert engine.state.step_time.times == (initial if resets else learned)


async def test_error_event_becomes_the_status_of_a_non_streaming_response() -> None:
    error = {"error": {"message": "engine died", "code": 500}}
    upstream = Scripted(lambda _: (200, b"text/event-stream", events(error)))
    async with proxied(upstream) as (_, client):
        response = await client.post(CHAT, json=ask())
        assert (response.status_code, response.json()["error"]["message"]) == (500, "engine died")
        assert "engine died" in (await client.post(CHAT, json=ask(stream=True))).text


async def test_truncated_stream_raises_engine_lost_for_a_non_streaming_request() -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": None}]}
    cut = events(chunk).removesuffix(b"data: [DONE]\n\n")
    async with serve(Scripted(lambda _: (200, b"text/event-stream", cut))) as url:
        engine = HttpEngine("remote", url)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
            with pytest.raises(EngineLost, match="ended before"):
                await client.post(CHAT, json=ask())
        await engine.stop()


async def test_eighty_requests_run_at_once(simulated: SimulatedEngine) -> None:
    async with serve(simulated.app) as url:
        engine = HttpEngine("remote", url)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
            calls = [
                asyncio.create_task(client.post(CHAT, json=ask(max_tokens=60, ignore_eos=True))) for _ in range(80)
            ]
            await eventually(lambda: simulated.state.engine_running == 80)
            assert all(response.status_code == 200 for response in await asyncio.gather(*calls))
        await engine.stop()
