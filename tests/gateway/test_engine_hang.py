"""A hung engine: it computes no step until its watchdog restarts it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import orjson
import pytest
from starlette.responses import JSONResponse, StreamingResponse

from engine_adapter.engine import EngineEvents, Receive, Scope, Send
from engine_adapter.remote import engine as remote_engine
from engine_adapter.remote import step_samples
from engine_adapter.remote.engine import HttpEngine
from engine_adapter.step_time.linear_forms import StepTimes
from tests.fixtures.live_gateway import Live, chat, events, fast_engine, live
from tests.fixtures.live_server import eventually, serve

STEADY = StepTimes(d=0.01)
LONG = {"max_tokens": 500, "ignore_eos": True}


async def running(antares: Live, stream: bool) -> asyncio.Task[httpx.Response]:
    """A long request that has a token."""
    task = asyncio.create_task(antares.ask(chat(stream=stream, **LONG), x_slo_class="free"))
    admitted = antares.gateway.engine_queues[0].running
    await eventually(lambda: admitted and all(request.generated for request in admitted.values()))
    return task


async def test_requests_on_a_hung_engine_end_with_one_error() -> None:
    async with live(fast_engine(times=STEADY)) as antares:
        stream, plain = await running(antares, True), await running(antares, False)
        antares.engine.hang(noticed_in_s=0.3)
        answers = await asyncio.gather(stream, plain)
        assert [event["error"]["code"] for event in events(answers[0].text) if "error" in event] == ["engine_lost"]
        assert answers[0].text.endswith("data: [DONE]\n\n")
        assert (answers[1].status_code, answers[1].json()["error"]["code"]) == (503, "engine_lost")
        await eventually(antares.is_idle)
        assert antares.outcomes["failed"] == 2
        metrics = (await antares.http.get("/metrics")).text
        assert 'antares_engine_hangs_total{engine="simulated"} 1.0' in metrics


async def test_request_that_waits_for_a_hung_engine_is_served_after_its_restart() -> None:
    async with live(fast_engine(times=STEADY, max_num_seqs=1)) as antares:
        lost = await running(antares, False)
        waiting = asyncio.create_task(antares.ask(x_slo_class="free"))
        await eventually(lambda: antares.gateway.engine_queues[0].waiting)
        antares.engine.hang(noticed_in_s=0.3)
        assert (await waiting).status_code == 200
        assert (await lost).status_code == 503
        assert (antares.engine.state.hangs, antares.engine.state.restarts) == (1, 1)


async def test_request_that_waits_for_a_hung_engine_is_answered_by_its_deadline() -> None:
    async with live(fast_engine(times=STEADY, max_num_seqs=1, restart_s=30)) as antares:
        lost = await running(antares, False)
        antares.engine.hang(noticed_in_s=3)
        late = await antares.ask(x_slo_ttft_ms="800", x_slo_tpot_ms="1000")
        assert late.status_code in (429, 503)
        assert antares.engine.state.alive, "answered before anything noticed the hang"
        await lost


async def test_request_that_waits_for_a_hung_engine_moves_to_another_one() -> None:
    first, second = fast_engine(name="a", times=STEADY, max_num_seqs=1, restart_s=30), fast_engine(name="b")
    async with live(first, more_engines=[second]) as antares:
        second.crash()
        lost = await running(antares, False)
        waiting = asyncio.create_task(antares.ask(x_slo_class="free"))
        await eventually(lambda: antares.gateway.engine_queues[0].waiting)
        first.hang(noticed_in_s=0.8)
        answers = await asyncio.gather(waiting, lost)
        assert {answer.status_code for answer in answers} == {200}
        assert second.state.alive


async def test_server_that_holds_a_tool_call_back_until_it_is_complete_does_not_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ollama and others send a tool call as one event. Nothing comes while they generate it."""
    monkeypatch.setattr(step_samples, "SILENCE_S", 0.2)
    monkeypatch.setattr(remote_engine, "PROBE_EVERY_S", 0.05)
    call = {"index": 0, "id": "call-1", "type": "function", "function": {"name": "write", "arguments": "{}"}}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "GET":
            await JSONResponse({"data": [{"id": "simulated"}]})(scope, receive, send)
        else:
            await StreamingResponse(_events(), media_type="text/event-stream")(scope, receive, send)

    async def _events() -> AsyncIterator[bytes]:
        delta = {"role": "assistant", "content": "I write."}
        yield b"data: " + orjson.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}) + b"\n\n"
        await asyncio.sleep(1.0)
        choice = {"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": "tool_calls"}
        yield b"data: " + orjson.dumps({"choices": [choice]}) + b"\n\ndata: [DONE]\n\n"

    tools = [{"type": "function", "function": {"name": "write", "parameters": {"type": "object"}}}]
    async with serve(app) as url, live(HttpEngine("remote", url)) as antares:
        # Without tools, a server has no reason to be silent.
        assert (await antares.ask(chat())).status_code == 503
        streamed, whole = await asyncio.gather(
            antares.ask(chat(stream=True, tools=tools)), antares.ask(chat(tools=tools))
        )
        assert (streamed.status_code, whole.status_code) == (200, 200)
        assert events(streamed.text)[-1]["choices"][0]["delta"]["tool_calls"] == [call]
        assert whole.json()["choices"][0]["message"]["tool_calls"][0]["id"] == "call-1"
        assert antares.engine.state.hangs == 1, "that of the request without tools"


async def test_stream_of_a_server_that_answers_probes_and_sends_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_samples, "SILENCE_S", 0.4)
    monkeypatch.setattr(remote_engine, "PROBE_EVERY_S", 0.1)
    simulated = fast_engine(times=STEADY)
    await simulated.start(EngineEvents())
    try:
        async with serve(simulated.app) as url, live(HttpEngine("remote", url)) as antares:
            begun, second = [asyncio.create_task(antares.ask(chat(stream=s, **LONG))) for s in (True, False)]
            await eventually(lambda: simulated.state.engine_running == 2)
            await asyncio.sleep(0.6)
            assert antares.engine.state.hangs == 0
            simulated.hang(noticed_in_s=60)
            async with asyncio.timeout(30):
                answer = await begun
            assert events(answer.text)[-1]["error"]["code"] == "engine_lost"
            assert (await second).status_code == 503
            assert antares.engine.state.hangs == 1
    finally:
        await simulated.stop()
