"""`HttpEngine`: requests and responses, token observation, and the loss of the server."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import orjson
import pytest

from engine_adapter.engine import (
    EngineEvents,
    EngineLost,
    Receive,
    Scope,
    Send,
)
from engine_adapter.remote.engine import HttpEngine
from engine_adapter.simulated.engine import SimulatedEngine
from engine_adapter.step_time.linear_forms import StepTimes
from tests.fixtures.live_server import Recorder, eventually, observed, serve
from tests.fixtures.scripted_server import CHAT, TEXT, Scripted, ScriptedStream, ask, events, proxied

SIX_TOKENS = {"max_tokens": 6, "ignore_eos": True}


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


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "logprobs is not supported with tools + stream"),
        (400, "Unsupported value: 'stream' does not support true with this model."),
        (500, "Automatic streaming tool choice is not supported"),
    ],
)
async def test_request_that_the_upstream_does_not_stream_is_sent_as_it_was(status: int, message: str) -> None:
    document = (
        b'{"choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}]}'
    )

    def answer(body: dict[str, Any]) -> tuple[int, bytes, bytes]:
        error = orjson.dumps({"error": {"message": message}})
        return (status, b"application/json", error) if "stream" in body else (200, b"application/json", document)

    upstream, recorder = Scripted(answer), Recorder()
    async with proxied(upstream, recorder) as (_, client):
        plain = await client.post(CHAT, json=ask())
        streamed = await client.post(CHAT, json=ask(stream=True))
    assert (plain.status_code, plain.content) == (200, document)
    assert upstream.bodies[1] == ask()
    assert "stream_options" in upstream.bodies[2], "the server has not rejected these"
    assert (streamed.status_code, streamed.json()["error"]["message"]) == (status, message)


@pytest.mark.parametrize("status", [400, 404, 422, 429, 500, 503])
@pytest.mark.parametrize("stream", [True, False])
async def test_upstream_errors_pass_through(status: int, stream: bool) -> None:
    error = b'{"error":{"message":"no"}}' if status != 500 else b'{"error":{"message":"CUDA stream error"}}'
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
            # 500 may reject the stream that the engine asks for, and 502 does not.
            for status in (500, 502):
                with pytest.raises(EngineLost, match=f"{status} with no body"):
                    await client.post(CHAT, json=ask(want=status))
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
                await asyncio.wait_for(call, 30)


@pytest.mark.parametrize("stream", [True, False])
async def test_client_disconnect_frees_the_upstream(simulated: SimulatedEngine, stream: bool) -> None:
    async with proxied(simulated.app) as (engine, client):
        call = asyncio.create_task(client.post(CHAT, json=ask(stream=stream, max_tokens=5000, ignore_eos=True)))
        await eventually(lambda: simulated.state.engine_running == 1)
        call.cancel()
        await eventually(lambda: simulated.state.engine_running == 0, within_s=8)
        assert engine.state.engine_running == 0


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


@pytest.mark.parametrize("turns", range(4))
async def test_engine_stops_although_a_stream_broke_just_before(turns: int) -> None:
    async with serve(ScriptedStream(())) as url:
        engine = HttpEngine("remote", url)
        await engine.start(EngineEvents())
        # Until the next probe is waited for.
        await asyncio.sleep(0.05)
        engine._on_broken()
        for _ in range(turns):
            await asyncio.sleep(0)
        stopping = asyncio.create_task(engine.stop())
        done, _ = await asyncio.wait({stopping}, timeout=20)
        stopping.cancel()
        assert done
