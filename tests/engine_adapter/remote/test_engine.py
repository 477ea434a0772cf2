"""A remote server as an engine: what it is asked, what is seen of its tokens, and what happens when it is gone."""

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
from engine_adapter.remote import engine as http_engine_module
from engine_adapter.remote.engine import HttpEngine
from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.step_time.linear_forms import StepTimes
from tests.fixtures.live_server import Recorder, eventually, observed, serve
from tests.fixtures.scripted_server import CHAT, TEXT, Scripted, ask, events, proxied

WHOLE = {"max_tokens": 6, "ignore_eos": True}


@pytest.fixture
async def simulated() -> AsyncIterator[SimulatedEngine]:
    engine = SimulatedEngine(times=StepTimes(b=0, d=2e-3, alpha=1e-5), restart_s=0.3)
    await engine.start(EngineEvents())
    yield engine
    await engine.stop()


def without_identity(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key not in ("id", "created")}


async def test_a_stream_passes_through_and_its_tokens_are_seen(simulated: SimulatedEngine) -> None:
    recorder = Recorder()
    async with proxied(simulated.app, recorder) as (_, client):
        response = await client.post(CHAT, json=ask(stream=True, **WHOLE))
    assert response.text.count("data: ") == 1 + 6 + 1
    assert response.text.endswith("data: [DONE]\n\n")
    assert recorder.count() == 6
    assert recorder.prompts == {"0": 3}
    times = [at for _, _, at in recorder.tokens]
    assert times == sorted(times)
    assert times[-1] > times[0]


@pytest.mark.parametrize("asked", [True, False])
async def test_the_client_sees_the_usage_chunk_exactly_when_it_asked(simulated: SimulatedEngine, asked: bool) -> None:
    recorder = Recorder()
    options = {"stream_options": {"include_usage": True}} if asked else {}
    async with proxied(simulated.app, recorder) as (_, client):
        response = await client.post(CHAT, json=ask(stream=True, vllm_xargs={"simulated_output_tokens": 5}, **options))
    assert ('"choices":[]' in response.text) is asked
    assert recorder.count() == 5, "the end-of-sequence token is one, though its event is empty"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, ask()),
        (CHAT, ask(n=3, max_tokens=4)),
        (TEXT, {"prompt": ["a b", "c"], "max_tokens": 5}),
    ],
)
async def test_the_assembled_answer_equals_the_upstreams_own(
    simulated: SimulatedEngine, path: str, body: dict[str, Any]
) -> None:
    recorder = Recorder()
    async with proxied(simulated.app, recorder) as (_, client), serve(simulated.app) as direct:
        through = await client.post(path, json=body)
        own = await client.post(direct + path, json=body)
    assert through.headers["content-type"] == "application/json"
    assert without_identity(through.json()) == without_identity(own.json())
    assert sum(count for _, count, _ in recorder.tokens) == own.json()["usage"]["completion_tokens"]
    assert len({at for _, _, at in recorder.tokens}) > 2, "the tokens were seen as they came"
    assert not recorder.unobserved


async def test_a_request_that_cannot_be_rebuilt_goes_as_it_is() -> None:
    plain = orjson.dumps({"id": "1", "choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 7}})
    upstream, recorder = Scripted(lambda _: (200, b"application/json", plain)), Recorder()
    async with proxied(upstream, recorder) as (_, client):
        response = await client.post(TEXT, json={"prompt": "x", "best_of": 2})
    assert response.content == plain
    assert upstream.bodies == [{"prompt": "x", "best_of": 2}]
    assert [(name, count) for name, count, _ in recorder.tokens] == [("0", 7)], "told at the end, all at once"
    assert recorder.unobserved


async def test_first_token_none_never_asks_for_a_stream(simulated: SimulatedEngine) -> None:
    recorder = Recorder()
    async with proxied(simulated.app, recorder, first_token="none") as (_, client):
        response = await client.post(CHAT, json=ask(**WHOLE))
    assert response.json()["usage"]["completion_tokens"] == 6
    assert len(recorder.tokens) == 1


async def test_tool_calls_are_assembled_from_their_pieces() -> None:
    def call(arguments: str, finish: str | None = None, **more: Any) -> dict[str, Any]:
        delta = {"tool_calls": [{"index": 0, "function": {"arguments": arguments}, **more}]}
        return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    usage = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 12}}
    stream = events(call('{"a"', id="call_1", type="function"), call(":1}", "tool_calls"), usage)
    recorder = Recorder()
    async with proxied(Scripted(lambda _: (200, b"text/event-stream", stream)), recorder) as (_, client):
        body = (await client.post(CHAT, json=ask(tools=[{"type": "function"}]))).json()
    (made,) = body["choices"][0]["message"]["tool_calls"]
    assert made == {"function": {"arguments": '{"a":1}'}, "id": "call_1", "type": "function"}
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    assert body["object"] == "chat.completion"
    assert recorder.count() == 12, "the usage knows better than the number of events"


async def test_an_upstream_that_refuses_stream_options_is_asked_without_and_remembered() -> None:
    def answer(body: dict[str, Any]) -> tuple[int, bytes, bytes]:
        if "stream_options" in body:
            return 400, b"application/json", b'{"error": {"message": "unknown field stream_options"}}'
        chunk = {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": None}]}
        return 200, b"text/event-stream", events(chunk)

    upstream = Scripted(answer)
    async with proxied(upstream) as (_, client):
        answers = [await client.post(CHAT, json=ask(stream=True)) for _ in range(2)]
    assert [a.status_code for a in answers] == [200, 200]
    assert ["stream_options" in body for body in upstream.bodies] == [True, False, False]


@pytest.mark.parametrize("status", [400, 404, 422, 429, 500, 503])
@pytest.mark.parametrize("stream", [True, False])
async def test_the_upstreams_errors_pass_through(status: int, stream: bool) -> None:
    error = b'{"error":{"message":"no"}}'
    upstream = Scripted(lambda _: (status, b"application/json", error))
    async with proxied(upstream) as (_, client):
        response = await client.post(CHAT, json=ask(stream=stream))
    assert (response.status_code, response.content) == (status, error)
    assert len(upstream.bodies) == 1


async def test_an_empty_5xx_is_a_lost_engine_but_an_empty_503_is_not() -> None:
    upstream = Scripted(lambda body: (body["want"], b"text/plain", b""))
    async with serve(upstream) as url:
        engine = HttpEngine("remote", url)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
            with pytest.raises(EngineLost, match="502 with no body"):
                await client.post(CHAT, json=ask(want=502))
            assert (await client.post(CHAT, json=ask(want=503))).status_code == 503
        await engine.stop()


@pytest.mark.parametrize("stream", [True, False])
async def test_an_upstream_that_dies_midway_is_lost(simulated: SimulatedEngine, stream: bool) -> None:
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


async def test_nothing_listening_is_a_lost_engine() -> None:
    engine = HttpEngine("remote", "http://127.0.0.1:9")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
        for path in (CHAT, "/v1/models"):
            with pytest.raises(EngineLost, match="Cannot connect"):
                await client.post(path, json=ask())
        await engine.stop()
        with pytest.raises(EngineLost, match="stopped"):
            await client.post(CHAT, json=ask())


@pytest.mark.parametrize("stream", [True, False])
async def test_stopping_the_engine_loses_what_is_in_flight(simulated: SimulatedEngine, stream: bool) -> None:
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


async def test_stopping_the_engine_loses_what_still_waits_for_an_answer() -> None:
    asked = asyncio.Event()

    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        asked.set()
        await receive()  # until the connection is gone

    async with serve(silent) as url:
        engine = HttpEngine("remote", url)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
            call = asyncio.create_task(client.post(CHAT, json=ask()))
            await asked.wait()
            await engine.stop()
            with pytest.raises(EngineLost):
                await asyncio.wait_for(call, 5)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_the_upstream(simulated: SimulatedEngine, stream: bool) -> None:
    async with proxied(simulated.app) as (engine, client):
        call = asyncio.create_task(client.post(CHAT, json=ask(stream=stream, max_tokens=5000, ignore_eos=True)))
        await eventually(lambda: simulated.state.engine_running == 1)
        call.cancel()
        await eventually(lambda: simulated.state.engine_running == 0, within_s=1)
        assert engine.state.engine_running == 0


async def test_the_engine_notices_that_its_server_went_and_came_back(simulated: SimulatedEngine) -> None:
    alive: list[bool] = []
    async with serve(simulated.app) as url:
        engine = HttpEngine("remote", url)
        await engine.start(EngineEvents(on_alive=alive.append))
        assert engine.state.alive
        simulated.crash()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
            assert (await client.get("/v1/models")).status_code == 500
        engine._probe_now.set()
        await eventually(lambda: not engine.state.alive)
        await eventually(lambda: engine.state.alive)
        await engine.stop()
    assert alive == [True, False, True]


async def test_a_server_to_which_no_connection_comes_about_is_dead_at_once(simulated: SimulatedEngine) -> None:
    alive: list[bool] = []
    async with serve(simulated.app) as url:
        engine = HttpEngine("remote", url)
        await engine.start(EngineEvents(on_alive=alive.append))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
        for _ in range(2):
            with pytest.raises(EngineUnreachable):
                await client.post(CHAT, json=ask())
            assert alive == [True, False], "before whoever asked can ask again"
    await engine.stop()


async def test_a_server_that_was_gone_for_a_moment_is_back_at_once(
    simulated: SimulatedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_engine_module, "PROBE_EVERY_S", 60.0)
    monkeypatch.setattr(http_engine_module, "PROBE_AGAIN_S", (60.0,))
    async with proxied(simulated.app) as (engine, client):
        engine._note_death()
        assert not engine.state.alive
        await eventually(lambda: engine.state.alive)
        assert (await client.post(CHAT, json=ask(max_tokens=1))).status_code == 200


async def test_a_server_as_busy_as_may_be_is_not_taken_for_dead(simulated: SimulatedEngine) -> None:
    async with proxied(simulated.app, max_connections=3, connect_timeout_s=2) as (engine, client):
        endless = ask(stream=True, max_tokens=5000, ignore_eos=True)
        calls = [asyncio.create_task(client.post(CHAT, json=endless)) for _ in range(4)]
        await eventually(lambda: engine.state.engine_running == 4 and simulated.state.engine_running == 3)
        await engine._probe()
        assert engine.state.alive
        assert simulated.state.engine_running == 3, "the fourth still waits for a connection"
        for call in calls:
            call.cancel()


async def test_every_probe_asks_for_a_new_connection(simulated: SimulatedEngine) -> None:
    peers: list[Any] = []

    async def noting(scope: Scope, receive: Receive, send: Send) -> None:
        peers.append(scope["client"])
        await simulated.app(scope, receive, send)

    async with proxied(noting) as (engine, _):
        peers.clear()
        for _ in range(3):
            await engine._probe()
    assert len(set(peers)) == len(peers) == 3


async def test_a_server_without_health_is_probed_by_its_models() -> None:
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
        assert not engine.takes_xargs, "it may not know the field"


@pytest.mark.parametrize("send_slo", [True, False])
async def test_only_a_server_that_knows_them_and_may_see_the_slo_is_given_xargs(
    simulated: SimulatedEngine, send_slo: bool
) -> None:
    async with proxied(simulated.app, send_slo=send_slo) as (engine, _):
        assert engine.takes_xargs is send_slo


async def test_a_refused_key_stops_the_start_and_an_absent_server_does_not() -> None:
    async def refuses(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with serve(refuses) as url:
        with pytest.raises(EngineStartError, match="api_key"):
            await HttpEngine("remote", url).start(EngineEvents())
    absent = HttpEngine("remote", "http://127.0.0.1:9")
    await absent.start(EngineEvents())
    assert not absent.state.alive
    await absent.stop()


def test_a_base_url_must_be_one() -> None:
    with pytest.raises(ValueError, match="http://host:8000"):
        HttpEngine("remote", "localhost:8000")


async def test_step_times_are_learnt_from_the_streams() -> None:
    steps: list[None] = []
    # Long steps: a busy machine is late by some milliseconds.
    slow = SimulatedEngine(times=StepTimes(b=0.0, d=0.012))
    await slow.start(EngineEvents())
    async with serve(slow.app) as url:
        engine = HttpEngine("remote", url)
        await engine.start(EngineEvents(on_step=lambda: steps.append(None)))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
            asked = ask(stream=True, max_tokens=100, ignore_eos=True)
            await asyncio.gather(*(client.post(CHAT, json=asked) for _ in range(3)))
            await client.post(CHAT, json=asked | {"max_tokens": 40})
        await engine.stop()
    await slow.stop()
    model = engine.state.step_time
    assert 13 <= model.steps_seen == len(steps) <= 25, "one sample in twenty tokens, and one for the lone prefill"
    model.refit()
    assert model.itl(3, 100) == pytest.approx(0.012, rel=0.5)


@pytest.mark.parametrize(
    ("took_s", "starts_over"), [({"d": 0.1, "alpha": 1e-4}, True), ({"d": 0.001, "alpha": 1e-4}, False)]
)
async def test_an_engine_that_refuses_goes_back_to_its_first_guess_where_that_refuses_less(
    took_s: dict[str, float], starts_over: bool
) -> None:
    engine = HttpEngine("remote", "http://127.0.0.1:9", step_times=StepTimes())
    learnt = StepTimes(**took_s)
    engine.state.step_time.start_over(learnt)
    await engine.probe()
    assert engine.state.step_time.times == (StepTimes() if starts_over else learnt)


async def test_an_error_inside_a_stream_becomes_the_status_of_a_plain_answer() -> None:
    error = {"error": {"message": "engine died", "code": 500}}
    upstream = Scripted(lambda _: (200, b"text/event-stream", events(error)))
    async with proxied(upstream) as (_, client):
        response = await client.post(CHAT, json=ask())
        assert (response.status_code, response.json()["error"]["message"]) == (500, "engine died")
        assert "engine died" in (await client.post(CHAT, json=ask(stream=True))).text


async def test_a_stream_that_ends_too_early_is_a_lost_engine_for_a_plain_request() -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": None}]}
    cut = events(chunk).removesuffix(b"data: [DONE]\n\n")
    async with serve(Scripted(lambda _: (200, b"text/event-stream", cut))) as url:
        engine = HttpEngine("remote", url)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
            with pytest.raises(EngineLost, match="ended before"):
                await client.post(CHAT, json=ask())
        await engine.stop()


async def test_more_requests_than_one_pool_holds_are_served_at_once(simulated: SimulatedEngine) -> None:
    async with serve(simulated.app) as url:
        engine = HttpEngine("remote", url)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(engine.app), base_url="http://e") as client:
            calls = [
                asyncio.create_task(client.post(CHAT, json=ask(max_tokens=60, ignore_eos=True))) for _ in range(80)
            ]
            await eventually(lambda: simulated.state.engine_running == 80)
            assert all(answer.status_code == 200 for answer in await asyncio.gather(*calls))
        await engine.stop()
